"""A second tile for each sample: another one of its micrograph."""

from __future__ import annotations

import numpy as np

from hpc.seeding import key, uniforms
from nanodist.shards.order import I64
from nanodist.shards.windows import Tiles


class GroupPartners:
    """Chooses for a sample a tile of its group (micrograph), itself included, keyed by (seed, epoch, sample).

    Attributes:
        group_of: (samples,) number of each sample's group.
    """

    def __init__(self, store: Tiles, seed: int) -> None:
        self._keys, self._seed = store.keys, seed
        _, self.group_of = np.unique(store.group_codes, return_inverse=True)
        self._members = np.argsort(self.group_of, kind="stable")
        self._sizes = np.bincount(self.group_of)
        self._first = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])

    def __call__(self, epochs: I64, indices: I64) -> I64:
        """Numbers (n,) of the partners of the samples ``indices`` in ``epochs``."""
        words = [key(self._seed, "partner", int(e), self._keys[i]) for e, i in zip(epochs, indices, strict=True)]
        groups = self.group_of[indices]
        place = np.floor(uniforms(words, 1)[:, 0] * self._sizes[groups]).astype(np.int64)
        return np.asarray(self._members[self._first[groups] + place], np.int64)
