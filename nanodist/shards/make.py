"""A rank's units made into pieces, by this process alone or by workers."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait

from hpc.errors import UserError
from hpc.progress import Progress
from nanodist.shards.convert import PackOptions
from nanodist.shards.pack_ranks import OtherRankFailed
from nanodist.shards.pieces import make_piece
from nanodist.shards.staging import Staging
from nanodist.shards.units import Unit

# What one process converts in about the time that another takes to start, twice.
_FILES_PER_WORKER = 32
_BYTES_PER_WORKER = 8 * 2**20


def make_pieces(units: Sequence[Unit], options: PackOptions, staging: Staging, workers: int, bar: Progress) -> None:
    """Make the pieces of ``units`` in ``staging``; stops between two of them once another rank has failed.

    Raises:
        UserError: an unreadable file; of several, the first.
        OtherRankFailed: another rank failed.
        OSError: the disk is full.
    """
    try:
        with _made(units, options, staging, workers) as counts:
            for count in counts:
                bar.update(count)
                if staging.stop.exists():
                    raise OtherRankFailed("another rank failed")
    except OtherRankFailed:
        raise
    except BaseException:
        staging.stop.touch()
        raise


def worker_count(asked: int | None, units: Sequence[Unit], cores: Callable[[], int]) -> int:
    """How many processes this rank takes: ``asked``, or as many as there are cores and work for them.

    ``cores`` asks the other ranks, so that every rank has to come here.

    Raises:
        UserError: a negative number.
    """
    if asked is not None and asked < 0:
        raise UserError(f"--workers is {asked}; it must be at least 0")
    most = cores()
    if asked is not None:
        return asked
    files, length = sum(len(unit.files) for unit in units), sum(unit.bytes for unit in units)
    return min(most, len(units), files // _FILES_PER_WORKER + length // _BYTES_PER_WORKER)


@contextmanager
def _made(units: Sequence[Unit], options: PackOptions, staging: Staging, workers: int) -> Iterator[Iterator[int]]:
    """Yield the numbers of micrographs in the units, in order, as their pieces become whole."""
    workers = min(workers, len(units))
    if workers <= 1:
        yield (make_piece(unit, options, staging.pieces) for unit in units)
        return
    # Spawned: forking a process that runs threads (torch, a notebook) can hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)
    try:
        yield _in_order(pool, units, options, staging, 4 * workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: end it when its parent was killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_exit, args=(parent.sentinel,), daemon=True).start()


def _wait_and_exit(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _in_order(
    pool: ProcessPoolExecutor, units: Sequence[Unit], options: PackOptions, staging: Staging, window: int
) -> Iterator[int]:
    left = iter(units)
    ahead: deque[Future[int]] = deque()
    while True:
        for unit in itertools.islice(left, window - len(ahead)):
            ahead.append(pool.submit(make_piece, unit, options, staging.pieces))
        if not ahead:
            return
        yield ahead.popleft().result()
