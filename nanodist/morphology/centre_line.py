"""From a skeleton's pixels to a smooth centre line, its width at every point, and its tips.

The skeleton only says where to look. The line is smoothed (local quadratics; A. Savitzky and M. J. E. Golay, *Anal.
Chem.* 36 (1964) 1627), moved to the middle between the two edges that the mask shows on its normals, and smoothed
again, twice. Edges are where the linearly interpolated mask falls to 1/2: over many points this is unbiased, whereas a
distance transform of pixels is not. A free end reaches to where the mask ends on the line's tangent; the centre line
proper ends half a width before that, as the centre of a round cap does. At the border of the image both end at the
border.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import map_coordinates, median_filter
from scipy.signal import savgol_filter

from nanodist.morphology.skeleton import FREE
from nanodist.morphology.tracing import Path

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

STEP = 1.0  # pixels between points of the line
RAY = 0.5  # pixels between samples of the mask
ROUNDS = 2
SMOOTHING = (3.0, 15.0)  # bounds of the smoothing length in pixels; between them it is half the radius
LEAST = 3.0  # pixels of line below which there is nothing to measure
TIP, BORDER, JUNCTION, NONE = "tip", "border", "junction", "closed"


@dataclass(frozen=True)
class Field:
    """A mask (h, w) that was cut out of an image: ``origin`` (row, column) in it, and the image's ``shape``."""

    mask: Mask
    origin: tuple[int, int]
    shape: tuple[int, int]

    def to_border(self, points: Floats, direction: Floats) -> Floats:
        """Distance (n,) from points (n, 2) of the mask along unit vectors (n, 2) to the image's border."""
        at = points + np.asarray(self.origin) + 0.5
        with np.errstate(divide="ignore", invalid="ignore"):
            limits = np.where(direction > 0, np.asarray(self.shape) - at, -at) / direction
        return np.asarray(np.where(direction == 0, np.inf, limits).min(axis=-1))


@dataclass(frozen=True)
class CentreLine:
    """A measured wire, in pixels of the mask (index coordinates: a pixel's centre is a whole number).

    Attributes:
        points: (n, 2) centre line, from the centre of one end cap to that of the other.
        widths: (n,) distance between the edges on the normal; NaN where it cannot be known: at junctions, in end caps,
            and where the normal leaves the image.
        contour_length: length of the centre line.
        tip_to_tip_length: length to the tips: half a width more at each free end.
        ends: what each end is: ``tip``, ``border``, ``junction`` or ``closed``.
        rough_width: twice the median distance of the skeleton to the background, for where ``widths`` are unknown.
    """

    points: Floats
    widths: Floats
    contour_length: float
    tip_to_tip_length: float
    ends: tuple[str, str]
    rough_width: float

    @property
    def width(self) -> float:
        """Mean width, NaN where none could be measured."""
        known = self.widths[np.isfinite(self.widths)]
        return float(known.mean()) if len(known) else float("nan")


def _resample(points: Floats, closed: bool = False) -> Floats:
    if closed:
        points = np.concatenate([points, points[:1]])
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    keep = np.concatenate([[True], np.diff(arc) > 1e-9])
    points, arc = points[keep], arc[keep]
    count = max(2, round(arc[-1] / STEP) + 1)
    at = np.linspace(0, arc[-1], count)
    if closed:
        at = at[:-1]
    return np.stack([np.interp(at, arc, points[:, k]) for k in (0, 1)], axis=1)


def _smooth(values: Floats, scale: float, closed: bool, derivative: int = 0) -> Floats:
    """Local quadratic fits over about 5 ``scale``; ``values`` (n, k) at spacing ``STEP``."""
    window = min(2 * round(2.5 * scale) + 1, len(values) - (1 - len(values) % 2))
    if window < 5:
        return np.gradient(values, axis=0) if derivative else values
    mode = "wrap" if closed else "interp"
    return np.asarray(savgol_filter(values, window, 2, deriv=derivative, axis=0, mode=mode))


def tangents(points: Floats, scale: float, closed: bool = False) -> Floats:
    """Unit tangents (n, 2)."""
    slope = _smooth(points, scale, closed, derivative=1)
    return slope / np.maximum(np.hypot(*slope.T), 1e-9)[:, None]


