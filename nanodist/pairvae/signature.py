"""What a pattern or a micrograph shows, in few numbers that neither its orientation nor its exposure changes.

By these an input is held against the training part (:mod:`nanodist.pairvae.reference`). A mean over all pixels, such as
the error of a reconstruction, does not see a few sharp spots; these do: I(q) over its own peak, and how each ring of it
varies with the angle. A micrograph's spectrum is described as a pattern is; grey levels and texture come with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from nanodist.pairvae.describe import first_peak, image_spectrum
from nanodist.scattering.azimuthal import azimuthal
from nanodist.scattering.pattern import Pattern

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Signature = dict[str, F64]
# What two specimens of one kind may differ by in each number, whatever the training part says.
FLOORS = {"latent": 1e-6, "peak": 0.1, "profile": 0.2, "angular": 0.1, "grey": 0.03, "texture": 0.1}
# How many numbers each part of a signature has.
WIDTHS = {"peak": 3, "profile": 24, "angular": 30, "grey": 13, "texture": 12}
# Edges in q / q*, even in the logarithm; I0 of asinh(I / I0) where I(q*) is 1.
_EDGES = np.exp(np.linspace(math.log(0.3), math.log(4.0), 25))
_I0 = 0.02
# Rings in q / q*: below the peak, the peak, between it and higher orders, those, and beyond.
_RINGS = ((0.35, 0.75), (0.75, 1.25), (1.25, 1.6), (1.6, 2.2), (2.2, 3.2))
_SECTORS = 48
_LEVELS = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98)
_SCALES_PX = (1.0, 2.0, 4.0)
# Fewer crops than this say nothing of how an image varies over its area.
_FEWEST_CROPS = 4


class _Pixels(NamedTuple):
    """Measured pixels (n,): q / q*, angle from 0 to 2 pi, and intensity over that at q*."""

    x: F64
    angle: F64
    value: F64


def pattern_signature(pattern: Pattern) -> Signature:
    """``peak``, ``profile`` and ``angular`` of a pattern; NaN where too little was measured.

    - ``peak`` (3,): ln q*, ln of the width over q*, and 1 where there is a peak. Without one the first two are NaN, and
      the middle of the measured q stands for q* below.
    - ``profile`` (24,): asinh(I / I0) of the mean over rings from 0.3 to 4 q*, I0 being a fiftieth of I(q*).
    - ``angular`` (30,): for each of five rings, logarithms of the harmonics 2, 4, 6, of all even ones from 8 on, of
      1, 3 and 5 together (0 by Friedel's law), each over the mean, and of the brightest 2 % of the pixels over it.
    """
    pattern = _filled(pattern)
    q, intensity, _ = azimuthal(pattern)
    good = np.isfinite(intensity)
    q, intensity = q[good], intensity[good]
    q_star, width = first_peak(q, intensity)
    found = math.isfinite(q_star)
    peak = np.array([math.log(q_star), math.log(width / q_star), 1.0] if found else [math.nan, math.nan, 0.0])
    middle = q_star if found else float(np.exp(np.log(q[q > 0]).mean()))
    # Subtracted data can be negative where there is no peak.
    top = max(float(np.interp(middle, q, intensity)), 1e-6 * float(np.abs(intensity).max()), 1e-30)
    q_y, q_x = (plane[pattern.mask] for plane in pattern.grid.q())
    angle = np.remainder(np.arctan2(q_y, q_x), 2 * math.pi)
    pixels = _Pixels(np.hypot(q_y, q_x) / middle, angle, pattern.intensity[pattern.mask].astype(np.float64) / top)
    rings = [_ring(pixels, low, high) for low, high in _RINGS]
    step = pattern.grid.q_step_inv_nm / middle
    return {"peak": peak, "profile": _profile(pixels, step), "angular": np.concatenate(rings)}


def _filled(pattern: Pattern) -> Pattern:
    """With what was not measured as it is on the opposite side of the beam."""
    opposite, there = pattern.intensity[::-1, ::-1], pattern.mask[::-1, ::-1]
    intensity = np.where(pattern.mask, pattern.intensity, np.where(there, opposite, np.float32(0)))
    return dataclasses.replace(pattern, intensity=intensity, sigma=None, mask=pattern.mask | there)


def _profile(pixels: _Pixels, step: float) -> F64:
    """The compressed mean of each ring of which a quarter was measured; ``step`` is a pixel of the grid over q*."""
    bins = len(_EDGES) - 1
    number = np.searchsorted(_EDGES, pixels.x) - 1
    inside = (number >= 0) & (number < bins)
    counts = np.bincount(number[inside], minlength=bins)
    sums = np.bincount(number[inside], pixels.value[inside], bins)
    whole = math.pi * (_EDGES[1:] ** 2 - _EDGES[:-1] ** 2) / step**2
    enough = counts >= np.maximum(4, 0.25 * whole)
    return np.where(enough, np.arcsinh(sums / np.maximum(counts, 1) / _I0), math.nan)


def _ring(pixels: _Pixels, low: float, high: float) -> F64:
    """The six numbers of ``angular`` of one ring."""
    inside = (pixels.x >= low) & (pixels.x < high)
    value = pixels.value[inside]
    sector = np.minimum((pixels.angle[inside] / (2 * math.pi) * _SECTORS).astype(np.int64), _SECTORS - 1)
    counts = np.bincount(sector, minlength=_SECTORS)
    means = np.where(counts > 0, np.bincount(sector, value, _SECTORS) / np.maximum(counts, 1), math.nan)
    there = counts > 0
    if there.mean() < 0.7 or len(value) < 20:
        return np.full(6, math.nan)
    # What neither side measured is between its neighbours.
    places = np.flatnonzero(there)
    wrapped = np.concatenate([places - _SECTORS, places, places + _SECTORS])
    means = np.interp(np.arange(_SECTORS), wrapped, np.tile(means[there], 3))
    mean = max(abs(float(means.mean())), 1e-9)
    c = np.abs(np.fft.rfft(means)) / _SECTORS / mean
    parts = [c[2], c[4], c[6], float(np.linalg.norm(c[8::2])), float(np.linalg.norm(c[1:6:2]))]
    bright = max(float(np.quantile(value, 0.98)), 0.0) / max(abs(float(value.mean())), 1e-9)
    return np.log(np.array([*parts, bright]) + 0.01)


def image_signature(crops: Sequence[F32], pixel_size_nm: float) -> Signature:
    """That of the crops' mean spectrum, and ``grey`` and ``texture`` of the crops (P, P), which are in [0, 1].

    - ``grey`` (13,): quantiles of the levels, mean of the crops' means and contrasts, and their spreads over the crops.
    - ``texture`` (12,): at each of three scales, of the difference of two Gaussians: its share of the contrast,
      skewness, logarithm of the kurtosis, and how its strength varies over the crops.
    """
    stack = np.stack(crops).astype(np.float64)
    each = np.stack([stack.mean((1, 2)), stack.std((1, 2))], 1)
    several = len(stack) >= _FEWEST_CROPS
    spread = each.std(0) if several else np.full(2, math.nan)
    grey = np.concatenate([np.quantile(stack, _LEVELS), each.mean(0), spread])
    contrast, texture = max(float(stack.std()), 1e-6), []
    for scale in _SCALES_PX:
        band = np.stack([ndimage.gaussian_filter(c, scale) - ndimage.gaussian_filter(c, 2 * scale) for c in stack])
        deviation = max(float(band.std()), 1e-9)
        z = (band - band.mean()) / deviation
        varies = math.log(float(band.std((1, 2)).std()) / deviation + 0.02) if several else math.nan
        texture += [math.log(deviation / contrast), float((z**3).mean()), math.log(float((z**4).mean()) + 1e-3), varies]
    return {
        **pattern_signature(image_spectrum(list(crops), pixel_size_nm)),
        "grey": grey,
        "texture": np.array(texture),
    }
