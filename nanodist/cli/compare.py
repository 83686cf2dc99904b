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
    from nanodist.downstream.finished_runs import Finished

COMPARISON, TABLE = "comparison.json", "comparison.csv"
NOTES = (
    "Intervals are bootstraps over test micrographs (within classes), encoder seeds, label draws (with the seed of the "
    "run) and splits, of each as many as there are: of one encoder seed an interval holds no spread over pretrainings.",
    "A class that neither mask nor prediction shows counts as right, where another run shows it; else it has no score.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("runs", nargs="+", type=Path, help="Run directories of fine-tunings, or folders of sweeps.")
    parser.add_argument(
        "--metric", help="Of a segmentation: which of dice,iou,boundary_f1 to print (dice,boundary_f1)."
    )
    parser.add_argument(
        "--encoders",
        action="append",
        default=[],
        metavar="NAME=PATH,PATH",
        help="Encoders, as the recipes have them, that are seeds of one pretraining; may be given again.",
    )
    parser.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="KEY",
        help="Key of the recipe, such as train.steps, whose values are settings of their own; may be given again.",
    )
    parser.add_argument("--level", type=float, default=0.95, help="Level of the intervals.")
    parser.add_argument("--resamples", type=int, default=2000, help="Number of bootstrap resamples.")
    parser.add_argument("--out", type=Path, required=True, help=f"Folder for {COMPARISON} and {TABLE}.")


def run(options: argparse.Namespace) -> int:
    """Read, compare, write and print."""
    from hpc.tables import csv_of
    from nanodist.downstream.compare import Comparison
    from nanodist.downstream.finished_runs import SEGMENTATION_METRICS, find_runs, read_run

    if not 0.5 <= options.level < 1.0:
        raise UserError(f"--level is {options.level}; it must be at least 0.5 and below 1")
    if options.resamples < 1:
        raise UserError(f"--resamples is {options.resamples}; it must be at least 1")
    wanted = (options.metric or "dice,boundary_f1").split(",")
    unknown = [name for name in wanted if name not in SEGMENTATION_METRICS]
    if unknown:
        raise UserError(f"--metric: '{unknown[0]}' does not exist; allowed: {', '.join(SEGMENTATION_METRICS)}")
    runs = [read_run(path, options.by) for path in find_runs(options.runs)]
    compared = Comparison(runs, options.level, options.resamples, families(options.encoders, runs))
    rows = [row for key in compared.metrics for row in compared.rows(*key)] + compared.run_score_rows()
    differences = [row for key in compared.metrics for row in compared.differences(*key)]
    document = {"schema": 1, "kind": compared.kind, "level": options.level, "runs": len(runs), "notes": list(NOTES)}
    options.out.mkdir(parents=True, exist_ok=True)
    atomic.write_json(options.out / COMPARISON, {**document, "rows": rows, "differences": differences})
    flat = [{**row, "micrographs_per_class": _per_class(row)} for row in rows]
    atomic.write_text(options.out / TABLE, csv_of(flat, list(flat[0])))
    keys = list(dict.fromkeys((row["metric"], row["class"]) for row in rows))
    keys = [key for key in keys if compared.kind == "classification" or key[0] in wanted]
    print(_text(compared, rows, differences, keys, options))
    return 0


def families(texts: Sequence[str], runs: Sequence[Finished]) -> dict[str, str]:
    """For each path of ``NAME=PATH,PATH`` its name.

    Raises:
        UserError: a text is something else, a path has two names, or no run began with it.
    """
    found: dict[str, str] = {}
    known = {run.encoder for run in runs}
    for text in texts:
        name, separator, paths = text.partition("=")
        if not (name and separator and paths):
            raise UserError(f"--encoders {text}: write NAME=PATH,PATH")
        for path in paths.split(","):
            if path not in known:
                raise UserError(
                    f"--encoders {text}: no run began with {path}; they began with {', '.join(sorted(known))}"
                )
            if path in found:
                raise UserError(f"--encoders {text}: {path} is one of {found[path]} already")
            found[path] = name
    return found


def _per_class(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in row["micrographs_per_class"].items())


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
        f"{rows[0]['images']} test images of {rows[0]['micrographs']} micrographs; splits: {rows[0]['splits']}; runs "
        f"by number of labels {replicates}; {100 * options.level:g} % intervals"
    ]
    if compared.kind == "classification":
        lines.append(f"test micrographs of each class: {_per_class(rows[0])}")
    if min(row["encoder_seeds"] for row in rows) == 1:
        lines.append("of one encoder seed: the interval holds no spread over pretrainings (--encoders names seeds)")
    for metric, label in keys:
        shown = [row for row in rows if (row["metric"], row["class"]) == (metric, label)]
        apart = [row for row in differences if (row["metric"], row["class"]) == (metric, label)]
        where = f" of class {label} ({shown[0]['micrographs']} micrographs)" if label else ""
        lines += ["", f"{metric}{where}", _table(shown, "", "{:.3f}")]
        lines += [_table(apart, " minus ", "{:+.3f}")] if apart else []
    return "\n".join([*lines, "", str(options.out / COMPARISON)])


def _table(rows: Sequence[dict[str, Any]], between: str, form: str) -> str:
    """Settings down, labels across."""
    budgets = list(dict.fromkeys(str(row["labels"]) for row in rows))
    budgets.sort(key=lambda text: (text == "all", int(text) if text != "all" else 0))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        seeds = row.get("encoder_seeds", 0)
        name = row["setting"] + (
            between + row["baseline"] if between else f" ({seeds} encoder seed{'s' * (seeds > 1)})"
        )
        said = f"{form.format(row['mean'])} [{form.format(row['low'])}, {form.format(row['high'])}]"
        cells.setdefault(name, {})[str(row["labels"])] = said
    grid = [["labels" if not between else "difference", *budgets]]
    grid += [[name, *(line.get(budget, "-") for budget in budgets)] for name, line in cells.items()]
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in grid)
