"""``launch status``: how far a sweep is, as a table that is drawn again until it is over."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from launch.collect import state_of
from launch.queue import active_jobs
from launch.records import SweepFolder

if TYPE_CHECKING:
    from rich.table import Table

ORDER = ("done", "running", "stopped", "queued", "missing", "lost", "cancelled", "failed")
_FAILED_SHOWN = 10


def states(folder: SweepFolder) -> dict[str, str]:
    """State of every job that was ever submitted, by fingerprint."""
    active = active_jobs(folder)
    return {name: state_of(folder.record(name), folder.silent_s(name), name in active) for name in folder.jobs()}


def summary(folder: SweepFolder) -> str:
    """Numbers of jobs by state, and what is known of those that failed, in a few lines."""
    found = states(folder)
    counts = Counter(found.values())
    lines = [f"{folder.name}: {len(found)} jobs, " + ", ".join(f"{counts[s]} {s}" for s in ORDER if counts[s])]
    for name, state in [item for item in found.items() if item[1] in ("failed", "lost")][:_FAILED_SHOWN]:
        record = folder.record(name)
        lines.append(f"  {name} {state}: {record.failures[-1] if record.failures else record.host}")
    return "\n".join(lines)


def watch(folder: SweepFolder, every_s: float) -> None:
    """Draw the table again and again until nothing is left to be done; once where nobody sits before a terminal."""
    if not sys.stdout.isatty() or every_s <= 0:
        print(summary(folder))
        return
    from rich.live import Live

    with Live(_table(folder), auto_refresh=False) as live:
        while any(state in ("running", "stopped", "queued") for state in states(folder).values()):
            time.sleep(every_s)
            live.update(_table(folder), refresh=True)


def _table(folder: SweepFolder) -> Table:
    from rich.table import Table

    found = states(folder)
    counts = Counter(found.values())
    seconds = [folder.record(name).seconds for name, state in found.items() if state == "done"]
    table = Table(title=f"{folder.name}: {len(found)} jobs")
    for name in ("state", "jobs", "share"):
        table.add_column(name, justify="right" if name != "state" else "left")
    for state in ORDER:
        if counts[state]:
            table.add_row(state, str(counts[state]), f"{counts[state] / len(found):.0%}")
    if seconds:
        table.caption = f"{sum(seconds) / len(seconds):.0f} s a job"
    return table
