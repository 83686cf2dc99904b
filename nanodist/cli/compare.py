"""``nanodist compare``: fine-tunings beside each other over the number of labels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc import atomic
from hpc.errors import UserError

if TYPE_CHECKING:
    from nanodist.downstream.compare import Comparison

COMPARISON, TABLE = "comparison.json", "comparison.csv"
NOTES = (
    "Intervals are bootstraps over test micrographs (within classes) and over replicates, which are runs that differ "
    "in their seeds alone; an encoder was pretrained once.",
    "A class that neither mask nor prediction shows counts as right, where another run shows it; else it has no score.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("runs", nargs="+", type=Path, help="Run directories of fine-tunings, or folders of sweeps.")
    parser.add_argument(
        "--metric", help="Of a segmentation: which of dice,iou,boundary_f1 to print (dice,boundary_f1)."
    )
    parser.add_argument("--level", type=float, default=0.95, help="Level of the intervals.")
    parser.add_argument("--resamples", type=int, default=2000, help="Number of bootstrap resamples.")
    parser.add_argument("--out", type=Path, required=True, help=f"Folder for {COMPARISON} and {TABLE}.")


def run(options: argparse.Namespace) -> int:
    """Read, compare, write and print."""
    from hpc.tables import csv_of
    from nanodist.downstream.compare import SEGMENTATION_METRICS, Comparison, find_runs, read_run

    if not 0.5 <= options.level < 1.0:
        raise UserError(f"--level is {options.level}; it must be at least 0.5 and below 1")
    if options.resamples < 1:
        raise UserError(f"--resamples is {options.resamples}; it must be at least 1")
    wanted = (options.metric or "dice,boundary_f1").split(",")
    unknown = [name for name in wanted if name not in SEGMENTATION_METRICS]
    if unknown:
        raise UserError(f"--metric: '{unknown[0]}' does not exist; allowed: {', '.join(SEGMENTATION_METRICS)}")
    runs = [read_run(path) for path in find_runs(options.runs)]
    compared = Comparison(runs, options.level, options.resamples)
    rows = [row for key in compared.metrics for row in compared.rows(*key)]
    differences = [row for key in compared.metrics for row in compared.differences(*key)]
    document = {"schema": 1, "kind": compared.kind, "level": options.level, "runs": len(runs), "notes": list(NOTES)}
    options.out.mkdir(parents=True, exist_ok=True)
    atomic.write_json(options.out / COMPARISON, {**document, "rows": rows, "differences": differences})
    atomic.write_text(options.out / TABLE, csv_of(rows, list(rows[0])))
    keys = [key for key in compared.metrics if compared.kind == "classification" or key[0] in wanted]
    print(_text(compared, rows, differences, keys, options))
    return 0


def _text(
    compared: Comparison,
    rows: Sequence[dict[str, Any]],
    differences: Sequence[dict[str, Any]],
    keys: Sequence[tuple[str, str]],
    options: argparse.Namespace,
) -> str:
    sizes = [f"{row['labels']}: {row['runs']}" for row in rows if row["setting"] == rows[0]["setting"]]
    replicates = ", ".join(dict.fromkeys(sizes))
    lines = [
        f"{rows[0]['images']} test images of {rows[0]['micrographs']} micrographs; runs by number of labels "
        f"{replicates}; {100 * options.level:g} % intervals"
    ]
    for metric, label in keys:
        shown = [row for row in rows if (row["metric"], row["class"]) == (metric, label)]
        apart = [row for row in differences if (row["metric"], row["class"]) == (metric, label)]
        lines += ["", f"{metric}{f' of class {label}' if label else ''}", _table(shown, "", "{:.3f}")]
        lines += [_table(apart, " minus ", "{:+.3f}")] if apart else []
    return "\n".join([*lines, "", str(options.out / COMPARISON)])


def _table(rows: Sequence[dict[str, Any]], between: str, form: str) -> str:
    """Settings down, labels across."""
    budgets = list(dict.fromkeys(str(row["labels"]) for row in rows))
    budgets.sort(key=lambda text: (text == "all", int(text) if text != "all" else 0))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        name = row["setting"] + (between + row["baseline"] if between else "")
        said = f"{form.format(row['mean'])} [{form.format(row['low'])}, {form.format(row['high'])}]"
        cells.setdefault(name, {})[str(row["labels"])] = said
    grid = [["labels" if not between else "difference", *budgets]]
    grid += [[name, *(line.get(budget, "-") for budget in budgets)] for name, line in cells.items()]
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in grid)
