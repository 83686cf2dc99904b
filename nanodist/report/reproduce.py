"""The sections on what runs cost and on how to do them again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nanodist.report import several
from nanodist.report.collect import Run
from nanodist.report.facts import store_hash
from nanodist.report.markup import Markup, details, escaped, missing, number, section, table
from nanodist.report.words import timed

MOST_RECIPES = 12
_COMMANDS = {
    "pretrain": "pretrain",
    "classification": "finetune",
    "segmentation": "finetune",
    "pairvae": "pairvae train",
}


@dataclass(frozen=True)
class Cost:
    """Of all starts of a run, those that were lost as well.

    Attributes:
        hours: from the beginning to the end of each start.
        rank_hours: the same times the number of ranks.
        open_starts: starts without a recorded end, which are not counted.
    """

    hours: float
    rank_hours: float
    open_starts: int


def cost(run: Run) -> Cost:
    """What a run took, by its own record."""
    hours, rank_hours, unknown = 0.0, 0.0, 0
    for start in run.starts:
        try:
            took = datetime.fromisoformat(str(start["ended"])) - datetime.fromisoformat(str(start["began"]))
        except (KeyError, ValueError):
            unknown += 1
            continue
        topology = start.get("topology")
        ranks = topology.get("world_size") if isinstance(topology, Mapping) else None
        hours += took.total_seconds() / 3600
        rank_hours += took.total_seconds() / 3600 * (ranks if isinstance(ranks, int) else 1)
    return Cost(hours, rank_hours, unknown)


def cost_cells(run: Run) -> tuple[Markup, str, str]:
    """Time of all starts, rank hours, and number of starts, for a table."""
    of = cost(run)
    more = f" ({of.open_starts} without an end)" if of.open_starts else ""
    return timed(3600 * of.hours), number(of.rank_hours, 3), f"{len(run.starts)}{more}"


def again(runs: Sequence[Run]) -> str:
    """The command, code, data and recipe of each run."""
    if len(runs) > MOST_RECIPES:
        whole = _one(runs[0])
        body = f"<p>The first run as an example, then where the others differ from each other.</p>{whole}"
        return section("recipe", "Do it again", body + several.differing_keys(runs))
    shown: dict[str, str] = {}  # stages of a PairVAE share their recipe
    parts = [_one(run, len(runs) > 1, shown.setdefault(run.recipe_text, run.name)) for run in runs]
    return section("recipe", "Do it again", "".join(parts))


def _one(run: Run, titled: bool = True, shown: str = "") -> str:
    if not run.recipe_text:
        return missing(f"{run.name} has no recipe.yaml.")
    last: dict[str, Any] = run.starts[-1] if run.starts else {}
    versions = last.get("versions")
    packages = versions if isinstance(versions, Mapping) else {}
    name = "run_dir=NEW_FOLDER"
    command = f"nanodist {_COMMANDS[run.kind]} {shlex.quote(str(run.recipe_of()))} {name}"
    rows = [
        ("Code", last.get("git_commit")),
        ("Versions", ", ".join(f"{key} {value}" for key, value in packages.items() if value)),
        ("Store's hash", store_hash(run)),
        ("Fingerprint", run.info.get("fingerprint")),
    ]
    listed = table([], [(label, number(value)) for label, value in rows if value])
    title = f"<h3>{escaped(run.name)}</h3>" if titled else ""
    note = (
        "<p>Any number of ranks that divides the batch gives the same run; a run of this fingerprint is this run.</p>"
    )
    recipe = details(f"Recipe of {run.name} (YAML)", f'<pre class="recipe">{escaped(run.recipe_text)}</pre>')
    if shown not in ("", run.name):
        recipe = f"<p>The recipe is that of {escaped(shown)}.</p>"
    return f'{title}<pre>{escaped(command)}</pre>{note}<div class="wrap">{listed}</div>{recipe}'
