"""Sizes and shapes of single objects, whatever they are; rows are taken in blocks, so that memory stays small."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import ConvexHull, QhullError

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
_ROWS = 1024


def shape_of(mask: Mask) -> dict[str, Any]:
    """Area, equivalent diameter, aspect ratio, circularity, Feret diameters and holes of one object (h, w).

    In pixels and pixels^2. ``aspect_ratio`` is that of the second moments, which is exact for ellipses and rectangles.
    ``perimeter`` is Crofton's over four directions (G. Lehmann and D. Legland, *Insight Journal* 2012), holes included;
    ``circularity`` is ``4 pi area / perimeter^2``, 1 for a disc; small objects may exceed it by chance.
    """
    area, length, width, angle = _moments(mask)
    quads = _quads(mask)
    boundary = _perimeter(quads)
    smallest, largest = feret(mask)
    return {
        "area": area,
        "equivalent_diameter": math.sqrt(4 * area / math.pi),
        "perimeter": boundary,
        "major_axis": length,
        "minor_axis": width,
        "aspect_ratio": length / width,
        "axis_angle_deg": angle,
        "circularity": 4 * math.pi * area / boundary**2 if boundary else float("nan"),
        "feret_max": largest,
        "feret_min": smallest,
        "holes": 1 - _euler(quads),
    }


def _blocks(mask: Mask) -> Iterator[tuple[int, Mask]]:
    for top in range(0, len(mask), _ROWS):
        yield top, mask[top : top + _ROWS]


def _moments(mask: Mask) -> tuple[float, float, float, float]:
    """Area, axes of the ellipse with the same second moments, and its angle in [0, 180) from x towards y."""
    x = np.arange(mask.shape[1], dtype=float)
    rows, first = np.zeros(len(mask)), np.zeros(len(mask))
    columns = np.zeros(mask.shape[1])
    for top, part in _blocks(mask):
        rows[top : top + len(part)] = part.sum(axis=1)
        first[top : top + len(part)] = part @ x
        columns += part.sum(axis=0)
    y = np.arange(len(mask), dtype=float)
    area = float(rows.sum())
    my, mx = float(rows @ y) / area, float(columns @ x) / area
    # 1/12 is the second moment of a pixel about its own centre.
    yy = float(rows @ (y - my) ** 2) / area + 1 / 12
    xx = float(columns @ (x - mx) ** 2) / area + 1 / 12
    xy = float(first @ (y - my)) / area
    spread, middle = math.hypot((xx - yy) / 2, xy), (xx + yy) / 2
    angle = math.degrees(0.5 * math.atan2(2 * xy, xx - yy)) % 180.0
    return area, 4 * math.sqrt(middle + spread), 4 * math.sqrt(max(middle - spread, 1 / 12)), angle


def _quads(mask: Mask) -> npt.NDArray[np.int64]:
    """How often each 2 x 2 pattern occurs (16,): 1 top left, 2 top right, 4 bottom left, 8 bottom right."""
    padded = np.pad(mask.view(np.uint8), 1)
    count = np.zeros(16, np.int64)
    for top in range(0, len(padded) - 1, _ROWS):
        part = padded[top : top + _ROWS + 1]
        code = part[:-1, :-1] + 2 * part[:-1, 1:] + 4 * part[1:, :-1] + 8 * part[1:, 1:]
        count += np.bincount(code.ravel(), minlength=16)
    return count


def _perimeter(quads: npt.NDArray[np.int64]) -> float:
    """Crofton's formula: the boundary's crossings with lines in four directions, each by its spacing."""
    code = np.arange(16)
    bit = [(code >> k) & 1 for k in range(4)]
    across, down = (int(quads[bit[0] != bit[k]].sum()) for k in (1, 2))
    diagonal = int(quads[bit[0] != bit[3]].sum() + quads[bit[1] != bit[2]].sum())
    return math.pi / 8 * (across + down + diagonal / math.sqrt(2))


def _euler(quads: npt.NDArray[np.int64]) -> int:
    """Pieces less holes, pieces having 8 neighbours (S. B. Gray, *IEEE Trans. Comput.* 20 (1971) 551)."""
    one, three, opposite = quads[[1, 2, 4, 8]].sum(), quads[[7, 11, 13, 14]].sum(), quads[[6, 9]].sum()
    return int((one - three - 2 * opposite) // 4)


def feret(mask: Mask) -> tuple[float, float]:
    """Least and largest distance between parallel lines that hold the object: of the hull of its contour at 1/2."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, right = mask[rows].argmax(axis=1), mask.shape[1] - 1 - mask[rows, ::-1].argmax(axis=1)
    upper, lower = mask[:, columns].argmax(axis=0), len(mask) - 1 - mask[::-1, columns].argmax(axis=0)
    y = np.concatenate([rows, rows, upper - 0.5, lower + 0.5])
    x = np.concatenate([left - 0.5, right + 0.5, columns, columns])
    points = np.stack([y, x], axis=1).astype(float)
    try:
        hull = points[ConvexHull(points).vertices]
    except QhullError:
        return 1.0, float(np.ptp(points, axis=0).max())
    edges = np.roll(hull, -1, axis=0) - hull
    normals = np.stack([-edges[:, 1], edges[:, 0]], axis=1) / np.hypot(*edges.T)[:, None]
    # The least width is met on a side of the hull, the largest between two of its corners.
    least = float(np.ptp(hull @ normals.T, axis=0).min())
    return least, max(float(np.hypot(*(hull - corner).T).max()) for corner in hull)
