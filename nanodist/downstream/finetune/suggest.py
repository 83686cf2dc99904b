"""Which micrographs are worth labelling next, by a fine-tuned classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from hpc import atomic
from hpc.tables import csv_text
from nanodist.downstream.finetune.load import Loaded
from nanodist.downstream.finetune.predict import SHOWN_PX, Prediction, predict_one, read_each
from nanodist.downstream.neighbours import unit_rows
from nanodist.shards.sheet import draw_sheet

F64 = npt.NDArray[np.float64]
TABLE, SHEET, REPORT = "suggested.csv", "suggested.png", "report.json"
COLUMNS = ("rank", "file", "page", "predicted", "probability", "uncertainty", "distance", "unlike_training")


def uncertainty(probabilities: F64) -> F64:
    """(n,) one less the margin between the two likeliest classes of (n, classes): 1 where they tie, 0 where sure."""
    best = -np.sort(-probabilities, axis=1)[:, :2]
    return np.asarray(1.0 - (best[:, 0] - best[:, 1]))


def choose(unsure: F64, features: F64, known: F64 | None, count: int) -> list[tuple[int, float]]:
    """Which of n micrographs to label, best first, and how far each is from all labelled and chosen ones.

    Each next one has the largest product of uncertainty and cosine distance to the nearest that is labelled or chosen
    already, so that look-alikes are not labelled twice. (Margin sampling, Scheffer et al. 2001, with the distances of
    a core set, Sener and Savarese, ICLR 2018.)

    Args:
        unsure: (n,) see :func:`uncertainty`.
        features: (n, d).
        known: (m, d) of what is labelled, of length 1; ``None`` where that is not kept.
        count: how many, at most n.
    """
    rows = unit_rows(features)
    distance = np.full(len(rows), 2.0)
    if known is not None and len(known):
        distance = np.clip(1.0 - (rows @ known.T).max(1), 0.0, 2.0)
    left = np.ones(len(rows), bool)
    chosen: list[tuple[int, float]] = []
    for _ in range(min(count, len(rows))):
        score = np.where(left, unsure * distance, -1.0)
        best = int(score.argmax())
        chosen.append((best, float(distance[best])))
        left[best] = False
        distance = np.minimum(distance, np.clip(1.0 - rows @ rows[best], 0.0, 2.0))
    return chosen


def suggest(loaded: Loaded, paths: Sequence[Path], out: Path, count: int = 20) -> int:
    """Write the micrographs of ``paths`` that are worth a label to ``suggested.csv`` in ``out``, with a contact sheet.

    Returns:
        The number of files that could not be read; the report names each, with the reason.

    Raises:
        UserError: no such path, or none of the files is a micrograph.
    """
    problems: dict[str, str] = {}
    done = read_each(paths, lambda file, page, each: predict_one(loaded, file, page, each), problems)
    unsure = uncertainty(np.stack([one.probabilities for one in done]))
    known = loaded.reference.rows if loaded.reference is not None else None
    chosen = choose(unsure, np.stack([one.features for one in done]), known, count)
    table, cells = [], []
    for rank, (i, distance) in enumerate(chosen, 1):
        name, likely = _answer(loaded, done[i])
        unlike = "" if done[i].unlike is None else f"{done[i].unlike:.3f}"
        table.append(
            [rank, done[i].file, done[i].page, name, f"{likely:.4f}", f"{unsure[i]:.4f}", f"{distance:.4f}", unlike]
        )
        cells.append((done[i].picture, f"{rank} {name[:10]} {likely:.2f}"))
    write_suggested(out, csv_text(COLUMNS, table), cells, len(done), problems)
    return len(problems)


def write_suggested(
    out: Path, table: str, cells: Sequence[tuple[Image.Image, str]], looked_at: int, problems: dict[str, str]
) -> None:
    """Write the table, the contact sheet of ``cells`` and the report to the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(out / TABLE, table)
    atomic.write_json(out / REPORT, {"schema": 1, "looked_at": looked_at, "not_read": problems})
    draw_sheet(cells, out / SHEET, SHOWN_PX)


def _answer(loaded: Loaded, one: Prediction) -> tuple[str, float]:
    best = int(one.probabilities.argmax())
    return loaded.classes[best], float(one.probabilities[best])
