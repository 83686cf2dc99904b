"""Directions of wires, which have no sign: angles are doubled before they are averaged.

Angles are in degrees in [0, 180), from x (columns) towards y (rows), that is clockwise on the screen.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def moment(points: Floats) -> complex:
    """``sum over segments of length * exp(2 i angle)`` of a polyline (n, 2) of (row, column)."""
    dy, dx = np.diff(points, axis=0).T
    length = np.hypot(dx, dy)
    return complex(np.sum((dx + 1j * dy) ** 2 / np.maximum(length, 1e-12)))


def axis_deg(value: complex) -> float:
    """The mean axis of a moment."""
    return math.degrees(np.angle(value) / 2) % 180.0


def order_parameter(moments: Floats | list[complex], length: float) -> float:
    """2D nematic order ``S = |<exp(2 i angle)>|`` weighted by length: 0 isotropic, 1 parallel; NaN without length."""
    return abs(complex(np.sum(np.asarray(moments)))) / length if length > 0 else float("nan")
