"""A rank's part of every global batch, read ahead by threads or processes."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from nanodist.decoding.reading import BlockReader
from nanodist.shards.order import I64, Batches
from nanodist.shards.replace import read_numbers, stand_in
from nanodist.shards.windows import Tiles, block_plan
from nanodist.shards.workers import Allocate, Job, Source, Threads, build_team, own_cores

VERSION = 1


@dataclass(frozen=True)
class Batch:
    """One rank's contiguous part of a global batch.

    Attributes:
        step: number of the global batch.
        epochs: (n,) epoch of each sample.
        indices: (n,) number of each sample in the store.
        keys: of the samples.
        images: (n, H, W) uint8 or uint16.
        partners: (n, H, W), another tile for each sample where the loader was given a choice of partners.
        wait_seconds: how long the consumer waited for it.
    """

    step: int
    epochs: I64
    indices: I64
    keys: list[str]
    images: npt.NDArray[Any]
    partners: npt.NDArray[Any] | None
    wait_seconds: float


class Loader:
    """Iterates for ever over this rank's part of the global batches of ``order``.

    All ranks together pass over the global batch in ``micro_batches`` contiguous parts; of each, rank r of w takes the
    r-th of w equal pieces (:func:`places`). Its whole state is the next step.

    Args:
        store: tiles of one size; a store, or several of them mixed.
        order: which sample is where.
        rank: of this process.
        world_size: number of processes; a divisor of the global batch size.
        workers: processes that read and decode; 0 reads as batches are asked for; ``None`` takes what suits the
            encoding and the cores (:func:`nanodist.shards.workers.build_team`).
        read_ahead: batches that are in work before they are asked for.
        start_step: the first batch.
        partners: gives for (epochs, indices) the number of a second tile of each sample; a pure function.
        cache_mb: decoded tiles are kept in memory up to this size, so that a small store is decoded once; with an order
            in windows it keeps the blocks that are read in its place, where they fit.
        micro_batches: parts of the global batch that all ranks pass over in turn.
        corrupt: ``error``, or ``replace`` a sample that cannot be read by another (:mod:`nanodist.shards.replace`).
        ranks_here: ranks on this machine, which share its cores.
        allocate: makes the arrays of batches, such as in pinned memory.

    Attributes:
        replaced: samples that others stood in for, as (key, key of what stood in, fault), since the start.

    Raises:
        UserError: tiles of different sizes, an order over another number of samples, or an illegal world size.
    """

    def __init__(
        self,
        store: Tiles,
        order: Batches,
        rank: int,
        world_size: int,
        workers: int | None = 0,
        read_ahead: int = 2,
        start_step: int = 0,
        partners: Callable[[I64, I64], I64] | None = None,
        cache_mb: int = 0,
        micro_batches: int = 1,
        corrupt: Literal["error", "replace"] = "error",
        ranks_here: int = 1,
        allocate: Allocate | None = None,
    ) -> None:
        _check_world(order.global_batch_size, rank, world_size)
        self._places = places(order.global_batch_size, rank, world_size, micro_batches)
        if order.samples_total != len(store):
            raise UserError(f"the order is over {order.samples_total} samples and {store.path} has {len(store)}")
        if (workers is not None and workers < 0) or read_ahead < 1:
            raise UserError(f"the loader's workers ({workers}) must be at least 0 and read_ahead ({read_ahead}) 1")
        self.store, self.order, self.rank, self.world_size = store, order, rank, world_size
        self.size = order.global_batch_size // world_size
        self.read_ahead = read_ahead if workers != 0 else 0
        self.replaced: list[tuple[str, str, str]] = []
        self._tile = _one_size(store)
        self._step, self._partners, self._corrupt = start_step, partners, corrupt
        self._shape = (self.size * (2 if partners else 1), *self._tile)
        blocks, capacity = block_plan(store, order, world_size, cache_mb)
        self.in_blocks = blocks is not None
        files = BlockReader(store.files, blocks, capacity) if blocks is not None else store.files
        self.source = Source(files, store.suffixes, blocks, capacity)
        decoded = len(store) * self._tile[0] * self._tile[1] * store.dtype.itemsize
        cached = (cache_mb << 20) if not self.in_blocks else 0
        self._cache: dict[int, npt.NDArray[Any]] = {}
        # Of a store that is much larger, what lies in the cache would hardly ever be asked for.
        self._cached_most = cached * len(store) // decoded if decoded <= 4 * cached else 0
        costly = store.costs_decoding and (workers is not None or decoded > cached)
        cores, ahead = own_cores(ranks_here), self.read_ahead
        self._pinned = allocate
        self._team = build_team(
            self.source, workers, costly, cores, ahead, self._shape, store.dtype, allocate or np.empty
        )
        self._ahead: deque[_Pending] = deque()
        self._returned = -math.inf  # when the last batch was given out
        self._away = math.inf  # how long the consumer was away before it

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield next(self)

    def __next__(self) -> Batch:
        """The batch of the next step.

        Raises:
            UserError: a sample is damaged or gone; names shard and sample. The step stays the same.
        """
        begun = time.perf_counter()
        before, self._away = self._away, begun - self._returned  # of a single pause nothing is concluded
        wanted = 1 + (self.read_ahead if self._team.gains(min(before, self._away)) else 0)
        while len(self._ahead) < wanted:
            self._ahead.append(self._begin(self._step + len(self._ahead)))
        try:
            pending = self._finished(self._ahead[0])
        except BaseException:
            self._drop_ahead()
            raise
        self._ahead.popleft()
        self._step += 1
        keys = [self.store.keys[i] for i in pending.indices.tolist()]
        images = pending.job.images
        if self._pinned is not None and not isinstance(self._team, Threads):
            images = self._pinned(images.shape, images.dtype)
            images[:] = pending.job.images
        partners = images[self.size :] if len(images) > self.size else None
        self._returned = time.perf_counter()
        waited = self._returned - begun
        return Batch(pending.step, pending.epochs, pending.indices, keys, images[: self.size], partners, waited)

    def state_dict(self) -> dict[str, int]:
        """The next step: it does not depend on ranks, workers or what was read ahead."""
        return {"version": VERSION, "step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at the step of ``state``, which any number of ranks may have saved.

        Raises:
            UserError: state of another version.
        """
        if state.get("version") != VERSION:
            raise UserError(f"loader state has version {state.get('version')!r} and this nanodist reads {VERSION}")
        self._drop_ahead()
        self._step = int(state["step"])

    def close(self) -> None:
        """End threads and processes; batches that were read ahead are dropped. The loader reads no more."""
        self._ahead.clear()
        self._team.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, step: int) -> _Pending:
        epochs, indices = self.order.arrays(step)
        epochs, indices = epochs[self._places], indices[self._places]
        reads = indices if self._partners is None else np.concatenate([indices, self._partners(epochs, indices)])
        there = (
            np.asarray([i in self._cache for i in reads.tolist()], bool) if self._cache else np.zeros(len(reads), bool)
        )
        missing = np.flatnonzero(~there)
        job = self._team.begin(self.store.rows(reads[missing]), missing, self._shape, self.store.dtype)
        return _Pending(step, epochs, indices, reads, job, np.flatnonzero(there))

    def _finished(self, pending: _Pending) -> _Pending:
        """Wait for a batch, complete it from the cache, and deal with what could not be read."""
        faults = self._team.finish(pending.job)
        images, reads = pending.job.images, pending.reads.tolist()
        for place in pending.cached.tolist():
            images[place] = self._cache[reads[place]]
        bad = {place for place, _ in faults}
        if len(self._cache) < self._cached_most:
            for place in range(len(reads)):
                if place not in bad and len(self._cache) < self._cached_most and reads[place] not in self._cache:
                    self._cache[reads[place]] = images[place].copy()
        # What a disk or a network of this machine does is no property of the store: others would see other samples.
        fatal = (
            faults if self._corrupt == "error" else [f for f in faults if f[1].startswith("the shard cannot be read")]
        )
        if fatal:
            place, fault = min(fatal)
            raise self.store.error(reads[place], fault)
        for place, fault in sorted(faults):
            self._stand_in(pending, place, fault)
        return pending

    def _stand_in(self, pending: _Pending, place: int, fault: str) -> None:
        """Replace what could not be read at ``place`` of a batch."""
        images, bad = pending.job.images, int(pending.reads[place])
        if place >= self.size:  # a partner: the sample itself is one that it could have been
            images[place] = images[place - self.size]
            self.replaced.append(
                (self.store.keys[bad], self.store.keys[int(pending.indices[place - self.size])], fault)
            )
            return
        epoch = int(pending.epochs[place])
        taken = set(self.order.arrays(pending.step)[1].tolist())
        number = stand_in(self.store, self.order.seed, epoch, bad, taken, images[place], fault)
        pending.indices[place] = pending.reads[place] = number
        self._note(bad, number, fault)
        if self._partners is not None:
            partner = self._partners(pending.epochs[[place]], pending.indices[[place]])
            if read_numbers(self.store, partner, images[self.size + place][None]):
                images[self.size + place] = images[place]

    def _note(self, bad: int, number: int, fault: str) -> None:
        self.replaced.append((self.store.keys[bad], self.store.keys[number], fault))

    def _drop_ahead(self) -> None:
        for pending in self._ahead:
            with contextlib.suppress(UserError):
                self._team.finish(pending.job)  # processes answer in order: nothing may be left on the way
        self._ahead.clear()


