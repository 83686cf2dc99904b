"""Sizes and shapes of single objects, whatever they are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import ConvexHull, QhullError
from skimage.measure import euler_number, find_contours, perimeter_crofton

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def shape_of(mask: Mask) -> dict[str, Any]:
    """Area, equivalent diameter, aspect ratio, circularity, Feret diameters and holes of one object.

    Args:
        mask: (h, w) with a margin of background on every side.

    Returns:
        In pixels and pixels^2. ``aspect_ratio`` is that of the second moments, which is exact for ellipses and
        rectangles. ``circularity`` is ``4 pi area / perimeter^2``, 1 for a disc, with Crofton's perimeter over four
        directions of the outer contour (G. Lehmann and D. Legland, *Insight Journal* 2012); small objects may exceed 1.
    """
    area = float(mask.sum())
    length, width, angle = _axes(mask)
    boundary = float(perimeter_crofton(mask, directions=4))
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
        "holes": int(1 - euler_number(mask, connectivity=2)),
    }


def _axes(mask: Mask) -> tuple[float, float, float]:
    """Axes of the ellipse with the same second moments, and its angle in [0, 180) from x towards y."""
    y, x = np.nonzero(mask)
    # 1/12 is the second moment of a pixel about its own centre.
    (xx, xy), (_, yy) = np.cov(np.stack([x, y]), bias=True) + np.eye(2) / 12.0
    spread = math.hypot((xx - yy) / 2, xy)
    middle = (xx + yy) / 2
    angle = math.degrees(0.5 * math.atan2(2 * xy, xx - yy)) % 180.0
    return 4 * math.sqrt(middle + spread), 4 * math.sqrt(max(middle - spread, 1 / 12)), angle


def feret(mask: Mask) -> tuple[float, float]:
    """Least and largest distance between parallel lines that hold the object: of the hull of its contour at 1/2."""
    contours = find_contours(mask.astype(np.float32), 0.5)
    points = np.concatenate(contours)
    try:
        hull = points[ConvexHull(points).vertices]
    except QhullError:
        return 1.0, float(np.ptp(points, axis=0).max())
    edges = np.roll(hull, -1, axis=0) - hull
    normals = np.stack([-edges[:, 1], edges[:, 0]], axis=1) / np.hypot(*edges.T)[:, None]
    across = hull @ normals.T
    # The least width is met on a side of the hull, the largest between two of its corners.
    least = float(np.ptp(across, axis=0).min())
    far = hull[:, None, :] - hull[None, :, :] if len(hull) <= 2000 else hull[:: len(hull) // 1000, None] - hull[None]
    return least, float(np.sqrt((far**2).sum(-1).max()))
