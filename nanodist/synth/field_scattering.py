"""Small-angle scattering of films: the mean |FFT|^2 of many periodic fields of one specimen.

In the Born approximation, and along the normal of a film, a pattern is the power spectrum of the projected density:
the field holds the shape of its domains already, so no form factor comes on top. Fields of sharp domains fall as q^-3
when averaged over the azimuth (Porod's law in two dimensions).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft
from scipy.ndimage import map_coordinates

from nanodist.synth.copolymers import FilmField
from nanodist.synth.phase_field import Box

ANGLES = 480
# Up to this share of its Nyquist wave, the spectrum of an edge's pixels is that of the edge.
_TRUSTED = 0.6


@dataclass(frozen=True)
class PolarPattern:
    """Scattered intensity over q and azimuth, in nm^2: |F|^2 over the area, of a contrast of 1.

    Attributes:
        intensity: (q, azimuth), float64; the azimuth goes once around, in :data:`ANGLES` steps from the x axis.
        q_inv_nm: (q,) in 1/nm, evenly from 0.
    """

    intensity: npt.NDArray[np.float64]
    q_inv_nm: npt.NDArray[np.float64]

    def at(self, q_y: npt.NDArray[np.float64], q_x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The intensity at places in q (1/nm, any shape, q_y up); the last q's beyond the last."""
        step = self.q_inv_nm[1]
        radius = np.minimum(np.hypot(q_y, q_x) / step, len(self.q_inv_nm) - 1)
        turn = (np.arctan2(q_y, q_x) / (2 * np.pi) % 1.0) * ANGLES
        closed = np.concatenate([self.intensity, self.intensity[:, :1]], axis=1)
        return np.asarray(map_coordinates(closed, [radius, turn], order=1, mode="nearest"))

    def azimuthal(self) -> npt.NDArray[np.float64]:
        """(q,) the mean over the azimuth."""
        return np.asarray(self.intensity.mean(axis=1))


