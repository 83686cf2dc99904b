"""Which tiles show nothing: a rule of two measured numbers, whose limits were set on real micrographs.

Of the tiles of 256 px of the micrographs that the tests use, those of the least contrast were looked at: up to 0.6 %
they show bare film, vacuum and the shadow of the aperture, up to 0.75 % bare film and faint edges lie mixed
(``python -m tests.e2e.packing_rules``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# Standard deviation of the means of blocks, without the slope of the illumination, over the micrograph's range.
LEAST_CONTRAST = 0.006
# The same with the slope: a slope over more of the range than illumination makes is something to see.
MOST_SLOPE = 0.03
# Share of a tile's pixels at one end of the range of values.
MOST_SATURATED = 0.5
EMPTY = f"empty tile: its blocks differ by less than {LEAST_CONTRAST:.1%} of the micrograph's range"
SATURATED = f"saturated tile: more than {MOST_SATURATED:.0%} of its pixels are at one end of the range"
_BLOCKS = 32
_LEAST_BLOCK = 4


def fault_of(tile: npt.NDArray[Any], span: float) -> str | None:
    """Why a (H, W) uint8 or uint16 tile shows nothing, or ``None`` where it shows something.

    Args:
        tile: its pixels.
        span: the range of values of its whole micrograph.
    """
    top = np.iinfo(tile.dtype).max
    if max(np.count_nonzero(tile == 0), np.count_nonzero(tile == top)) > MOST_SATURATED * tile.size:
        return SATURATED
    with_slope, without = contrast(tile)
    return EMPTY if (without < LEAST_CONTRAST * span and with_slope < MOST_SLOPE * span) or span == 0 else None


def contrast(tile: npt.NDArray[Any]) -> tuple[float, float]:
    """Standard deviation of the block means of a (H, W) tile in pixel values, and after its slope is taken off.

    Means of blocks (32 x 32 of them in a tile of 256 px) hardly feel the noise of single pixels, and the illumination
    changes slowly over a tile of bare film.
    """
    block = max(_LEAST_BLOCK, min(tile.shape) // _BLOCKS)
    rows, columns = (length // block for length in tile.shape)
    if min(rows, columns) < 2:
        return float(tile.std()), float(tile.std())
    cut = tile[: rows * block, : columns * block].astype(np.float64)
    means = cut.reshape(rows, block, columns, block).mean(axis=(1, 3))
    with_slope = float(means.std())
    means -= means.mean()
    # Row and column numbers around their middle are orthogonal, so that each slope stands alone.
    for axis, count in enumerate(means.shape):
        at = (np.arange(count) - (count - 1) / 2).reshape((-1, 1) if axis == 0 else (1, -1))
        means -= (means * at).sum() / ((at**2).sum() * means.size / count) * at
    return with_slope, float(means.std())


def span_of(pixels: npt.NDArray[Any]) -> float:
    """Range of values of a uint8 or uint16 micrograph, without the outermost 0.1 % at either end."""
    step = max(1, min(pixels.shape) // 2048)
    low, high = np.percentile(pixels[::step, ::step], (0.1, 99.9), method="nearest")
    return float(high) - float(low)
