"""From a micrograph to tiles of 8 or 16 bits: scaled as a whole, then cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

PERCENTILES = (0.1, 99.9)
ROWS = 128


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Starts of the fewest tiles that cover ``length`` pixels, evenly spread, sharing ``overlap`` pixels or more.

    Raises:
        ValueError: ``length`` is shorter than a tile, or the overlap is no part of one.
    """
    if length < tile or not 0 <= overlap < tile:
        raise ValueError(f"no tiles of {tile} with overlap {overlap} in {length}")
    count = 1 + -(-(length - tile) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) if count > 1 else 0 for i in range(count)]


def to_depth(pixels: npt.NDArray[Any], depth: int, always: bool) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """A micrograph's (H, W) pixels as uint8 (``depth`` 8) or uint16 (16), and how that was done.

    Pixels that have the depth already stay untouched, and 8 bits become 16 by the exact factor 257, unless ``always``.
    Else the 0.1 and 99.9 percentiles of the *whole micrograph* go to the ends of the range and what lies beyond is
    clipped, so that single hot pixels do not set the contrast and tiles of one micrograph stay comparable.

    Raises:
        ValueError: all pixels have one value, so that there is no contrast to scale.
    """
    dtype = np.dtype(np.uint16 if depth == 16 else np.uint8)
    if not always and pixels.dtype == dtype:
        return pixels, {"method": "none"}
    if not always and pixels.dtype == np.uint8:
        return pixels.astype(np.uint16) * np.uint16(257), {"method": "times 257"}
    low, high = _percentiles(pixels)
    if low == high:
        low, high = pixels.min(), pixels.max()
    if low == high:
        raise ValueError(f"every pixel is {low.item()}")
    recorded = {"method": "percentiles", "percentiles": list(PERCENTILES), "low": low.item(), "high": high.item()}
    return _scaled(pixels, float(low), float(high), dtype), recorded


def _percentiles(pixels: npt.NDArray[Any]) -> tuple[Any, Any]:
    """The values at :data:`PERCENTILES`; counted for up to 16 bits, where sorting would take a copy of all pixels."""
    if pixels.dtype.kind not in "iu" or pixels.dtype.itemsize > 2:
        low, high = np.percentile(pixels, PERCENTILES, method="nearest")
        return low, high
    lowest = int(np.iinfo(pixels.dtype).min)
    counts = np.zeros(2 ** (8 * pixels.dtype.itemsize), np.int64)
    for row in range(0, pixels.shape[0], ROWS):
        part = pixels[row : row + ROWS].astype(np.int64).ravel() - lowest
        counts += np.bincount(part, minlength=len(counts))
    # The rank that numpy's method "nearest" takes.
    ranks = np.around((pixels.size - 1) * (np.asarray(PERCENTILES) / 100)).astype(np.int64)
    low, high = np.searchsorted(np.cumsum(counts), ranks, side="right") + lowest
    return pixels.dtype.type(low), pixels.dtype.type(high)


def _scaled(pixels: npt.NDArray[Any], low: float, high: float, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Rows at a time: the 64-bit copies of a whole 16k x 16k micrograph would take 4 GB."""
    result = np.empty(pixels.shape, dtype)
    top = float(np.iinfo(dtype).max)
    for row in range(0, pixels.shape[0], ROWS):
        part = (pixels[row : row + ROWS].astype(np.float64) - low) * (top / (high - low))
        result[row : row + ROWS] = np.clip(np.floor(part + 0.5), 0.0, top)
    return result