def places(global_batch_size: int, rank: int, world_size: int, micro_batches: int = 1) -> I64:
    """The places of a global batch that a rank takes, micro-batch after micro-batch.

    Raises:
        UserError: the batch cannot be shared so.
    """
    piece, rest = divmod(global_batch_size, world_size * micro_batches)
    if rest:
        raise UserError(
            f"global_batch_size {global_batch_size} cannot be shared by {world_size} ranks in {micro_batches} "
            "micro-batches each"
        )
    grid = np.arange(global_batch_size, dtype=np.int64).reshape(micro_batches, world_size, piece)
    return grid[:, rank].reshape(-1)


@dataclass(frozen=True)
class _Pending:
    """A batch while it is being read; ``cached`` are the places that come from the cache."""

    step: int
    epochs: I64
    indices: I64
    reads: I64
    job: Job
    cached: I64


def _check_world(global_batch_size: int, rank: int, world_size: int) -> None:
    if world_size < 1 or global_batch_size % world_size:
        legal = [w for w in range(1, global_batch_size + 1) if global_batch_size % w == 0]
        raise UserError(
            f"global_batch_size {global_batch_size} cannot be shared by {world_size} ranks; "
            f"legal world sizes are {', '.join(map(str, legal))}"
        )
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} is not in a world of {world_size} ranks (0 to {world_size - 1})")


def _one_size(store: Tiles) -> tuple[int, int]:
    sizes = store.tile_sizes
    if len(sizes) > 1:
        (a, b), few = store.examples_of_sizes(), "which make no batch: pack with --tile PX"
        raise UserError(f"{store.path} has tiles of different sizes (sample {a}, sample {b}), {few}")
    return sizes[0]
