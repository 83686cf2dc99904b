"""Tables as CSV text, which :func:`hpc.atomic.write_text` writes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A line of names, and a line a row; ``None`` gives a blank cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def csv_of(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The same of rows by name; what a row lacks, or has as ``None``, is a blank cell.

    Raises:
        ValueError: a row has what is not among ``names``.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
