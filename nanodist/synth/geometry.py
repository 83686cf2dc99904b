"""Round wires in the plane of the film, and their exact projection onto pixels.

A wire is what a ball of its radius sweeps along a polyline: a cylinder with hemispherical ends. Seen along the beam, a
point at distance ``d`` from the centre line has the projected thickness ``2 sqrt(r^2 - d^2)``.

Coordinates are (x, y) in nm, x to the right and y down; pixel (row, column) covers ``[column, column + 1) x
[row, row + 1)`` pixels, so its centre lies at ``(column + 0.5, row + 0.5) * pixel_size_nm``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from skimage.measure import label

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Frame:
    """A square field of ``size_px`` pixels of ``pixel_size_nm``, computed with ``margin_px`` more on every side."""

    size_px: int
    pixel_size_nm: float
    margin_px: int = 0

    @property
    def padded_px(self) -> int:
        """Side of the computed square, margins included, in pixels."""
        return self.size_px + 2 * self.margin_px

    @property
    def field_nm(self) -> float:
        """Side of the field that is kept, in nm."""
        return self.size_px * self.pixel_size_nm

    @property
    def inner(self) -> tuple[slice, slice]:
        """The slices that cut the field out of a computed array."""
        cut = slice(self.margin_px, self.margin_px + self.size_px)
        return cut, cut


@dataclass(frozen=True)
class Wire:
    """One wire: centre line ``points`` (n, 2) in nm, n >= 2, and radius in nm."""

    points: Floats
    radius_nm: float

    @property
    def contour_length_nm(self) -> float:
        """Length of the centre line; the two hemispherical ends add a radius each."""
        return float(np.linalg.norm(np.diff(self.points, axis=0), axis=1).sum())

    @property
    def end_to_end_nm(self) -> float:
        """Distance between the ends of the centre line."""
        return float(np.linalg.norm(self.points[-1] - self.points[0]))

    @property
    def orientation_deg(self) -> float:
        """Length-weighted axis in [0, 180) from x towards y (clockwise on the screen), by angle doubling."""
        dx, dy = np.diff(self.points, axis=0).T
        squared = np.sum((dx + 1j * dy) ** 2 / np.maximum(np.hypot(dx, dy), 1e-12))
        return math.degrees(float(np.angle(squared)) / 2) % 180.0

    def visible_length_nm(self, field_nm: float, steps: int = 4096) -> float:
        """Length of the centre line inside ``[0, field_nm]^2``, to 1/``steps`` of the contour."""
        arc = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(self.points, axis=0), axis=1))])
        at = (np.arange(steps) + 0.5) / steps * arc[-1]
        inside = np.ones(steps, bool)
        for axis in (0, 1):
            value = np.interp(at, arc, self.points[:, axis])
            inside &= (value >= 0) & (value <= field_nm)
        return float(inside.mean() * arc[-1])

    def is_cut(self, field_nm: float) -> bool:
        """Whether any part of the wire, ends included, lies outside the field."""
        low, high = self.points.min() - self.radius_nm, self.points.max() + self.radius_nm
        return bool(low < 0 or high > field_nm)


@dataclass(frozen=True)
class Projection:
    """A wire on the pixels of its bounding box ``window`` of the computed square.

    ``thickness_nm``, ``mask`` and ``arc_nm`` (position along the centre line) all have the shape of the window.
    """

    window: tuple[slice, slice]
    thickness_nm: Floats
    mask: Mask
    arc_nm: Floats


def segment_distance(x: Floats, y: Floats, start: Floats, end: Floats) -> tuple[Floats, Floats]:
    """Squared distance of points to a segment, and where on it (0 to 1) the nearest point lies.

    ``x`` and ``y`` broadcast against each other; ``start`` and ``end`` are (2,).
    """
    dx, dy = float(end[0] - start[0]), float(end[1] - start[1])
    length2 = max(dx * dx + dy * dy, 1e-30)
    u, v = x - start[0], y - start[1]
    along = np.clip(u * (dx / length2) + v * (dy / length2), 0.0, 1.0)
    across_x, across_y = u - along * dx, v - along * dy
    return across_x * across_x + across_y * across_y, along


def _span(low: float, high: float, limit: int) -> slice:
    return slice(max(0, math.floor(low)), min(limit, math.ceil(high)))


def _sweep(points: Floats, reach: float, rows: slice, columns: slice, fine: int) -> tuple[Floats, Floats]:
    """Distance to a polyline and arc length of the nearest point, in pixels, on ``fine`` x ``fine`` points a pixel."""
    y = (np.arange((rows.stop - rows.start) * fine) + 0.5) / fine + rows.start
    x = (np.arange((columns.stop - columns.start) * fine) + 0.5) / fine + columns.start
    squared, arc = np.full((y.size, x.size), np.inf), np.zeros((y.size, x.size))
    done = 0.0
    for start, end in pairwise(points):
        length = float(np.hypot(*(end - start)))
        low, high = np.minimum(start, end) - reach, np.maximum(start, end) + reach
        i = slice(*np.searchsorted(y, (low[1], high[1])))
        j = slice(*np.searchsorted(x, (low[0], high[0])))
        near, along = segment_distance(x[None, j], y[i, None], start, end)
        closer = near < squared[i, j]
        np.copyto(squared[i, j], near, where=closer)
        np.copyto(arc[i, j], done + along * length, where=closer)
        done += length
    return np.sqrt(squared), arc


def _binned(values: Floats, fine: int) -> Floats:
    # Sums of strided slices: several times quicker than a mean over two short axes.
    rows = np.add.reduce([values[i::fine] for i in range(fine)])
    return np.asarray(np.add.reduce([rows[:, j::fine] for j in range(fine)]) / fine**2)


def mean_chord(distance: Floats, radius: float, half: float) -> Floats:
    """Mean of ``2 sqrt(r^2 - x^2)`` over ``distance - half <= x <= distance + half``, in closed form.

    Points sample the steep rim of a thin wire badly: the mean over their spacing keeps its volume to a part in 1000.
    """

    def area(x: Floats) -> Floats:
        x = np.clip(x, -radius, radius)
        return x * np.sqrt(radius * radius - x * x) + radius * radius * np.arcsin(x / radius)

    return (area(distance + half) - area(distance - half)) / (2 * half)


def project(wire: Wire, frame: Frame, fine: int = 2) -> Projection | None:
    """The wire's thickness averaged over each pixel (``fine`` x ``fine`` points), or ``None`` outside the square.

    The mask holds a pixel where the distance of its centre to the centre line is at most the radius.
    """
    points = wire.points / frame.pixel_size_nm + frame.margin_px
    radius = wire.radius_nm / frame.pixel_size_nm
    reach = radius + 1.0
    (left, top), (right, bottom) = points.min(axis=0) - reach, points.max(axis=0) + reach
    rows, columns = _span(top, bottom, frame.padded_px), _span(left, right, frame.padded_px)
    if rows.stop <= rows.start or columns.stop <= columns.start:
        return None
    distance, arc = _sweep(points, reach, rows, columns, fine)
    half = 0.5 / fine
    near, chord = distance < radius + half, np.zeros_like(distance)
    chord[near] = mean_chord(distance[near], radius, half)
    thickness = _binned(chord, fine)
    # The mean distance of the fine points is the centre's to second order: below 0.01 px for radii above 1 px.
    mask = _binned(np.minimum(distance, reach), fine) <= radius
    scale = frame.pixel_size_nm
    return Projection((rows, columns), thickness * scale, mask, _binned(arc, fine) * scale)


def layer(projection: Projection, frame: Frame) -> Mask:
    """The wire's mask on the kept field, (size_px, size_px)."""
    full = np.zeros((frame.padded_px, frame.padded_px), bool)
    full[projection.window] = projection.mask
    return full[frame.inner]


def spans(mask: Mask) -> tuple[bool, bool]:
    """Whether one connected piece (8 neighbours) of ``mask`` joins left and right, and one top and bottom."""
    pieces = label(mask, connectivity=2)

    def joined(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> bool:
        return bool((np.intersect1d(a, b) > 0).any())

    return joined(pieces[:, 0], pieces[:, -1]), joined(pieces[0], pieces[-1])
