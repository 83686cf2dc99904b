"""Tidy tables of what was measured: CSV always, Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = Sequence[dict[str, Any]]


def header(rows: Iterable[dict[str, Any]]) -> list[str]:
    """All columns of the rows, in the order in which they first come."""
    return list(dict.fromkeys(name for row in rows for name in row))


def write_rows(path: Path, rows: Rows, columns: Sequence[str] | None = None) -> None:
    """A CSV with one line a row; what is unknown is an empty cell."""
    names = list(columns) if columns is not None else header(rows)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_columns(path: Path, parts: Sequence[tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]]) -> None:
    """A CSV of columns (n,) one part under the other, each with constant values beside them."""
    names = header(row for fixed, columns in parts for row in (fixed, columns))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for fixed, columns in parts:
            writer.writerows(_lines(names, fixed, columns))


def _lines(names: list[str], fixed: dict[str, Any], columns: dict[str, npt.NDArray[Any]]) -> Iterator[tuple[Any, ...]]:
    count = len(next(iter(columns.values()))) if columns else 0
    cells = []
    for name in names:
        if name not in columns:
            cells.append([fixed.get(name, "")] * count)
        elif columns[name].dtype.kind == "f":
            cells.append([f"{v:.6g}" for v in columns[name].tolist()])
        else:
            cells.append(columns[name].tolist())
    return zip(*cells, strict=True)


def has_parquet() -> bool:
    """Whether pyarrow is there to write Parquet."""
    return find_spec("pyarrow") is not None


def to_parquet(folder: Path) -> None:
    """A Parquet file beside each CSV of a folder."""
    from pyarrow import csv as arrow_csv
    from pyarrow import parquet

    for path in sorted(folder.glob("*.csv")):
        convert = arrow_csv.ConvertOptions(strings_can_be_null=True)
        parquet.write_table(arrow_csv.read_csv(path, convert_options=convert), path.with_suffix(".parquet"))


def as_float(values: Iterable[Any]) -> npt.NDArray[np.float64]:
    """A column as floats without what is unknown."""
    return np.array([float(v) for v in values if v is not None and v != ""], float)
