"""Gaussian random fields with the scattering of a pattern, and images that draws begin with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from nanodist.pairvae.physics import CropScattering
from nanodist.pairvae.polar import folded
from nanodist.scattering.pattern import Pattern

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def amplitude_of(pattern: Pattern, crops: CropScattering) -> F64 | None:
    """What white noise (P, P) is multiplied with in Fourier space to scatter as ``pattern``; ``None``: nothing does.

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
    if not known.any():
        return None
    above = spectrum - np.quantile(spectrum[known], 0.05)
    inside = known & (vectors.norm(dim=1).numpy() > crops.range_inv_nm[0])
    # An even pattern is above its background by rounding alone.
    inside &= above > 1e-5 * float(np.abs(spectrum[known]).max())
    amplitude = np.sqrt(np.where(inside, above, 0.0)).reshape(size, size)
    return np.fft.ifftshift(amplitude) if amplitude.any() else None


def gaussian_field(amplitude: F64, rng: np.random.Generator) -> F64:
    """A field (P, P) with that amplitude."""
    return np.asarray(np.fft.ifft2(np.fft.fft2(rng.standard_normal(amplitude.shape)) * amplitude).real)


def with_levels(field: F64, levels: F64) -> F32:
    """``field`` (P, P) with other grey levels in the same order: ``levels`` are their quantiles, evenly from 0 to 1."""
    rank = np.empty(field.size)
    rank[np.argsort(field, axis=None, kind="stable")] = np.linspace(0, 1, field.size)
    return np.interp(rank, np.linspace(0, 1, len(levels)), levels).reshape(field.shape).astype(np.float32)


def first_images(
    pattern: Pattern, crops: CropScattering, levels: F64, draws: Sequence[np.random.Generator]
) -> F32 | None:
    """Images (n, P, P) that scatter as ``pattern`` does and have the grey ``levels`` of the training part, no more."""
    amplitude = amplitude_of(pattern, crops)
    return None if amplitude is None else np.stack([with_levels(gaussian_field(amplitude, r), levels) for r in draws])
