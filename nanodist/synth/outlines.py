"""Flat outlines with exact sizes: what a disc of some radius sweeps over a convex polygon.

A point swept is a disc, a segment a rod with round ends, a square or a triangle one with rounded corners. Area and
perimeter follow from Steiner's formula (``A + P r + pi r^2`` and ``P + 2 pi r``), Feret diameters from the corners.
Coordinates are those of :mod:`nanodist.synth.geometry`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanodist.synth.geometry import Frame, segment_distance

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Outline:
    """A convex polygon ``corners`` (n, 2), n >= 1, in order and in nm, rounded by ``radius_nm``."""

    corners: Floats
    radius_nm: float

    @property
    def centre(self) -> Floats:
        """Mean of the corners, (2,)."""
        return np.asarray(self.corners.mean(axis=0))

    @property
    def area_nm2(self) -> float:
        """Area."""
        x, y = self.corners.T
        inner = abs(float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))) / 2
        return inner + self._around() * self.radius_nm + math.pi * self.radius_nm**2

    @property
    def perimeter_nm(self) -> float:
        """Length of the boundary."""
        return self._around() + 2 * math.pi * self.radius_nm

    def _around(self) -> float:
        return float(np.hypot(*(np.roll(self.corners, -1, axis=0) - self.corners).T).sum())

    def feret_nm(self) -> tuple[float, float]:
        """Least and largest distance between parallel lines that hold the outline."""
        far = self.corners[:, None] - self.corners[None]
        largest = float(np.hypot(far[..., 0], far[..., 1]).max())
        edges = np.roll(self.corners, -1, axis=0) - self.corners
        length = np.hypot(*edges.T)
        least = 0.0
        if (length > 0).any() and len(self.corners) > 2:
            normal = np.stack([-edges[:, 1], edges[:, 0]], axis=1)[length > 0] / length[length > 0, None]
            least = float(np.ptp(self.corners @ normal.T, axis=0).min())
        return least + 2 * self.radius_nm, largest + 2 * self.radius_nm

    def is_cut(self, field_nm: float) -> bool:
        """Whether any part lies outside the field."""
        return bool(self.corners.min() < self.radius_nm or self.corners.max() > field_nm - self.radius_nm)

    def signed_distance(self, x: Floats, y: Floats) -> Floats:
        """Distance to the boundary, negative inside; ``x`` and ``y`` broadcast against each other."""
        squared = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf)
        inside = np.ones(squared.shape, bool)
        following = np.roll(self.corners, -1, axis=0)
        turn = 0.0
        for a, b in zip(self.corners, following, strict=True):
            near, _ = segment_distance(x, y, a, b)
            np.minimum(squared, near, out=squared)
            turn += float(a[0] * b[1] - a[1] * b[0])
        if len(self.corners) < 3:
            return np.sqrt(squared) - self.radius_nm
        for a, b in zip(self.corners, following, strict=True):
            side = (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])
            inside &= side * np.sign(turn) >= 0
        return np.where(inside, -1.0, 1.0) * np.sqrt(squared) - self.radius_nm


def disc(centre: Floats, diameter_nm: float) -> Outline:
    """A disc."""
    return Outline(np.asarray(centre, float)[None], diameter_nm / 2)


def rod(centre: Floats, length_nm: float, width_nm: float, angle: float) -> Outline:
    """A rod with round ends, ``length_nm`` from tip to tip, its axis at ``angle`` (rad, from x towards y)."""
    half = (length_nm - width_nm) / 2 * np.array([math.cos(angle), math.sin(angle)])
    return Outline(np.stack([centre - half, centre + half]), width_nm / 2)


def polygon(centre: Floats, sides: int, edge_nm: float, rounding_nm: float, angle: float) -> Outline:
    """A regular polygon with edges ``edge_nm`` long before its corners are rounded by ``rounding_nm``."""
    inradius = edge_nm / (2 * math.tan(math.pi / sides))
    # Shrinking a regular polygon by r moves its corners in by r / cos(pi / n).
    reach = (inradius - rounding_nm) / math.cos(math.pi / sides)
    turns = angle + 2 * math.pi * np.arange(sides) / sides
    return Outline(centre + reach * np.stack([np.cos(turns), np.sin(turns)], axis=1), rounding_nm)


@dataclass(frozen=True)
class Raster:
    """An outline on the pixels of a computed square: signed distance (n, m) in nm on ``window``, and coordinates."""

    window: tuple[slice, slice]
    signed_nm: Floats
    x_nm: Floats
    y_nm: Floats

    @property
    def mask(self) -> Mask:
        """Pixels whose centre lies inside."""
        return np.asarray(self.signed_nm <= 0)

    def covered(self, pixel_nm: float) -> Floats:
        """Share of each pixel that lies inside, from the distance of its centre."""
        return np.clip(0.5 - self.signed_nm / pixel_nm, 0.0, 1.0)


def raster(outline: Outline, frame: Frame, beyond_nm: float = 0.0) -> Raster | None:
    """The outline's distance map with ``beyond_nm`` around it, or ``None`` where that lies outside the square."""
    scale, margin = frame.pixel_size_nm, frame.margin_px
    reach = outline.radius_nm + beyond_nm + scale
    low = (outline.corners.min(axis=0) - reach) / scale + margin
    high = (outline.corners.max(axis=0) + reach) / scale + margin
    columns, rows = (
        slice(max(0, math.floor(a)), min(frame.padded_px, math.ceil(b))) for a, b in zip(low, high, strict=True)
    )
    if rows.stop <= rows.start or columns.stop <= columns.start:
        return None
    y = (np.arange(rows.start, rows.stop) + 0.5 - margin)[:, None] * scale
    x = (np.arange(columns.start, columns.stop) + 0.5 - margin)[None, :] * scale
    return Raster((rows, columns), outline.signed_distance(x, y), x, y)


def truth_of(outline: Outline, field_nm: float) -> dict[str, float | bool]:
    """The exact sizes of an outline, border or not, as JSON-able values."""
    least, largest = outline.feret_nm()
    area, perimeter = outline.area_nm2, outline.perimeter_nm
    x, y = outline.centre
    return {
        "x_nm": float(x),
        "y_nm": float(y),
        "width_nm": least,
        "length_nm": largest,
        "area_nm2": area,
        "perimeter_nm": perimeter,
        "equivalent_diameter_nm": math.sqrt(4 * area / math.pi),
        "circularity": 4 * math.pi * area / perimeter**2,
        "border_cut": outline.is_cut(field_nm),
    }
