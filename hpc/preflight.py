"""What can be wrong with a place to run in, said before hours are burnt. Knows nothing of what is trained.

A check gives a list of :class:`Finding`; those with a ``world`` are collective and give all ranks the same list. None
of them raises for what it looks at.
"""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from hpc.collectives import Group, every, group_rank, group_size
from hpc.preflight_quota import room

GIB, MIB = 2**30, 2**20
MOST_CLOCK_SKEW_S = 2.0
_NAMED = 4
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One sentence: ``"ok"``, ``"warning"`` (worth a look) or ``"error"`` (a run would fail)."""

    level: Literal["ok", "warning", "error"]
    what: str


def errors(findings: Sequence[Finding]) -> list[str]:
    """The sentences of the errors."""
    return [finding.what for finding in findings if finding.level == "error"]


def size_text(count: float) -> str:
    """Bytes for people: ``"1.5 GiB"``, ``"20 MiB"``."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def merged(own: Sequence[Finding], world: Group, host: str) -> list[Finding]:
    """The findings of all ranks, each said once, with the ranks where only some have it; collective.

    What is ``"ok"`` is told by rank 0 alone.
    """
    gathered = every((host, list(dict.fromkeys(own))), world)
    where: dict[Finding, list[int]] = {}
    for rank, (_, findings) in enumerate(gathered):
        for finding in findings:
            if rank == 0 or finding.level != "ok":
                where.setdefault(finding, []).append(rank)
    everywhere = [f for f, ranks in where.items() if f.level == "ok" or len(ranks) == len(gathered)]
    return [
        finding
        if finding in everywhere
        else Finding(finding.level, f"{_ranks(ranks, [gathered[rank][0] for rank in ranks])}: {finding.what}")
        for finding, ranks in where.items()
    ]


def _ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """``rank 3 on node2``, or the first few of many."""
    names = list(dict.fromkeys(hosts))
    numbers = ", ".join(map(str, ranks[:_NAMED])) + (", ..." if len(ranks) > _NAMED else "")
    places = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers} on {places}"


def storage(path: Path, least_bytes: int, all_bytes: int, files: int) -> list[Finding]:
    """Whether ``path``, or the nearest parent that exists, can be written and has room.

    Args:
        path: the folder that will grow.
        least_bytes: without so much nothing works.
        all_bytes: what is wanted to the end.
        files: how many new files and folders.
    """
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not place.is_dir():
        return [Finding("error", f"{place} is a file and no folder, so {path} cannot be made")]
    try:
        # Asking for permission is not enough: read-only mounts, root squashing and full disks say yes.
        with tempfile.NamedTemporaryFile(prefix=".nanodist-", dir=place) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return [Finding("error", f"{place} cannot be written ({error.strerror or error}); choose another run_dir")]
    left = room(place)
    have = f"{size_text(left.bytes)} left in {place} ({left.source})"
    if left.bytes < least_bytes:
        return [Finding("error", f"{have}, but checkpoints need {size_text(least_bytes)}; free some or move run_dir")]
    if left.files is not None and left.files < files:
        return [Finding("error", f"{left.files} more files are allowed in {place} ({left.source}), {files} are needed")]
    if left.bytes < all_bytes:
        more = f"the checkpoints that stay will take {size_text(all_bytes)}; lower checkpoint.keep or keep_best"
        return [Finding("warning", f"{have}, but {more}, or raise keep_every_steps")]
    return [Finding("ok", f"{have}, checkpoints take up to {size_text(all_bytes)} in {files} files")]


def shared_folder(folder: Path, world: Group) -> list[Finding]:
    """Whether all ranks see the same ``folder``, which exists on rank 0; collective.

    Every rank reads checkpoints and writes its dumps there, so it cannot be the disk of one node.
    """
    rank, name = group_rank(world), ""
    if world is None:
        return []
    if rank == 0:
        with contextlib.suppress(OSError):
            name = Path(tempfile.mkdtemp(prefix=".nanodist-", dir=folder)).name
    name = every(name, world)[0]
    seen = bool(name) and _appears(folder / name)
    hosts = every(platform.node(), world)
    blind = [number for number, sees in enumerate(every(seen, world)) if not sees]
    if rank == 0 and name:
        with contextlib.suppress(OSError):
            (folder / name).rmdir()
    if not name or not blind:
        return []  # that rank 0 cannot write is told by storage()
    who = _ranks(blind, [hosts[number] for number in blind])
    return [Finding("error", f"{folder} of {hosts[0]} is not there for {who}; run_dir must be on a shared file system")]


