"""``pairs.csv``: which pattern belongs to which micrograph of which specimen, and what is known about them."""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc.errors import UserError
from nanodist.scattering.read import Given
from nanodist.shards.calibration import Given as PixelSize

NEEDED = ("saxs", "sem", "sample")
UNPAIRED = ("error", "keep", "skip")
TRUTH = ("morphology", "period_nm", "centre_distance_nm", "orientation_deg", "order_parameter", "area_fraction")
_PATHS = ("poni", "mask", "sigma")
_TEXTS = ("kind", "setup", "detector", "dataset", "mask_marks", "beam_stop")
_NUMBERS = ("distance_mm", "wavelength_nm", "saturation")
# Two columns for what is a pair of numbers, as (y, x) or (row, column).
_DOUBLES = {
    "beam_centre_px": ("beam_row_px", "beam_column_px"),
    "pixel_size_mm": ("detector_pixel_y_mm", "detector_pixel_x_mm"),
}
_PIXEL = ("pixel_size_nm_y", "pixel_size_nm_x")
KNOWN = (
    *NEEDED, *TRUTH, *_PATHS, *_TEXTS, *_NUMBERS, *(name for both in _DOUBLES.values() for name in both), "frame",
    "pixel_size_nm", *_PIXEL,
)  # fmt: skip
_MAX_STEM = 60


