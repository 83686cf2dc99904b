"""What a PairVAE sees of a micrograph: one pixel size, stated contrast, and crops that may be turned."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from hpc.errors import UserError
from nanodist.micrographs.resample import resample
from nanodist.pairvae.recipe import PairDataConfig

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
# Gaussian that OpenCV takes for a kernel of 5 pixels, as the paper's notebooks do.
_SIGMA_OF_5 = 1.1


def prepared(
    pixels: npt.NDArray[Any], pixel_size_nm: tuple[float, float], target_nm: float, config: PairDataConfig
) -> F32:
    """A micrograph (H, W) as float32 in [0, 1] with square pixels of ``target_nm``.

    ``binary`` follows Lu and Jayaraman (JACS Au 2023): a Gaussian of 5 px, a threshold at the mean of a window, a blur
    of 5 px. ``grey`` takes out what varies over more than a crop (charging, tilt) and puts the percentiles 0.5 and 99.5
    at 0 and 1.
    """
    image = resample(np.asarray(pixels, np.float32), pixel_size_nm, target_nm).astype(np.float32)
    if config.contrast == "binary":
        smooth = ndimage.gaussian_filter(image, _SIGMA_OF_5)
        above = (smooth > ndimage.uniform_filter(smooth, config.window_px)).astype(np.float32)
        return np.asarray(ndimage.uniform_filter(above, 5), np.float32)
    if config.smooth_px:
        image = ndimage.gaussian_filter(image, config.smooth_px)
    image = image - ndimage.gaussian_filter(image, config.size_px / 2)
    low, high = np.percentile(image, (0.5, 99.5))
    return np.asarray(np.clip((image - low) / max(float(high - low), 1e-6), 0.0, 1.0), np.float32)


def check_large_enough(image: F32, size_px: int, key: str, target_nm: float) -> None:
    """Raise a ``UserError`` where a crop does not fit into a micrograph."""
    if min(image.shape) < size_px:
        height, width = (round(extent * target_nm, 1) for extent in image.shape)
        raise UserError(
            f"the micrograph of item {key} covers {height} x {width} nm, less than a crop of {size_px} px of "
            f"{target_nm:g} nm: set data.size_px or data.pixel_size_nm lower"
        )


def transformation(rotation_deg: float, flip: bool, zoom: float) -> F64:
    """(2, 2) matrix A that turns a structure: r' = A r with r = (x to the right, y upwards).

    First the reflection x -> -x, then the rotation (anticlockwise), then the magnification. Scattering follows as
    I'(q) = I(A^T q).
    """
    angle = np.deg2rad(rotation_deg)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.asarray(zoom * turn @ np.diag([-1.0 if flip else 1.0, 1.0]))


def fits(shape: tuple[int, ...], size_px: int, matrix: F64) -> bool:
    """Whether a crop turned by ``matrix`` lies inside an image of ``shape`` somewhere."""
    half_y, half_x = _reach(size_px, matrix)
    return 2 * half_y <= shape[0] - 1 and 2 * half_x <= shape[1] - 1


def _reach(size_px: int, matrix: F64) -> tuple[float, float]:
    """How far a turned crop reaches from its middle, in pixels of the image, along y and x."""
    inverse = np.abs(np.linalg.inv(matrix)) * (size_px - 1) / 2
    return float(inverse[1].sum()), float(inverse[0].sum())


def crop(image: F32, size_px: int, matrix: F64, place: tuple[float, float]) -> F32:
    """A crop (size_px, size_px) of the structure turned by ``matrix`` (see :func:`transformation`).

    Args:
        place: (y, x) from 0 to 1 over where a crop can lie.

    Pixels between pixels are interpolated linearly; with no turn, the crop is the image's own pixels.
    """
    height, width = image.shape
    half_y, half_x = _reach(size_px, matrix)
    if not np.any(matrix - np.eye(2)):
        top, left = (int(share * (extent - size_px) + 0.5) for share, extent in zip(place, image.shape, strict=True))
        return np.ascontiguousarray(image[top : top + size_px, left : left + size_px])
    middle_y = half_y + place[0] * max(height - 1 - 2 * half_y, 0.0)
    middle_x = half_x + place[1] * max(width - 1 - 2 * half_x, 0.0)
    axis = np.arange(size_px) - (size_px - 1) / 2
    inverse = np.linalg.inv(matrix)
    x_out, up_out = axis[None, :], -axis[:, None]
    x = middle_x + inverse[0, 0] * x_out + inverse[0, 1] * up_out
    y = middle_y - (inverse[1, 0] * x_out + inverse[1, 1] * up_out)
    return np.asarray(ndimage.map_coordinates(image, [y, x], order=1, mode="mirror"), np.float32)


def tiling(image: F32, size_px: int, most: int = 16) -> list[F32]:
    """Crops that cover an image evenly, unturned, at most ``most`` of them."""
    counts = [max(1, extent // size_px) for extent in image.shape]
    while counts[0] * counts[1] > most:
        counts[int(np.argmax(counts))] -= 1
    shares = [np.linspace(0.0, 1.0, count) if count > 1 else np.array([0.5]) for count in counts]
    return [crop(image, size_px, np.eye(2), (y, x)) for y in shares[0] for x in shares[1]]
