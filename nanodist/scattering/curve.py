"""I(q) curves: from frames by pyFAI, and as text of three columns that SasView and its relatives read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpc.atomic import write_text
from hpc.errors import UserError
from nanodist.scattering.frame import Frame
from nanodist.scattering.poni import integrator

_LONGEST = 2**27


@dataclass(frozen=True)
class Curve:
    """I(q).

    Attributes:
        q_inv_nm: float64 (N,), increasing.
        intensity: float64 (N,).
        sigma: float64 (N,), or None where it is unknown.
        units: of the intensity, as text.
        facts: plain values on where it comes from.
    """

    q_inv_nm: np.ndarray
    intensity: np.ndarray
    sigma: np.ndarray | None = None
    units: str = "arbitrary"
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = [self.q_inv_nm, self.intensity, *([] if self.sigma is None else [self.sigma])]
        if any(column.ndim != 1 or len(column) != len(self.q_inv_nm) for column in columns):
            raise ValueError("q, intensity and sigma of a curve are columns of one length")


def integrate(frame: Frame, bins: int = 500, solid_angle: bool | None = None) -> Curve:
    """I(q) of a frame by pyFAI; rings without a pixel are left out.

    A pixel belongs to the ring of its centre: splitting it over rings would make their errors depend on each other.
    Frames with q for each pixel but no geometry are averaged by the same rule.

    Args:
        frame: counts or reduced data.
        bins: number of rings between the smallest and the largest q of the frame.
        solid_angle: divide by each pixel's solid angle (that of the pixel at the beam is 1). By default where that was
            not done yet.

    Raises:
        UserError: the frame has no q, is all masked, or was measured at grazing incidence.
    """
    if frame.setup == "grazing":
        raise UserError(
            f"{frame.name} was measured at grazing incidence, where the mean over directions means nothing: cut "
            "it along q_y or q_z instead"
        )
    frame.require_measured()
    correct = frame.corrections.get("solid_angle") != "done" if solid_angle is None else solid_angle
    if frame.geometry is None or frame.q_planes is not None:
        q, intensity, sigma = _averaged(frame, bins)
        correct = False
    else:
        q, intensity, sigma = _by_pyfai(frame, bins, correct)
    states = dict(frame.corrections)
    if correct:
        states["solid_angle"] = "done"
    facts = {"source": Path(frame.name).name, "kind": frame.kind, "corrections": states, **frame.metadata}
    return Curve(q, intensity, sigma, str(frame.metadata.get("units") or _UNITS[frame.kind]), facts)


_UNITS = {"counts": "counts", "reduced": "arbitrary"}


def _by_pyfai(frame: Frame, bins: int, correct: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    assert frame.geometry is not None
    # The variance of a ring's counts is their sum. pyFAI's own model gives a pixel without a count the variance 1,
    # which overstates sigma by half where a pixel has half a count.
    spread = frame.intensity if frame.kind == "counts" else None if frame.sigma is None else frame.sigma**2
    result = integrator(frame.geometry).integrate1d_ng(
        frame.intensity,
        bins,
        mask=~frame.mask,
        unit="q_nm^-1",
        method=("no", "csr", "cython"),
        correctSolidAngle=correct,
        variance=None if spread is None else spread.astype(np.float32),
    )
    filled = np.asarray(result.count) > 0
    sigma = None if result.sigma is None else np.asarray(result.sigma, np.float64)[filled]
    if sigma is not None and frame.kind == "counts":
        # A ring without a count is uncertain by one.
        sigma = np.where(sigma > 0, sigma, 1 / np.asarray(result.count, np.float64)[filled])
    return np.asarray(result.radial, np.float64)[filled], np.asarray(result.intensity, np.float64)[filled], sigma


def _averaged(frame: Frame, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    q_y, q_x = frame.q()
    modulus = np.hypot(q_y, q_x)[frame.mask]
    edges = np.linspace(modulus.min(), modulus.max() * (1 + 1e-12), bins + 1)
    ring = np.clip(np.searchsorted(edges, modulus, "right") - 1, 0, bins - 1)
    pixels = np.bincount(ring, minlength=bins)
    filled = pixels > 0
    pixels = pixels[filled]
    values = frame.intensity[frame.mask].astype(np.float64)
    intensity = np.bincount(ring, values, bins)[filled] / pixels
    q = np.bincount(ring, modulus, bins)[filled] / pixels
    if frame.kind == "counts":
        return q, intensity, np.sqrt(np.maximum(intensity * pixels, 1)) / pixels
    if frame.sigma is None:
        return q, intensity, None
    variance = np.bincount(ring, frame.sigma[frame.mask].astype(np.float64) ** 2, bins)[filled]
    return q, intensity, np.sqrt(variance) / pixels


def write_curve(path: Path, curve: Curve) -> None:
    """Text of columns q (1/A, as SasView expects of text), I and sigma, after a header of lines with ``#``."""
    names = ["q_inv_A", f"I ({curve.units})", *([] if curve.sigma is None else ["sigma"])]
    lines = [f"# {key}: {value}" for key, value in curve.facts.items()]
    lines.append("# " + "  ".join(names))
    columns = [curve.q_inv_nm / 10, curve.intensity, *([] if curve.sigma is None else [curve.sigma])]
    lines.extend("  ".join(f"{value:.9e}" for value in row) for row in zip(*columns, strict=True))
    write_text(path, "\n".join(lines) + "\n")


def read_curve(path: Path, q_unit: str | None = None) -> Curve:
    """Text of two or more columns: q, I and perhaps sigma; what is not numbers is passed over.

    Args:
        path: the file.
        q_unit: ``1/A`` or ``1/nm``. By default what the header says (``1/nm``, ``nm-1``, ``q_inv_nm``), else 1/A.

    Raises:
        UserError: no such columns, or q that does not increase.
    """
    try:
        if path.stat().st_size > _LONGEST:
            raise UserError(f"{path} is too long for a curve: give a file with q, I and sigma")
        text = path.read_text(errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check its name and rights") from error
    header, rows = [], []
    for line in text.splitlines():
        words = line.replace(",", " ").replace(";", " ").split()
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            header.append(line.lower())
            continue
        if len(numbers) >= 2:
            rows.append(numbers[:3])
    width = min(map(len, rows), default=0)
    if len(rows) < 2:
        raise UserError(f"{path} has no columns q and I: give a text with q, I and sigma")
    table = np.array([row[:width] for row in rows])
    unit = q_unit or ("1/nm" if any(mark in line for line in header for mark in _NM) else "1/A")
    if unit not in ("1/A", "1/nm"):
        raise UserError(f"q of {path} is said to be in {unit!r}: choose 1/A or 1/nm")
    if not (np.diff(table[:, 0]) > 0).all():
        raise UserError(f"{path} has a q that does not increase from line to line: give one curve, sorted")
    q = table[:, 0] * (10.0 if unit == "1/A" else 1.0)
    return Curve(q, table[:, 1], table[:, 2] if width > 2 else None, facts={"source": path.name})


_NM = ("1/nm", "nm^-1", "nm-1", "inv_nm", "nm⁻¹")
