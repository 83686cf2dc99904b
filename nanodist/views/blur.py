"""Gaussian blur of one view by products with banded blocks: what kornia's ``gaussian_blur2d`` computes, faster."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanodist.views.config import ViewsConfig

# Of 8 to 112 the quickest at 224 px: small blocks make slow products, large ones waste them on the band's zeros.
_BLOCK = 16
# Up to this size one product with the whole band takes less time than several with its blocks.
_WHOLE = 64


def reach(config: ViewsConfig) -> int:
    """Half the width in pixels of every blur's window, without its middle: 3 of the largest standard deviation."""
    return min(math.ceil(3 * config.blur_sigma_px[1]), config.size_px // 2 - 1)


class Scratch:
    """Memory for views of ``size`` pixels that are made one after the other, each step in the same as the last.

    Attributes:
        both: two buffers (2, size^2) float32.
        images: the same as (size, size) each. ``reach`` rows of zeros lie before and behind either, and stay.
    """

    def __init__(self, size: int, reach: int) -> None:
        edge = reach * size
        room = torch.zeros(2, edge + size**2 + edge)
        self.both = room[:, edge : edge + size**2]
        self.images = self.both.view(2, size, size)


class Blur:
    """Blurs square images of ``size`` pixels, one at a time, with a window of ``2 * reach + 1`` pixels.

    Along each axis, a block of about 16 results is a product of the 16 + 2 reach inputs under it with one banded
    matrix, so a matrix product does the work of the taps. Nothing is padded: the blocks at the edges have matrices of
    their own, which hold the weights of what is mirrored there, and zeros for what lies in memory beside the image.
    Sums are taken image by image, in an order that no batch changes.

    Args:
        size: of the images.
        reach: half the width of the window.
        sigmas: the standard deviations in pixels that will be asked for, by number.
        scratch: that others may use between two calls, but for what lies beside its images.
    """

    def __init__(self, size: int, reach: int, sigmas: npt.NDArray[np.float64], scratch: Scratch) -> None:
        block = _block(size)
        count, window = size // block, block + 2 * reach
        weights = _weights(sigmas, reach)
        self._source, rows = scratch.images[1], scratch.images[1]
        # Blocks at either end whose windows leave the image.
        self._ends = min(-(-reach // block), -(-count // 2))
        chosen = [*range(self._ends), *range(count - self._ends, count)]
        self._edges = _bands(weights, size, block, tuple(dict.fromkeys(chosen)))
        self._inner = _bands(weights, size, block, (self._ends,))[:, 0] if count > 2 * self._ends else None
        self._band = torch.empty(count, window, block)
        start = rows.storage_offset()
        self._across = self._source.as_strided((count, size, window), (block, size, 1), start - reach)
        self._product = scratch.both[0].view(count, size, block)
        self._made = rows.view(size, count, block).transpose(0, 1)
        self._down = rows.as_strided((count, window, size), (block * size, size, 1), start - reach * size)
        self._blocks = (count, block, size)

    @property
    def source(self) -> Tensor:
        """Where :meth:`into` takes its image (size, size) from; part of the scratch."""
        return self._source

    def into(self, out: Tensor, number: int) -> None:
        """Write to ``out`` (size, size), contiguous, the image at :attr:`source` by the ``number``-th deviation.

        The image is mirrored at its edges, and overwritten.
        """
        self._choose(number)
        torch.bmm(self._across, self._band, out=self._product)
        self._made.copy_(self._product)
        torch.bmm(self._band.transpose(1, 2), self._down, out=out.view(self._blocks))

    def _choose(self, number: int) -> None:
        edges = self._edges[number]
        if self._inner is None:
            self._band.copy_(edges)
            return
        inner = self._inner[number].expand(len(self._band) - 2 * self._ends, -1, -1)
        torch.cat([edges[: self._ends], inner, edges[self._ends :]], out=self._band)


def _block(size: int) -> int:
    """Pixels of a block: a divisor of ``size``, and where there is none near 16, the whole."""
    divisors = [d for d in range(_BLOCK // 2, 2 * _BLOCK + 1) if size % d == 0]
    return size if size <= _WHOLE or not divisors else min(divisors, key=lambda d: abs(math.log(d / _BLOCK)))


def _weights(sigmas: npt.NDArray[np.float64], reach: int) -> npt.NDArray[np.float64]:
    """Weights (n, 2 reach + 1) of the windows."""
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / np.where(sigmas > 0, sigmas, 1.0)[:, None]) ** 2)
    weights /= weights.sum(1, keepdims=True)
    # Numbers below float32's normal range would make the products ten times slower.
    weights[weights < 1e-12] = 0.0
    return weights


def _bands(weights: npt.NDArray[np.float64], size: int, block: int, numbers: tuple[int, ...]) -> Tensor:
    """Matrices (n, blocks, block + 2 reach inputs, block results) of the blocks of these numbers along an axis."""
    taps = _taps(size, weights.shape[1] // 2, block, numbers)
    made = (weights @ taps.reshape(len(taps), -1)).astype(np.float32)
    return torch.from_numpy(made).view(-1, *taps.shape[1:])


@lru_cache(maxsize=16)
def _taps(size: int, reach: int, block: int, numbers: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """(2 reach + 1, blocks, inputs, results): 1 where a tap of the window brings an input to a result."""
    taps = np.zeros((2 * reach + 1, len(numbers), block + 2 * reach, block))
    results = np.arange(block)
    for place, number in enumerate(numbers):
        first = number * block
        for tap, offset in enumerate(range(-reach, reach + 1)):
            # The edge itself is not doubled, as in torch's padding named reflect.
            inputs = np.abs(first + results + offset)
            inputs = np.minimum(inputs, 2 * (size - 1) - inputs)
            taps[tap, place, inputs - first + reach, results] = 1.0
    return taps
