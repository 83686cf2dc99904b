"""One tidy table of all jobs of a sweep: what was set, how far it came and why not further, and what it measured."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hpc import atomic
from hpc.errors import UserError
from launch.kinds import Kind, Row
from launch.queue import active_jobs
from launch.records import STALE_S, Job, Record, SweepFolder

if TYPE_CHECKING:
    import pandas

SCHEMA = 1
_LOG_LINES = 5


def state_of(record: Record, silent_s: float, active: bool) -> str:
    """The state of a job for people: ``missing`` where nobody has it, ``lost`` where who ran it has gone silent."""
    if record.final:
        return record.state
    if record.state == "running" and silent_s > STALE_S:
        return "queued" if active else "lost"  # its node died: Slurm starts the allocation again, or does not
    if not active and record.state != "running":
        return "missing"
    return record.state


def rows(folder: SweepFolder, jobs: Iterable[Job], kind: Kind) -> list[Row]:
    """The rows of :func:`collect`, as plain values."""
    active = active_jobs(folder)
    broken = {name: why for name in folder.helpers() if (why := _why_not(folder, name))}
    found: list[Row] = []
    for job in jobs:
        record = folder.record(job.fingerprint)
        state = state_of(record, folder.silent_s(job.fingerprint), job.fingerprint in active)
        told = _told(folder, job, record, state)
        if state == "missing":
            told["reason"] = next((f"needs {name}: {broken[name]}" for name in job.needs if name in broken), "")
        measured: list[Row] = [{}]
        if state == "done":
            try:
                measured = kind.rows(folder.run_dir(job.fingerprint))
            except (OSError, ValueError, KeyError) as error:
                told |= {"state": "failed", "reason": f"done, but its scores cannot be read ({error})"}
        # What the job measured may have a name of its own for what was set; what was set stands first.
        found += [{**told, **{name: value for name, value in one.items() if name not in told}} for one in measured]
    return found


def _why_not(folder: SweepFolder, helper: str) -> str:
    """Why a helper came to nothing; empty while it may still be done."""
    record = folder.record(helper)
    if not record.final or record.state == "done":
        return ""
    return record.failures[-1] if record.failures else record.state


def _told(folder: SweepFolder, job: Job, record: Record, state: str) -> Row:
    row: Row = {"fingerprint": job.fingerprint, **job.point, "state": state, "reason": "", "log": ""}
    if state in ("failed", "lost"):
        row["reason"] = record.failures[-1] if record.failures else f"nothing heard of it on {record.host}"
        row["log"] = "\n".join(folder.last_words(job.fingerprint, _LOG_LINES))
    elif state == "cancelled":
        row["reason"] = "cancelled"
    return {
        **row,
        "tries": record.starts,
        "seconds": round(record.seconds, 3),
        "overhead_s": round(record.seconds - record.training_s, 3) if record.training_s else None,
        "run_dir": str(folder.run_dir(job.fingerprint)),
    }


def collect(folder: SweepFolder, jobs: Sequence[Job], kind: Kind) -> pandas.DataFrame:
    """The table of a sweep, a row a job (as many rows as it measured where its kind measures several).

    Columns: ``fingerprint``, what the sweep set, ``state``, ``reason``, ``log`` (its last lines where it failed),
    ``tries``, ``seconds``, ``overhead_s`` (of these outside of the command), ``run_dir``, and what was measured. The
    same goes to ``sweep.parquet`` and ``sweep.json`` in the sweep's folder, and ``sweep.html`` is the page about it.

    Raises:
        UserError: pandas is missing, or the queue cannot be asked.
    """
    try:
        import pandas
    except ImportError:
        raise UserError("collect needs pandas and pyarrow: pip install 'nanodist[launch]'") from None
    from launch.pages import sweep_page

    found = document(folder, jobs, kind)
    table = pandas.DataFrame(found["rows"])
    if not folder.path.is_dir():
        return table
    atomic.write_json(folder.path / "sweep.json", found)
    temporary = folder.path / f".sweep.parquet.{os.getpid()}.tmp"
    # Values of several types under one name (a number, or "all") are text in a column of a file.
    plain = table.apply(lambda column: column if _of_one_type(column) else column.map(_as_text))
    plain.to_parquet(temporary)
    temporary.replace(folder.path / "sweep.parquet")
    sweep_page(folder, found)
    return table


def document(folder: SweepFolder, jobs: Sequence[Job], kind: Kind) -> dict[str, Any]:
    """What ``sweep.json`` holds: the rows, what was set in them, and how many jobs are in which state."""
    found = rows(folder, jobs, kind)
    counts: dict[str, int] = {}
    for state in {row["fingerprint"]: row["state"] for row in found}.values():
        counts[state] = counts.get(state, 0) + 1
    names = [*dict.fromkeys(name for job in jobs for name in job.point)]
    return {"schema": SCHEMA, "sweep": folder.name, "job": kind.name, "states": counts, "set": names, "rows": found}


def _of_one_type(column: Any) -> bool:
    return column.dtype != object or len({type(value) for value in column if value is not None}) <= 1


def _as_text(value: Any) -> str | None:
    return None if value is None else str(value)
