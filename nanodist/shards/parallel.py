"""Jobs over processes, with results in their order."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

J = TypeVar("J")
R = TypeVar("R")


def results(work: Callable[[J], R], jobs: Sequence[J], workers: int) -> Iterator[R]:
    """``work`` of each of ``jobs``, in this process where ``workers`` is 1."""
    if workers <= 1:
        yield from map(work, jobs)
        return
    # "spawn", since forking a process that holds threads (BLAS, torch) can hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(work, jobs, chunksize=max(1, min(16, len(jobs) // (4 * workers))))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
