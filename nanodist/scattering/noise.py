"""The noise of reduced data whose file does not state it."""

from __future__ import annotations

import numpy as np

_WINDOW = 15


def estimated_sigma(intensity: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Standard deviation of each pixel from how far neighbours differ, float32 (H, W); 0 where the mask is False.

    The difference of a pixel and the mean of its neighbours above, below, left and right has 1.25 times the variance of
    a pixel, and no part of a pattern that is smooth over three pixels. Its square is averaged over 15 x 15 pixels.
    """
    from scipy.ndimage import uniform_filter

    values = np.where(mask, intensity, 0).astype(np.float64)
    padded, known = np.pad(values, 1), np.pad(mask, 1).astype(np.float64)
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    count = known[:-2, 1:-1] + known[2:, 1:-1] + known[1:-1, :-2] + known[1:-1, 2:]
    usable = mask & (count > 0)
    neighbours = np.maximum(count, 1)
    square = np.where(usable, (values - around / neighbours) ** 2 / (1 + 1 / neighbours), 0)
    share = uniform_filter(usable.astype(np.float64), _WINDOW, mode="constant")
    mean = uniform_filter(square, _WINDOW, mode="constant") / np.maximum(share, 1e-12)
    # A pixel that stands alone says nothing about its noise: it gets that of the whole.
    whole = float(square[usable].mean()) if usable.any() else 1.0
    variance = np.where(share * _WINDOW**2 >= 9, mean, whole)
    return np.where(mask, np.sqrt(np.maximum(variance, 0)), 0).astype(np.float32)
