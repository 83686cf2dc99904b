"""I(q): the mean over all directions, of patterns on a grid and of raw frames."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from nanodist.scattering.pattern import Pattern, QGrid


@lru_cache(maxsize=8)
def _rings(grid: QGrid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each pixel its ring, (size^2,), and for each ring its mean |q| and its number of pixels, (rings,)."""
    modulus = grid.modulus().ravel()
    number = int(np.floor(grid.q_max_inv_nm / grid.q_step_inv_nm + 1e-9))
    ring = np.minimum(np.floor(modulus / grid.q_step_inv_nm).astype(np.int64), number)
    pixels = np.bincount(ring, minlength=number + 1)[:number]
    q_inv_nm = np.bincount(ring, modulus, number + 1)[:number] / np.maximum(pixels, 1)
    return ring, q_inv_nm, pixels


def azimuthal(pattern: Pattern) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean intensity of the measured pixels of each ring; rings are one pixel of the grid wide.

    Rings and their q depend on the grid alone, so that curves of two patterns of one grid compare point by point.

    Returns:
        q_inv_nm, intensity and sigma, float64 (rings,), from the beam to q_max_inv_nm (not to the corners).
        intensity and sigma are NaN where a ring has no measured pixel. sigma is propagated: from Poisson statistics
        for counts (of one count at least, where nothing was counted), from the pattern's sigma for reduced data; for
        reduced data without sigma it is the standard error of the ring's pixels.
    """
    ring, q_inv_nm, _ = _rings(pattern.grid)
    number = len(q_inv_nm)
    measured = pattern.mask.ravel()
    ring = ring[measured]
    values = pattern.intensity.ravel()[measured].astype(np.float64)
    pixels = np.bincount(ring, minlength=number + 1)[:number].astype(np.float64)
    pixels[pixels == 0] = np.nan
    intensity = np.bincount(ring, values, number + 1)[:number] / pixels
    if pattern.kind == "counts":
        variance = np.maximum(intensity * pixels, 1.0)
    elif pattern.sigma is not None:
        variance = np.bincount(ring, pattern.sigma.ravel()[measured].astype(np.float64) ** 2, number + 1)[:number]
    else:
        mean = np.append(intensity, 0.0)[ring]
        variance = np.bincount(ring, (values - mean) ** 2, number + 1)[:number] * pixels / np.maximum(pixels - 1, 1)
    return q_inv_nm.copy(), intensity, np.sqrt(variance) / pixels
