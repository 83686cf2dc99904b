"""What a PairVAE has to be better than: no learning at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nanodist.pairvae.fields import amplitude_of, gaussian_field
from nanodist.pairvae.physics import CropScattering
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
    """Gaussian random fields (draws, P, P) with the scattering of ``pattern``, thresholded to an area fraction."""
    amplitude = amplitude_of(pattern, crops)
    made = []
    for _ in range(draws):
        empty = np.zeros((crops.size_px, crops.size_px)) if amplitude is None else amplitude
        field = gaussian_field(empty, rng)
        made.append(field > np.quantile(field, 1 - area_fraction))
    return np.stack(made).astype(np.float32)
