"""What a micrograph is, and what every reader asks of the pixels that it found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError

# A stitched map of 23k x 23k pixels fits; a file of a few kilobytes that claims more is a decompression bomb.
MAX_PIXELS = 2**29
# Raw pixels stay in their file until a part of them is asked for, and no file holds more of them than it is long.
MAX_MAPPED_PIXELS = 2**34
_ROWS = 128


class NotAMicrograph(UserError):
    """A file that is whole and readable and holds no micrograph, such as a spectrum or a diffraction pattern."""


@dataclass(frozen=True)
class Micrograph:
    """One two-dimensional image.

    Attributes:
        pixels: (H, W), in the depth of the file (any integer or real floating-point type), all finite.
        pixel_size_nm: (y, x) in nanometres, or ``None`` where the file does not say.
        pixel_size_source: where the pixel size comes from, or why it is unknown.
        metadata: plain values about the file: format, page, number of pages, what was changed in reading, and where
            known ``instrument``, ``voltage_kv``, ``magnification``, ``mode``, ``detector``. Never who operated it.
        pixel_size_uncertainty: relative standard uncertainty of the pixel size (0.01 is 1 %), or ``None`` where
            nothing is known about it.
    """

    pixels: npt.NDArray[Any]
    pixel_size_nm: tuple[float, float] | None = None
    pixel_size_source: str = "unknown: the file states none"
    metadata: dict[str, Any] = field(default_factory=dict)
    pixel_size_uncertainty: float | None = None


def check_size(height: int, width: int, path: Path, limit: int = MAX_PIXELS) -> None:
    """Refuse sizes before anything of that size is allocated.

    Raises:
        UserError: a side of zero, or more pixels than any micrograph has.
    """
    if height < 1 or width < 1:
        raise UserError(f"{path} has no pixels ({height} x {width}): remove it or write it again")
    if height * width > limit:
        raise UserError(
            f"{path} claims {height} x {width} pixels, more than the {limit} that are read: it is either damaged,"
            " a decompression bomb, or has to be cut into parts first"
        )


def checked_pixels(pixels: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    """(H, W) pixels in native byte order, with booleans as 0 and 255; a memory map in native order stays one.

    Raises:
        UserError: zero size, complex values, NaN or infinite pixels.
    """
    height, width = pixels.shape
    check_size(height, width, path, MAX_MAPPED_PIXELS if isinstance(pixels, np.memmap) else MAX_PIXELS)
    if pixels.dtype.kind == "b":
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype.kind not in "iuf":
        raise UserError(f"{path} holds {pixels.dtype} pixels: write it with real numbers (integer or floating point)")
    if pixels.dtype.kind == "f":
        bad = sum(_not_finite(pixels[row : row + _ROWS]) for row in range(0, height, _ROWS))
        if bad:
            raise UserError(f"{path} has {bad} pixels that are NaN or infinite: repair or remove it")
    if isinstance(pixels, np.memmap) and pixels.dtype.isnative:
        return pixels
    return np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder("="), copy=False))


def _not_finite(part: npt.NDArray[Any]) -> int:
    return int(part.size - np.isfinite(part).sum())


def collapse_channels(pixels: npt.NDArray[Any], path: Path, alpha: bool) -> npt.NDArray[Any]:
    """(H, W, C) with equal channels as (H, W); with ``alpha`` the last channel is opacity and must be opaque.

    Raises:
        UserError: the channels differ, so that this is a colour picture and no micrograph.
    """
    if alpha:
        opacity = pixels[..., -1]
        if opacity.size and (opacity != np.iinfo(opacity.dtype).max).any():
            raise UserError(f"{path} is partly transparent: save it without a transparency channel")
        pixels = pixels[..., :-1]
    gray = pixels[..., 0]
    for channel in range(1, pixels.shape[-1]):
        if not np.array_equal(gray, pixels[..., channel]):
            raise UserError(
                f"{path} is a colour picture (its channels differ), no micrograph: save it as grayscale or leave it out"
            )
    return gray
