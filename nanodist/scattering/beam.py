"""The beam centre and the distance of a pattern of rings, from nothing but its pixels."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from hpc.errors import UserError
from nanodist.scattering.frame import Frame

_SMOOTHING_PX = 3.0
_SHARE_OF_GRADIENTS = 0.3
_LEAST_GRADIENTS = 500
_LEAST_SCORE = 0.05


def find_beam(frame: Frame, start_px: tuple[float, float] | None = None) -> tuple[float, float]:
    """(row, column) of the centre of rings: where the normals of the pattern's contours meet.

    Gradients of the smoothed logarithm point along the radius. The centre minimises the distances to their lines,
    those far off weighted down (Cauchy) with a scale that shrinks from 30 to 2 pixels; half a ring is enough.

    Args:
        frame: a pattern of rings, or one that is isotropic.
        start_px: a first guess; by default the brightest region.

    Raises:
        UserError: the pattern is too small or flat.
    """
    from scipy.ndimage import binary_erosion, gaussian_filter

    frame.require_measured()
    weight = gaussian_filter(frame.mask.astype(np.float64), _SMOOTHING_PX)
    logarithm = np.log(np.maximum(frame.intensity.astype(np.float64), 0) + 3)
    smooth = gaussian_filter(np.where(frame.mask, logarithm, 0), _SMOOTHING_PX) / np.maximum(weight, 1e-9)
    down, right = np.gradient(smooth)
    size = np.hypot(down, right)
    inner = binary_erosion(frame.mask, iterations=math.ceil(2 * _SMOOTHING_PX)) & (size > 0)
    if inner.sum() < _LEAST_GRADIENTS:
        raise UserError(f"{frame.name} has too few pixels to find its beam centre: give beam_centre_px")
    steep = inner & (size >= np.quantile(size[inner], 1 - _SHARE_OF_GRADIENTS))
    rows, columns = np.nonzero(steep)
    normals = np.stack([-right[steep], down[steep]]) / size[steep]
    offsets = normals[0] * rows + normals[1] * columns
    if start_px is None:
        bright = gaussian_filter(np.where(frame.mask, frame.intensity, 0).astype(np.float64), 8) * (weight > 0.5)
        row, column = np.unravel_index(int(bright.argmax()), bright.shape)
        start_px = (float(row), float(column))
    centre = np.array(start_px, np.float64)
    for step in range(40):
        scale = max(2.0, 30 * 0.8**step)
        weights = 1 / (1 + ((normals.T @ centre - offsets) / scale) ** 2) ** 2
        centre = np.linalg.solve((normals * weights) @ normals.T, (normals * weights) @ offsets)
    return float(centre[0]), float(centre[1])


def find_distance(
    frame: Frame,
    beam_centre_px: tuple[float, float],
    pixel_size_mm: tuple[float, float],
    wavelength_nm: float,
    period_nm: float,
) -> float:
    """The distance in mm at which rings of a period fall on those of the pattern, within about a percent.

    The logarithm of the radial profile, its slow part taken off, is to be high at the radii of all orders and low half
    way between them; so neither half nor twice the distance fits.

    Raises:
        UserError: no distance between 30 mm and 30 m has two rings that stand out.
    """
    rows, columns = np.indices(frame.shape, sparse=True)
    radius_mm = np.hypot(
        (rows - beam_centre_px[0]) * pixel_size_mm[0], (columns - beam_centre_px[1]) * pixel_size_mm[1]
    )
    step = float(min(pixel_size_mm))
    ring = np.floor(radius_mm / step).astype(np.int64)[frame.mask]
    pixels = np.bincount(ring)
    mean = np.bincount(ring, frame.intensity[frame.mask]) / np.maximum(pixels, 1)
    logarithm = np.log(np.maximum(mean, 0) + 0.1)
    # Where the mean is known to a tenth.
    known = pixels * mean >= 100
    best, distance = 0.0, 0.0
    for candidate in np.geomspace(30, 30_000, 1400):
        score = _score(logarithm, known, order_radii(candidate, wavelength_nm, period_nm) / step)
        if score > best:
            best, distance = score, float(candidate)
    if best < _LEAST_SCORE:
        raise UserError(
            f"{frame.name} shows no rings of period {period_nm:g} nm at any distance from 30 mm to 30 m: check that it "
            "is the calibrant, its wavelength and pixel size, or give the distance"
        )
    return distance


def _score(logarithm: np.ndarray, known: np.ndarray, radii: np.ndarray) -> float:
    """How much the profile stands out at these radii (in bins) over half way between them.

    The sum over orders by the root of their number: with orders that are not there, as at half the distance, it is
    less.
    """
    from scipy.ndimage import median_filter

    inside = [place for place in radii if place < len(known) - 3 and known[int(place)]]
    if len(inside) < 2 or radii[0] < 12:
        return 0.0
    # The slow part is what varies over more than an order; steps as at the edge of a flight tube count little.
    gap = max(5, int(radii[1] - radii[0]))
    sharp = np.clip(logarithm - median_filter(logarithm, gap), -0.3, 0.3)
    heights = np.array([_between(sharp, place) for place in inside])
    middles = [(low + high) / 2 for low, high in pairwise(inside)]
    valleys = np.array([_between(sharp, place) for place in middles])
    return float((heights.sum() - valleys.sum()) / math.sqrt(len(heights)))


def order_radii(distance_mm: float, wavelength_nm: float, period_nm: float, orders: int = 40) -> np.ndarray:
    """Radii in mm of the orders 1, 2, ... of a period on a detector that stands square to the beam."""
    sines = np.arange(1, orders + 1) * wavelength_nm / (2 * period_nm)
    angles = 2 * np.arcsin(sines[sines < 0.6])
    return distance_mm * np.tan(angles)


def _between(values: np.ndarray, place: float) -> float:
    return float(np.interp(place - 0.5, np.arange(len(values)), values))
