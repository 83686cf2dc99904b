"""What the specimen does to the beam: absorption, diffraction and phase of wires on an amorphous film.

Mass-thickness contrast is Beer-Lambert's ``exp(-t / mean free path)`` (D. B. Williams and C. B. Carter, *Transmission
Electron Microscopy*, 2nd ed. 2009, chapter 22). Bend contours and thickness fringes follow the two-beam equation
(chapter 13 and 24): ``1 - sin^2(pi t s_eff) / (1 + w^2)`` with ``w = s xi_g`` and ``s_eff = sqrt(1 + w^2) / xi_g``.
HAADF intensity goes as ``thickness * Z^n`` (chapter 22; S. J. Pennycook, *Ultramicroscopy* 30 (1989) 58).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanodist.synth.geometry import Frame, Projection, Wire
from nanodist.synth.optics import interaction_rad_per_v_nm

Floats = npt.NDArray[np.float64]
Complexes = npt.NDArray[np.complex128]


@dataclass(frozen=True)
class Material:
    """What the wires are made of; ``extinction_nm`` 0 means amorphous, without diffraction contrast.

    Args:
        mean_free_path_nm: of electrons that pass the objective aperture.
        inner_potential_v: mean inner potential.
        extinction_nm: two-beam extinction distance.
        diffraction: share (0 to 1) of the crystal that diffracts coherently.
        twin_spacing_nm: mean distance between twin planes across the wire; 0 means none.
        atomic_number: mean Z, for HAADF.
    """

    mean_free_path_nm: float
    inner_potential_v: float
    extinction_nm: float
    diffraction: float
    twin_spacing_nm: float
    atomic_number: float


@dataclass(frozen=True)
class Film:
    """The amorphous support: optical depth, slow relative variation of it, and rms phase noise a pixel in rad."""

    optical_depth: float
    unevenness: float
    grain_rad: float


def absorption(thickness_nm: Floats, mean_free_path_nm: float) -> Floats:
    """Transmitted share of the intensity, ``exp(-t / mean free path)``."""
    return np.exp(-thickness_nm / mean_free_path_nm)


def two_beam(thickness_nm: Floats, deviation: Floats, extinction_nm: float) -> Floats:
    """Bright-field intensity of a perfect crystal in the two-beam case; ``deviation`` is ``w = s xi_g``."""
    spread = 1.0 + deviation**2
    return 1.0 - np.sin(np.pi / extinction_nm * thickness_nm * np.sqrt(spread)) ** 2 / spread


def deviation_along(
    arc_nm: Floats, length_nm: float, width_nm: float, twin_nm: float, rng: np.random.Generator
) -> Floats:
    """Deviation ``w`` from the Bragg condition along a wire: slow bending, and steps at twin planes.

    A bent wire turns its lattice planes through the Bragg condition (w = 0) at a few places: these are bend contours.
    """
    periods = rng.uniform(2.0, 12.0, 3) * width_nm
    phases, weights = rng.uniform(0, 2 * np.pi, 3), rng.uniform(0.5, 3.0, 3)
    twins = rng.exponential(twin_nm, max(1, int(3 * length_nm / twin_nm))) if twin_nm else np.zeros(0)
    steps = rng.uniform(-1.5, 1.5, twins.size + 1)
    result = sum(w * np.sin(2 * np.pi * arc_nm / p + f) for w, p, f in zip(weights, periods, phases, strict=True))
    if twin_nm:
        result = result + steps[np.searchsorted(np.cumsum(twins), arc_nm)]
    return np.asarray(result)


def smooth_field(size_px: int, waves: int, rng: np.random.Generator) -> Floats:
    """A slow random field (size, size) with values about -1 to 1: a few plane waves longer than the field."""
    axis = np.linspace(0.0, 1.0, size_px)
    total = np.zeros((size_px, size_px))
    for _ in range(waves):
        fx, fy, phase = rng.uniform(-1.3, 1.3), rng.uniform(-1.3, 1.3), rng.uniform(0, 2 * np.pi)
        wave = np.exp(2j * np.pi * fy * axis + 1j * phase)[:, None] * np.exp(2j * np.pi * fx * axis)[None, :]
        total += wave.real
    return total / waves


def projected_thickness(projections: Sequence[Projection], frame: Frame) -> Floats:
    """Thickness in nm on the computed square, summed where wires cross."""
    total = np.zeros((frame.padded_px, frame.padded_px))
    for projection in projections:
        total[projection.window] += projection.thickness_nm
    return total


def diffraction_map(
    wires: Sequence[Wire],
    projections: Sequence[Projection],
    material: Material,
    frame: Frame,
    rng: np.random.Generator,
) -> Floats:
    """Factor on the bright-field intensity from diffraction; every wire has its own orientation and twins."""
    total = np.ones((frame.padded_px, frame.padded_px))
    if not material.extinction_nm:
        return total
    for wire, seen in zip(wires, projections, strict=True):
        w = deviation_along(
            seen.arc_nm, wire.contour_length_nm, 2 * wire.radius_nm, material.twin_spacing_nm, rng
        ) + rng.uniform(-2, 2)
        kept = two_beam(seen.thickness_nm, w, material.extinction_nm)
        total[seen.window] *= 1.0 - material.diffraction * (1.0 - kept)
    return total


def exit_wave(
    thickness_nm: Floats,
    diffraction: Floats,
    material: Material,
    film: Film,
    voltage_kv: float,
    rng: np.random.Generator,
) -> Complexes:
    """The complex exit wave (n, n) of wires on a film, for a plane wave of amplitude 1."""
    size = thickness_nm.shape[0]
    uneven = film.optical_depth * (1.0 + film.unevenness * smooth_field(size, 3, rng))
    intensity = absorption(thickness_nm, material.mean_free_path_nm) * diffraction * np.exp(-uneven)
    phase = interaction_rad_per_v_nm(voltage_kv) * material.inner_potential_v * thickness_nm
    phase = phase + rng.normal(0.0, film.grain_rad, thickness_nm.shape)
    return np.sqrt(intensity) * np.exp(1j * phase)


def haadf(
    thickness_nm: Floats, material: Material, film: Film, film_nm: float, exponent: float, rng: np.random.Generator
) -> Floats:
    """Relative HAADF intensity (n, n): ``thickness * (Z / 6)^exponent`` of the wires and of the carbon film."""
    size = thickness_nm.shape[0]
    carbon = film_nm * (1.0 + film.unevenness * smooth_field(size, 3, rng))
    return thickness_nm * (material.atomic_number / 6.0) ** exponent + np.maximum(carbon, 0.0)
