"""What a pixel detector counts of a pattern: smearing, background, module gaps, beam stop, dead pixels, Poisson noise.

The detector is a PILATUS 200K: two modules, one above the other, of 407 x 487 pixels of 172 um with a gap of 17 rows.
Pixels that measure nothing hold negative sentinels, as beamlines write them: -1 in gaps, -2 elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from nanodist.scattering.geometry import Geometry
from nanodist.synth.field_scattering import PolarPattern

SHAPE = (407, 487)
PIXEL_MM = 0.172
_GAP = slice(195, 212)
GAP, DEAD = -1, -2


@dataclass(frozen=True)
class Beamline:
    """How a frame was taken.

    Attributes:
        geometry: where the detector stood.
        peak_counts: expected counts of the highest pixel that is measured, above the background.
        background: flat background, relative to that.
        parasitic: scattering of slits and windows at the edge of the beam stop, relative to that; it falls as q^-3.
        smear_px: standard deviation of beam and detector together, in pixels.
        beam_stop_inv_nm: radius of the beam stop's shadow.
        arm_deg: direction of its arm.
        dead: share of pixels that are dead.
    """

    geometry: Geometry
    peak_counts: float
    background: float
    parasitic: float
    smear_px: float
    beam_stop_inv_nm: float
    arm_deg: float
    dead: float


def draw_beamline(rng: np.random.Generator) -> Beamline:
    """Conditions drawn alike for every specimen: 12.4 keV, the beam near the middle, q to about 0.6 1/nm."""
    centre = (SHAPE[0] / 2 + 12 + rng.normal(0, 3), SHAPE[1] / 2 + rng.normal(0, 3))
    geometry = Geometry(
        distance_mm=float(rng.uniform(3700, 4100)),
        beam_centre_px=(float(centre[0]), float(centre[1])),
        pixel_size_mm=(PIXEL_MM, PIXEL_MM),
        wavelength_nm=0.1,
        source="synthetic",
    )
    return Beamline(
        geometry=geometry,
        peak_counts=float(np.exp(rng.uniform(np.log(500), np.log(30000)))),
        background=float(np.exp(rng.uniform(np.log(3e-4), np.log(3e-3)))),
        parasitic=float(np.exp(rng.uniform(np.log(0.01), np.log(0.1)))),
        smear_px=float(rng.uniform(0.8, 1.6)),
        beam_stop_inv_nm=float(rng.uniform(0.035, 0.045)),
        arm_deg=float(rng.choice([90.0, 180.0, 270.0]) + rng.normal(0, 3)),
        dead=2e-4,
    )


def q_max_inv_nm(line: Beamline) -> float:
    """The largest |q| that the detector sees, at its farthest corner."""
    rows, columns = np.meshgrid([0.0, SHAPE[0] - 1.0], [0.0, SHAPE[1] - 1.0], indexing="ij")
    return float(np.hypot(*line.geometry.q_at(rows, columns)).max())


def expose(pattern: PolarPattern, line: Beamline, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """The counts of a frame, int32, with sentinels where nothing is measured; ``pattern`` as it is oriented."""
    q_y, q_x = line.geometry.q(SHAPE)
    modulus = np.hypot(q_y, q_x)
    frame_mask = measured(line, rng)
    signal = gaussian_filter(pattern.at(q_y, q_x), line.smear_px, mode="nearest")
    signal /= signal[frame_mask > 0].max()
    parasitic = line.parasitic * (np.maximum(modulus, line.beam_stop_inv_nm) / line.beam_stop_inv_nm) ** -3.0
    counts = rng.poisson(line.peak_counts * (signal + line.background + parasitic)).astype(np.int32)
    return np.where(frame_mask > 0, counts, frame_mask).astype(np.int32)


def measured(line: Beamline, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """1 where a pixel measures, else its sentinel."""
    q_y, q_x = line.geometry.q(SHAPE)
    state = np.ones(SHAPE, np.int32)
    arm = np.radians(line.arm_deg)
    along, across = q_x * np.cos(arm) + q_y * np.sin(arm), q_y * np.cos(arm) - q_x * np.sin(arm)
    state[np.hypot(q_y, q_x) < line.beam_stop_inv_nm] = DEAD
    state[(along > 0) & (np.abs(across) < 0.3 * line.beam_stop_inv_nm)] = DEAD
    state[rng.random(SHAPE) < line.dead] = DEAD
    state[_GAP] = GAP
    return state
