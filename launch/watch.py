"""``launch status``: how far sweeps are, as a table that is drawn again until it is over."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpc.errors import UserError
from launch.collect import state_of
from launch.queue import active_jobs, is_in_queue
from launch.records import Record, SweepFolder, read_lines

if TYPE_CHECKING:
    from rich.console import Group

ORDER = ("done", "running", "stopped", "queued", "missing", "lost", "cancelled", "failed")
_BUSY = ("running", "stopped", "queued")
_SHOWN = 10


@dataclass(frozen=True)
class Look:
    """A sweep at one moment: each record is read once, and Slurm asked at most once in 30 s for all sweeps.

    Attributes:
        folder: of the sweep.
        states, records: of every job and helper that was ever submitted, by fingerprint.
        helpers: which of them are helpers.
    """

    folder: SweepFolder
    states: dict[str, str]
    records: dict[str, Record]
    helpers: frozenset[str]

    @classmethod
    def at(cls, folder: SweepFolder) -> Look:
        """The sweep now."""
        helpers, active = folder.helpers(), active_jobs(folder)
        records = {name: folder.record(name) for name in (*helpers, *folder.jobs())}
        states = {name: state_of(one, folder.silent_s(name), name in active) for name, one in records.items()}
        return cls(folder, states, records, frozenset(helpers))

    def counts(self) -> Counter[str]:
        """Jobs by state."""
        return Counter(state for name, state in self.states.items() if name not in self.helpers)

    def busy(self) -> bool:
        """Whether anything is still to come by itself."""
        return any(state in _BUSY for state in self.states.values())

    def bad(self) -> list[str]:
        """A line for each job or helper that failed or is lost."""
        bad = [name for name, state in self.states.items() if state in ("failed", "lost")]
        return [
            f"{name} {self.states[name]}: {[self.records[name].host, *self.records[name].failures][-1]}" for name in bad
        ]

    def seconds(self) -> float | None:
        """Of a job that is done, the mean."""
        took = [one.seconds for name, one in self.records.items() if self._is_done(name)]
        return sum(took) / len(took) if took else None

    def left_s(self) -> float | None:
        """Seconds until the last job ends, by how fast the last ones did; ``None`` while nobody can say."""
        ends = sorted(one.ended for name, one in self.records.items() if self._is_done(name))
        to_do = sum(self.counts()[state] for state in _BUSY)
        recent = ends[-50:]
        if len(recent) < 2 or recent[-1] <= recent[0] or not to_do:
            return None
        return to_do * (recent[-1] - recent[0]) / (len(recent) - 1)

    def _is_done(self, name: str) -> bool:
        return self.states[name] == "done" and name not in self.helpers


def summary(look: Look) -> str:
    """Numbers of jobs by state, and what is known of those that failed, in a few lines."""
    counts = look.counts()
    told = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
    return "\n".join([f"{look.folder.name}: {counts.total()} jobs, {told or 'none is known yet'}", *_some(look.bad())])


def _some(bad: Sequence[str]) -> list[str]:
    more = [f"  and {len(bad) - _SHOWN} more; collect has them all"] if len(bad) > _SHOWN else []
    return [*(f"  {line}" for line in bad[:_SHOWN]), *more]


def steps(home: Path) -> dict[str, str]:
    """Of each step of a pipeline that was submitted, whether it is in the queue or over."""
    lines = {line["step"]: line for line in read_lines(home / "steps.jsonl")}
    waiting = {name: is_in_queue(line["cluster"], line["id"]) for name, line in lines.items()}
    return {name: f"in the queue ({lines[name]['id']})" if there else "over" for name, there in waiting.items()}


def watch(folders: Sequence[SweepFolder], every_s: float, pipeline: Path | None = None) -> None:
    """Draw the table again and again until nothing is left to be done; once where nobody sits before a terminal.

    Args:
        folders: of the sweeps.
        every_s: seconds between looks; 0: look once.
        pipeline: folder of the pipeline that they belong to.
    """
    looks = [Look.at(folder) for folder in folders]
    begun = {} if pipeline is None else steps(pipeline)
    if not sys.stdout.isatty() or every_s <= 0:
        print("\n".join([*(f"{name}: {state}" for name, state in begun.items()), *map(summary, looks)]))
        return
    from rich.live import Live

    with Live(_drawn(looks, begun), auto_refresh=False) as live:
        while any(look.busy() for look in looks) or any(state != "over" for state in begun.values()):
            time.sleep(every_s)
            trouble = ""
            try:
                looks = [Look.at(folder) for folder in folders]
                begun = {} if pipeline is None else steps(pipeline)
            except UserError as error:  # a busy controller does not answer; the jobs go on meanwhile
                trouble = f"as it was before {time.strftime('%H:%M:%S')}: {error}"
            live.update(_drawn(looks, begun, trouble), refresh=True)


def _drawn(looks: Sequence[Look], begun: dict[str, str], trouble: str = "") -> Group:
    """One table with a row a sweep, and under it what went wrong, also with the looking itself."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from hpc.progress import duration

    table = Table()
    table.add_column("sweep")
    for state in ("jobs", *ORDER, "each", "left"):
        table.add_column(state, justify="right")
    lines = [f"{name}: {state}" for name, state in begun.items()]
    for look in looks:
        counts, each, left = look.counts(), look.seconds(), look.left_s()
        shown = [str(counts[state] or "") for state in ORDER]
        times = ["" if value is None else duration(value) for value in (each, left)]
        table.add_row(look.folder.name, str(counts.total()), *shown, *times)
        lines += _some(look.bad())
    lines += [trouble] if trouble else []
    # What a job said is text, and no markup of ours.
    return Group(table, Text("\n".join(lines)))