def sharp(field: FilmField, fraction: float, refine: int) -> tuple[npt.NDArray[np.float32], float]:
    """The two phases, 0 and 1, of a field on ``refine`` times as fine a grid, and the level between them.

    The level is such that the phase above it fills ``fraction``. A pixel on an edge holds the share of it that lies
    above: the edge is smeared by a box of a pixel, which :func:`power` takes off again.
    """
    ny, nx = field.box.points
    hat = fft.rfft2(field.values)
    fine = np.zeros((refine * ny, refine * nx // 2 + 1), hat.dtype)
    half = ny // 2
    fine[:half, : nx // 2] = hat[:half, : nx // 2]
    fine[-half + 1 :, : nx // 2] = hat[-half + 1 :, : nx // 2]
    psi = fft.irfft2(fine, s=(refine * ny, refine * nx)) * np.float32(refine**2)
    level = float(np.quantile(psi[::2, ::2], 1 - fraction))
    slope = np.hypot(
        np.roll(psi, -1, 0) - np.roll(psi, 1, 0), np.roll(psi, -1, 1) - np.roll(psi, 1, 1), dtype=np.float32
    )
    share = np.clip(0.5 + 2 * (psi - np.float32(level)) / np.maximum(slope, 1e-12), 0, 1)
    return share.astype(np.float32), level


def refinement(box: Box, unit_nm: float, q_max_inv_nm: float) -> int:
    """How much finer than a field its edges must be drawn for a spectrum up to q_max: 2, 4, 8, ..."""
    coarse = max(periods * unit_nm / points for periods, points in zip(box.periods, box.points, strict=True))
    refine = 2
    while coarse / refine * q_max_inv_nm > _TRUSTED * np.pi:
        refine *= 2
    return refine


def power(
    phases: npt.NDArray[np.float32], lengths_nm: tuple[float, float], q_max_inv_nm: float
) -> npt.NDArray[np.float64]:
    """|F|^2 over the area, in nm^2, of a periodic map (y, x): (2 m + 1, 2 n + 1), q = 0 in the middle, up to q_max."""
    ny, nx = phases.shape
    pixel = lengths_nm[0] / ny, lengths_nm[1] / nx
    m, n = (min(math.ceil(q_max_inv_nm * length / (2 * np.pi)) + 1, points // 2 - 1) for length, points in
            zip(lengths_nm, phases.shape, strict=True))  # fmt: skip
    hat = fft.rfft2(phases - phases.mean(dtype=np.float64).astype(np.float32))
    half = np.abs(np.concatenate([hat[-m:, : n + 1], hat[: m + 1, : n + 1]])).astype(np.float64) ** 2
    whole = np.concatenate([half[::-1, :0:-1], half], axis=1)
    q_y = 2 * np.pi * np.arange(-m, m + 1)[:, None] / lengths_nm[0]
    q_x = 2 * np.pi * np.arange(-n, n + 1)[None, :] / lengths_nm[1]
    edge = np.sinc(np.hypot(q_y * pixel[0], q_x * pixel[1]) / (2 * np.pi)) ** 2
    return np.asarray(whole * (pixel[0] * pixel[1]) ** 2 / (lengths_nm[0] * lengths_nm[1]) / edge)


def scatter(
    fields: Sequence[FilmField],
    fraction: float,
    unit_nm: float,
    *,
    q_max_inv_nm: float,
    fold: int,
    oriented: bool,
    interface_nm: float = 0.0,
    bins: int = 320,
) -> PolarPattern:
    """The mean pattern of ``fields``, along whose x axis the specimen is oriented.

    Args:
        fields: independent fields of one specimen.
        fraction: of the area, that the phase above the level fills.
        unit_nm: the length of a period of the equation.
        q_max_inv_nm: how far the pattern goes.
        fold: rotations that leave the specimen's statistics alone (2 or 6).
        oriented: whether a direction is favoured. The beam sees many more grains than there are fields here, so the
            pattern is averaged over what turns one probable field into another: mirror and ``fold`` rotations of an
            oriented specimen, all rotations of another.
        interface_nm: standard deviation of the Gaussian that smears the interfaces.
        bins: of q.
    """
    q = np.linspace(0, q_max_inv_nm, bins)
    angle = np.arange(ANGLES) * (2 * np.pi / ANGLES)
    total = np.zeros((bins, ANGLES))
    for field in fields:
        unit = unit_nm * field.stretched
        lengths = field.box.periods[0] * unit, field.box.periods[1] * unit
        phases, _ = sharp(field, fraction, refinement(field.box, unit, q_max_inv_nm))
        spectrum = power(phases, lengths, q_max_inv_nm)
        turned = angle - np.radians(field.turned_deg)
        at_y = q[:, None] * np.sin(turned) * lengths[0] / (2 * np.pi) + spectrum.shape[0] // 2
        at_x = q[:, None] * np.cos(turned) * lengths[1] / (2 * np.pi) + spectrum.shape[1] // 2
        total += map_coordinates(spectrum, [at_y, at_x], order=1, mode="constant")
    mean = total / len(fields)
    if oriented:
        mirrored = mean[:, (-np.arange(ANGLES)) % ANGLES]
        mean = np.mean([np.roll(one, k * ANGLES // fold, 1) for one in (mean, mirrored) for k in range(fold)], axis=0)
    else:
        mean = np.broadcast_to(mean.mean(axis=1, keepdims=True), mean.shape).copy()
    return PolarPattern(mean * np.exp(-((q * interface_nm) ** 2))[:, None], q)


def rotated(pattern: PolarPattern, angle_deg: float) -> PolarPattern:
    """The pattern of the specimen turned by ``angle_deg`` anticlockwise."""
    shift = angle_deg / 360 * ANGLES
    whole, rest = math.floor(shift), shift - math.floor(shift)
    turned = (1 - rest) * np.roll(pattern.intensity, whole, 1) + rest * np.roll(pattern.intensity, whole + 1, 1)
    return PolarPattern(turned, pattern.q_inv_nm)
