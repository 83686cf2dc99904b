"""Specimens of block copolymer films and of spinodal mixtures: what they are, and fields of them.

A specimen is a morphology with a period, an orientation, an area fraction and an order; its fields differ in noise and
defects alone. Angles are in degrees, anticlockwise from the image's x axis with y up, and mean the direction of the
first peak: of stripes, their normal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft
from scipy.ndimage import gaussian_filter1d

from hpc.errors import UserError
from hpc.seeding import generator
from nanodist.synth.phase_field import Box, Copolymer, Field, copolymer, dot_box, spinodal, spinodal_box, stripe_box

MORPHOLOGIES = ("lamellae", "lying_cylinders", "standing_cylinders", "dots", "mixed", "spinodal")
HEXAGONAL = ("standing_cylinders", "dots")
PERIODS_NM = (20.0, 64.0)
# Boxes of several sizes, so that the lattice of waves that one of them has is not seen in the mean.
_BOX_PERIODS = (14, 16, 18, 20)
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Specimen:
    """What the fields of a sample share.

    Attributes:
        morphology: one of :data:`MORPHOLOGIES`.
        period_nm: 2 pi / q* of the first peak; of a hexagonal lattice the distance of its rows.
        orientation_deg: of the first peak, modulo 180 (60 of a hexagonal lattice); None where no direction is favoured.
        area_fraction: of the bright, etch-resistant phase.
        alignment: strength of what aligns the film, 0 for nothing.
        steps: how long it was annealed.
        quadratic: g of :class:`~nanodist.synth.phase_field.Copolymer`; of a spinodal mixture without meaning.
        interface_nm: standard deviation of the Gaussian by which the interfaces are smeared, 0 for sharp ones.
        mosaic_deg: standard deviation of the orientation between fields.
        period_spread: relative standard deviation of the period between fields.
    """

    morphology: str
    period_nm: float
    orientation_deg: float | None
    area_fraction: float
    alignment: float
    steps: int
    quadratic: float | tuple[float, float] = 0.0
    interface_nm: float = 0.0
    mosaic_deg: float = 0.0
    period_spread: float = 0.0

    @property
    def fold(self) -> int:
        """2 for stripes, 6 for hexagonal lattices: 360 degrees over the angle that leaves the pattern alone."""
        return 6 if self.morphology in HEXAGONAL else 2

    @property
    def centre_distance_nm(self) -> float | None:
        """Distance of neighbouring dots, 2 d / sqrt(3), of a hexagonal lattice."""
        return 2 * self.period_nm / math.sqrt(3) if self.morphology in HEXAGONAL else None


@dataclass(frozen=True)
class FilmField:
    """A periodic field of a specimen.

    Attributes:
        values: (y, x) order parameter, y up; what lies above the level is the bright phase.
        box: of ``values``, in periods of the equation.
        turned_deg: deviation of its orientation from the specimen's.
        stretched: its period over that of the specimen.
    """

    values: Field
    box: Box
    turned_deg: float
    stretched: float


def draw_specimen(
    seed: int, index: int, morphologies: tuple[str, ...] = MORPHOLOGIES, periods_nm: tuple[float, float] = PERIODS_NM
) -> Specimen:
    """Specimen ``index`` of a set: a pure function of the arguments.

    Morphologies take turns; periods are even in the logarithm, and cover their range evenly within each morphology
    (a golden-ratio sequence).

    Raises:
        UserError: an unknown morphology, or no range of periods.
    """
    unknown = [name for name in morphologies if name not in MORPHOLOGIES]
    if unknown or not morphologies:
        raise UserError(f"no morphology {', '.join(unknown) or '(none given)'}; there are {', '.join(MORPHOLOGIES)}")
    low, high = periods_nm
    if not 4 <= low <= high <= 400:
        raise UserError(f"periods are {low:g} to {high:g} nm; give a lowest and a highest one between 4 and 400 nm")
    rng = generator(seed, "pair", index, "specimen")
    turn, morphology = divmod(index, len(morphologies))
    name = morphologies[morphology]
    start = generator(seed, "pair", "periods", name).random()
    period_nm = low * (high / low) ** ((start + turn * _GOLDEN) % 1.0)
    alignment = (
        0.0 if rng.random() < 0.3 or name == "spinodal" else float(np.exp(rng.uniform(np.log(0.03), np.log(0.5))))
    )
    angle = rng.uniform(0, 60.0 if name in HEXAGONAL else 180.0)
    lowest, highest = _FRACTIONS[name]
    quadratic: dict[str, float | tuple[float, float]] = {
        "lying_cylinders": float(rng.uniform(0.0, 0.15)),
        "standing_cylinders": float(rng.uniform(0.9, 1.1)),
        "dots": float(rng.uniform(0.8, 1.0)),
        "mixed": (0.0, float(rng.uniform(0.5, 0.8))),
    }
    shortest, longest = {"dots": (25, 60), "spinodal": (80, 240)}.get(name, (25, 300))
    return Specimen(
        morphology=name,
        period_nm=period_nm,
        orientation_deg=angle if alignment > 0 else None,
        area_fraction=float(rng.uniform(lowest, highest)),
        alignment=alignment,
        steps=round(float(np.exp(rng.uniform(np.log(shortest), np.log(longest))))),
        quadratic=quadratic.get(name, 0.0),
        interface_nm=float(rng.uniform(0.3, 1.2)),
        mosaic_deg=float(rng.uniform(0.3, 3.0)),
        period_spread=float(rng.uniform(0.0, 0.015)),
    )


_FRACTIONS = {
    "lamellae": (0.42, 0.58),
    "lying_cylinders": (0.26, 0.38),
    "standing_cylinders": (0.2, 0.34),
    "dots": (0.1, 0.18),
    "mixed": (0.26, 0.38),
    "spinodal": (0.35, 0.6),
}


def make_field(specimen: Specimen, rng: np.random.Generator, periods: int | None = None) -> FilmField:
    """A field of ``specimen``, its orientation along the box's x axis; ``periods`` a side, or a few at random."""
    count = periods if periods is not None else int(rng.choice(_BOX_PERIODS))
    turned = specimen.mosaic_deg * float(rng.standard_normal()) if specimen.orientation_deg is not None else 0.0
    stretched = 1.0 + specimen.period_spread * float(rng.standard_normal())
    if specimen.morphology == "spinodal":
        box = spinodal_box(count)
        return FilmField(spinodal(rng, box, 2 * specimen.area_fraction - 1, specimen.steps), box, turned, stretched)
    box = dot_box(count) if specimen.morphology in HEXAGONAL else stripe_box(count)
    film = Copolymer(specimen.quadratic, specimen.alignment, specimen.fold, specimen.steps)
    return FilmField(copolymer(rng, box, film), box, turned, stretched)


