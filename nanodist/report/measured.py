"""The section on morphology: what ``nanodist measure`` found, with its histograms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.errors import UserError
from nanodist.report import figures
from nanodist.report.collect import Run
from nanodist.report.markup import Markup, details, escaped, figure, image, number, section, table
from nanodist.report.words import quantity

IMAGE_BYTES = 600_000  # what all histograms of a page may take together, before base64
MOST_FOLDERS = 6


@dataclass(frozen=True)
class Measured:
    """One folder that ``nanodist measure`` wrote: its name, ``summary.json`` and histograms."""

    name: str
    data: dict[str, Any]
    histograms: tuple[Path, ...]

    def records(self, name: str) -> list[dict[str, Any]]:
        """The list of records called ``name``."""
        rows = self.data.get(name)
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def read_measured(path: Path) -> Measured:
    """Read a folder of ``nanodist measure``.

    Raises:
        UserError: it holds no readable ``summary.json``.
    """
    try:
        data = json.loads((path / "summary.json").read_bytes())
        if not isinstance(data, dict):
            raise ValueError("no keys and values")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} has no readable summary.json ({error}): give --measured the folder that 'nanodist measure --out' "
            "wrote."
        ) from None
    return Measured(path.resolve().name, data, tuple(sorted(path.glob("histograms_*.png"))))


def default_measured(runs: Sequence[Run]) -> list[Path]:
    """The folders that lie in the runs themselves."""
    return [run.path / "measured" for run in runs if (run.path / "measured" / "summary.json").is_file()]


def morphology(found: Sequence[Measured]) -> str:
    """Histograms and means with intervals; empty where nothing was measured."""
    if not found:
        return ""
    parts, share = [], IMAGE_BYTES // min(len(found), MOST_FOLDERS)
    for one in found[:MOST_FOLDERS]:
        counts = ", ".join(f"{number(one.data.get(name))} {name}" for name in ("images", "objects", "wires"))
        parts.append(f"<h3>{escaped(one.name)}</h3><p>{escaped(counts)}.</p>")
        for file in one.histograms:
            data = figures.picture(file.read_bytes(), share)
            if data is not None:
                unit = file.stem.rpartition("_")[2]
                told = f"Histograms of sizes in {unit}; objects are weighted against the border."
                parts.append(figure(image(figures.data_uri(data), f"{told} The table has the means."), told, wide=True))
        parts.append(_means(one))
    return section("morphology", "Morphology", "".join(parts))


def _means(one: Measured) -> str:
    rows = []
    for row in one.records("specimens"):
        if row.get("mean") is None:
            continue
        low, high = row.get("low"), row.get("high")
        span = "" if low is None or high is None else f"{number(low, 3)} to {number(high, 3)}"
        mean = Markup(f'{escaped(number(row["mean"], 4))}<span class="interval">{escaped(span)}</span>')
        rows.append((row.get("specimen"), quantity(str(row.get("quantity"))), mean, *_counts(row)))
    if not rows:
        return ""
    listed = table(["specimen", "quantity", "mean", "n", "images"], rows, "Means with 95 % bootstraps over images.", 2)
    return listed if len(rows) <= 12 else details(f"All {len(rows)} means with intervals", listed)


def _counts(row: dict[str, Any]) -> tuple[str, str]:
    return number(row.get("n")), number(row.get("images"))