def _appears(path: Path, timeout_s: float = 2.0) -> bool:
    # Network file systems may show a new name a moment later.
    end = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def agreement(facts: Mapping[str, str | None], world: Group, host: str) -> list[Finding]:
    """Whether the clocks of all ranks agree within 2 s, and ``facts`` (versions by name) altogether; collective."""
    if world is None:
        return []
    every(None, world)  # all ranks leave this within the time of a message
    gathered = every((host, time.time(), dict(facts)), world)
    times = [told for _, told, _ in gathered]
    found = []
    for name in facts:
        first = gathered[0][2].get(name)
        others = [rank for rank, (_, _, told) in enumerate(gathered) if told.get(name) != first]
        if others:
            who = _ranks(others, [gathered[rank][0] for rank in others])
            what = f"{name} {gathered[others[0]][2].get(name)}, rank 0 on {gathered[0][0]} {first}"
            found.append(Finding("error", f"{who}: {what}; all ranks must run the same software"))
    skew = max(times) - min(times)
    if skew > MOST_CLOCK_SKEW_S:
        late, early = gathered[times.index(max(times))][0], gathered[times.index(min(times))][0]
        found.append(
            Finding("warning", f"the clock of {late} is {skew:.1f} s ahead of that of {early}; logs will contradict")
        )
    if not found:
        found.append(Finding("ok", f"{len(gathered)} ranks agree on {', '.join(facts)}; clocks within {skew:.2f} s"))
    return found


@dataclass(frozen=True)
class Exchange:
    """What an all-reduce was measured at, the slowest rank counting: seconds for 8 bytes, and bytes a second.

    The bandwidth is that of the link ("bus bandwidth"): an all-reduce of n bytes sends 2 n (w - 1) / w of each rank.
    """

    latency_s: float
    bytes_per_s: float

    def seconds(self, count: float, world_size: int) -> float:
        """How long an all-reduce of ``count`` bytes would take."""
        return self.latency_s + 2 * count * (world_size - 1) / world_size / self.bytes_per_s


def all_reduce(world: Group, device: torch.device | str, count: int = 4 * MIB) -> tuple[list[Finding], Exchange | None]:
    """A tiny all-reduce: whether its sum is right, and how fast it is; collective."""
    if world is None:
        return [], None
    size, rank = group_size(world), group_rank(world)
    small = torch.full((2,), float(rank + 1), device=device)
    dist.all_reduce(small, group=world)  # the first one makes connections
    total = small[0].item()
    large = torch.zeros(count // 4, device=device)
    latency = _timed(small.zero_(), world, 5)
    slow = _timed(large, world, 1)
    # Again where that is quick enough for a better figure; all ranks have the same times.
    seconds = min(slow, _timed(large, world, 3)) if slow < 0.1 else slow
    speed = 2 * count * (size - 1) / size / max(seconds - latency, 1e-9)
    if total != size * (size + 1) / 2:
        return [Finding("error", f"the sum of 1 to {size} over the ranks came out as {total}: a broken network")], None
    what = f"all-reduce over {size} ranks: {1e6 * latency:.0f} us for 8 bytes, {speed / 1e9:.2f} GB/s per link"
    return [Finding("ok", what)], Exchange(latency, speed)


def _timed(tensor: torch.Tensor, world: Group, repeats: int) -> float:
    """Seconds of the quickest of ``repeats`` all-reduces, on the slowest rank."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        dist.all_reduce(tensor, group=world)
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        best = min(best, time.perf_counter() - start)
    slowest = torch.tensor(best, dtype=torch.float64, device=tensor.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=world)
    return float(slowest.item())
