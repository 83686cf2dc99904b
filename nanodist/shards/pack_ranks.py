"""The processes that share one packing: who they are, and how they wait for each other.

Micrographs and samples go through files of the staging folder. Between the processes travel only what rank 0 decides
and how each of them fared, over torch.distributed's gloo, so that srun without MPI, mpiexec and torchrun all serve.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, TypeVar

from hpc import mpi, topology
from hpc.errors import UserError

T = TypeVar("T")

# A rank that is done may wait for the slowest one as long as a job can be.
_WAIT = datetime.timedelta(days=30)
_MEETING_S = 900.0
_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_UNKNOWN_RANKS = ("PMIX_RANK", "ALPS_APP_PE")


class OtherRankFailed(RuntimeError):
    """Another rank failed and says why; this one only stops."""


class Ranks:
    """One process alone: rank 0 of 1."""

    rank = 0
    size = 1

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, on every rank.

        Raises:
            OtherRankFailed: on the others, where rank 0 raised.
        """
        return work()

    def each(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` gives on every rank, in rank order, once all are done with it.

        Raises:
            OtherRankFailed: another rank raised; where several did, all but the lowest of them get this.
        """
        return [work()]


class Group(Ranks):
    """The ranks of a process group of torch.distributed."""

    def __init__(self, place: topology.Topology, group: Any) -> None:
        self.rank, self.size, self._group = place.rank, place.world_size, group

    def first(self, work: Callable[[], T]) -> T:
        """See :meth:`Ranks.first`."""
        from torch import distributed

        value: list[Any] = [None]

        def here() -> None:
            if self.rank == 0:
                value[0] = work()

        self.each(here)
        with _peers():
            distributed.broadcast_object_list(value, 0, group=self._group)
        return value[0]  # type: ignore[no-any-return]

    def each(self, work: Callable[[], T]) -> list[T]:
        """See :meth:`Ranks.each`."""
        error: Exception | None = None
        value: T | None = None
        try:
            value = work()
        except Exception as raised:
            error = raised
        answers = self._gather((error is None, value))
        failed = [rank for rank, (good, _) in enumerate(answers) if not good]
        if error is not None and failed[0] == self.rank:
            raise error
        if failed:
            raise OtherRankFailed(f"rank {failed[0]} failed") from error
        return [value for _, value in answers]

    def _gather(self, value: Any) -> list[Any]:
        from torch import distributed

        answers: list[Any] = [None] * self.size
        with _peers():
            distributed.all_gather_object(answers, value, group=self._group)
        return answers


@contextmanager
def _peers() -> Iterator[None]:
    """Say what gloo means when it loses a connection."""
    try:
        yield
    except RuntimeError as error:
        raise OtherRankFailed(
            "another process of this packing ended without a word, such as one that was killed for memory: give the "
            f"same command again, it goes on where it stopped ({str(error).splitlines()[0]})"
        ) from error


def find_place(environ: Mapping[str, str] = os.environ) -> topology.Topology:
    """The place of this process among those that its launcher started.

    Raises:
        UserError: the launcher's variables contradict each other, or this process takes itself for the only one of
            several, each of which would pack everything.
    """
    place = topology.detect(environ)
    if place.world_size == 1 and topology.MARK not in environ:
        _refuse_many_alone(place, environ)
    return place


def _refuse_many_alone(place: topology.Topology, environ: Mapping[str, str]) -> None:
    advice = "start the ranks with srun, mpiexec or torchrun, or one process alone (srun -n 1, mpiexec -n 1)"
    # sbatch and salloc describe the job's tasks as well where there is no step; only a step is several processes.
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    # Hydra starts its own processes as steps, one a node.
    in_step = step.isdigit() and "SLURM_PROCID" in environ and not mpi.started_by_mpi(environ)
    for name in _SIZES:
        size = environ.get(name, "")
        if size.isdigit() and int(size) > 1 and (name != "SLURM_STEP_NUM_TASKS" or in_step):
            raise UserError(
                f"this process is one of {size} ({name}), but takes itself for the only one ({place.launcher}), so "
                f"that each would pack everything: {advice}"
            )
    rank = next((name for name in _UNKNOWN_RANKS if environ.get(name, "0") != "0"), None)
    if place.launcher == "none" and rank is not None:
        raise UserError(f"this process is number {environ[rank]} of several ({rank}) of a launcher unknown: {advice}")


@contextmanager
def join(place: topology.Topology) -> Iterator[Ranks]:
    """The ranks of ``place``, joined for the time of a packing."""
    if place.world_size == 1:
        yield Ranks()
        return
    from torch import distributed

    topology.init_process_group(place, "cpu", _MEETING_S)
    try:
        yield Group(place, distributed.new_group(backend="gloo", timeout=_WAIT))
    finally:
        distributed.destroy_process_group()


def cores(ranks: Ranks) -> int:
    """This process's share of the cores of its machine, at least 1: what several ranks may use counts in parts."""
    mine = (socket.gethostname(), _affinity())
    seats = [seat for seat in ranks.each(lambda: mine) if seat[0] == mine[0]]
    share = sum(Fraction(1, sum(core in others for _, others in seats)) for core in mine[1])
    return max(1, int(share))


def _affinity() -> frozenset[int]:
    ask: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return frozenset(ask(0)) if ask else frozenset(range(os.cpu_count() or 1))
