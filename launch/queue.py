"""Allocations of a sweep: how they are submitted, which of them are still in the queue, and how they are ended."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc.errors import UserError
from launch.records import Job, SweepFolder
from launch.resources import SlurmResources
from launch.submit import environment_of, make_executor
from launch.worker import Allocation, Chunk, run_here

_ASK_EVERY_S = 30.0
_DEFAULT_MOST_IN_ARRAY = 1000
_asked: tuple[float, frozenset[str] | None] = (float("-inf"), None)


@dataclass(frozen=True)
class How:
    """How allocations are submitted.

    Attributes:
        cluster: slurm, local or debug.
        resources: of each allocation.
        max_parallel: allocations at a time.
        pack: jobs an allocation.
        side_by_side: of these, how many run at once.
    """

    cluster: str = "slurm"
    resources: SlurmResources = field(default_factory=SlurmResources)
    max_parallel: int = 64
    pack: int = 1
    side_by_side: int = 1


def submit_jobs(folder: SweepFolder, jobs: Sequence[Job], how: How) -> Sequence[Any]:
    """Submit jobs, packed, and before them the helpers that they need and that are not done.

    Raises:
        UserError: the cluster is unknown or takes none.
    """
    needed = dict.fromkeys(name for job in jobs for name in job.needs)
    waiting = [name for name in needed if folder.record(name).state != "done"]
    active = active_jobs(folder)
    absent = [name for name in waiting if name not in active]
    for name in absent:
        folder.write(name, folder.record(name).anew())
    handles = submit_allocations(folder, [(name,) for name in absent], how, required=True)
    if how.cluster == "local":
        for handle in handles:
            handle.exception()  # a machine is no queue: what needs them cannot wait there
    if how.cluster != "slurm":
        # Those whose helper failed stay missing, with its reason.
        jobs = [job for job in jobs if all(folder.record(name).state == "done" for name in job.needs)]
        waiting = []
    numbers = {line["id"]: line["fingerprints"] for line in folder.allocations()}
    groups: dict[tuple[str, ...], list[str]] = {}
    for job in jobs:
        groups.setdefault(tuple(name for name in job.needs if name in waiting), []).append(job.fingerprint)
    submitted = [*handles]
    for needs, names in groups.items():
        packs = [tuple(names[i : i + how.pack]) for i in range(0, len(names), max(1, how.pack))]
        # The last allocation of a helper is the one that has it now.
        after = [next(number for number in reversed(numbers) if name in numbers[number]) for name in needs]
        conditions = [f"afterok:{number}" for number in after] if how.cluster == "slurm" else []
        submitted += submit_allocations(folder, packs, how, after=conditions)
    return submitted


def submit_allocations(
    folder: SweepFolder,
    packs: Sequence[tuple[str, ...]],
    how: How,
    after: Sequence[str] = (),
    required: bool = False,
) -> Sequence[Any]:
    """Submit each pack of jobs as one allocation; in Slurm as members of job arrays.

    Args:
        folder: of the sweep.
        packs: fingerprints of each allocation.
        how: see :class:`How`.
        after: conditions of Slurm on other jobs.
        required: an allocation fails where a job of it does, so that what depends on it is not started.

    Raises:
        UserError: the cluster is unknown or takes none.
    """
    if how.cluster == "debug":
        for pack in packs:
            run_here(folder, pack)
        return []
    allocations = [Allocation(str(folder.path), pack, how.side_by_side, required=required) for pack in packs]
    described = [{"fingerprints": list(pack)} for pack in packs]
    return _submit_all(folder, allocations, described, how, after)


def submit_chunks(folder: SweepFolder, listed: str, part: str, count: int, how: How, after: Sequence[str]) -> list[str]:
    """Submit allocations for jobs that are not known yet, but will be when ``after`` has come true.

    Args:
        folder: of the sweep.
        listed: ``jobs`` or ``helpers``.
        part: of the list, which another job writes.
        count: jobs at most.
        how: see :class:`How`.
        after: conditions of Slurm on other jobs.

    Returns:
        Numbers of Slurm.

    Raises:
        UserError: Slurm takes none.
    """
    size = max(1, how.pack) if listed == "jobs" else 1
    slices = [(begin, min(begin + size, count)) for begin in range(0, count, size)]
    home, side = str(folder.path), how.side_by_side
    chunks = [
        Chunk(home, (), side, required=listed == "helpers", listed=listed, part=part, slice=one) for one in slices
    ]
    described = [{"list": listed, "part": part, "slice": list(one)} for one in slices]
    return [str(job.job_id) for job in _submit_all(folder, chunks, described, how, after)]


def _submit_all(
    folder: SweepFolder,
    allocations: Sequence[Allocation],
    described: Sequence[dict[str, Any]],
    how: How,
    after: Sequence[str],
) -> list[Any]:
    resources, cluster = how.resources, how.cluster
    if not allocations:
        return []
    if resources.nodes * resources.tasks() > 1:
        raise UserError("the jobs of a sweep are processes alone: nodes and tasks_per_node must be 1; see side_by_side")
    logs = folder.path / "submitit"
    most = _most_in_array() if cluster == "slurm" else 1
    submitted: list[Any] = []
    for start in range(0, len(allocations), most):
        part = allocations[start : start + most]
        parallel = min(how.max_parallel, len(part))
        executor = make_executor(resources, cluster, logs, f"sweep-{folder.name}", parallel, after)
        if cluster == "local":
            _wait_for_room(submitted, how.max_parallel)
        try:
            with environment_of(executor), executor.batch():
                jobs = [executor.submit(allocation) for allocation in part]
        except (RuntimeError, OSError, _failed_submission()) as error:
            raise UserError(f"the sweep cannot be submitted to {cluster}: {' '.join(str(error).split())}") from None
        for job, what in zip(jobs, described[start : start + most], strict=True):
            size = {"gpus": resources.gpus_per_node, "cpus": resources.cpus_per_task, "at_once": how.side_by_side}
            folder.add_allocation(str(job.job_id), cluster, **what, **size)
        submitted += jobs
    forget()
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
            words = ((getattr(error, "stderr", None) or "").strip() or str(error)).splitlines()[-1]
            raise UserError(f"squeue cannot be asked which jobs are in the queue: {words}") from None
        rows = [line.split() for line in said.splitlines() if line.strip()]
        _asked = (time.monotonic(), frozenset(name for row in rows for name in (row[0], row[1])))
    return _asked[1] or frozenset()


def forget() -> None:
    """What Slurm was asked is out of date, since something was submitted or cancelled."""
    global _asked
    _asked = (float("-inf"), None)


def active_jobs(folder: SweepFolder) -> frozenset[str]:
    """Fingerprints of jobs (and helpers) whose allocation is in the queue or runs, and which are not final."""
    open_jobs: dict[str, bool] = {}

    def is_open(name: str) -> bool:
        if name not in open_jobs:
            open_jobs[name] = not folder.record(name).final
        return open_jobs[name]

    found: set[str] = set()
    for line in folder.allocations():
        left = [name for name in line["fingerprints"] if is_open(name)]
        if left and _is_active(line):
            found.update(left)
    return frozenset(found)


def is_in_queue(cluster: str, number: str) -> bool:
    """Whether a job that was submitted has not ended."""
    return _is_active({"cluster": cluster, "id": number})


def _is_active(line: dict[str, Any]) -> bool:
    if line["cluster"] == "slurm":
        return line["id"] in queued()
    try:
        command = Path(f"/proc/{line['id']}/cmdline").read_bytes()
    except OSError:
        return False
    return b"submitit" in command


def withdraw(number: str) -> None:
    """Take a job of Slurm out of the queue."""
    subprocess.run(["scancel", number], check=False, timeout=60)
    forget()


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
