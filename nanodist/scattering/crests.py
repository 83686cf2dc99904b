"""Where the rings of a calibrant are, sector by sector: single rings, and pairs of two layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nanodist.scattering.frame import Frame
from nanodist.scattering.geometry import Geometry
from nanodist.scattering.peaks import Peaks, fit_peaks

SECTORS = 36
# Rings are looked for within a third of their spacing.
_REACH = 0.33
# A crest is used where its height is so many standard errors, and its place known to a twentieth of the spacing.
_SIGNIFICANT, _PLACED = 5.0, 0.05
# Two crests are told apart where they are so many of their widths (standard deviations) away from each other.
_RESOLVED = 2.0
# Where the second crest of a pair is first looked for, relative to q.
_FIRST_GAP = 0.02
_LEAST_SECTORS = 6
_SHARE_OF_RING = 0.25


@dataclass(frozen=True)
class Points:
    """Where rings were seen: arrays of one length.

    Attributes:
        rows, columns: pixel coordinates of the crest.
        orders: of the ring.
        sigma_px: standard error of the place along the radius.
        layers: 0 for the inner of a pair of rings, or a single one; 1 for the outer.
        heights: of the crest over its surroundings.
    """

    rows: np.ndarray
    columns: np.ndarray
    orders: np.ndarray
    sigma_px: np.ndarray
    layers: np.ndarray
    heights: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> Points:
        """The chosen points, by a mask."""
        return Points(*(getattr(self, name)[chosen] for name in vars(self)))


@dataclass(frozen=True)
class Profiles:
    """Mean intensities around the orders of a calibrant, by sector.

    Attributes:
        axis: float64 (bins,), the distance to the order in units of the spacing.
        mean, sigma: float64 (orders, SECTORS, bins); sigma is infinite where there is no pixel.
        q_per_pixel: how much q grows with a pixel, near the beam, in 1/nm.
        spacing: 2 pi / period, in 1/nm.
        geometry: that gave each pixel its q.
    """

    axis: np.ndarray
    mean: np.ndarray
    sigma: np.ndarray
    q_per_pixel: float
    spacing: float
    geometry: Geometry

    def filled(self) -> tuple[np.ndarray, np.ndarray]:
        """The orders and sectors, (N,) each, with pixels in at least four fifths of their bins."""
        orders, sectors = np.nonzero(np.isfinite(self.sigma).mean(axis=-1) > 0.8)
        return orders[orders > 0], sectors[orders > 0]

    def highest(self, orders: np.ndarray, sectors: np.ndarray) -> np.ndarray:
        """The place of the highest three bins in a row, (N, 1)."""
        three = np.lib.stride_tricks.sliding_window_view(self.mean[orders, sectors], 3, axis=1).mean(axis=-1)
        return self.axis[1 + three.argmax(axis=1)][:, None]


def q_per_pixel(geometry: Geometry) -> float:
    """How much q grows with a pixel, near the beam, in 1/nm."""
    return 2 * math.pi / geometry.wavelength_nm * min(geometry.pixel_size_mm) / geometry.distance_mm


def profiles(frame: Frame, geometry: Geometry, period_nm: float) -> Profiles:
    """The radial profiles of all orders in all sectors, in bins of half a pixel."""
    q_y, q_x = geometry.q_at(*np.nonzero(frame.mask))
    modulus, angle = np.hypot(q_y, q_x), np.arctan2(q_y, q_x)
    values = frame.intensity[frame.mask].astype(np.float64)
    spacing = 2 * math.pi / period_nm
    per_pixel = q_per_pixel(geometry)
    bins = max(8, round(2 * _REACH * spacing / (0.5 * per_pixel)))
    order = np.rint(modulus / spacing).astype(np.int64)
    offset = modulus / spacing - order
    near = (order >= 1) & (np.abs(offset) < _REACH)
    sector = np.floor((angle[near] + math.pi) / (2 * math.pi) * SECTORS).astype(np.int64) % SECTORS
    place = np.floor((offset[near] + _REACH) / (2 * _REACH) * bins).astype(np.int64).clip(0, bins - 1)
    shape = (int(order[near].max(initial=0)) + 1, SECTORS, bins)
    index = (order[near] * SECTORS + sector) * bins + place
    pixels = np.bincount(index, minlength=math.prod(shape)).reshape(shape)
    total = np.bincount(index, values[near], math.prod(shape)).reshape(shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(pixels > 0, total / pixels, 0.0)
        if frame.kind == "counts":
            sigma = np.sqrt(np.maximum(total, 1)) / pixels
        else:
            squares = np.bincount(index, values[near] ** 2, math.prod(shape)).reshape(shape)
            scatter = np.maximum(squares / pixels - mean**2, 0)
            typical = np.nanmedian(scatter[pixels > 3]) if (pixels > 3).any() else 1.0
            sigma = np.sqrt(np.where(pixels > 3, np.maximum(scatter, 0.1 * typical), typical) / pixels)
    axis = ((np.arange(bins) + 0.5) / bins * 2 - 1) * _REACH
    return Profiles(axis, mean, np.where(pixels > 0, sigma, np.inf), per_pixel, spacing, geometry)


def split_of(found: Profiles) -> float | None:
    """By how much, relative to its q, each ring is split in two; None for single rings.

    Two layers of calibrant, as on both windows of a cell, stand at two distances: each ring is a pair whose gap grows
    with the order. In most sectors of the orders from 3 up, two crests then fit much better than one.
    """
    orders, sectors = found.filled()
    orders, sectors = orders[orders >= 3], sectors[orders >= 3]
    if len(orders) < _LEAST_SECTORS:
        return None
    profile = found.axis, found.mean[orders, sectors], found.sigma[orders, sectors]
    top = found.highest(orders, sectors)
    single = fit_peaks(*profile, top)
    # The other crest of a pair may stand on either side of the highest.
    step = _FIRST_GAP * orders[:, None]
    pairs = [fit_peaks(*profile, np.sort(np.concatenate([top, top + side * step], axis=1))) for side in (-1, 1)]
    chosen = np.where(_misfit(pairs[0]) <= _misfit(pairs[1]), 0, 1)
    gains = np.stack([_resolved(pair) & (pair.misfit < 0.7 * single.misfit) for pair in pairs])
    gaps = np.stack([(pair.centres[:, 1] - pair.centres[:, 0]) / orders for pair in pairs])
    gain, gap = (np.take_along_axis(both, chosen[None], 0)[0] for both in (gains, gaps))
    # Sectors without a crest say nothing.
    shown = single.good & (single.heights[:, 0] > _SIGNIFICANT * single.height_errors[:, 0])
    if shown.sum() < _LEAST_SECTORS or gain[shown].mean() < 0.5:
        return None
    low, middle, high = np.quantile(gap[shown & gain], (0.25, 0.5, 0.75))
    return float(middle) if high - low < 0.4 * middle else None


def _misfit(peaks: Peaks) -> np.ndarray:
    return np.where(peaks.good, peaks.misfit, np.inf)


def _resolved(peaks: Peaks) -> np.ndarray:
    """Where two crests are told apart, and neither is a mere shoulder."""
    apart = peaks.centres[:, 1] - peaks.centres[:, 0] > _RESOLVED * peaks.width
    return peaks.good & apart & (peaks.heights.min(axis=1) > 0.15 * peaks.heights.max(axis=1))


def crests(found: Profiles, split: float | None) -> Points:
    """The crests that stand out, as points on the detector.

    Args:
        found: the profiles.
        split: None for single rings; of pairs, only those are taken whose two rings are told apart.
    """
    orders, sectors = found.filled()
    if len(orders) == 0:
        return Points(*(np.zeros(0) for _ in range(6)))
    around = found.highest(orders, sectors) if split is None else orders[:, None] * split * np.array([-0.5, 0.5])
    peaks = fit_peaks(found.axis, found.mean[orders, sectors], found.sigma[orders, sectors], around)
    good = (peaks.good if split is None else _resolved(peaks))[:, None]
    good = good & (peaks.heights > _SIGNIFICANT * peaks.height_errors)
    good &= (peaks.centre_errors < _PLACED) & (np.abs(peaks.centres) < 0.85 * _REACH)
    # What few sectors of a ring show is no ring.
    all_of = np.bincount(orders)
    for layer in range(peaks.centres.shape[1]):
        seen = np.bincount(orders[good[:, layer]], minlength=len(all_of))
        good[:, layer] &= (seen >= np.maximum(_SHARE_OF_RING * all_of, 3))[orders]
    which, layers = np.nonzero(good)
    q = (orders[which] + peaks.centres[good]) * found.spacing
    angles = (sectors[which] + 0.5) / SECTORS * 2 * math.pi - math.pi
    rows, columns = found.geometry.pixel_at(q, angles)
    sigma = peaks.centre_errors[good] * found.spacing / found.q_per_pixel
    return Points(rows, columns, orders[which], sigma, layers, peaks.heights[good])
