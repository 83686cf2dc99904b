"""Which sample stands at which place of which global batch: a pure function of a seed."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from hpc.seeding import permutation

I64 = npt.NDArray[np.int64]
_EPOCHS_KEPT = 3


class Order:
    """The endless sequence of global batches over ``samples_total`` samples.

    Epoch after epoch of keyed permutations is laid end to end and cut into batches, so that every batch is full and
    each sample comes exactly once an epoch. A batch across the end of an epoch holds its tail and the head of the
    next one; heads are changed (see :meth:`epoch`) so that no sample is twice in one batch. Nothing depends on ranks,
    workers, or what was asked before.

    Args:
        samples_total: number of samples, at least ``global_batch_size``.
        seed: the run's seed.
        global_batch_size: samples of one optimizer step, over all ranks.

    Raises:
        UserError: fewer samples than one global batch.
    """

    def __init__(self, samples_total: int, seed: int, global_batch_size: int) -> None:
        if global_batch_size < 1:
            raise UserError(f"global_batch_size is {global_batch_size}; it must be at least 1")
        if samples_total < global_batch_size:
            raise UserError(
                f"the store has {samples_total} samples, fewer than global_batch_size {global_batch_size}: "
                "choose a smaller batch or pack more micrographs"
            )
        self.samples_total, self.seed, self.global_batch_size = samples_total, seed, global_batch_size
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
            before = self._drawn(epoch - 1) if before is None else before  # their tails are the same
            return self._keep(epoch, self._joined(self._drawn(epoch), before, epoch))
        start = max((e for e in self._cache if e < epoch), default=0)
        made = self._made(start)
        for later in range(start + 1, epoch + 1):
            made = self._keep(later, self._joined(self._drawn(later), made, later))
        return made

    def _drawn(self, epoch: int) -> I64:
        return permutation(self.samples_total, self.seed, "order", epoch)

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
        tail = before[self.samples_total - tail_length :]
        in_tail = np.zeros(self.samples_total, bool)
        in_tail[tail] = True
        conflicts = np.flatnonzero(in_tail[order[:head_length]])
        # These tail_length places are enough, since the samples of the tail that are not in the head are fewer by as
        # many as are; so only the first global_batch_size places of an epoch ever change.
        later = np.arange(head_length, self.global_batch_size)
        partners = later[~in_tail[order[later]]][: len(conflicts)]
        order[conflicts], order[partners] = order[partners], order[conflicts]
        return order
