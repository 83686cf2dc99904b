"""SasView's and NIST's 2D text: columns Qx, Qy, I, and perhaps the error of I and the shadow of the beam stop."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from hpc.errors import UserError
from nanodist.scattering.raw import MAX_PIXELS, Raw

_BYTES_A_LINE = 160
_INV_A = 10.0


def read_ascii(path: Path) -> Raw:
    """A pattern as text, q in 1/A, one line a pixel, row by row.

    Raises:
        UserError: no such columns, or rows of different lengths.
    """
    if path.stat().st_size > MAX_PIXELS // 8 * _BYTES_A_LINE:
        raise UserError(f"{path} is too long for the text of a pattern: write it as NXcanSAS")
    names, table = _table(path)
    # The axis that runs along a row goes back at the end of each.
    fast = 0 if abs(table[1, 0] - table[0, 0]) > abs(table[1, 1] - table[0, 1]) else 1
    step = np.diff(table[:, fast])
    back = np.flatnonzero(np.sign(step) == -np.sign(step[0]))
    width = int(back[0]) + 1 if len(back) else len(table)
    if width < 2 or len(table) % width or not np.array_equal(back, np.arange(width - 1, len(table) - 1, width)):
        raise UserError(f"{path} has {len(table)} points in rows of different lengths: write it as NXcanSAS")
    planes = table.reshape(-1, width, table.shape[1])
    if fast == 1:
        planes = planes.transpose(1, 0, 2)
    # As displayed: q_x to the right, q_y up.
    planes = planes[
        :: -1 if planes[0, 0, 1] < planes[-1, 0, 1] else 1, :: -1 if planes[0, 0, 0] > planes[0, -1, 0] else 1
    ]
    q_x, q_y, values = planes[..., 0] * _INV_A, planes[..., 1] * _INV_A, planes[..., 2].copy()
    raw = Raw(values, q_planes=(q_y, q_x), metadata={"format": "2D text"})
    if "err" in names or (not names and table.shape[1] == 4):
        raw.sigma = planes[..., names.index("err") if names else 3].copy()
        raw.kind = "reduced"
    if "fsubs" in names and (planes[..., names.index("fsubs")] > 0).any():
        raw.measured = planes[..., names.index("fsubs")] > 0
    return raw


def _table(path: Path) -> tuple[list[str], np.ndarray]:
    """The names of the columns where a line has them (qx, qy, i, err, qz, ..., fsubs), and the numbers."""
    names: list[str] = []
    rows: list[list[float]] = []
    for line in path.read_text(errors="replace").splitlines():
        words = line.replace(",", " ").split()
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            # A header may hold lines of numbers between its words: what comes after the last of these is the table.
            rows = []
            if "qx" in line.lower() and " - " in line:
                names = [_column(part) for part in line[line.lower().index("qx") :].split(" - ")]
            continue
        if len(numbers) >= 3:
            rows.append(numbers)
    widths = {len(row) for row in rows}
    if len(rows) < 4 or len(widths) != 1:
        raise UserError(f"{path} has no table of Qx, Qy, I: write SasView's 2D text, or NXcanSAS")
    width = widths.pop()
    return (names if len(names) == width else []), np.array(rows)


def _column(text: str) -> str:
    name = re.split(r"[^a-z]", text.strip().lower())[0]
    return {"sigmai": "err", "di": "err", "error": "err"}.get(name, name)