@dataclass(frozen=True)
class Order:
    """Of the first peak of a specimen's fields.

    Attributes:
        wave: its place, in waves a period of the equation.
        parameter: |<exp(i fold theta)>| over the peak, weighted with the intensity: 1 for a single direction.
    """

    wave: float
    parameter: float


def measure_order(fields: Sequence[FilmField], fold: int) -> Order:
    """Where the first peak of ``fields`` lies, and how much of it points along the box's x axis.

    The place is the centroid of the azimuthal mean where it is above half of its highest value, as a fit of the peak
    finds it: defects add a tail at small waves that says nothing about the distance of neighbours.
    """
    parts = [_power(field) for field in fields]
    wave, angle, power = (np.concatenate([part[k] for part in parts]) for k in range(3))
    edges = np.arange(0.2, 3.0, 0.01)
    # Lattice points a ring grow with the wave: over it, their sum is the azimuthal mean.
    mean = gaussian_filter1d(np.histogram(wave, edges, weights=power / wave)[0], 3.0)
    top = int(np.argmax(mean))
    below = np.flatnonzero(mean < mean[top] / 2)
    first, last = below[below < top].max(initial=-1) + 1, below[below > top].min(initial=len(mean))
    place = float(np.average((edges[:-1] + 0.005)[first:last], weights=mean[first:last]))
    near = (wave > 0.75 * place) & (wave < 1.3 * place)
    ordered = np.abs(np.sum(power[near] * np.exp(1j * fold * angle[near]))) / power[near].sum()
    return Order(place, float(ordered))


def _power(field: FilmField) -> tuple[npt.NDArray[np.float64], ...]:
    """Waves, their angles (with the field's own deviation) and powers, of waves below 3."""
    ky, kx = field.box.waves()
    power = np.abs(fft.rfft2(field.values - field.values.mean())).astype(np.float64) ** 2 / field.values.size**2
    power[:, 1:-1] *= 2  # the other half of the transform of real numbers
    wave = np.hypot(ky, kx)
    low = (wave > 0) & (wave < 3)
    angle = np.arctan2(ky, kx) + np.radians(field.turned_deg)
    return wave[low] / field.stretched, angle[low], power[low]
