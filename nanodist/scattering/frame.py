"""What a reader makes of a file: a pattern as it was measured, before it is put on a grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from hpc.errors import UserError
from nanodist.scattering.geometry import Geometry
from nanodist.scattering.pattern import Kind

Setup = Literal["transmission", "grazing", "unknown"]
State = Literal["done", "not done", "unknown"]
STATES = ("done", "not done", "unknown")
CORRECTIONS = ("dark", "flat", "solid_angle", "transmission", "time", "background")


@dataclass(frozen=True)
class Frame:
    """A two-dimensional scattering pattern on the pixels of its detector, or on those of a reduction.

    Attributes:
        intensity: float32 (H, W); counts, or reduced data, whose negative values are kept. 0 where the mask is False.
        mask: bool (H, W), True where something was measured.
        kind: raw ``counts`` or ``reduced``.
        name: the file, for messages.
        geometry: where the detector stood; None where that is unknown or q is stated for each pixel.
        q_planes: (q_y, q_x) in 1/nm, each (H, W), of data that state them; q_y grows upwards.
        sigma: float32 (H, W), the standard deviation of reduced data; None for counts.
        setup: transmission, grazing incidence, or unknown.
        corrections: for each of `CORRECTIONS`, whether it was done.
        masked: how many pixels each rule masked, by its name.
        metadata: plain values from the header: exposure_s, detector, units, frames, ...
    """

    intensity: np.ndarray
    mask: np.ndarray
    kind: Kind
    name: str
    geometry: Geometry | None = None
    q_planes: tuple[np.ndarray, np.ndarray] | None = None
    sigma: np.ndarray | None = None
    setup: Setup = "unknown"
    corrections: Mapping[str, State] = field(default_factory=lambda: dict.fromkeys(CORRECTIONS, "unknown"))
    masked: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.intensity.shape[0], self.intensity.shape[1]

    def q(self) -> tuple[np.ndarray, np.ndarray]:
        """The planes (q_y, q_x), float64 (H, W), in 1/nm.

        Raises:
            UserError: neither a geometry nor q itself is known.
        """
        if self.q_planes is not None:
            return self.q_planes
        if self.geometry is None:
            raise UserError(
                f"{self.name} has no geometry, so its pixels have no q: give a PONI file, or beam centre, distance, "
                "pixel size and wavelength, or fit them on a calibrant with 'nanodist scattering calibrate'"
            )
        return self.geometry.q(self.shape)

    def require_measured(self) -> None:
        """Refuse a pattern that holds nothing.

        Raises:
            UserError: every pixel is masked.
        """
        if not self.mask.any():
            why = ", ".join(f"{name} {count}" for name, count in self.masked.items() if count)
            raise UserError(
                f"{self.name} has no measured pixel, all {self.mask.size} are masked ({why or 'by its mask'}): "
                "leave it out, or check its mask"
            )
