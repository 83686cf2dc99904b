"""The labels of a fine-tuning: which samples are trained on, which choose the step, and which are the test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from nanodist.downstream.features import Dataset, labelled
from nanodist.downstream.finetune.recipe import LabelsConfig
from nanodist.downstream.labels import Targets, check_splittable, draw_order, first, hold_out, short_classes, without
from nanodist.downstream.probe import Split, split_within
from nanodist.shards import Order, Store
from nanodist.shards.loader import places

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
# The seed of the probe's splits and draws, so that both see the same labels.
PROTOCOL_SEED = 0


def stores_of(config: LabelsConfig) -> tuple[Store, Store | None]:
    """The store, and the test store where there is one.

    Raises:
        UserError: there is no such store.
    """
    if not config.store:
        raise UserError("data.store is not set; give data.store=FOLDER, a store packed with --labels or --masks")
    return Store.open(config.store), Store.open(config.test_store) if config.test_store else None


class Labels:
    """Labelled samples of one or two stores, and their parts; no micrograph is in two of them.

    Args:
        config: the recipe's section.
        dataset: what it says, where that is not by the labels of the stores.

    Attributes:
        dataset: all labelled samples; the numbers below are theirs.
        train, validation, test: numbers of samples.
        short: classes that have fewer labels than were asked for, with what they have.

    Raises:
        UserError: no labels, a class that cannot be split by micrograph, or stores that share a micrograph.
    """

    def __init__(self, config: LabelsConfig, dataset: Dataset | None = None) -> None:
        self.dataset: Dataset = labelled(*stores_of(config)) if dataset is None else dataset
        targets, every = self.targets, np.arange(len(self.dataset.targets.y), dtype=np.int64)
        if self.dataset.fixed_test is not None:
            split = Split(config.split_seed, without(every, self.dataset.fixed_test), self.dataset.fixed_test)
        else:
            if dataset is None:
                check_splittable(targets, every, config.store)
            split = split_within(targets, config.test_share, PROTOCOL_SEED, config.split_seed)
        orders = draw_order(targets, split.train, PROTOCOL_SEED, split.seed, config.draw_seed)
        self.short = short_classes(targets, orders, config.budget)
        drawn = first(orders, config.budget)
        self.test, self.validation = split.test, np.zeros(0, np.int64)
        enough = config.labels_per_class == 0 or config.labels_per_class >= config.validation_from
        if config.validation_share and enough:
            words = (config.split_seed, config.draw_seed)
            self.validation = hold_out(
                targets, drawn, config.validation_share, PROTOCOL_SEED, "finetune-validation", *words
            )
        self.train = without(drawn, self.validation)
        self._images: dict[int, npt.NDArray[np.generic]] = {}
        self._room = config.cache_mb << 20

    @property
    def targets(self) -> Targets:
        """Classes and micrographs of all samples."""
        return self.dataset.targets

    @property
    def learned(self) -> I64:
        """Numbers of the samples that were trained on or chose the step, ascending."""
        return np.sort(np.concatenate([self.train, self.validation]))

    def place(self, number: int) -> tuple[Store, int]:
        """The store of a sample, and its number there."""
        for part in self.dataset.parts:
            if number < len(part.indices):
                return part.store, part.indices[number]
            number -= len(part.indices)
        raise IndexError(number)

    def image(self, number: int) -> npt.NDArray[np.generic]:
        """The pixels (H, W) of a sample, uint8 or uint16.

        Raises:
            SampleError: it is damaged; names shard and sample.
        """
        image = self._images.get(number)
        if image is None:
            store, at = self.place(number)
            image = store.read(at)
            if image.nbytes <= self._room:
                self._images[number], self._room = image, self._room - image.nbytes
        return image

    def pixel_sizes(self, numbers: I64) -> F64:
        """(n, 2) nanometres a pixel as (y, x), NaN where unknown."""
        found = (self.place(int(i)) for i in numbers)
        return np.stack([store.samples.columns["pixel_size_nm"][at] for store, at in found]).astype(np.float64)

    def check_one_size(self) -> tuple[int, int]:
        """Height and width of the samples that are trained on.

        Raises:
            UserError: they differ, so that they make no batch; names two of them.
        """
        sizes: dict[tuple[int, int], str] = {}
        for number in self.train.tolist():
            store, at = self.place(number)
            sample = store.samples[at]
            sizes.setdefault((sample.height, sample.width), sample.key)
        if len(sizes) > 1:
            (one, a), (other, b) = list(sizes.items())[:2]
            raise UserError(
                f"the labelled tiles have different sizes (sample {a} is {one[0]} x {one[1]}, sample {b} is "
                f"{other[0]} x {other[1]}), which make no batch: pack with --tile PX"
            )
        return next(iter(sizes))


@dataclass(frozen=True)
class LabelledBatch:
    """This rank's part of a global batch.

    Attributes:
        numbers: (n,) samples of the dataset; ``epochs`` (n,) when they come.
        images: (n, H, W) uint8 or uint16.
    """

    step: int
    epochs: I64
    numbers: I64
    keys: list[str]
    images: npt.NDArray[np.generic]
    wait_seconds: float


def batches(
    labels: Labels, seed: int, batch_size: int, rank: int, world_size: int, micro_batches: int, start_step: int
) -> Iterator[LabelledBatch]:
    """This rank's part of every global batch from ``start_step`` on, without end: a pure function of its arguments."""
    order = Order(len(labels.train), seed, batch_size)
    mine = places(batch_size, rank, world_size, micro_batches)
    step = start_step
    while True:
        epochs, indices = (values[mine] for values in order.arrays(step))
        numbers = labels.train[indices]
        images = np.stack([labels.image(int(i)) for i in numbers])
        keys = [labels.dataset.keys[i] for i in numbers]
        yield LabelledBatch(step, epochs, numbers, keys, images, 0.0)
        step += 1
