"""What a PairVAE has to be better than: no learning at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from nanodist.pairvae.physics import CropScattering
from nanodist.pairvae.polar import folded
from nanodist.scattering.pattern import Pattern

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
# I0 of neighbours' asinh(I / I0), where the peak of a pattern is 1.
NEAREST_REFERENCE = 0.02


def distance(a: Pattern, b: Pattern, reference: float) -> float:
    """Mean absolute difference of asinh(I / I0) over what both patterns measured."""
    both = a.mask & b.mask
    if not both.any():
        return float("inf")
    first, second = (np.arcsinh(x.intensity[both].astype(np.float64) / reference) for x in (a, b))
    return float(np.abs(first - second).mean())


def nearest(given: Pattern, known: Sequence[Pattern]) -> int:
    """Which of ``known`` is nearest to ``given`` in shape, whatever the exposures.

    By counts the neighbour would often be the one of like exposure, which makes this baseline too weak.
    """
    scaled = scaled_to_its_peak(given)
    return int(np.argmin([distance(scaled, scaled_to_its_peak(other), NEAREST_REFERENCE) for other in known]))


def scaled_to_its_peak(pattern: Pattern) -> Pattern:
    """The pattern over the 99 % quantile of what it measured."""
    top = float(np.quantile(pattern.intensity[pattern.mask], 0.99))
    return dataclasses.replace(pattern, intensity=pattern.intensity / np.float32(max(top, 1e-12)))


def mean_pattern(known: Sequence[Pattern], reference: float) -> Pattern:
    """The mean of asinh(I / I0) over the patterns that measured a pixel, back as an intensity."""
    values = np.stack([np.arcsinh(x.intensity.astype(np.float64) / reference) for x in known])
    mask = np.stack([x.mask for x in known])
    count = mask.sum(0)
    mean = (values * mask).sum(0) / np.maximum(count, 1)
    intensity = (np.sinh(mean) * reference).astype(np.float32)
    return Pattern(intensity, None, count > 0, known[0].grid, known[0].kind)


def random_fields(
    pattern: Pattern, crops: CropScattering, area_fraction: float, draws: int, rng: np.random.Generator
) -> F32:
    """Gaussian random fields (draws, P, P) with the scattering of ``pattern``, thresholded to an area fraction.

    The flat background (the lowest twentieth of what is compared) is taken off; where nothing was measured, and below
    the q that a crop knows, there is no scattering.
    """
    size = crops.size_px
    axis = (torch.arange(size, dtype=torch.float64) - crops.middle) * crops.step_inv_nm
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    vectors = torch.stack([x.flatten(), y.flatten()], 1)
    values, share = folded(
        torch.from_numpy(pattern.intensity).double()[None],
        torch.from_numpy(pattern.mask)[None],
        (pattern.grid.size - 1) / 2,
        pattern.grid.q_step_inv_nm,
        vectors[None],
    )
    spectrum, known = values[0].numpy(), share[0].numpy() > 0
    background = np.quantile(spectrum[known], 0.05)
    inside = known & (vectors.norm(dim=1).numpy() > crops.range_inv_nm[0])
    amplitude = np.sqrt(np.where(inside, np.maximum(spectrum - background, 0.0), 0.0)).reshape(size, size)
    amplitude = np.fft.ifftshift(amplitude)
    made = []
    for _ in range(draws):
        field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) * amplitude).real
        made.append(field > np.quantile(field, 1 - area_fraction))
    return np.stack(made).astype(np.float32)