def edge_distance(field: Field, points: Floats, direction: Floats, reach: float) -> tuple[Floats, Mask]:
    """How far (n,) the mask goes on from points (n, 2) along unit vectors (n, 2), and whether the image ended first.

    NaN where it goes on beyond ``reach``; 0 where the point itself lies outside.
    """
    steps = np.arange(0, reach + RAY, RAY)
    at = points[:, :, None] + direction[:, :, None] * steps
    value = map_coordinates(field.mask.view(np.uint8), at.transpose(1, 0, 2), np.float32, order=1, mode="nearest")
    outside = value < 0.5
    first = np.argmax(outside, axis=1)
    row = np.arange(len(points))
    after, before = value[row, first], value[row, np.maximum(first - 1, 0)]
    share = np.clip((before - 0.5) / np.maximum(before - after, 1e-6), 0.0, 1.0)
    found = np.where(first > 0, (first - 1 + share) * RAY, 0.0)
    found = np.where(outside.any(axis=1), found, np.nan)
    border = field.to_border(points, direction)
    return found, ~(found < border)


def _trimmed(pixels: Floats, radius: Floats, ends: tuple[int, int]) -> slice:
    """Without the stretches at free ends in which the skeleton turns from the middle towards a rim."""
    size = int(2 * round(float(np.median(radius)))) * 2 + 1
    usual = median_filter(radius, min(size, 2 * (len(radius) // 2) + 1), mode="nearest")
    inner = radius >= 0.9 * np.maximum(usual, 0.7 * np.median(radius))
    if not inner.any():
        return slice(0, len(radius))
    first = int(np.argmax(inner)) if ends[0] == FREE else 0
    last = len(inner) - (int(np.argmax(inner[::-1])) if ends[1] == FREE else 0)
    return slice(first, last)


def _centred(field: Field, points: Floats, scale: float, reach: float, blind: Mask, closed: bool) -> Floats:
    """The line moved to the middle between its edges."""
    along = tangents(points, scale, closed)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1)
    right, right_cut = edge_distance(field, points, normal, reach)
    left, left_cut = edge_distance(field, points, -normal, reach)
    sees_right, sees_left = ~right_cut & np.isfinite(right), ~left_cut & np.isfinite(left)
    known = sees_right & sees_left & ~blind & (right + left > 0)
    if known.sum() < 2:
        return points
    half = float(np.median((right + left)[known])) / 2
    shift = np.where(known, (right - left) / 2, np.where(sees_right, right - half, half - left))
    # Where the image cuts one side off, the other still says where the middle is.
    known |= (sees_right ^ sees_left) & (right_cut | left_cut) & ~blind
    shift = np.clip(shift, -reach / 4, reach / 4)
    order = np.arange(len(points))
    shift = np.interp(order, order[known], shift[known])
    return _smooth(points + shift[:, None] * normal, scale, closed)


def _near_junction(points: Floats, crossings: Floats, factor: float = 1.2) -> Mask:
    near = np.zeros(len(points), bool)
    for row, column, radius in crossings:
        near |= np.hypot(points[:, 0] - row, points[:, 1] - column) < factor * radius + 2.0
    return near


def measure_path(field: Field, path: Path, distance: npt.NDArray[np.float32]) -> CentreLine | None:
    """The centre line of one wire, or ``None`` where the path is too short to be one.

    Args:
        field: the mask.
        path: the wire on the skeleton.
        distance: (h, w) distance to the background.
    """
    radius = distance[path.pixels[:, 0], path.pixels[:, 1]].astype(float)
    chain = path.pixels.astype(float)
    if not path.closed:
        kept = _trimmed(chain, radius, path.ends)
        chain, radius = chain[kept], radius[kept]
    if len(chain) < 3:
        return None
    typical = float(np.median(radius))
    scale = float(np.clip(0.5 * typical, *SMOOTHING))
    reach = 2.0 * min(float(radius.max()), 2.0 * typical) + 4.0
    points = _smooth(_resample(chain, path.closed), scale, path.closed)
    for _ in range(ROUNDS):
        points = _resample(points, path.closed)
        blind = _near_junction(points, path.crossings)
        points = _centred(field, points, scale, reach, blind, path.closed)
    points = _resample(points, path.closed)
    if len(points) < 3:
        return None
    widths = _widths(field, points, scale, reach, path)
    return _finished(field, points, widths, scale, typical, path)


def _widths(field: Field, points: Floats, scale: float, reach: float, path: Path) -> Floats:
    along = tangents(points, scale, path.closed)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1)
    right, right_cut = edge_distance(field, points, normal, reach)
    left, left_cut = edge_distance(field, points, -normal, reach)
    widths = right + left
    widths[right_cut | left_cut | (widths < 0.5) | _near_junction(points, path.crossings)] = np.nan
    # An acute crossing widens a wire far beyond the junction's disc.
    usual = np.nanmedian(widths) if np.isfinite(widths).any() else np.nan
    wide = _near_junction(points, path.crossings, 4.0) & (widths > 1.25 * usual + 1.0)
    widths[wide] = np.nan
    return widths


def _end(field: Field, points: Floats, scale: float, half: float, last: bool, kind: int) -> tuple[str, float]:
    """What an end is, and how far the mask goes on beyond the line there."""
    if kind != FREE:
        return JUNCTION, 0.0
    use = points[::-1] if not last else points
    stretch = use[-min(len(use), max(6, round(2 * half))) :]
    if len(stretch) >= 5:
        # The tangent at the very end, from a quadratic over the last stretch.
        t = np.arange(len(stretch)) - (len(stretch) - 1.0)
        direction = np.array([np.polyfit(t, stretch[:, k], 2 if len(stretch) >= 9 else 1)[-2] for k in (0, 1)])
    else:
        direction = stretch[-1] - stretch[0]
    direction = direction / max(float(np.hypot(*direction)), 1e-9)
    side = np.array([-direction[1], direction[0]])
    # Three rays, the outer two lowered by as much as a round cap is lower there, instead of one pixel's chance.
    offsets = np.array([-0.3, 0.0, 0.3]) * half
    origin = use[-1] + offsets[:, None] * side
    rays = np.repeat(direction[None], 3, axis=0)
    far, _ = edge_distance(field, origin, rays, 4 * half + 8)
    border = float(field.to_border(origin[1:2], rays[1:2])[0])
    cap = half - np.sqrt(np.maximum(half**2 - offsets**2, 0.0))
    reach = float(np.nanmean(far + cap)) if np.isfinite(far).any() else 4 * half + 8
    return (BORDER, border) if border <= reach + 0.25 else (TIP, reach)


def _finished(
    field: Field, points: Floats, widths: Floats, scale: float, typical: float, path: Path
) -> CentreLine | None:
    steps = np.hypot(*np.diff(points, axis=0).T)
    if path.closed:
        around = float(steps.sum() + np.hypot(*(points[0] - points[-1])))
        return CentreLine(points, widths, around, around, (NONE, NONE), 2 * typical)
    known = widths[np.isfinite(widths)]
    half = (float(np.median(known)) if len(known) else 2 * typical) / 2
    ends = [_end(field, points, scale, half, last, path.ends[last]) for last in (False, True)]
    more = [reach - (half if kind == TIP else 0.0) for kind, reach in ends]
    length = float(steps.sum()) + sum(more)
    if length <= 0:
        return None
    line = _extended(points, more)
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
    place = np.concatenate([[0.0], np.cumsum(steps)]) + more[0]
    widths = np.interp(arc, place, np.where(np.isfinite(widths), widths, np.nan), left=np.nan, right=np.nan)
    kinds = (ends[0][0], ends[1][0])
    caps = half * sum(kind == TIP for kind in kinds)
    return CentreLine(line, widths, length, length + caps, kinds, 2 * typical)


def _extended(points: Floats, more: list[float]) -> Floats:
    """The line made longer (or, where negative, shorter) by ``more`` at its first and last point."""
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    at = np.linspace(-more[0], arc[-1] + more[1], max(2, round((arc[-1] + sum(more)) / STEP) + 1))
    reach = min(5, len(points) - 1)
    first = (points[0] - points[reach]) / max(float(np.hypot(*(points[0] - points[reach]))), 1e-9)
    last = (points[-1] - points[-1 - reach]) / max(float(np.hypot(*(points[-1] - points[-1 - reach]))), 1e-9)
    line = np.stack([np.interp(at, arc, points[:, k]) for k in (0, 1)], axis=1)
    before, after = np.maximum(-at, 0.0), np.maximum(at - arc[-1], 0.0)
    return line + before[:, None] * first + after[:, None] * last
