"""Simulated frames of silver behenate. The q of each pixel is pyFAI's, not that of the code under test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pyFAI.integrator.azimuthal import AzimuthalIntegrator

PERIOD_NM = 5.838
PIXEL_MM = 0.172
WAVELENGTH_NM = 0.15418


@dataclass(frozen=True)
class Simulated:
    """A frame and what is known of it.

    Attributes:
        counts: int32 (H, W), with the markers of a Pilatus.
        broken: for each kind of broken pixel, where it is, bool (H, W).
        beam_stop: bool (H, W), the shadow.
        q_inv_nm: (H, W), by pyFAI.
        beam_centre_px: (row, column), by pyFAI.
        distance_mm: along the beam, by pyFAI.
        rotations_rad: as given.
    """

    counts: np.ndarray
    broken: dict[str, np.ndarray]
    beam_stop: np.ndarray
    q_inv_nm: np.ndarray
    beam_centre_px: tuple[float, float]
    distance_mm: float
    rotations_rad: tuple[float, float, float]


def simulated(
    shape: tuple[int, int] = (619, 487),
    distance_mm: float = 500.0,
    foot_px: tuple[float, float] = (331.7, 212.4),
    rotations_rad: tuple[float, float, float] = (0.02, -0.03, 0.0),
    second: float | None = None,
    seed: int = 0,
) -> Simulated:
    """Rings on the tail of a beam, counted; with gaps, marked, dead and hot pixels, full counters, and a beam stop.

    Args:
        shape: of the frame; that of a Pilatus has its gaps.
        distance_mm: pyFAI's, along the detector's normal.
        foot_px: (row, column) of the normal's foot, in pyFAI's pixels (the first has its centre at 0.5).
        rotations_rad: pyFAI's rot1, rot2, rot3.
        second: the distance of a second layer of calibrant, relative to the first.
        seed: of the counts.
    """
    integrator = AzimuthalIntegrator(
        dist=distance_mm * 1e-3,
        poni1=foot_px[0] * PIXEL_MM * 1e-3,
        poni2=foot_px[1] * PIXEL_MM * 1e-3,
        rot1=rotations_rad[0],
        rot2=rotations_rad[1],
        rot3=rotations_rad[2],
        pixel1=PIXEL_MM * 1e-3,
        pixel2=PIXEL_MM * 1e-3,
        wavelength=WAVELENGTH_NM * 1e-9,
    )
    q = integrator.array_from_unit(shape, "center", "q_nm^-1")
    beam = integrator.getFit2D()
    centre = (float(beam["centerY"]) - 0.5, float(beam["centerX"]) - 0.5)
    rng = np.random.default_rng(seed)
    expected = 5.0 + 300.0 / (1 + (q / 0.25) ** 3)
    for order in range(1, 12):
        for layer in (1.0,) if second is None else (1.0, second):
            crest = 2 * np.pi * order / PERIOD_NM * layer
            expected += 400.0 / order**1.5 * np.exp(-0.5 * ((q - crest) / 0.03) ** 2)
    rows, columns = np.indices(shape)
    away = np.hypot(rows - centre[0], columns - centre[1])
    arm = (np.abs(columns - centre[1] - 0.3 * (rows - centre[0])) < 3) & (rows > centre[0])
    beam_stop = (away < 9) | arm
    counts = rng.poisson(np.where(beam_stop, 0.2, expected)).astype(np.int32)
    broken = _broken(shape, rng, beam_stop | (expected < 40))
    counts[broken["dead"]] = 0
    counts[broken["hot"]] = 30_000
    counts[broken["overflow"]] = 2**20 + 5
    counts[broken["marked"]] = -2
    counts[broken["gaps"]] = -1
    return Simulated(counts, broken, beam_stop, q, centre, float(beam["directDist"]), rotations_rad)


def _broken(shape: tuple[int, int], rng: np.random.Generator, avoid: np.ndarray) -> dict[str, np.ndarray]:
    """Gaps of a Pilatus, and single pixels, none beside another one or in the dark."""
    rows, columns = np.indices(shape)
    broken = {"gaps": (rows % 212 >= 195) | (columns % 494 >= 487)}
    free = ~(broken["gaps"] | avoid)
    for kind, number in (("dead", 12), ("hot", 8), ("overflow", 5), ("marked", 20)):
        broken[kind] = np.zeros(shape, dtype=bool)
        for _ in range(number):
            places = np.argwhere(free[2:-2, 2:-2]) + 2
            row, column = places[rng.integers(len(places))]
            broken[kind][row, column] = True
            free[row - 2 : row + 3, column - 2 : column + 3] = False
    return broken
