"""The samples of one store in two parts that share no group."""

from __future__ import annotations

import numpy as np

from nanodist.decoding.reading import I64
from nanodist.shards.parts import Part, held_out
from nanodist.shards.store import Store


def split(store: Store, test_share: float = 0.3, seed: int = 0) -> dict[str, I64]:
    """Numbers of the samples to train on (``train``) and of those that are held out (``test``).

    Of each label, ``test_share`` of the groups are held out, at least one and never all; the choice depends on the
    names of labels and groups alone, and is that of ``nanodist pack --part``.

    Raises:
        UserError: a share outside (0, 1), or a label with a single group.
    """
    groups = store.groups
    test = held_out(store.labels, groups, Part("test", test_share, seed))
    held = np.asarray([group in test for group in groups], bool)
    return {"train": np.flatnonzero(~held), "test": np.flatnonzero(held)}
