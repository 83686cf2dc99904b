"""Pixel sizes that the user knows better than the files: ``--calibration FILE.csv``."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc.errors import UserError
from nanodist.shards.sources import Finder, Source

_COLUMNS = "file, pixel_size_nm (or pixel_size_nm_y and pixel_size_nm_x), and uncertainty if it is known"


@dataclass(frozen=True)
class Given:
    """A pixel size that takes the place of a file's own.

    Attributes:
        y_nm, x_nm: sides of a pixel in nanometres.
        uncertainty: relative standard uncertainty (0.01 is 1 %), or ``None`` where unknown.
        source: where it comes from.
    """

    y_nm: float
    x_nm: float
    uncertainty: float | None
    source: str


def read_calibration(table: Path, sources: Sequence[Source]) -> list[Given | None]:
    """The pixel size of each source, ``None`` where the table does not list it or leaves it empty.

    Raises:
        UserError: no such file or column, a size that is not positive, two sizes for one file, a row that fits several
            files, or no row that fits any.
    """
    finder = Finder(sources, table)
    given: dict[Path, Given] = {}
    for line, row in _rows(table):
        path = finder.find(row["file"].strip())
        size = _given(row, f"{table}, line {line}", table.name)
        if path is None or size is None:
            continue
        if given.setdefault(path, size) != size:
            raise UserError(f"{table}, line {line} gives a second pixel size to {row['file']}: keep one row")
    if not given:
        raise UserError(f"{table} gives a pixel size to none of the {len(sources)} files (such as {sources[0].name})")
    return [given.get(source.path) for source in sources]


def _rows(table: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = set(reader.fieldnames or ())
            if "file" not in names or not ("pixel_size_nm" in names or {"pixel_size_nm_y", "pixel_size_nm_x"} <= names):
                raise UserError(f"{table} must have the columns {_COLUMNS}; it has: {', '.join(sorted(names))}")
            return [(reader.line_num, row) for row in reader if row["file"]]
    except FileNotFoundError:
        raise UserError(f"{table}, named by --calibration, does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}, named by --calibration, is no readable CSV: {error}") from None


def _given(row: dict[str, str], where: str, name: str) -> Given | None:
    texts = [row.get(f"pixel_size_nm_{axis}") or row.get("pixel_size_nm") or "" for axis in "yx"]
    if not any(text.strip() for text in texts):
        return None
    y, x = (_positive(text, f"{where}: pixel_size_nm") for text in texts)
    uncertainty = (row.get("uncertainty") or "").strip()
    relative = _positive(uncertainty, f"{where}: uncertainty (relative, such as 0.01)") if uncertainty else None
    return Given(y, x, relative, f"calibration table {name}")


def _positive(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{what} is '{text}'; it must be a number above 0")
    return value
