"""Secondary-electron images of a film whose one phase stands out: relief, edges, shading, noise and the probe's width.

The signal of secondary electrons grows with the tilt of the surface and at edges, out of which more of them escape
(Reimer, Scanning Electron Microscopy, 1998, sections 4.2 and 6.1), so that domains have bright rims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, map_coordinates

from nanodist.synth.copolymers import FilmField, Specimen

F64 = npt.NDArray[np.float64]
# A crop that is turned by any angle fits into a box that is longer by this.
_DIAGONAL = math.sqrt(2)


@dataclass(frozen=True)
class SemSettings:
    """What of the microscope is chosen.

    Attributes:
        size_px: side of the image.
        pixel_size_nm: side of a pixel.
    """

    size_px: int = 512
    pixel_size_nm: float = 2.0

    @property
    def field_nm(self) -> float:
        """Side of the image in nm."""
        return self.size_px * self.pixel_size_nm


@dataclass(frozen=True)
class SemConditions:
    """How an image was taken.

    Attributes:
        contrast: yield of the bright phase over that of the dark one, less 1.
        edge: extra yield at edges.
        edge_nm: decay of it into the bright phase.
        probe_nm: standard deviations of the probe along the image's two axes.
        grain: relative roughness of the bright phase.
        shading: relative variation of the signal over the image.
        electrons: per pixel of the dark phase, which sets the noise.
        jitter_px: standard deviation of the shift of a scanned row.
        dust: bright specks on the image.
        black, white: grey values of the dark phase and of what is brightest, before noise.
    """

    contrast: float
    edge: float
    edge_nm: float
    probe_nm: tuple[float, float]
    grain: float
    shading: float
    electrons: float
    jitter_px: float
    dust: int
    black: float
    white: float


def sem_conditions(rng: np.random.Generator) -> SemConditions:
    """Conditions drawn alike for every specimen."""
    probe = rng.uniform(0.8, 2.2)
    return SemConditions(
        contrast=float(rng.uniform(0.6, 1.6)),
        edge=float(rng.uniform(0.1, 0.8)),
        edge_nm=float(rng.uniform(1.5, 4.0)),
        probe_nm=(float(probe), float(probe * rng.uniform(1.0, 1.25))),
        grain=float(rng.uniform(0.02, 0.1)),
        shading=float(rng.uniform(0.02, 0.15)),
        electrons=float(np.exp(rng.uniform(np.log(15), np.log(150)))),
        jitter_px=float(rng.uniform(0.0, 0.3)),
        dust=int(rng.poisson(1.0)),
        black=float(rng.uniform(20, 70)),
        white=float(rng.uniform(170, 235)),
    )


def box_periods(specimen: Specimen, unit_nm: float, settings: SemSettings) -> int:
    """How many periods a side a field must have, so that an image lies inside it at any angle."""
    needed = settings.field_nm * _DIAGONAL / unit_nm + 2
    if specimen.morphology == "spinodal":
        needed /= 2  # its box is counted in waves of about twice the fastest one
    return max(8, 2 * math.ceil(needed / 2))


def edge_distance(
    field: FilmField, level: float, unit_nm: float, angle_deg: float, settings: SemSettings, rng: np.random.Generator
) -> F64:
    """Signed distance in nm from the nearest edge, (size, size), positive in the bright phase; row 0 is on top.

    Args:
        field: at least as large as :func:`box_periods` says.
        level: between the phases.
        unit_nm: the length of a period of the equation.
        angle_deg: of the field's x axis in the image, anticlockwise.
        settings: of the image.
        rng: says where the crop lies.
    """
    unit = unit_nm * field.stretched
    step = [periods * unit / points for periods, points in zip(field.box.periods, field.box.points, strict=True)]
    half = (settings.size_px - 1) / 2
    axis = (np.arange(settings.size_px) - half) * settings.pixel_size_nm
    right, up = np.broadcast_arrays(axis[None, :], -axis[:, None])
    cos, sin = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    start = rng.uniform(0, 1, 2) * field.box.points
    along, across = right * cos + up * sin, up * cos - right * sin
    places = [start[0] + across / step[0], start[1] + along / step[1]]
    values = map_coordinates(field.values.astype(np.float64), places, order=3, mode="grid-wrap") - level
    slope_y, slope_x = np.gradient(values, settings.pixel_size_nm)
    # The slope where the field is flat is that of edges elsewhere: distances are only used near edges.
    slope = np.hypot(slope_y, slope_x)
    floor = 0.5 * float(np.median(slope[np.abs(values) < 0.2 * values.std()]))
    return np.asarray(values / np.maximum(slope, floor), np.float64)


def render_sem(
    distance_nm: F64, interface_nm: float, made: SemConditions, settings: SemSettings, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """The image (size, size) of a film with edges at these distances."""
    pixel = settings.pixel_size_nm
    width = math.hypot(interface_nm, 0.4 * pixel)
    share = 0.5 * (1 + np.tanh(distance_nm / (1.25 * width)))
    rim = np.where(distance_nm > 0, np.exp(-distance_nm / made.edge_nm), np.exp(distance_nm / (0.5 * width)))
    grain = gaussian_filter(rng.standard_normal(distance_nm.shape), 2.0 / pixel)
    grain *= made.grain / max(float(grain.std()), 1e-9)
    signal = 1.0 + share * (made.contrast * (1 + grain)) + made.edge * rim
    signal += _dust(made.dust, settings, rng)
    signal *= 1 + made.shading * _slow(distance_nm.shape, rng)
    signal = gaussian_filter(signal, [nm / pixel for nm in made.probe_nm])
    signal = _jittered(signal, made.jitter_px, rng)
    noisy = rng.poisson(np.maximum(signal, 0.05) * made.electrons) / made.electrons
    # Amplifier and digitiser see less than a pixel's time: a little of each pixel is left in the next.
    noisy = gaussian_filter(noisy, [0.0, 0.35])
    top = 1.0 + made.contrast + 0.5 * made.edge
    grey = made.black + (noisy - 1.0) / (top - 1.0) * (made.white - made.black) + rng.normal(0, 1.5, noisy.shape)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def _slow(shape: tuple[int, ...], rng: np.random.Generator) -> F64:
    """What varies over the whole image: charging and a detector that stands on one side; -1 to 1."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, length) for length in shape), indexing="ij")
    a, b, c, d, e = rng.normal(0, 1, 5)
    slow = a * x + b * y + 0.5 * (c * x * y + d * x**2 + e * y**2)
    return np.asarray(slow / max(float(np.abs(slow).max()), 1e-9), np.float64)


def _dust(count: int, settings: SemSettings, rng: np.random.Generator) -> F64:
    """Bright specks of 4 to 15 nm radius."""
    signal = np.zeros((settings.size_px, settings.size_px))
    axis = np.arange(settings.size_px) * settings.pixel_size_nm
    for _ in range(count):
        y, x = rng.uniform(0, settings.field_nm, 2)
        radius, height = rng.uniform(4, 15), rng.uniform(0.8, 2.0)
        away = np.hypot(axis[:, None] - y, axis[None, :] - x)
        signal += height * 0.5 * (1 + np.tanh((radius - away) / 1.5))
    return signal


def _jittered(signal: F64, jitter_px: float, rng: np.random.Generator) -> F64:
    """Each row shifted by a little, as vibration and stray fields do."""
    places = np.indices(signal.shape, dtype=np.float64)
    places[1] += rng.normal(0, max(jitter_px, 0.0), (signal.shape[0], 1))
    return np.asarray(map_coordinates(signal, places, order=1, mode="nearest"))
