"""The pairs of a PairVAE: split by specimen, held in memory, and batches whose every draw is keyed by its sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from hpc.seeding import key, permutation, uniforms
from nanodist.pairvae.images import check_large_enough, crop, fits, prepared, transformation
from nanodist.pairvae.recipe import PairDataConfig, PairModelConfig
from nanodist.scattering.pattern import Pattern, QGrid
from nanodist.shards import Order
from nanodist.shards.loader import places

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


class Pairs(Protocol):
    """What is asked of a pair store, see :class:`nanodist.pairvae.pairs.PairStore`."""

    keys: tuple[str, ...]
    samples: tuple[str, ...]
    grid: QGrid
    reference: float
    manifest_hash: str

    def pattern(self, i: int) -> Pattern | None:
        """The pattern of item ``i``."""
        ...

    def micrograph(self, i: int) -> tuple[npt.NDArray[np.uint8], tuple[float, float]] | None:
        """Pixels, and pixel size (y, x) in nm, of item ``i``."""
        ...

    def truth(self, i: int) -> dict[str, Any]:
        """What is known of item ``i`` from its synthesis."""
        ...


def split(samples: Sequence[str], test_share: float, seed: int) -> tuple[I64, I64]:
    """Numbers of the training and of the test items; no specimen is in both.

    Raises:
        UserError: fewer than two specimens, where some are to be held out.
    """
    names = sorted(set(samples))
    held = round(test_share * len(names))
    if test_share and (held == 0 or held == len(names)):
        raise UserError(
            f"data.test_share {test_share:g} of {len(names)} specimens holds out {held}: pack more, or set 0"
        )
    order = permutation(len(names), seed, "pairvae-split")
    test = {names[i] for i in order[:held]}
    out = np.array([name in test for name in samples])
    return np.flatnonzero(~out), np.flatnonzero(out)


class PairData:
    """The pairs of a recipe.

    Args:
        store: a pair store.
        config: the recipe's section.

    Attributes:
        train, test: numbers of items.
        pixel_size_nm: of all crops.

    Raises:
        UserError: nothing to train on, or a micrograph that is smaller than a crop.
    """

    def __init__(self, store: Pairs, config: PairDataConfig) -> None:
        self.store, self.config = store, config
        self.train, self.test = split(store.samples, config.test_share, config.split_seed)
        if not len(self.train):
            raise UserError("data.test_share leaves nothing to train on")
        self._patterns: dict[int, Pattern | None] = {}
        self._images: dict[int, F32 | None] = {}
        self.pixel_size_nm = config.pixel_size_nm or self._median_pixel()
        for name, look in (("saxs", self.pattern), ("sem", self.image)):
            if all(look(int(i)) is None for i in self.train):
                raise UserError(f"none of the {len(self.train)} training items has a {name} member")

    def _median_pixel(self) -> float:
        found = [self.store.micrograph(int(i)) for i in self.train]
        sizes = [size for entry in found if entry is not None for size in entry[1]]
        if not sizes:
            raise UserError(f"none of the {len(self.train)} training items has a sem member")
        return float(np.median(sizes))

    def pattern(self, number: int) -> Pattern | None:
        """The pattern of an item."""
        if number not in self._patterns:
            self._patterns[number] = self.store.pattern(number)
        return self._patterns[number]

    def image(self, number: int) -> F32 | None:
        """The micrograph of an item as it is learned, see :func:`nanodist.pairvae.images.prepared`."""
        if number not in self._images:
            self._images[number] = self._prepared(number)
        return self._images[number]

    def _prepared(self, number: int) -> F32 | None:
        entry = self.store.micrograph(number)
        if entry is None:
            return None
        image = prepared(entry[0], entry[1], self.pixel_size_nm, self.config)
        check_large_enough(image, self.config.size_px, self.store.keys[number], self.pixel_size_nm)
        return image

    def refuse_missing(self) -> None:
        """Raise a ``UserError`` that names a training item without one of its members."""
        for number in self.train.tolist():
            for name, look in (("saxs", self.pattern), ("sem", self.image)):
                if look(number) is None:
                    raise UserError(
                        f"item {self.store.keys[number]} has no {name} member, and preset lu2023 trains on pairs "
                        "alone: leave it out, or use preset modern"
                    )


@dataclass(frozen=True)
class PairBatch:
    """This rank's part of a global batch; a member that is missing is zeros, and its flag is 0.

    Attributes:
        numbers: (n,) items, ``epochs`` (n,) when they come.
        intensity, sigma, mask: (n, S, S) of patterns; ``sigma`` is 0 for raw counts.
        images: (n, 1, P, P) crops in [0, 1].
        turns: (n, 2, 2) what turned both members, see :func:`nanodist.pairvae.images.transformation`. The crops are
            turned; patterns are as they were measured.
        has: (n, 2) 1 where there is a pattern, a micrograph.
        noise: (n, d) standard normal numbers.
    """

    step: int
    epochs: I64
    numbers: I64
    keys: list[str]
    intensity: F32
    sigma: F32
    mask: npt.NDArray[np.bool_]
    images: F32
    turns: F32
    has: F32
    noise: F32
    wait_seconds: float = 0.0


def normals(keys: Sequence[int], count: int) -> F32:
    """``count`` standard normal numbers for each key, as (len(keys), count), by Box and Muller."""
    half = -(-count // 2)
    u = uniforms(keys, 2 * half)
    radius = np.sqrt(-2.0 * np.log1p(-u[:, :half]))
    angle = 2.0 * np.pi * u[:, half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1)[:, :count].astype(np.float32)


class Sampler:
    """Items as a model sees them: a pure function of (seed, stage, epoch, item).

    Args:
        data: the pairs.
        model: says how they are turned, and until when crops are new.
        seed: of the run.
        stage: keys the draws beside it.
        noise: random numbers that the model needs of each sample.
    """

    def __init__(self, data: PairData, model: PairModelConfig, seed: int, stage: str, noise: int) -> None:
        self.data, self.model, self.seed, self.stage, self.noise = data, model, seed, stage, noise

    def _crop_epoch(self, epoch: int) -> int:
        fixed = self.model.fixed_crop_from_epoch
        return epoch if self.stage != "pair" or fixed is None else min(epoch, fixed)

    def turn(self, number: int, epoch: int) -> tuple[F64, tuple[float, float]]:
        """The matrix that turns an item in an epoch, and the place of its crop."""
        word = key(self.seed, "pairvae-crop", self.stage, self._crop_epoch(epoch), self.data.store.keys[number])
        y, x, turned, flipped, zoomed = uniforms([word], 5)[0].tolist()
        m = self.model
        zoom = float(m.zoom ** (2 * zoomed - 1))
        matrix = transformation((2 * turned - 1) * m.max_rotation_deg, m.flip and flipped < 0.5, zoom)
        image, size = self.data.image(number), self.data.config.size_px
        if image is not None and not fits(image.shape, size, matrix):
            # A small micrograph holds no turned crop; quarter turns always fit.
            quarters = 90.0 * round((2 * turned - 1) * m.max_rotation_deg / 90.0)
            matrix = transformation(quarters, m.flip and flipped < 0.5, 1.0).round()
        return matrix, (y, x)

    def batch(self, step: int, epochs: I64, numbers: I64) -> PairBatch:
        """The items ``numbers`` in their ``epochs``."""
        data, size = self.data, self.data.config.size_px
        n, side = len(numbers), data.store.grid.size
        intensity, sigma = np.zeros((2, n, side, side), np.float32)
        mask, images = np.zeros((n, side, side), bool), np.zeros((n, 1, size, size), np.float32)
        turns, has = np.zeros((n, 2, 2), np.float32), np.zeros((n, 2), np.float32)
        for row, (number, epoch) in enumerate(zip(numbers.tolist(), epochs.tolist(), strict=True)):
            matrix, place = self.turn(number, epoch)
            turns[row] = matrix
            pattern, image = data.pattern(number), data.image(number)
            if pattern is not None:
                intensity[row], mask[row], has[row, 0] = pattern.intensity, pattern.mask, 1.0
                if pattern.sigma is not None:
                    sigma[row] = pattern.sigma
            if image is not None:
                images[row, 0], has[row, 1] = crop(image, size, matrix, place), 1.0
        names = [data.store.keys[i] for i in numbers.tolist()]
        words = [
            key(self.seed, "pairvae-noise", self.stage, epoch, name)
            for epoch, name in zip(epochs.tolist(), names, strict=True)
        ]
        noise = normals(words, self.noise)
        return PairBatch(step, epochs, numbers, names, intensity, sigma, mask, images, turns, has, noise)

    def batches(
        self, batch_size: int, rank: int, world_size: int, micro_batches: int, start_step: int
    ) -> Iterator[PairBatch]:
        """This rank's part of every global batch from ``start_step`` on, without end."""
        order = Order(len(self.data.train), self.seed, batch_size)
        mine, step = places(batch_size, rank, world_size, micro_batches), start_step
        while True:
            epochs, indices = (values[mine] for values in order.arrays(step))
            yield self.batch(step, epochs, self.data.train[indices])
            step += 1
