"""Orders that suit a store, and the memory in which their blocks are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from nanodist.decoding.reading import BLOCK_BYTES, I64, Blocks
from nanodist.shards.order import Batches, MixedOrder, Order, Window


class Tiles(Protocol):
    """What a loader and a task need of a store, or of several stores mixed."""

    path: Any
    files: Any
    manifest_hash: str

    def __len__(self) -> int: ...

    @property
    def keys(self) -> Sequence[str]:
        """The key of every sample."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pixels: uint8 or uint16."""
        ...

    @property
    def suffixes(self) -> list[str]:
        """Endings of the members, as :meth:`rows` counts them."""
        ...

    @property
    def tile_sizes(self) -> list[tuple[int, int]]:
        """The (height, width) that there are, each once."""
        ...

    @property
    def blocks(self) -> Blocks | None:
        """Runs of samples that are read at once."""
        ...

    @property
    def shard_count(self) -> int:
        """How many shards there are."""
        ...

    @property
    def shard_bytes(self) -> int:
        """Of all shards."""
        ...

    @property
    def costs_decoding(self) -> bool:
        """Whether decoding takes much longer than reading."""
        ...

    @property
    def pixel_size_nm(self) -> npt.NDArray[np.float64]:
        """(samples, 2) nanometres a pixel as (y, x), NaN where unknown."""
        ...

    @property
    def group_codes(self) -> npt.NDArray[Any]:
        """(samples,) whole numbers, the same for samples of one group."""
        ...

    @property
    def group_names(self) -> list[str]:
        """The groups that there are, each once."""
        ...

    @property
    def statistics(self) -> dict[str, Any]:
        """Pixel ``mean`` and ``std`` among others."""
        ...

    def rows(self, numbers: I64) -> I64:
        """Where samples lie, as :func:`nanodist.decoding.reading.read_rows` takes it."""
        ...

    def range_of(self, i: int) -> tuple[int, int]:
        """First and last but one number of the samples of sample ``i``'s store."""
        ...

    def read(self, i: int) -> npt.NDArray[Any]:
        """The pixels of sample ``i``."""
        ...

    def error(self, i: int, fault: str) -> UserError:
        """What to raise about sample ``i``."""
        ...

    def examples_of_sizes(self) -> tuple[str, str]:
        """Two samples of different sizes, in words."""
        ...


def window_of(store: Any, window_mb: int) -> Window | None:
    """The window of ``window_mb`` MiB of a store; ``None`` where the store fits into it, so that it is all shuffled.

    It depends on the store alone, and so does the order.
    """
    if window_mb <= 0 or store.shard_bytes <= window_mb << 20 or store.blocks is None:
        return None
    return Window(store.blocks.first, max(1, (window_mb << 20) * len(store) // store.shard_bytes))


def block_plan(store: Tiles, order: Batches, world_size: int, cache_mb: int) -> tuple[Blocks | None, int]:
    """The blocks to read at once, and the bytes to keep them in; ``None`` reads sample by sample.

    Two windows of this rank's lanes have to fit into ``cache_mb``, and the blocks at their edges.
    """
    orders = order.orders if isinstance(order, MixedOrder) else [order]
    need = 0
    for part in orders:
        if not isinstance(part, Order) or part.window is None:
            return None, 0
        share = part.window.samples / part.samples_total * store.shard_bytes * part.samples_total / len(store)
        need += int(2 * share / world_size) + 4 * BLOCK_BYTES * -(-part.lanes // world_size)
    capacity = cache_mb << 20
    return (store.blocks, capacity) if need <= capacity else (None, 0)
