"""Gaussian blur of one view by products with banded blocks: what kornia's ``gaussian_blur2d`` computes, faster."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanodist.views.config import ViewsConfig

# Of 8 to 64 the quickest at 224 px: small blocks waste fewer products on the band's zeros.
_BLOCK = 16


def reach(config: ViewsConfig) -> int:
    """Half the width in pixels of every blur's window, without its middle: 3 of the largest standard deviation."""
    return min(math.ceil(3 * config.blur_sigma_px[1]), config.size_px // 2 - 1)


class Blur:
    """Blurs square images of ``size`` pixels, one at a time, with a window of ``2 * reach + 1`` pixels.

    Along each axis, a block of 16 results is a product of the 16 + 2 reach inputs under it with one banded matrix, so
    a matrix product does the work of the taps. Sums are taken image by image, in an order that no batch changes.

    Args:
        size: of the images.
        reach: half the width of the window.
        sigmas: the standard deviations in pixels that will be asked for, by number.
        scratch: three buffers (at least :meth:`needed` float32) that others may use between two calls.
    """

    def __init__(
        self, size: int, reach: int, sigmas: npt.NDArray[np.float64], scratch: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        blocks = -(-size // _BLOCK)
        whole, window = blocks * _BLOCK, _BLOCK + 2 * reach
        end, length = reach + size, whole + 2 * reach
        self._bands = _bands(sigmas, reach)
        wide, high = scratch[0][: size * length].view(size, length), scratch[1][: length * whole].view(length, whole)
        self._product = scratch[2][: size * whole].view(blocks, size, _BLOCK)
        blurred = scratch[0][: whole * whole].view(blocks, _BLOCK, whole)
        self._blurred, self._result = blurred, blurred.view(whole, whole)[:size, :size]
        self._image = wide[:, reach:end]
        self._rows = high[reach:end].view(size, blocks, _BLOCK).transpose(0, 1)
        # The edge itself is not doubled, as in torch's padding named reflect.
        self._sides = (
            (wide[:, :reach], wide[:, reach + 1 : 2 * reach + 1], 1),
            (wide[:, end : end + reach], wide[:, end - 1 - reach : end - 1], 1),
        )
        self._ends = (
            (high[:reach], high[reach + 1 : 2 * reach + 1], 0),
            (high[end : end + reach], high[end - 1 - reach : end - 1], 0),
        )
        # Up to whole blocks: what comes of it is dropped, but a nan there would spread.
        self._rest = (wide[:, end + reach :], high[end + reach :]) if whole > size else ()
        self._wide_blocks = wide.as_strided((blocks, size, window), (_BLOCK, length, 1))
        self._high_blocks = high.as_strided((blocks, window, whole), (_BLOCK * whole, whole, 1))

    @staticmethod
    def needed(size: int, reach: int) -> int:
        """Numbers that a scratch buffer must hold."""
        whole = -(-size // _BLOCK) * _BLOCK
        return whole * (whole + 2 * reach)

    def __call__(self, image: Tensor, number: int) -> Tensor:
        """``image`` (size, size) float32, mirrored at its edges, by the ``number``-th deviation; in place."""
        band = self._bands[number]
        across, down = (m.expand(len(self._product), -1, -1) for m in (band, band.t()))
        for rest in self._rest:
            rest.zero_()
        self._image.copy_(image)
        _mirror(self._sides)
        self._rows.copy_(torch.bmm(self._wide_blocks, across, out=self._product))
        _mirror(self._ends)
        torch.bmm(down, self._high_blocks, out=self._blurred)
        return image.copy_(self._result)


def _bands(sigmas: npt.NDArray[np.float64], reach: int) -> Tensor:
    """Matrices (n, 16 + 2 reach, 16) whose column j holds the window's weights from row j on."""
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / np.where(sigmas > 0, sigmas, 1.0)[:, None]) ** 2)
    weights /= weights.sum(1, keepdims=True)
    # Numbers below float32's normal range would make the products ten times slower.
    weights[weights < 1e-12] = 0.0
    bands = np.zeros((len(sigmas), _BLOCK + 2 * reach, _BLOCK), np.float32)
    for j in range(_BLOCK):
        bands[:, j : j + 2 * reach + 1, j] = weights
    return torch.from_numpy(bands)


def _mirror(edges: tuple[tuple[Tensor, Tensor, int], ...]) -> None:
    for edge, inside, axis in edges:
        edge.copy_(inside.flip(axis))
