"""Micrographs of different magnification brought to one pixel size."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

_ROWS = 256


def resample(
    pixels: npt.NDArray[Any], pixel_size_nm: tuple[float, float], target_nm: float, nearest: bool = False
) -> npt.NDArray[Any]:
    """(H, W) pixels of ``pixel_size_nm`` (y, x) as pixels of exactly ``target_nm``, both ways.

    Smaller pixels are averaged under a triangle as wide as two new ones (Pillow's bilinear filter, which reaches over
    all that it shrinks), so that nothing folds back; larger ones are interpolated linearly. What is left over at the
    lower and the right edge, less than a new pixel, is left out. Integers of up to 16 bits stay what they are, others
    become float32.

    Args:
        nearest: take the nearest pixel, as class numbers of masks need it.

    Raises:
        ValueError: the micrograph is smaller than one pixel of the new size.
    """
    scale = [target_nm / size for size in pixel_size_nm]  # old pixels in a new one
    height, width = (int(length / step + 1e-9) for length, step in zip(pixels.shape, scale, strict=True))
    if height < 1 or width < 1:
        raise ValueError(f"{pixels.shape} pixels of {pixel_size_nm} nm are less than one of {target_nm} nm")
    if nearest:
        rows, columns = (
            np.minimum(((np.arange(n) + 0.5) * step).astype(np.int64), old - 1)
            for n, step, old in zip((height, width), scale, pixels.shape, strict=True)
        )
        return np.ascontiguousarray(pixels[rows][:, columns])
    whole = pixels.dtype.kind in "iu" and pixels.dtype.itemsize <= 2
    result = np.empty((height, width), pixels.dtype if whole else np.float32)
    margin = int(2 * max(1.0, scale[0])) + 2
    for row in range(0, height, _ROWS):
        count = min(_ROWS, height - row)
        # A strip with what the filter reaches beyond it: a whole map as float32 would not fit.
        start = max(0, int(row * scale[0]) - margin)
        end = min(pixels.shape[0], int((row + count) * scale[0]) + margin + 1)
        strip = Image.fromarray(pixels[start:end].astype(np.float32))
        box = (0.0, row * scale[0] - start, width * scale[1], min((row + count) * scale[0] - start, end - start))
        part = np.asarray(strip.resize((width, count), Image.Resampling.BILINEAR, box=box))
        result[row : row + count] = np.floor(part + 0.5) if whole else part
    return result
