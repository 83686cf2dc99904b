"""Who reads a loader's batches: the thread that asks for them, threads of their own, or processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from nanodist.decoding.reading import I64, Blocks, read_rows
from nanodist.decoding.worker import Slots

Fault = tuple[int, str]
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], npt.NDArray[Any]]
_MOST_WORKERS = 8
# Of a batch, per thread, where it is decoded. Raw tiles stay one part: two threads on them get in each other's way.
_PARTS = 4
# A consumer that is away for less than this part of the time that a batch takes leaves none to read it meanwhile: to
# hand it over to a thread, and to keep more batches in the processor's cache, would only cost.
_IDLE = 0.25


@dataclass
class Job:
    """A batch while it is read: its images, and what remains to be waited for."""

    images: npt.NDArray[Any]
    parts: list[tuple[Future[list[Fault]], Callable[[], list[Fault]]]] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """What there is to read, for :func:`nanodist.decoding.reading.read_rows`."""

    files: Any
    suffixes: Sequence[str]
    blocks: Blocks | None
    capacity: int


class Team(Protocol):
    """Reads batches that were begun, in the order in which they were."""

    def begin(self, rows: I64, places: I64, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Job:
        """Start to read ``rows`` into the ``places`` of new images of ``shape``."""
        ...

    def finish(self, job: Job) -> list[Fault]:
        """Wait until a batch is read; what could not be."""
        ...

    def gains(self, idle_seconds: float) -> bool:
        """Whether to read ahead pays for a consumer that was away for ``idle_seconds`` before it asked again."""
        ...

    def close(self) -> None:
        """End it; what was begun is dropped."""
        ...


class Threads:
    """Threads, which decode side by side as decoders let go of the interpreter; with 0, the caller itself.

    Who waits for a batch helps: it reads those of its ``parts`` a thread that none has begun, from the batch's end.
    Where a batch is one part, its consumer reads it itself as long as it leaves no time to read it meanwhile.
    """

    def __init__(self, source: Source, threads: int, allocate: Allocate = np.empty, parts: int = 1) -> None:
        self._source, self._allocate, self._pieces = source, allocate, max(1, threads * parts)
        self._pool = ThreadPoolExecutor(threads, "nanodist-loader") if threads else None
        self._reads_here, self._seconds = threads == 0, 0.0

    def begin(self, rows: I64, places: I64, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Job:
        """See :meth:`Team.begin`."""
        job = Job(self._allocate(shape, dtype))
        for start, stop in cuts(len(rows), self._pieces):
            source, at = self._source, places[start:stop].tolist()
            read = partial(self._read, rows[start:stop], source.suffixes, source.files, job.images, at)
            if self._pool is None or self._reads_here:
                job.faults += read()
            else:
                job.parts.append((self._pool.submit(read), read))
        return job

    def _read(self, *what: Any) -> list[Fault]:
        begun = time.perf_counter()
        faults = read_rows(*what)
        self._seconds = time.perf_counter() - begun
        return faults

    def finish(self, job: Job) -> list[Fault]:
        """See :meth:`Team.finish`."""
        parts, job.parts = job.parts, []  # a batch that failed is finished again before it is dropped
        for future, read in reversed(parts):
            if future.cancel():
                job.faults += read()
        for future, _ in parts:
            if not future.cancelled():
                job.faults += future.result()
        return job.faults

    def gains(self, idle_seconds: float) -> bool:
        """See :meth:`Team.gains`."""
        if self._pieces == 1:
            self._reads_here = self._pool is None or idle_seconds < _IDLE * self._seconds
        return not self._reads_here

    def close(self) -> None:
        """See :meth:`Team.close`."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class Processes:
    """Processes that decode into memory which they share with this one; the first batches are read here meanwhile.

    Args:
        source: what there is to read.
        workers: processes.
        ahead: batches that are in work at a time.
        shape: (n, H, W) of a batch.
        dtype: of its pixels.
    """

    def __init__(self, source: Source, workers: int, ahead: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._source, self._shape, self._dtype = source, shape, dtype
        slots = ahead + 3  # those that are read, that which is used, and those that a careless consumer keeps
        length = slots * Slots.bytes_of(shape, dtype.str)
        handle = os.memfd_create("nanodist-loader")
        try:
            os.truncate(handle, length)
            self._slots = Slots(mmap.mmap(handle, length), slots, shape, dtype.str)
            spec = reader_spec(source, workers) | {
                "memory": handle,
                "length": length,
                "slots": slots,
                "shape": shape,
                "dtype": dtype.str,
            }
            self._workers = [_start(spec, handle) for _ in range(workers)]
        finally:
            os.close(handle)
        self._free = list(range(slots))
        self._ready = [False] * workers

    def begin(self, rows: I64, places: I64, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Job:
        """See :meth:`Team.begin`."""
        if not self._free or not self._all_ready():
            job = Job(np.empty(shape, dtype))
            job.faults += read_rows(rows, self._source.suffixes, self._source.files, job.images, places.tolist())
            return job
        slot = self._free.pop()
        table = self._slots.table(slot)
        table[: len(rows), :5], table[: len(rows), 5] = rows, places
        images = self._slots.images(slot)
        # The slot is free again once nobody holds an array of it: its memoryview is what they all refer to.
        weakref.finalize(_owner(images), self._free.append, slot)
        job = Job(images)
        for (start, stop), worker in zip(cuts(len(rows), len(self._workers)), self._workers, strict=False):
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # said when its answer lacks
                worker.stdin.write(b"".join(value.to_bytes(4, "little") for value in (slot, start, stop)))
                worker.stdin.flush()
            job.waiting.append(len(job.waiting))
        return job

    def finish(self, job: Job) -> list[Fault]:
        """See :meth:`Team.finish`."""
        while job.waiting:  # each is asked once, also where one of them is gone
            worker = self._workers[job.waiting.pop(0)]
            job.faults += [(int(place), str(fault)) for place, fault in json.loads(_line(worker))]
        return job.faults

    def gains(self, idle_seconds: float) -> bool:
        """See :meth:`Team.gains`: processes read while others wait, too."""
        return True

    def close(self) -> None:
        """See :meth:`Team.close`."""
        for worker in self._workers:
            worker.kill()  # it only reads
        for worker in self._workers:
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            worker.wait()

    def _all_ready(self) -> bool:
        """Whether all processes run; does not wait for them."""
        import select

        for k, worker in enumerate(self._workers):
            assert worker.stdout is not None
            if not self._ready[k] and select.select([worker.stdout], [], [], 0)[0]:
                _line(worker)
                self._ready[k] = True
        return all(self._ready)


def _owner(array: npt.NDArray[Any]) -> Any:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.base


def _line(worker: subprocess.Popen[bytes]) -> bytes:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line.endswith(b"\n"):
        code = worker.wait()
        raise UserError(
            f"a loader process ended with code {code}, most likely for memory: take fewer data.workers, or a smaller "
            "data.cache_mb"
        )
    return line


def _start(spec: dict[str, Any], handle: int) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    worker = subprocess.Popen(
        [sys.executable, "-m", "nanodist.decoding.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(handle,),
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(spec).encode() + b"\n")
    worker.stdin.flush()
    return worker


def reader_spec(source: Source, workers: int) -> dict[str, Any]:
    """What a process needs to read the same bytes, as JSON; the capacity for blocks is shared by the workers."""
    inner = getattr(source.files, "inner", source.files)
    parts = inner.parts if hasattr(inner, "parts") else [inner]
    blocks = source.blocks
    arrays = None
    if blocks is not None:
        arrays = {name: getattr(blocks, name).tolist() for name in ("first", "shard", "start", "length")}
    return {
        "parts": [part.spec() for part in parts],
        "suffixes": list(source.suffixes),
        "blocks": arrays,
        "capacity": source.capacity // workers,
    }


def cuts(count: int, parts: int) -> list[tuple[int, int]]:
    """``count`` places in up to ``parts`` runs."""
    edges = np.linspace(0, count, min(parts, count) + 1).astype(int).tolist()
    return list(itertools.pairwise(edges))


def own_cores(ranks_here: int = 1) -> int:
    """This rank's share of the cores that it may run on, at least 1."""
    ask: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    cores = len(ask(0)) if ask else os.cpu_count() or 1
    return max(1, cores // max(1, ranks_here))


def build_team(
    source: Source,
    workers: int | None,
    costs_decoding: bool,
    cores: int,
    ahead: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    allocate: Allocate = np.empty,
) -> Team:
    """Who reads: ``workers`` processes, the caller itself (0), or what suits the data and the cores (``None``).

    Raw tiles are read by one thread: handing them over costs more than their decoding. What is costly to decode is
    given to processes where there are cores beside the one that trains. Where memory cannot be shared by
    ``memfd_create`` (not Linux), threads take the place of processes.
    """
    parts = _PARTS if costs_decoding else 1
    if workers is None:
        workers = min(_MOST_WORKERS, cores - 1) if costs_decoding and cores > 2 else 0
        if workers == 0:
            return Threads(source, 1, allocate, parts)
    if workers == 0 or not costs_decoding or not hasattr(os, "memfd_create"):
        return Threads(source, workers if costs_decoding else min(workers, 1), allocate, parts)
    return Processes(source, workers, ahead, shape, dtype)
