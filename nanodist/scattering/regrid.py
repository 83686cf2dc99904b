"""A pattern on the fixed q grid of training, from the pixels of any detector."""

from __future__ import annotations

import math

import numpy as np

from hpc.errors import UserError
from nanodist.scattering.frame import Frame
from nanodist.scattering.noise import estimated_sigma
from nanodist.scattering.pattern import Pattern, QGrid
from nanodist.scattering.transmission import LARGEST_RATIO, friedel_ratio

# A pixel of the grid counts as measured where at least this share of its area was.
LEAST_COVERAGE = 0.5
# Parts of a detector pixel a side, at most: 16 fills a grid that is 8 times finer than the detector.
_MOST_PARTS = 16


def regrid(frame: Frame, grid: QGrid) -> Pattern:
    """Share out the detector's pixels over the grid by area, measured ones only.

    Reduced intensities are averaged, and their sigma propagated. Counts become what a pixel of the grid would have
    counted: the mean over its detector pixels times the number of detector pixels that a grid pixel holds, so that
    they keep the statistics of counts. What lies outside the detector, under a mask, or is measured over less than half
    of a grid pixel, is masked.

    Args:
        frame: (H, W) with q for each pixel.
        grid: the q grid, in 1/nm.

    Returns:
        The pattern, (size, size); its beam is at the centre of the grid.

    Raises:
        UserError: the frame has no q, is all masked, was measured at grazing incidence (as it says, or as its halves
            show where it does not say), or shares no q with the grid.
    """
    if frame.setup == "grazing":
        raise UserError(
            f"{frame.name} was measured at grazing incidence: it is no transmission pattern, and cannot be part of a "
            "pair; leave it out, or state setup=transmission if that is wrong"
        )
    frame.require_measured()
    q_y, q_x = frame.q()
    pixel_area = _pixel_area(q_y, q_x)
    sigma = frame.sigma
    if sigma is None and frame.kind == "reduced":
        sigma = estimated_sigma(frame.intensity, frame.mask)
    sums = _shared_out(frame, sigma, q_y, q_x, grid)
    per_pixel = grid.q_step_inv_nm**2 / pixel_area
    measured = sums[0] >= LEAST_COVERAGE * per_pixel
    if not measured.any():
        raise UserError(
            f"{frame.name} measured nothing between q = 0 and {grid.q_max_inv_nm:g} 1/nm, where the grid is: check its "
            "geometry, or choose a larger q_max_inv_nm"
        )
    area = np.where(measured, sums[0], 1.0)
    intensity = np.where(measured, sums[1] / area, 0.0)
    if frame.kind == "counts":
        pattern = Pattern((intensity * per_pixel).astype(np.float32), None, measured, grid, "counts")
    else:
        # Parts of one detector pixel are one measurement: a grid finer than the detector gains nothing from them.
        variance = sums[2] / (area * np.maximum(area, 1.0))
        spread = np.where(measured, np.sqrt(variance), 0.0).astype(np.float32)
        pattern = Pattern(intensity.astype(np.float32), spread, measured, grid, "reduced")
    if frame.setup != "transmission":
        _check_transmission(pattern, frame.name)
    return pattern


def _check_transmission(pattern: Pattern, name: str) -> None:
    ratio = friedel_ratio(pattern)
    if ratio is not None and ratio > LARGEST_RATIO:
        raise UserError(
            f"{name} differs between q and -q (median factor {ratio:.1f}), which no transmission pattern does: it was "
            "measured at grazing incidence, or its beam centre is wrong; state setup=transmission to keep it"
        )


def _pixel_area(q_y: np.ndarray, q_x: np.ndarray) -> float:
    """The median area of a detector pixel, in 1/nm^2."""
    if min(q_y.shape) < 2:
        raise UserError(f"a pattern of {q_y.shape[0]} x {q_y.shape[1]} pixels is no two-dimensional pattern")
    down, across = _slopes(q_y), _slopes(q_x)
    return float(np.nanmedian(np.abs(down[0] * across[1] - down[1] * across[0])))


def _slopes(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.gradient(plane, axis=0), np.gradient(plane, axis=1)


def _shared_out(
    frame: Frame, sigma: np.ndarray | None, q_y: np.ndarray, q_x: np.ndarray, grid: QGrid
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over the parts of detector pixels in each grid pixel: of area, intensity and variance, (size, size)."""
    size, step = grid.size, grid.q_step_inv_nm
    slopes_y, slopes_x = _slopes(q_y), _slopes(q_x)
    keep = frame.mask & (np.maximum(abs(q_y), abs(q_x)) <= grid.q_max_inv_nm + 2 * step)
    # Where q or a neighbour's is not stated.
    keep &= np.isfinite(sum(slopes_y) + sum(slopes_x))
    largest = max(float(np.nanmedian(abs(plane))) for plane in (*slopes_y, *slopes_x))
    parts = min(_MOST_PARTS, max(2, 2 * math.ceil(largest / step)))
    weight = 1.0 / parts**2
    intensity = frame.intensity[keep].astype(np.float64)
    variance = np.zeros_like(intensity) if sigma is None else sigma[keep].astype(np.float64) ** 2
    row, column = (size - 1) / 2 - q_y[keep] / step, (size - 1) / 2 + q_x[keep] / step
    turn = [plane[keep] / step for plane in (*slopes_y, *slopes_x)]
    sums = np.zeros((3, size * size))
    offsets = (np.arange(parts) + 0.5) / parts - 0.5
    for down in offsets:
        for right in offsets:
            rows = np.floor(row - turn[0] * down - turn[1] * right + 0.5).astype(np.int64)
            columns = np.floor(column + turn[2] * down + turn[3] * right + 0.5).astype(np.int64)
            inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
            place = rows[inside] * size + columns[inside]
            sums[0] += np.bincount(place, minlength=size * size) * weight
            sums[1] += np.bincount(place, intensity[inside] * weight, size * size)
            sums[2] += np.bincount(place, variance[inside] * weight, size * size)
    return tuple(plane.reshape(size, size) for plane in sums)  # type: ignore[return-value]
