"""Where a detector stands: q of every pixel from distance, beam centre, pixel size, wavelength and tilt.

Rotations are those of pyFAI (Kieffer et al., J. Synchrotron Rad. 27, 558, 2020), about the vertical, the horizontal and
the beam axis, applied in this order. Pixel coordinates are (row, column), counted from the centre of the first pixel.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hpc.errors import UserError


@dataclass(frozen=True)
class Geometry:
    """A flat detector behind a sample.

    Attributes:
        distance_mm: from the sample to the detector, along the beam.
        beam_centre_px: (row, column) of the direct beam; it may lie outside the detector.
        pixel_size_mm: (height, width) of a pixel.
        wavelength_nm: of X-rays or neutrons.
        rotations_rad: pyFAI's rot1, rot2, rot3; zeros for a detector that stands square to the beam.
        source: where these values come from.
    """

    distance_mm: float
    beam_centre_px: tuple[float, float]
    pixel_size_mm: tuple[float, float]
    wavelength_nm: float
    rotations_rad: tuple[float, float, float] = (0.0, 0.0, 0.0)
    source: str = "given"

    def __post_init__(self) -> None:
        positive = {
            "distance_mm": self.distance_mm,
            "pixel_size_mm": min(self.pixel_size_mm),
            "wavelength_nm": self.wavelength_nm,
        }
        for name, value in positive.items():
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"the geometry ({self.source}) has {name} = {value}: give a positive number")
        if not all(map(math.isfinite, (*self.beam_centre_px, *self.rotations_rad))):
            raise UserError(
                f"the geometry ({self.source}) has beam centre {self.beam_centre_px} and rotations "
                f"{self.rotations_rad}: give finite numbers"
            )

    @property
    def tilt_deg(self) -> float:
        """The angle between the detector's normal and the beam, in degrees."""
        return math.degrees(math.acos(min(1.0, abs(float(rotation(self.rotations_rad)[2, 2])))))

    def q_at(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(q_y, q_x) in 1/nm at pixel coordinates; q_y grows towards row 0, and hypot(q_y, q_x) is |q|.

        |q| = 4 pi / wavelength sin(two_theta / 2); the direction is that of the pixel around the beam.
        """
        down, right, along = self._laboratory(rows, columns)
        radius = np.hypot(down, right)
        modulus = 4 * np.pi / self.wavelength_nm * np.sin(np.arctan2(radius, along) / 2)
        over_radius = np.divide(modulus, radius, out=np.zeros_like(radius), where=radius > 0)
        return -down * over_radius, right * over_radius

    def q(self, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The planes (q_y, q_x) of an image, float64 (H, W), in 1/nm."""
        rows, columns = np.indices(shape, dtype=np.float64, sparse=True)
        return self.q_at(*np.broadcast_arrays(rows, columns))

    def pixel_at(self, q_inv_nm: np.ndarray, angle_rad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) of what scatters with |q| along an angle: anticlockwise from the right, as displayed."""
        half = np.asarray(q_inv_nm, np.float64) * self.wavelength_nm / (4 * np.pi)
        two_theta = 2 * np.arcsin(half)
        side = np.sin(two_theta)
        direction = np.stack(
            np.broadcast_arrays(-side * np.sin(angle_rad), side * np.cos(angle_rad), np.cos(two_theta))
        )
        turn = rotation(self.rotations_rad)
        centre = turn.T @ (0.0, 0.0, self.distance_mm)
        ray = np.tensordot(turn.T, direction, 1)
        place = [ray[axis] * (centre[2] / ray[2]) - centre[axis] for axis in range(2)]
        return (
            place[0] / self.pixel_size_mm[0] + self.beam_centre_px[0],
            place[1] / self.pixel_size_mm[1] + self.beam_centre_px[1],
        )

    def _laboratory(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, ...]:
        """Positions (down, right, along the beam) in mm around the sample."""
        turn = rotation(self.rotations_rad)
        # The direct beam meets the detector at (0, 0, distance): in the detector's frame, at turn^T of that.
        centre = turn.T @ (0.0, 0.0, self.distance_mm)
        down = (np.asarray(rows, np.float64) - self.beam_centre_px[0]) * self.pixel_size_mm[0] + centre[0]
        right = (np.asarray(columns, np.float64) - self.beam_centre_px[1]) * self.pixel_size_mm[1] + centre[1]
        down, right = np.broadcast_arrays(down, right)
        return tuple(turn[i, 0] * down + turn[i, 1] * right + turn[i, 2] * centre[2] for i in range(3))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def poni(self) -> tuple[float, float, float]:
        """PyFAI's (distance, poni1, poni2) in metres: the foot of the sample's perpendicular on the detector."""
        centre = rotation(self.rotations_rad).T @ (0.0, 0.0, self.distance_mm)
        foot = [
            (pixel + 0.5) * size - offset
            for pixel, size, offset in zip(self.beam_centre_px, self.pixel_size_mm, centre[:2], strict=True)
        ]
        return float(centre[2]) * 1e-3, float(foot[0]) * 1e-3, float(foot[1]) * 1e-3


def from_poni(
    distance_m: float,
    poni_m: tuple[float, float],
    pixel_size_mm: tuple[float, float],
    wavelength_nm: float,
    rotations_rad: tuple[float, float, float],
    source: str,
) -> Geometry:
    """The geometry that pyFAI describes by the foot of the sample's perpendicular on the detector.

    Raises:
        UserError: values that no detector has, or a detector that the beam runs beside or away from.
    """
    turn = rotation(rotations_rad)
    if not turn[2, 2] > 0:
        raise UserError(f"the geometry ({source}) has the detector along the beam or behind it: check rot1 and rot2")
    along = distance_m * 1e3 / float(turn[2, 2])
    centre = tuple((poni_m[axis] * 1e3 + along * float(turn[2, axis])) / pixel_size_mm[axis] - 0.5 for axis in range(2))
    return Geometry(along, (centre[0], centre[1]), pixel_size_mm, wavelength_nm, rotations_rad, source)


def rotation(angles_rad: tuple[float, float, float]) -> np.ndarray:
    """PyFAI's rotation matrix, (3, 3), of (down, right, along the beam) for rot1, rot2, rot3."""
    (c1, c2, c3), (s1, s2, s3) = np.cos(angles_rad), np.sin(angles_rad)
    return np.array(
        [
            [c2 * c3, c3 * s1 * s2 - c1 * s3, -(c1 * c3 * s2 + s1 * s3)],
            [c2 * s3, c1 * c3 + s1 * s2 * s3, c3 * s1 - c1 * s2 * s3],
            [s2, -c2 * s1, c1 * c2],
        ]
    )
