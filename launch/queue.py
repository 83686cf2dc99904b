"""Allocations of a sweep: how they are submitted, which of them are still in the queue, and how they are ended."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc.errors import UserError
from launch.records import SweepFolder
from launch.resources import SlurmResources
from launch.submit import make_executor
from launch.worker import Allocation, run_here

_ASK_EVERY_S = 30.0
_DEFAULT_MOST_IN_ARRAY = 1000
_asked: tuple[float, frozenset[str] | None] = (float("-inf"), None)


def submit_allocations(
    folder: SweepFolder,
    packs: Sequence[tuple[str, ...]],
    cluster: str,
    resources: SlurmResources,
    max_parallel: int,
    side_by_side: int,
) -> Sequence[Any]:
    """Submit each pack of jobs as one allocation; in Slurm as members of job arrays.

    Raises:
        UserError: the cluster is unknown or takes none.
    """
    if not packs:
        return []
    if cluster == "debug":
        for pack in packs:
            run_here(folder, pack)
        return []
    if resources.nodes * resources.tasks() > 1:
        raise UserError("the jobs of a sweep are processes alone: nodes and tasks_per_node must be 1; see side_by_side")
    allocations = [Allocation(str(folder.path), pack, side_by_side) for pack in packs]
    logs = folder.path / "submitit"
    most = _most_in_array() if cluster == "slurm" else 1
    submitted: list[Any] = []
    for start in range(0, len(allocations), most):
        part = allocations[start : start + most]
        executor = make_executor(resources, cluster, logs, f"sweep-{folder.name}", min(max_parallel, len(part)))
        if cluster == "local":
            _wait_for_room(submitted, max_parallel)
        try:
            with executor.batch():
                jobs = [executor.submit(allocation) for allocation in part]
        except (RuntimeError, OSError, _failed_submission()) as error:
            raise UserError(f"the sweep cannot be submitted to {cluster}: {' '.join(str(error).split())}") from None
        for job, allocation in zip(jobs, part, strict=True):
            folder.add_allocation(str(job.job_id), cluster, allocation.fingerprints)
        submitted += jobs
    return submitted


def _failed_submission() -> type[Exception]:
    import submitit

    return submitit.core.utils.FailedSubmissionError  # type: ignore[no-any-return]


def _wait_for_room(jobs: Sequence[Any], most: int) -> None:
    """A machine is no queue: wait until fewer than ``most`` run."""
    while sum(not job.done() for job in jobs) >= most:
        time.sleep(0.2)


def _most_in_array() -> int:
    """``MaxArraySize`` of the cluster."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, IndexError):
        said = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=30, check=True)
        line = next(line for line in said.stdout.splitlines() if line.startswith("MaxArraySize"))
        return max(1, int(line.split("=")[1]))
    return _DEFAULT_MOST_IN_ARRAY


def queued() -> frozenset[str]:
    """Numbers of the user's jobs that Slurm has, as ``12_3``; asked for once in 30 s, for all jobs together."""
    global _asked
    if _asked[1] is None or time.monotonic() - _asked[0] > _ASK_EVERY_S:
        command = ["squeue", "--me", "--noheader", "--array", "--format=%F_%K %A"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise UserError(f"squeue cannot be asked which jobs are in the queue: {error}") from None
        rows = [line.split() for line in said.splitlines() if line.strip()]
        _asked = (time.monotonic(), frozenset(name for row in rows for name in (row[0], row[1])))
    return _asked[1] or frozenset()


def forget() -> None:
    """What Slurm was asked is out of date, since something was submitted or cancelled."""
    global _asked
    _asked = (float("-inf"), None)


def active_jobs(folder: SweepFolder) -> frozenset[str]:
    """Fingerprints of jobs whose allocation is in the queue or runs, and which are not final."""
    found: set[str] = set()
    for line in folder.allocations():
        if all(folder.record(name).final for name in line["fingerprints"]):
            continue
        if _is_active(line):
            found |= {name for name in line["fingerprints"] if not folder.record(name).final}
    return frozenset(found)


def _is_active(line: dict[str, Any]) -> bool:
    if line["cluster"] == "slurm":
        return line["id"] in queued()
    try:
        command = Path(f"/proc/{line['id']}/cmdline").read_bytes()
    except OSError:
        return False
    return b"submitit" in command


def cancel(folder: SweepFolder, fingerprints: Sequence[str]) -> list[str]:
    """End jobs, and nothing else in their allocations; those that were not over, by fingerprint."""
    ended = []
    for name in fingerprints:
        record = folder.record(name)
        if record.final:
            continue
        folder.cancel_mark(name).touch()
        ended.append(name)
    active = active_jobs(folder)
    for name in ended:
        if name not in active:  # nobody will come to see the mark
            folder.write(name, folder.record(name).finished("cancelled", 0.0, 0.0))
    _cancel_idle(folder)
    return ended


def _cancel_idle(folder: SweepFolder) -> None:
    """Take allocations out of the queue all of whose jobs are over or to be ended."""
    for line in folder.allocations():
        names = line["fingerprints"]
        over = all(folder.record(name).final or folder.cancel_mark(name).exists() for name in names)
        waits = all(folder.record(name).state != "running" for name in names)
        unfinished = any(not folder.record(name).final for name in names)
        if not (over and waits and unfinished and _is_active(line)):
            continue
        if line["cluster"] == "slurm":
            subprocess.run(["scancel", line["id"]], check=False, timeout=60)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line["id"]), 15)
        for name in names:
            if not folder.record(name).final:
                folder.write(name, folder.record(name).finished("cancelled", 0.0, 0.0))
    forget()
