"""Names a slow host. Ranks wait for each other in every collective, so that only work before the first one tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from hpc.collectives import Group
from hpc.topology import Topology

RATIO, LEAST_SECONDS = 1.5, 0.02
LINES_IN_A_ROW = 5


class SlowHosts:
    """Adds each rank's own work up (waiting for data, making views) and compares the ranks at every log line.

    Args:
        topology: this rank.
        world: group of all ranks; ``None`` for one process, which is compared with nobody.
        device: whose time counts.
    """

    def __init__(self, topology: Topology, world: Group, device: torch.device) -> None:
        self._world, self._device, self._is_main = world, device, topology.is_main
        self._seconds, self._steps = 0.0, 0
        self._slow_rank, self._slow_lines = -1, 0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._hosts = [topology.host]
        if world is not None:
            self._hosts = [""] * dist.get_world_size(world)
            dist.all_gather_object(self._hosts, topology.host, group=world)

    @contextmanager
    def own_work(self) -> Iterator[None]:
        """Around work of this rank in which no other rank takes part."""
        if self._device.type == "cuda":
            # The device is not waited for here: the events are read once the step's loss has been.
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()  # type: ignore[no-untyped-call]
            yield
            ended.record()  # type: ignore[no-untyped-call]
            self._events = (began, ended)
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def stepped(self, waited: float) -> None:
        """One more step is done, which waited so many seconds for its data."""
        if self._events is not None:
            self._seconds += self._events[0].elapsed_time(self._events[1]) / 1e3
            self._events = None
        self._seconds += waited
        self._steps += 1

    def line(self, warn: Callable[[str], None]) -> dict[str, float]:
        """``slowest_rank`` and its ``slowest_rank_ratio`` to the median of the others since the last call; collective.

        ``warn`` is told on rank 0 once a rank needed 1.5 times the median of the others, and 20 ms a step more than it,
        at five calls in a row: a shared core slows now this rank, now that one.
        """
        own = self._seconds / max(self._steps, 1)
        self._seconds, self._steps = 0.0, 0
        if self._world is None:
            return {}
        every = torch.zeros(len(self._hosts), dtype=torch.float64, device=self._device)
        every[dist.get_rank(self._world)] = own
        dist.all_reduce(every, group=self._world)
        rank = int(every.argmax())
        others = torch.cat([every[:rank], every[rank + 1 :]])
        median = float(others.quantile(0.5))
        ratio = float(every[rank]) / max(median, 1e-9)
        slow = ratio > RATIO and float(every[rank]) - median > LEAST_SECONDS
        self._slow_lines = self._slow_lines + 1 if slow and rank == self._slow_rank else int(slow)
        self._slow_rank = rank
        if self._is_main and self._slow_lines == LINES_IN_A_ROW:
            warn(
                f"rank {rank} on {self._hosts[rank]} is slow: {1e3 * float(every[rank]):.0f} ms of its own work a step "
                f"(data, views), {1e3 * median:.0f} ms on the other ranks; all ranks wait for it"
            )
        return {"slowest_rank": rank, "slowest_rank_ratio": ratio}
