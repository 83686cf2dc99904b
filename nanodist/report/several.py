"""What many runs have in common and where they differ: tables with a row a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpc.config import flatten
from nanodist.report.collect import Run
from nanodist.report.facts import START_COLUMNS, facts, start_row
from nanodist.report.markup import details, missing, number, table

MOST_COLUMNS = 4
MOST_STARTS = 2000
MOST_KEYS = 12
_OF_THE_PLACE = ("run_dir", "tracking.", "engine.", "checkpoint.", "guard.")


def facts_table(runs: Sequence[Run]) -> str:
    """A column a run where these are few; else a row each, after what all of them have."""
    told = [facts(run) for run in runs]
    known = [label for label in told[0] if any(one[label] is not None for one in told)]
    if len(runs) <= MOST_COLUMNS:
        rows = [(label, *[number(one[label]) for one in told]) for label in known]
        head = ["", *[run.name for run in runs]] if len(runs) > 1 else []
        columns = "" if head else " facts"
        return f'<div class="wrap{columns}">{table(head, rows, sort=False)}</div>'
    same = [label for label in known if len({repr(one[label]) for one in told}) == 1]
    other = [label for label in known if label not in same]
    shared = table([], [(label, number(told[0][label])) for label in same], "The same in all runs.")
    rows = [(run.name, *[number(one[label]) for label in other]) for run, one in zip(runs, told, strict=True)]
    return f'<div class="wrap">{shared}</div>{table(["run", *other], rows, "Where they differ.")}'


def differing_keys(runs: Sequence[Run]) -> str:
    """Recipe keys that differ between the runs, a row a run; what only says where a run ran is left out."""
    flat = [flatten(run.recipe) for run in runs]
    names = dict.fromkeys(name for one in flat for name in one)
    differ = [name for name in names if len({repr(one.get(name)) for one in flat}) > 1]
    differ = [name for name in differ if not name.startswith(_OF_THE_PLACE)]
    if not differ:
        return missing("All recipes are the same, but for where the runs lie and how they ran.")
    rows = [
        (run.name, *[_shown(one.get(name)) for name in differ[:MOST_KEYS]]) for run, one in zip(runs, flat, strict=True)
    ]
    more = f" {len(differ) - MOST_KEYS} more keys differ." if len(differ) > MOST_KEYS else ""
    return table(["run", *differ[:MOST_KEYS]], rows, f"Keys of the recipes that differ.{more}")


def starts_table(runs: Sequence[Run]) -> str:
    """The starts of many runs in one table."""
    rows = [(run.name, str(i + 1), *start_row(start)) for run in runs for i, start in enumerate(run.starts)]
    if not rows:
        return missing("No run.json lists a start.")
    ends: dict[str, int] = {}
    for row in rows:
        reason = row[2 + START_COLUMNS.index("end")].partition(":")[0]
        ends[reason] = ends.get(reason, 0) + 1
    counts = table(["end", "starts"], sorted(ends.items(), key=lambda item: -item[1]))
    used = [c for c in range(len(START_COLUMNS)) if any(row[c + 2] != "–" for row in rows)]
    shown = [(*row[:2], *[row[c + 2] for c in used]) for row in rows[:MOST_STARTS]]
    caption = f"The first {MOST_STARTS} of {len(rows)} starts." if len(rows) > MOST_STARTS else ""
    listed = table(["run", "start", *[START_COLUMNS[c] for c in used]], shown, caption)
    return counts + details(f"All {len(shown)} starts", listed)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping | list):
        return str(value)[:80]
    return number(value)
