"""A rank's part of every global batch, read ahead by threads."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from nanodist.shards.order import I64, Order
from nanodist.shards.store import Store

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
        store: tiles of one size.
        order: which sample is where.
        rank: of this process.
        world_size: number of processes; a divisor of the global batch size.
        workers: threads that read and decode (decoding lets go of the interpreter); 0 reads as batches are asked for.
        read_ahead: batches that threads have in work before they are asked for.
        start_step: the first batch.
        partners: gives for (epochs, indices) the number of a second tile of each sample; a pure function.
        cache_mb: decoded tiles are kept in memory up to this size, so that a small store is decoded once.
        micro_batches: parts of the global batch that all ranks pass over in turn.

    Raises:
        UserError: tiles of different sizes, an order over another number of samples, or an illegal world size.
    """

    def __init__(
        self,
        store: Store,
        order: Order,
        rank: int,
        world_size: int,
        workers: int = 0,
        read_ahead: int = 2,
        start_step: int = 0,
        partners: Callable[[I64, I64], I64] | None = None,
        cache_mb: int = 0,
        micro_batches: int = 1,
    ) -> None:
        _check_world(order.global_batch_size, rank, world_size)
        self._places = places(order.global_batch_size, rank, world_size, micro_batches)
        if order.samples_total != len(store):
            raise UserError(f"the order is over {order.samples_total} samples and {store.path} has {len(store)}")
        if workers < 0 or read_ahead < 1:
            raise UserError(f"the loader's workers ({workers}) must be at least 0 and read_ahead ({read_ahead}) 1")
        self.store, self.order, self.rank, self.world_size = store, order, rank, world_size
        self.size = order.global_batch_size // world_size
        self.workers, self.read_ahead = workers, read_ahead
        self._tile = _one_size(store)
        self._step = start_step
        self._partners = partners
        self._cache: dict[int, npt.NDArray[Any]] = {}
        tile_bytes = self._tile[0] * self._tile[1] * store.dtype.itemsize
        self._cached_most = (cache_mb << 20) // tile_bytes
        self._pool = ThreadPoolExecutor(workers, "nanodist-loader") if workers else None
        self._ahead: deque[_Pending] = deque()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield next(self)

    def __next__(self) -> Batch:
        """The batch of the next step.

        Raises:
            UserError: a sample is damaged or gone; names shard and sample. The step stays the same.
        """
        begun = time.perf_counter()
        if self._pool is None:
            pending = self._begin(self._step)
            self._fill(pending, 0, len(pending.reads))
        else:
            pending = self._from_ahead(self._pool)
        self._step += 1
        keys = [self.store.keys[i] for i in pending.indices]
        waited = time.perf_counter() - begun
        images = pending.images
        partners = images[self.size :] if len(images) > self.size else None
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
        """End the threads; batches that were read ahead are dropped. The loader reads no more."""
        if self._pool is not None:
            self._drop_ahead()
            self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, step: int) -> _Pending:
        epochs, indices = self.order.arrays(step)
        epochs, indices = epochs[self._places], indices[self._places]
        reads = indices if self._partners is None else np.concatenate([indices, self._partners(epochs, indices)])
        images = np.empty((len(reads), *self._tile), self.store.dtype)
        return _Pending(step, epochs, indices, reads, images, [])

    def _fill(self, pending: _Pending, start: int, stop: int) -> None:
        for place in range(start, stop):
            pending.images[place] = self._read(int(pending.reads[place]))

    def _read(self, i: int) -> npt.NDArray[Any]:
        tile = self._cache.get(i)
        if tile is None:
            tile = self.store.read(i)
            if len(self._cache) < self._cached_most:
                self._cache[i] = tile
        return tile

    def _from_ahead(self, pool: ThreadPoolExecutor) -> _Pending:
        while len(self._ahead) < self.read_ahead + 1:
            pending = self._begin(self._step + len(self._ahead))
            count = len(pending.reads)
            cuts = np.linspace(0, count, min(self.workers, count) + 1).astype(int).tolist()
            for start, stop in itertools.pairwise(cuts):
                pending.parts.append(pool.submit(self._fill, pending, start, stop))
            self._ahead.append(pending)
        try:
            for part in self._ahead[0].parts:
                part.result()
        except BaseException:
            self._drop_ahead()
            raise
        return self._ahead.popleft()

    def _drop_ahead(self) -> None:
        while self._ahead:
            for part in self._ahead.popleft().parts:
                part.cancel()


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
    """A batch while it is being read."""

    step: int
    epochs: I64
    indices: I64
    reads: I64
    images: npt.NDArray[Any]
    parts: list[Future[None]]


def _check_world(global_batch_size: int, rank: int, world_size: int) -> None:
    if world_size < 1 or global_batch_size % world_size:
        legal = [w for w in range(1, global_batch_size + 1) if global_batch_size % w == 0]
        raise UserError(
            f"global_batch_size {global_batch_size} cannot be shared by {world_size} ranks; "
            f"legal world sizes are {', '.join(map(str, legal))}"
        )
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} is not in a world of {world_size} ranks (0 to {world_size - 1})")


def _one_size(store: Store) -> tuple[int, int]:
    heights, widths = store.samples.columns["height"], store.samples.columns["width"]
    differs = np.flatnonzero((heights != heights[0]) | (widths != widths[0]))
    if len(differs):
        a, b = store.samples[0], store.samples[int(differs[0])]
        raise UserError(
            f"{store.path} has tiles of different sizes (sample {a.key} is {a.height} x {a.width}, sample {b.key} is "
            f"{b.height} x {b.width}), which make no batch: pack with --tile PX"
        )
    return int(heights[0]), int(widths[0])
