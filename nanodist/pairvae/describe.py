"""Descriptors of patterns and of micrographs: period, width, orientation, anisotropy, area fraction, S2, chords.

A pattern and the spectrum of a micrograph are described by the same rules, so that one can be held against the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks
from skimage.filters import threshold_otsu

from nanodist.morphology.domains import chord_summary, two_point_correlation
from nanodist.scattering.azimuthal import azimuthal
from nanodist.scattering.pattern import Pattern, QGrid

F64 = npt.NDArray[np.float64]
# A spectrum is made on a grid this many times as fine as the FFT's own.
_PADDED = 4
_SECTORS = 36


@dataclass(frozen=True)
class Scattering:
    """What a pattern says.

    Attributes:
        q_star_inv_nm: of the first peak; NaN where there is none.
        width_inv_nm: full width of it at half its height.
        orientation_deg: of the peak, modulo 180, anticlockwise from x.
        anisotropy: 0 for a ring, 1 for two spots: modulus of the mean of exp(2 i angle) over the peak.
        hexagonal_deg: modulo 60, from the mean of exp(6 i angle).
        six_fold: modulus of that.
    """

    q_star_inv_nm: float
    width_inv_nm: float
    orientation_deg: float
    anisotropy: float
    hexagonal_deg: float
    six_fold: float

    @property
    def period_nm(self) -> float:
        """2 pi / q*."""
        return 2 * math.pi / self.q_star_inv_nm


def describe_pattern(pattern: Pattern) -> Scattering:
    """Peak and directions of a pattern."""
    q, intensity, _ = azimuthal(pattern)
    q_star, width = first_peak(q, intensity)
    q_y, q_x = pattern.grid.q()
    return Scattering(q_star, width, *_directions(q_y, q_x, pattern.intensity, pattern.mask, q_star, width))


def first_peak(q: F64, intensity: F64) -> tuple[float, float]:
    """q* and full width at half height of the peak of I(q) that stands out most, above what falls on both sides of it.

    Between ln I and a straight line of ln I over ln q through both feet of the peak; NaN where nothing stands out.
    """
    good = np.isfinite(intensity) & (q > 0)
    q, intensity = q[good], np.asarray(intensity[good], np.float64)
    if len(q) < 8 or not (intensity > 0).any():
        return math.nan, math.nan
    floor = 1e-3 * float(np.median(intensity[intensity > 0]))
    fine = np.exp(np.linspace(math.log(q[0]), math.log(q[-1]), 400))
    logs = gaussian_filter1d(np.interp(fine, q, np.log(np.maximum(intensity, floor))), 3.0)
    peaks, found = find_peaks(logs, prominence=0.1)
    if not len(peaks):
        return math.nan, math.nan
    best = int(np.argmax(found["prominences"]))
    top, left, right = int(peaks[best]), int(found["left_bases"][best]), int(found["right_bases"][best])
    # A foot far down a tail would tilt the line under the peak.
    left, right = max(left, top - 120), min(right, top + 120)
    share = (np.arange(left, right + 1) - left) / max(right - left, 1)
    line = np.exp(logs[left] + share * (logs[right] - logs[left]))
    above = np.exp(logs[left : right + 1]) - line
    summit = int(np.argmax(above))
    half = above >= above[summit] / 2
    low, high = summit, summit
    while low > 0 and half[low - 1]:
        low -= 1
    while high < len(half) - 1 and half[high + 1]:
        high += 1
    inside = slice(low, high + 1)
    at = fine[left : right + 1]
    q_star = float((at[inside] * above[inside]).sum() / above[inside].sum())
    return q_star, float(at[high] - at[low])


def _directions(
    q_y: F64, q_x: F64, intensity: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_], q_star: float, width: float
) -> tuple[float, float, float, float]:
    """Two- and six-fold direction of the ring about q*, each with its strength."""
    if not math.isfinite(q_star):
        return math.nan, math.nan, math.nan, math.nan
    modulus = np.hypot(q_y, q_x)
    reach = max(0.5 * width, 0.08 * q_star)
    ring = mask & (np.abs(modulus - q_star) < reach)
    sector = np.floor(np.remainder(np.arctan2(q_y[ring], q_x[ring]), math.pi) / math.pi * _SECTORS).astype(int)
    sector = np.minimum(sector, _SECTORS - 1)
    counts = np.bincount(sector, minlength=_SECTORS)
    means = np.bincount(sector, intensity[ring], _SECTORS) / np.maximum(counts, 1)
    there = counts > 0
    if there.sum() < _SECTORS // 2:
        return math.nan, math.nan, math.nan, math.nan
    angle = (np.arange(_SECTORS) + 0.5) * math.pi / _SECTORS
    # A sector that nothing was measured in has the value between its neighbours.
    wrapped = np.concatenate([angle[there] - math.pi, angle[there], angle[there] + math.pi])
    filled = np.interp(angle, wrapped, np.tile(means[there], 3))
    weight = np.maximum(filled - filled.min(), 0.0)
    total = max(float(weight.sum()), 1e-12)
    two, six = (complex((weight * np.exp(1j * fold * angle)).sum() / total) for fold in (2, 6))
    # Against all of the ring, so that noise on an even ring is no direction.
    share = float(weight.sum() / max(filled.sum(), 1e-12))
    orientation = math.degrees(math.atan2(two.imag, two.real)) / 2 % 180
    hexagonal = math.degrees(math.atan2(six.imag, six.real)) / 6 % 60
    return orientation, abs(two) * share, hexagonal, abs(six) * share


def image_spectrum(images: Sequence[npt.NDArray[np.floating]], pixel_size_nm: float) -> Pattern:
    """Mean |FFT|^2 of images (H, W) of one size under a Hann window, each without its plane, as a pattern.

    Masked below 3 pi / L: there is the window.
    """
    side = min(images[0].shape)
    window = np.hanning(side + 1)[:side]
    window2 = window[:, None] * window[None, :]
    axis = np.linspace(-1.0, 1.0, side)
    size = _PADDED * side + 1
    total = np.zeros((size, size))
    for image in images:
        flat = np.asarray(image[:side, :side], np.float64)
        flat = flat - flat.mean()
        for slope in (axis[:, None], axis[None, :]):
            flat = flat - slope * (flat * slope).sum() / (np.broadcast_to(slope, flat.shape) ** 2).sum()
        total += np.abs(np.fft.fftshift(np.fft.fft2(flat * window2, (size, size)))) ** 2
    total /= len(images) * (window2**2).sum()
    step = 2 * math.pi / (size * pixel_size_nm)
    grid = QGrid(size, step * size / 2)
    mask = grid.modulus() > 3 * math.pi / (side * pixel_size_nm)
    return Pattern(total.astype(np.float32), None, mask, grid, "reduced")


@dataclass(frozen=True)
class Morphology:
    """What an image, cut in two at Otsu's threshold, says.

    Attributes:
        area_fraction: of the bright phase.
        chord_nm: length-weighted mean chord of it.
        s2: two-point correlation at whole pixels from 0 to a half of the side.
    """

    area_fraction: float
    chord_nm: float
    s2: F64


def describe_image(image: npt.NDArray[np.floating], pixel_size_nm: float) -> Morphology:
    """Area fraction, chords and S2 of an image (H, W)."""
    if float(np.ptp(image)) < 1e-6:
        empty = np.full(min(image.shape) // 2 + 1, math.nan)
        return Morphology(math.nan, math.nan, empty)
    mask = np.asarray(image > threshold_otsu(image))
    correlation = two_point_correlation(mask, min(image.shape) // 2)
    chord = float(chord_summary(mask)["domain_chord_weighted_mean"]) * pixel_size_nm
    return Morphology(float(mask.mean()), chord, np.asarray(correlation.s2, np.float64))


def apart(first_deg: float, second_deg: float, modulo: float) -> float:
    """Angle between two directions that repeat every ``modulo`` degrees."""
    return abs((first_deg - second_deg + modulo / 2) % modulo - modulo / 2)


def row_of(scattering: Scattering) -> dict[str, float]:
    """The descriptors as columns of a table."""
    return {"period_nm": scattering.period_nm, **asdict(scattering)}
