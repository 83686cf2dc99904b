"""Several stores as one, mixed in every batch by fixed shares; each keeps its own epochs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from nanodist.decoding.reading import I64, Blocks, JoinedReader
from nanodist.shards.index import Lazy
from nanodist.shards.order import Batches, MixedOrder, Order, shares
from nanodist.shards.store import SampleError, Store
from nanodist.shards.windows import Tiles, window_of


def make_order(store: Tiles, seed: int, global_batch_size: int, window_mb: int = 0) -> Batches:
    """The order of a run over ``store``: of one store, or of several that are mixed.

    Raises:
        UserError: a store with fewer samples than it has places in a batch.
    """
    if not isinstance(store, Mixture):
        return Order(len(store), seed, global_batch_size, window_of(store, window_mb))
    counts = shares(store.weights, global_batch_size)
    orders = []
    for part, count in zip(store.stores, counts, strict=True):
        if len(part) < count:
            raise UserError(
                f"{part.path} has {len(part)} samples and is to fill {count} of the {global_batch_size} places of each "
                "batch, in which none may come twice: give it a smaller weight, or choose a smaller batch"
            )
        orders.append(Order(len(part), seed, count, window_of(part, window_mb * count // global_batch_size)))
    return MixedOrder(orders)


class Mixture:
    """Stores whose samples are numbered on from each other's.

    Args:
        stores: of one depth and one size of tiles.
        weights: shares of each batch, in any unit; they are rounded to whole samples of a batch.

    Attributes:
        manifest_hash: over the stores' own hashes and the weights, in their order.

    Raises:
        UserError: stores that do not fit together.
    """

    def __init__(self, stores: Sequence[Store], weights: Sequence[float]) -> None:
        if len(stores) != len(weights) or not stores:
            raise UserError(f"{len(stores)} stores are mixed with {len(weights)} weights; give each its own")
        for one in stores[1:]:
            if one.dtype != stores[0].dtype or one.tile_sizes != stores[0].tile_sizes:
                both = (f"{s.path} has {s.dtype} tiles of {s.tile_sizes[0]}" for s in (stores[0], one))
                raise UserError(f"{' and '.join(both)}: stores that are mixed need one depth and one --tile")
        self.stores, self.weights = list(stores), [float(weight) for weight in weights]
        shares(self.weights, len(stores))  # refuses what is no weight
        self.path = " + ".join(str(store.path) for store in stores)
        facts = json.dumps([[s.manifest_hash, w] for s, w in zip(stores, self.weights, strict=True)])
        self.manifest_hash = hashlib.sha256(facts.encode()).hexdigest()
        self.starts = np.cumsum([0, *map(len, stores)])
        self.suffixes: list[str] = sorted({suffix for store in stores for suffix in store.suffixes})
        self._shards = np.cumsum([0, *(len(store.manifest.shards) for store in stores)])
        self.files = JoinedReader([(len(store.manifest.shards), store.files) for store in stores])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def keys(self) -> Sequence[str]:
        """``NUMBER_KEY``, with the number of the store in the mix: names of several stores may be the same."""
        return _MixedKeys(self)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pixels: uint8 or uint16."""
        return self.stores[0].dtype

    @property
    def tile_sizes(self) -> list[tuple[int, int]]:
        """The (height, width) that there are, each once."""
        return self.stores[0].tile_sizes

    def examples_of_sizes(self) -> tuple[str, str]:
        """See :meth:`Store.examples_of_sizes`."""
        return self.stores[0].examples_of_sizes()

    @property
    def shard_count(self) -> int:
        """How many shards there are."""
        return int(self._shards[-1])

    @property
    def shard_bytes(self) -> int:
        """Of all shards."""
        return sum(store.shard_bytes for store in self.stores)

    @property
    def costs_decoding(self) -> bool:
        """Whether any store's decoding takes much longer than reading."""
        return any(store.costs_decoding for store in self.stores)

    @cached_property
    def pixel_size_nm(self) -> npt.NDArray[np.float64]:
        """(samples, 2) nanometres a pixel as (y, x), NaN where unknown."""
        return np.concatenate([store.pixel_size_nm for store in self.stores])

    @cached_property
    def group_codes(self) -> npt.NDArray[Any]:
        """(samples,) whole numbers, the same for samples of one group of one store."""
        codes, base = [], 0
        for store in self.stores:
            codes.append(store.group_codes.astype(np.int64) + base)
            base = int(codes[-1].max()) + 1
        return np.concatenate(codes)

    @property
    def groups(self) -> list[str]:
        """The group of every sample."""
        return [f"{k}_{group}" for k, store in enumerate(self.stores) for group in store.groups]

    @property
    def group_names(self) -> list[str]:
        """The groups that there are, each once."""
        return sorted({name for store in self.stores for name in store.group_names})

    @property
    def statistics(self) -> dict[str, Any]:
        """Pixel ``mean`` and ``std`` of what the mix gives."""
        share = np.asarray(self.weights) / sum(self.weights)
        mean, std = (np.asarray([s.statistics[name] for s in self.stores], np.float64) for name in ("mean", "std"))
        middle = float(share @ mean)
        return {"mean": middle, "std": math.sqrt(float(share @ (std**2 + mean**2)) - middle**2)}

    @cached_property
    def blocks(self) -> Blocks | None:
        """Those of all stores; ``None`` where one has none."""
        every = [store.blocks for store in self.stores]
        blocks = [one for one in every if one is not None]
        if len(blocks) < len(every):
            return None
        first = [b.first[:-1] + start for b, start in zip(blocks, self.starts[:-1], strict=True)]
        shard = [b.shard + start for b, start in zip(blocks, self._shards[:-1], strict=True)]
        return Blocks(
            np.concatenate([*first, self.starts[-1:]]),
            np.concatenate(shard),
            np.concatenate([b.start for b in blocks]),
            np.concatenate([b.length for b in blocks]),
        )

    def rows(self, numbers: I64) -> I64:
        """Where samples lie; see :meth:`Store.rows`."""
        which = self._which(numbers)
        rows = np.empty((len(numbers), 5), np.int64)
        for k in np.unique(which).tolist():
            here, store = which == k, self.stores[k]
            part = store.rows(np.asarray(numbers)[here] - self.starts[k])
            part[:, 0] += self._shards[k]
            part[:, 4] = np.asarray([self.suffixes.index(suffix) for suffix in store.suffixes])[part[:, 4]]
            rows[here] = part
        return rows

    def range_of(self, i: int) -> tuple[int, int]:
        """First and last but one number of the samples of sample ``i``'s store."""
        k = int(self._which(np.asarray([i]))[0])
        return int(self.starts[k]), int(self.starts[k + 1])

    def read(self, i: int) -> npt.NDArray[Any]:
        """The pixels of sample ``i``; see :meth:`Store.read`."""
        low, _ = self.range_of(i)
        return self.stores[int(self._which(np.asarray([i]))[0])].read(i - low)

    def error(self, i: int, fault: str) -> SampleError:
        """What to raise about sample ``i``."""
        low, _ = self.range_of(i)
        return self.stores[int(self._which(np.asarray([i]))[0])].error(i - low, fault)

    def close(self) -> None:
        """Close the shard files; they open again when they are read."""
        self.files.close()

    def _which(self, numbers: I64) -> I64:
        return np.searchsorted(self.starts, numbers, side="right") - 1


class _MixedKeys(Lazy[str]):
    def __init__(self, mix: Mixture) -> None:
        self._mix = mix

    def __len__(self) -> int:
        return len(self._mix)

    def at(self, i: int) -> str:
        """See :class:`Lazy`."""
        k = int(np.searchsorted(self._mix.starts, i, side="right")) - 1
        return f"{k}_{self._mix.stores[k].keys[i - int(self._mix.starts[k])]}"

    def __iter__(self) -> Iterator[str]:
        for k, store in enumerate(self._mix.stores):
            for key in store.keys:
                yield f"{k}_{key}"
