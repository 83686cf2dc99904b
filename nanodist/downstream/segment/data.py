"""The masks of a segmentation: which images are trained on, and what their pixels are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from nanodist.downstream.features import Dataset, Part
from nanodist.downstream.finetune.data import Labels, stores_of
from nanodist.downstream.finetune.recipe import DecoderConfig, LabelsConfig
from nanodist.downstream.labels import encode
from nanodist.shards import Store
from nanodist.shards.companions import read_mask_bytes, read_mask_of

U8 = npt.NDArray[np.uint8]
MOST_CLASSES = 64


class Masks(Labels):
    """Samples with masks; ``data.labels_per_class`` counts images here, of which micrographs take turns.

    Args:
        config, decoder: the recipe's sections.

    Attributes:
        values: what stands in the masks for each class; (0, 1) where every object has a number of its own.

    Raises:
        UserError: no masks, a single micrograph, or more values than there are classes.
    """

    def __init__(self, config: LabelsConfig, decoder: DecoderConfig) -> None:
        store, test_store = stores_of(config)
        super().__init__(config, _masked(store, test_store))
        self._instances = decoder.masks == "instances"
        self._read: dict[int, npt.NDArray[Any]] = {}
        self._masks: dict[int, U8] = {}
        self.values: tuple[int, ...] = (0, 1) if self._instances else self._found()

    def _found(self) -> tuple[int, ...]:
        used = np.concatenate([self.train, self.validation, self.test])
        values = np.unique(np.concatenate([np.unique(self._raw(int(i))) for i in used]))
        if len(values) > MOST_CLASSES:
            raise UserError(
                f"the masks hold {len(values)} values, more than the {MOST_CLASSES} classes that are learned; set "
                "decoder.masks=instances where each object has a number of its own"
            )
        if len(values) < 2:
            raise UserError(f"every pixel of the masks is {values[0]}: there is nothing to tell apart")
        return tuple(int(v) for v in values)

    def _raw(self, number: int) -> npt.NDArray[Any]:
        """What stands in the mask of a sample, kept until :meth:`mask` has asked for it."""
        if number not in self._read:
            store, at = self.place(number)
            mask = read_mask_of(store, at)
            assert mask is not None  # only samples with masks are in the dataset
            self._read[number] = mask
        return self._read[number]

    def mask(self, number: int) -> U8:
        """The classes (H, W) of a sample, as places in :attr:`values`.

        Raises:
            SampleError: the mask is damaged.
        """
        if number not in self._masks:
            raw = self._raw(number)
            if self._instances:
                classes = (raw > 0).astype(np.uint8)
            else:
                classes = np.searchsorted(np.asarray(self.values), raw).astype(np.uint8)
            self._masks[number] = classes
            del self._read[number]
        return self._masks[number]


def _masked(store: Store, test_store: Store | None) -> Dataset:
    """All samples that have a mask; one class, so that draws count images."""
    stores = [store] if test_store is None else [store, test_store]
    parts, keys, groups, left_out = [], [], [], 0
    for each in stores:
        having = [i for i in range(len(each)) if read_mask_bytes(each, i) is not None]
        having.sort(key=lambda i: each.keys[i])
        if not having:
            raise UserError(f"store {each.path} has no masks; pack it with --masks images=masks")
        parts.append(Part(each, tuple(having), tuple(each.keys[i] for i in having)))
        keys += [each.keys[i] for i in having]
        groups.append([each.groups[i] for i in having])
        left_out += len(each) - len(having)
    names = [name for own in groups for name in own]
    targets = encode(["image"] * len(names), names)
    if test_store is None:
        if len(targets.group_names) < 2:
            raise UserError(f"{store.path}: its masks are of one micrograph, which cannot be on both sides of a split")
        return Dataset(tuple(parts), targets, tuple(keys), None, left_out)
    shared = sorted(set(groups[0]) & set(groups[1]))
    if shared:
        raise UserError(
            f"stores {store.path} and {test_store.path} share {len(shared)} micrograph(s), such as '{shared[0]}': "
            "a test on micrographs of the training says nothing; leave them out of one store"
        )
    fixed = np.arange(len(groups[0]), len(names), dtype=np.int64)
    return Dataset(tuple(parts), targets, tuple(keys), fixed, left_out)
