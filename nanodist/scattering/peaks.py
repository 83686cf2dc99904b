"""One or two Gaussians on an exponential, fitted to many profiles at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_STEPS = 60
_NARROWEST, _WIDEST = 0.003, 0.2


@dataclass(frozen=True)
class Peaks:
    """Fits of N profiles with K peaks each, peaks in the order of their place.

    Attributes:
        heights, centres: float64 (N, K).
        width: float64 (N,), the standard deviation that the peaks of a profile share.
        height_errors, centre_errors: float64 (N, K), standard errors.
        misfit: float64 (N,), the sum of squared residuals in units of sigma.
        good: bool (N,), False where no peak of a sensible height and width was found.
    """

    heights: np.ndarray
    centres: np.ndarray
    width: np.ndarray
    height_errors: np.ndarray
    centre_errors: np.ndarray
    misfit: np.ndarray
    good: np.ndarray


def fit_peaks(axis: np.ndarray, mean: np.ndarray, sigma: np.ndarray, centres: np.ndarray) -> Peaks:
    """Least squares by Levenberg and Marquardt, all profiles side by side: one by one it takes 60 times longer.

    Args:
        axis: float64 (B,), the places of the bins.
        mean: float64 (N, B).
        sigma: float64 (N, B), infinite where there is nothing.
        centres: float64 (N, K), where the peaks are looked for.
    """
    weight = np.where(np.isfinite(sigma), 1 / np.maximum(sigma, 1e-300), 0.0)
    values = _first(axis, mean, weight, centres)
    residual, slopes = _model(axis, mean, weight, values)
    cost = np.sum(residual**2, axis=1)
    damping, running = np.full(len(values), 1e-2), np.arange(len(values))
    for _ in range(_STEPS):
        step = _step(slopes[running], residual[running], damping[running])
        trial = values[running] - step
        new_residual, new_slopes = _model(axis, mean[running], weight[running], trial)
        new_cost = np.sum(new_residual**2, axis=1)
        gain = cost[running] - new_cost
        better = gain > 0
        moved = running[better]
        values[moved], cost[moved] = trial[better], new_cost[better]
        residual[moved], slopes[moved] = new_residual[better], new_slopes[better]
        damping[running] = np.clip(np.where(better, damping[running] * 0.2, damping[running] * 8), 1e-9, 1e9)
        done = np.where(better, gain <= 1e-7 * new_cost, damping[running] > 1e4)
        running = running[~done]
        if len(running) == 0:
            break
    return _result(values, slopes, cost, centres.shape[1])


def _first(axis: np.ndarray, mean: np.ndarray, weight: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Heights, centres, width, base and slope to begin with, (N, 2 K + 3)."""
    known = np.where(weight > 0, mean, np.nan)
    low = np.maximum(np.nanquantile(known, 0.2, axis=1), 1e-12)
    at = np.abs(axis - centres[..., None]).argmin(axis=-1)
    heights = np.maximum(np.take_along_axis(mean, at, 1) - low[:, None], 0.1 * low[:, None])
    rest = np.stack([np.full_like(low, 0.03), low, np.zeros_like(low)], axis=1)
    return np.concatenate([heights, centres, rest], axis=1)


def _model(axis: np.ndarray, mean: np.ndarray, weight: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Residuals (N, B) and their derivatives (N, B, 2 K + 3)."""
    number = (values.shape[1] - 3) // 2
    heights, centres = values[:, None, :number], values[:, None, number : 2 * number]
    width, base, slope = (values[:, None, column] for column in (-3, -2, -1))
    safe = np.where(np.abs(width) < 1e-4, 1e-4, width)[..., None]
    away = (axis[None, :, None] - centres) / safe
    bells = np.exp(-0.5 * np.minimum(away**2, 200))
    tail = np.exp(np.clip(slope * axis, -30, 30))
    tops = heights * bells
    curve = tops.sum(axis=2) + base * tail
    wider = (tops * away**2 / safe).sum(axis=2, keepdims=True)
    slopes = np.concatenate(
        [bells, tops * away / safe, wider, tail[..., None], (base * tail * axis)[..., None]], axis=2
    )
    return (curve - mean) * weight, slopes * weight[..., None]


def _step(slopes: np.ndarray, residual: np.ndarray, damping: np.ndarray) -> np.ndarray:
    """The damped step of each profile, (N, 2 K + 3), to be taken off its values."""
    turned = slopes.transpose(0, 2, 1)
    normal, gradient = turned @ slopes, turned @ residual[..., None]
    scale = np.sqrt(np.maximum(np.einsum("npp->np", normal), 1e-30))
    scaled = normal / scale[:, :, None] / scale[:, None, :] + damping[:, None, None] * np.eye(normal.shape[1])
    return np.linalg.solve(scaled, gradient / scale[..., None])[..., 0] / scale


def _result(values: np.ndarray, slopes: np.ndarray, cost: np.ndarray, number: int) -> Peaks:
    normal = slopes.transpose(0, 2, 1) @ slopes
    scale = np.sqrt(np.maximum(np.einsum("npp->np", normal), 1e-30))
    inverse = np.linalg.pinv(normal / scale[:, :, None] / scale[:, None, :], hermitian=True)
    errors = np.sqrt(np.maximum(np.einsum("npp->np", inverse), 0)) / scale
    width = np.abs(values[:, -3])
    heights, centres = values[:, :number], values[:, number : 2 * number]
    good = np.isfinite(values).all(axis=1) & (width > _NARROWEST) & (width < _WIDEST) & (heights > 0).all(axis=1)
    order = np.argsort(centres, axis=1)
    columns = (heights, centres, errors[:, :number], errors[:, number : 2 * number])
    sort = [np.take_along_axis(column, order, 1) for column in columns]
    return Peaks(sort[0], sort[1], width, sort[2], sort[3], cost, good)