@dataclass(frozen=True)
class Row:
    """One row: a pair, or one half of one.

    Attributes:
        line: in the table.
        key: of its item.
        sample: the specimen.
        saxs, sem: files; None where the cell is empty.
        saxs_name, sem_name: as the table names them.
        given: what it states about the pattern, over what the file says.
        pixel_size: what it states about the micrograph.
        truth: of synthetic pairs.
    """

    line: int
    key: str
    sample: str
    saxs: Path | None
    sem: Path | None
    saxs_name: str
    sem_name: str
    given: Given
    pixel_size: PixelSize | None = None
    truth: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the row is about, for messages."""
        return self.saxs_name or self.sem_name


@dataclass(frozen=True)
class Table:
    """A whole table: rows with those of one specimen together, what was left out, and columns that say nothing here."""

    rows: list[Row]
    dropped: list[dict[str, str]]
    unused: list[str]


def read_table(path: Path, unpaired: str = "error") -> Table:
    """Read ``pairs.csv``; files are named relative to its folder.

    Args:
        path: the table.
        unpaired: what to do with rows that have one half only: ``error``, ``keep`` or ``skip``.

    Raises:
        UserError: no such table or column, a missing file, a row without its other half, a file of two specimens, the
            same pair twice, or a value that is none.
    """
    if unpaired not in UNPAIRED:
        raise UserError(f"--unpaired is '{unpaired}'; it must be one of {', '.join(UNPAIRED)}")
    raw, columns = _read(path)
    rows, dropped = [], []
    for line, values in raw:
        row = _row(path, line, values)
        if row.saxs is None or row.sem is None:
            half, other = ("an SEM image", "a pattern") if row.saxs is None else ("a pattern", "an SEM image")
            if unpaired == "error":
                what = f"{path}, line {line}: sample '{row.sample}' has {half} without {other}"
                raise UserError(
                    f"{what}: name its file, or say --unpaired keep (it trains its own half alone) or --unpaired skip"
                )
            if unpaired == "skip":
                dropped.append({"source": row.name, "reason": f"{half} without {other}"})
                continue
        rows.append(row)
    if not rows:
        raise UserError(f"{path} lists no pair: write a row for each, with the columns {', '.join(NEEDED)}")
    _check(path, rows)
    return Table(_keyed(rows), dropped, [name for name in columns if name not in KNOWN])


def _read(path: Path) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [name.strip() for name in reader.fieldnames or ()]
            missing = [name for name in NEEDED if name not in columns]
            if missing:
                raise UserError(
                    f"{path} has no column {', '.join(missing)}; it needs {', '.join(NEEDED)} and has: "
                    f"{', '.join(columns) or 'none'}"
                )
            rows = []
            for row in reader:
                values = {
                    name: (row[key] or "").strip() for name, key in zip(columns, reader.fieldnames or (), strict=True)
                }
                if any(values.values()):
                    rows.append((reader.line_num, values))
            return rows, columns
    except FileNotFoundError:
        raise UserError(f"{path}, named by --pairs, does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}, named by --pairs, is no readable CSV: {error}") from None


def _row(path: Path, line: int, values: dict[str, str]) -> Row:
    where = f"{path}, line {line}"
    sample = values["sample"]
    if not sample:
        raise UserError(f"{where} names no sample: write the specimen, which no split may part, into column sample")
    if not values["saxs"] and not values["sem"]:
        raise UserError(
            f"{where} names neither a pattern nor an SEM image of sample '{sample}': name one, or remove it"
        )
    files = {name: _file(path, values.get(name, ""), where, name) for name in ("saxs", "sem", *_PATHS)}
    numbers = {name: _number(values[name], f"{where}: {name}") for name in _NUMBERS if values.get(name)}
    doubles = {
        name: (_number(values[first], f"{where}: {first}"), _number(values[second], f"{where}: {second}"))
        for name, (first, second) in _DOUBLES.items()
        if values.get(first) or values.get(second)
        if _both(values, first, second, where)
    }
    texts = {name: values[name] for name in _TEXTS if values.get(name)}
    _choice(texts, "kind", ("counts", "reduced"), where)
    _choice(texts, "setup", ("transmission", "grazing"), where)
    _choice(texts, "mask_marks", ("masked", "measured"), where)
    paths = {name: files[name] for name in _PATHS if files[name]}
    frame = {"frame": int(_number(values["frame"], f"{where}: frame"))} if values.get("frame") else {}
    extra: dict[str, Any] = {**numbers, **doubles, **texts, **paths, **frame}
    size = _pixel_size(values, where, path.name)
    return Row(
        line, "", sample, files["saxs"], files["sem"], values["saxs"], values["sem"], Given(**extra), size,
        _truth(values, where),
    )  # fmt: skip


def _file(table: Path, name: str, where: str, column: str) -> Path | None:
    if not name:
        return None
    path = table.parent / name.replace("\\", "/")
    if not path.is_file():
        raise UserError(
            f"{where}: {column} is '{name}', and there is no file {path}: write paths relative to the table"
        )
    return path


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{what} is '{text}'; it must be a number")
    return value


def _both(values: dict[str, str], first: str, second: str, where: str) -> bool:
    if not (values.get(first) and values.get(second)):
        raise UserError(f"{where} states {first} or {second} alone: state both")
    return True


def _choice(texts: dict[str, str], name: str, known: Sequence[str], where: str) -> None:
    if name in texts and texts[name] not in known:
        raise UserError(f"{where}: {name} is '{texts[name]}'; it must be one of {', '.join(known)}")


def _pixel_size(values: dict[str, str], where: str, name: str) -> PixelSize | None:
    texts = [values.get(axis) or values.get("pixel_size_nm") or "" for axis in _PIXEL]
    if not any(texts):
        return None
    y, x = (_number(text, f"{where}: pixel_size_nm") for text in texts)
    if min(y, x) <= 0:
        raise UserError(f"{where}: pixel_size_nm is {min(y, x):g}; it must be more than 0")
    return PixelSize(y, x, None, f"pair table {name}")


def _truth(values: dict[str, str], where: str) -> dict[str, Any]:
    """The columns of a synthetic table; {} where it has no morphology."""
    if not values.get("morphology"):
        return {}
    parse: Callable[[str], Any] = lambda name: _number(values[name], f"{where}: {name}") if values.get(name) else None  # noqa: E731
    return {"morphology": values["morphology"], **{name: parse(name) for name in TRUTH[1:]}}


def _check(path: Path, rows: Sequence[Row]) -> None:
    """Refuse a pair that is there twice, and a file of two specimens, which a split would part."""
    seen: dict[tuple[Path | None, Path | None, int | None], int] = {}
    owners: dict[tuple[Path, int | None], Row] = {}
    for row in rows:
        frame = row.given.frame
        first = seen.setdefault((row.saxs, row.sem, frame), row.line)
        if first != row.line:
            raise UserError(f"{path}, line {row.line} is the same pair as line {first}: remove one of them")
        for file in ((row.saxs, frame), (row.sem, None)):
            if file[0] is None:
                continue
            owner = owners.setdefault((file[0], file[1]), row)
            if owner.sample != row.sample:
                raise UserError(
                    f"{path}: {file[0]} belongs to sample '{owner.sample}' in line {owner.line} and to '{row.sample}' "
                    f"in line {row.line}: a split would part it; give both rows one sample"
                )


def _keyed(rows: Sequence[Row]) -> list[Row]:
    """Rows with their keys, those of one specimen together, in the order in which the specimens first come."""
    by_sample: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_sample[row.sample].append(row)
    plain = {sample: re.sub(r"[^A-Za-z0-9_]+", "-", sample).strip("-") for sample in by_sample}
    uses = Counter(stem.lower() for stem in plain.values())
    keyed = []
    for sample, its in by_sample.items():
        stem = plain[sample]
        if not stem or uses[stem.lower()] > 1 or len(stem) > _MAX_STEM:
            digest = hashlib.blake2b(sample.encode(), digest_size=5).hexdigest()
            stem = f"{stem[:_MAX_STEM]}-{digest}".strip("-")
        digits = len(str(len(its) - 1))
        for number, row in enumerate(its):
            key = stem if len(its) == 1 else f"{stem}--{number:0{digits}d}"
            keyed.append(Row(**{**vars(row), "key": key}))
    return keyed
