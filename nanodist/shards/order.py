"""Which sample stands at which place of which global batch: a pure function of a seed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from hpc.seeding import generator, permutation, permutation_tail

I64 = npt.NDArray[np.int64]
_EPOCHS_KEPT = 3
_MOST_LANES = 64


class Batches(Protocol):
    """An endless sequence of global batches: :class:`Order`, or several of them mixed."""

    samples_total: int
    seed: int
    global_batch_size: int

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (epoch, sample index) of each place of the global batch of ``step`` (from 0)."""
        ...

    def arrays(self, step: int) -> tuple[I64, I64]:
        """:meth:`batch` as two arrays of length ``global_batch_size``: epochs and sample indices."""
        ...

    def steps_of(self, sample: int, near: int, count: int = 3) -> list[int]:
        """The ``count`` steps (from 0) nearest to step ``near`` whose batch holds ``sample``."""
        ...


@dataclass(frozen=True)
class Window:
    """What an order over a store that is too large to be read at random knows of it.

    Attributes:
        first: (blocks + 1,) number of the first sample of each run of samples that is read at once, and of all samples.
        samples: about how many samples are shuffled among each other, over all lanes.
    """

    first: I64
    samples: int


class Order:
    """The endless sequence of global batches over ``samples_total`` samples.

    Epoch after epoch of keyed permutations is laid end to end and cut into batches, so that every batch is full and
    each sample comes exactly once an epoch. A batch across the end of an epoch holds its tail and the head of the
    next one; heads are changed (see :meth:`epoch`) so that no sample is twice in one batch. Nothing depends on ranks,
    workers, or what was asked before.

    With a ``window`` an epoch is no permutation of everything, which would be read in pieces of one sample. Its blocks
    (runs of samples that lie side by side) are permuted and dealt to lanes; a lane fills the same places of every
    batch, and shuffles its samples within a window that moves on over its blocks. As a rank takes the same places of
    every batch as well, each block is needed by one rank, during one window.

    Args:
        samples_total: number of samples, at least ``global_batch_size``.
        seed: the run's seed.
        global_batch_size: samples of one optimizer step, over all ranks.
        window: blocks and window; ``None`` permutes all samples.

    Raises:
        UserError: fewer samples than one global batch.
    """

    def __init__(self, samples_total: int, seed: int, global_batch_size: int, window: Window | None = None) -> None:
        if global_batch_size < 1:
            raise UserError(f"global_batch_size is {global_batch_size}; it must be at least 1")
        if samples_total < global_batch_size:
            raise UserError(
                f"the store has {samples_total} samples, fewer than global_batch_size {global_batch_size}: "
                "choose a smaller batch or pack more micrographs"
            )
        self.samples_total, self.seed, self.global_batch_size = samples_total, seed, global_batch_size
        self.window = window
        self.lanes = max(d for d in range(1, _MOST_LANES + 1) if global_batch_size % d == 0)
        self._cache: OrderedDict[int, I64] = OrderedDict()
        self._lock = threading.Lock()

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (epoch, sample index) of each place of the global batch of ``step`` (from 0)."""
        epochs, indices = self.arrays(step)
        return list(zip(epochs.tolist(), indices.tolist(), strict=True))

    def arrays(self, step: int) -> tuple[I64, I64]:
        """:meth:`batch` as two arrays of length ``global_batch_size``: epochs and sample indices."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        places = step * self.global_batch_size + np.arange(self.global_batch_size, dtype=np.int64)
        epochs, offsets = np.divmod(places, self.samples_total)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self.epoch(int(epoch))[offsets[here]]
        return epochs, indices

    def steps_of(self, sample: int, near: int, count: int = 3) -> list[int]:
        """The ``count`` steps (from 0) nearest to step ``near`` whose batch holds ``sample``."""
        middle = max(near, 0) * self.global_batch_size // self.samples_total
        steps = []
        for epoch in range(max(0, middle - 2), middle + 3):
            place = epoch * self.samples_total + int(np.flatnonzero(self.epoch(epoch) == sample)[0])
            steps.append(place // self.global_batch_size)
        return sorted(sorted(steps, key=lambda step: abs(step - near))[:count])

    def epoch(self, epoch: int) -> I64:
        """The samples of one epoch in their order: a permutation of ``range(samples_total)``, read-only.

        Let the last batch of epoch e hold r samples of e and h of e+1. Where one of those h is among those r, it
        changes places with the next later sample of epoch e+1 that is not. With at least two batches an epoch the
        places changed never reach the epoch's own last batch, so that each epoch can be made without those before it;
        with fewer, epochs are made from the first one on.
        """
        with self._lock:
            return self._made(epoch)

    def _made(self, epoch: int) -> I64:
        if epoch in self._cache:
            self._cache.move_to_end(epoch)
            return self._cache[epoch]
        if epoch == 0:
            return self._keep(0, self._drawn(0))
        if self.samples_total >= 2 * self.global_batch_size:
            before = self._cache.get(epoch - 1)
            before = self._drawn(epoch - 1, tail=True) if before is None else before  # their tails are the same
            return self._keep(epoch, self._joined(self._drawn(epoch), before, epoch))
        start = max((e for e in self._cache if e < epoch), default=0)
        made = self._made(start)
        for later in range(start + 1, epoch + 1):
            made = self._keep(later, self._joined(self._drawn(later), made, later))
        return made

    def _drawn(self, epoch: int, tail: bool = False) -> I64:
        """What an epoch is before its head is joined to the epoch before; with ``tail`` only its last places are."""
        if self.window is None and tail:
            return permutation_tail(self.samples_total, self.global_batch_size, self.seed, "order", epoch)
        if self.window is None:
            return permutation(self.samples_total, self.seed, "order", epoch)
        return self._in_blocks(epoch, self.window)

    def _in_blocks(self, epoch: int, window: Window) -> I64:
        total, size = self.samples_total, self.global_batch_size
        first = window.first
        blocks = permutation(len(first) - 1, self.seed, "blocks", epoch)
        lengths = (first[1:] - first[:-1])[blocks]
        # The samples, block after block: each block's numbers count up from its first.
        run = np.arange(total) + np.repeat(first[:-1][blocks] - (np.cumsum(lengths) - lengths), lengths)
        places = (epoch * total + np.arange(total)) % size
        lane = (places * self.lanes // size).astype(np.uint8)
        by_lane = np.argsort(lane, kind="stable")  # the places of each lane in time's order, lane after lane
        counts = np.bincount(lane, minlength=self.lanes)
        begins = np.repeat(np.cumsum(counts) - counts, counts)
        length = max(1, window.samples // self.lanes)
        within = (np.arange(total) - begins) // length
        # Windows of all lanes one after the other, shuffled by one sort.
        number = np.cumsum(np.append(True, (within[1:] != within[:-1]) | (begins[1:] != begins[:-1]))) - 1
        # Window, draw and place in one number each: a plain sort is several times faster than one of places.
        place_bits, window_bits = total.bit_length(), int(number[-1]).bit_length()
        draws = generator(self.seed, "order", epoch).integers(0, 2 ** (63 - place_bits - window_bits), total)
        mixed = np.sort((number << (63 - window_bits)) | (draws << place_bits) | np.arange(total))
        order = np.empty(total, np.int64)
        order[by_lane] = run[mixed & ((1 << place_bits) - 1)]
        return order

    def _keep(self, epoch: int, order: I64) -> I64:
        order.setflags(write=False)
        self._cache[epoch] = order
        while len(self._cache) > _EPOCHS_KEPT:
            self._cache.popitem(last=False)
        return order

    def _joined(self, order: I64, before: I64, epoch: int) -> I64:
        """``order`` with its head free of what the batch that it shares with ``before`` already holds."""
        tail_length = (epoch * self.samples_total) % self.global_batch_size
        if tail_length == 0:
            return order
        head_length = self.global_batch_size - tail_length
        tail = before[len(before) - tail_length :]
        in_tail = np.zeros(self.samples_total, bool)
        in_tail[tail] = True
        conflicts = np.flatnonzero(in_tail[order[:head_length]])
        # These tail_length places are enough, since the samples of the tail that are not in the head are fewer by as
        # many as are; so only the first global_batch_size places of an epoch ever change.
        later = np.arange(head_length, self.global_batch_size)
        partners = later[~in_tail[order[later]]][: len(conflicts)]
        order[conflicts], order[partners] = order[partners], order[conflicts]
        return order


class MixedOrder:
    """Several orders in one batch, each with its fixed number of places, evenly spread over the batch.

    The numbers of the samples of the k-th order begin where those before it end. Each order keeps its own epochs, so
    that each store's samples come exactly once in each of them.

    Args:
        orders: one for each store; their batch sizes add up to that of the mix.
    """

    def __init__(self, orders: Sequence[Order]) -> None:
        self.orders = list(orders)
        self.seed = orders[0].seed
        self.global_batch_size = sum(order.global_batch_size for order in orders)
        self.starts = np.cumsum([0, *(order.samples_total for order in orders)])
        self.samples_total = int(self.starts[-1])
        # Place (j + 1/2) / n of n, for every order: whatever piece of a batch a rank takes holds all of them.
        centres = np.concatenate([(np.arange(n) + 0.5) / n for n in (order.global_batch_size for order in orders)])
        self._places = np.argsort(np.argsort(centres, kind="stable"), kind="stable")

    def batch(self, step: int) -> list[tuple[int, int]]:
        """See :meth:`Order.batch`; the epoch is that of the sample's own store."""
        epochs, indices = self.arrays(step)
        return list(zip(epochs.tolist(), indices.tolist(), strict=True))

    def arrays(self, step: int) -> tuple[I64, I64]:
        """See :meth:`Order.arrays`."""
        parts = [order.arrays(step) for order in self.orders]
        epochs, indices = np.empty(self.global_batch_size, np.int64), np.empty(self.global_batch_size, np.int64)
        epochs[self._places] = np.concatenate([part[0] for part in parts])
        indices[self._places] = np.concatenate(
            [part[1] + start for part, start in zip(parts, self.starts, strict=False)]
        )
        return epochs, indices

    def steps_of(self, sample: int, near: int, count: int = 3) -> list[int]:
        """See :meth:`Order.steps_of`."""
        which = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return self.orders[which].steps_of(sample - int(self.starts[which]), near, count)


def shares(weights: Sequence[float], global_batch_size: int) -> list[int]:
    """Whole places in a batch in proportion to ``weights``, at least one for each, by largest remainder.

    Raises:
        UserError: a weight that is not positive, or a batch that is too small.
    """
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"the weights of mixed stores are {', '.join(map(str, weights))}; each must be more than 0")
    if global_batch_size < len(weights):
        raise UserError(f"global_batch_size {global_batch_size} is too small for {len(weights)} stores")
    exact = np.asarray(weights, np.float64) / sum(weights) * global_batch_size
    counts = np.maximum(1, np.floor(exact)).astype(int)
    while counts.sum() != global_batch_size:
        if counts.sum() < global_batch_size:
            counts[int(np.argmax(exact - counts))] += 1
        else:
            counts[int(np.argmax(np.where(counts > 1, counts - exact, -np.inf)))] -= 1
    return [int(count) for count in counts]
