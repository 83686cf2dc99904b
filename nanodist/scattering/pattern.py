"""Scattering patterns on a q grid: what the pair store, PairVAE and its evaluation share.

Angles are in degrees, anticlockwise from the image's x axis (to the right), with y up as displayed (row 0 on top).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hpc.errors import UserError

Kind = Literal["counts", "reduced"]


@dataclass(frozen=True)
class QGrid:
    """A square grid of q in 1/nm with the beam at its centre, pixel coordinate ((size - 1) / 2, (size - 1) / 2).

    Attributes:
        size: pixels a side.
        q_max_inv_nm: |q_x| at the outer edge of the outermost pixel.
    """

    size: int
    q_max_inv_nm: float

    def __post_init__(self) -> None:
        if self.size < 2 or not (self.q_max_inv_nm > 0 and np.isfinite(self.q_max_inv_nm)):
            raise UserError(
                f"a q grid needs at least 2 pixels a side and a positive q_max_inv_nm, not {self.size} and "
                f"{self.q_max_inv_nm}"
            )

    @property
    def q_step_inv_nm(self) -> float:
        """The side of a pixel, in 1/nm."""
        return 2 * self.q_max_inv_nm / self.size

    def q(self) -> tuple[np.ndarray, np.ndarray]:
        """The planes (q_y, q_x) at the centres of the pixels, float64 (size, size), in 1/nm; q_y grows upwards."""
        axis = (np.arange(self.size) - (self.size - 1) / 2) * self.q_step_inv_nm
        shape = (self.size, self.size)
        return np.broadcast_to(-axis[:, None], shape).copy(), np.broadcast_to(axis[None, :], shape).copy()

    def modulus(self) -> np.ndarray:
        """|q| at the centres of the pixels, float64 (size, size), in 1/nm."""
        q_y, q_x = self.q()
        return np.hypot(q_y, q_x)

    def as_dict(self) -> dict[str, Any]:
        """The grid as JSON holds it."""
        return {"size": self.size, "q_max_inv_nm": self.q_max_inv_nm}


@dataclass(frozen=True)
class Pattern:
    """A scattering pattern on a q grid.

    Attributes:
        intensity: float32 (size, size); counts, or reduced units (often 1/cm), in which negative values are data. 0
            where the mask is False.
        sigma: float32 (size, size), the standard deviation of reduced data; None for raw counts, which are Poisson.
        mask: bool (size, size), True where something was measured.
        grid: the q of every pixel.
        kind: raw ``counts`` or ``reduced`` (corrected, perhaps subtracted) data.
    """

    intensity: np.ndarray
    sigma: np.ndarray | None
    mask: np.ndarray
    grid: QGrid
    kind: Kind

    def __post_init__(self) -> None:
        shape = (self.grid.size, self.grid.size)
        if self.kind not in ("counts", "reduced"):
            raise ValueError(f"a pattern holds counts or reduced data, not {self.kind!r}")
        planes = {"intensity": self.intensity, "mask": self.mask, "sigma": self.sigma}
        for name, plane in planes.items():
            if plane is not None and plane.shape != shape:
                raise ValueError(f"{name} has shape {plane.shape}, its grid {shape}")
        if self.mask.dtype != np.bool_:
            raise ValueError(f"the mask is {self.mask.dtype}, not bool")


def compressed(intensity: np.ndarray, reference: float) -> np.ndarray:
    """asinh(intensity / reference): linear below ``reference`` and through zero, a logarithm far above; float32.

    Raises:
        ValueError: ``reference`` is not positive.
    """
    _check_reference(reference)
    return np.arcsinh(np.asarray(intensity, dtype=np.float64) / reference).astype(np.float32)


def decompressed(values: np.ndarray, reference: float) -> np.ndarray:
    """The inverse of `compressed`, float32."""
    _check_reference(reference)
    return (np.sinh(np.asarray(values, dtype=np.float64)) * reference).astype(np.float32)


def _check_reference(reference: float) -> None:
    if not (reference > 0 and np.isfinite(reference)):
        raise ValueError(f"the reference of asinh(I / I0) is positive, not {reference}")
