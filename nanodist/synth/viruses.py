"""Viruses in negative stain, bright-field TEM: capsids, filaments and enveloped virions, with their true sizes.

A dried heavy-metal salt surrounds the particles: it piles up around them, creeps into what is open (empty capsids, the
channel of a filament, the gaps between spikes) and is missing where protein and lipid stand. The image is that of the
stain, so particles are brighter than what surrounds them (J. R. Harris, *Negative Staining and Cryoelectron
Microscopy*, 1997). Sizes are drawn alike for every class; an enveloped virion's outline is that of its membrane,
without spikes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from hpc.seeding import generator
from nanodist.synth import optics, specimen
from nanodist.synth.detector import to_uint16
from nanodist.synth.geometry import Frame, Projection, Wire, project
from nanodist.synth.micrograph import Conditions, Micrograph, Settings, conditions, illumination
from nanodist.synth.outlines import Outline, polygon, raster, truth_of
from nanodist.synth.particles import layer_of, overlap, truth
from nanodist.synth.wires import curve, place

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

COVERAGE = (0.05, 0.22)
WIDTH = (0.06, 0.16)  # of a particle, in units of the field
SMALLEST_PX = 12.0


@dataclass(frozen=True)
class Body:
    """One particle on the pixels of its window.

    Attributes:
        projection: mask, and the thickness of stain that it keeps out.
        rim_nm: (n, m) distance outside of its outline, 0 inside.
        facts: its true sizes.
        centre: (2,) in nm.
        reach_nm: radius of a circle that holds it.
    """

    projection: Projection
    rim_nm: Floats
    facts: dict[str, Any]
    centre: Floats
    reach_nm: float


def _chord(depth_nm: Floats, radius_nm: float) -> Floats:
    """Thickness of a round body at ``depth_nm`` inside of its outline."""
    depth = np.clip(depth_nm, 0.0, radius_nm)
    return 2 * np.sqrt(depth * (2 * radius_nm - depth))


def capsid(rng: np.random.Generator, centre: Floats, width: float, frame: Frame) -> Body | None:
    """A shell with a hexagonal, rounded outline and bumps of capsomers; one in four is empty and filled by stain."""
    edge = width / math.sqrt(3)
    outline = polygon(centre, 6, edge, rng.uniform(0.45, 0.95) * width / 2, rng.uniform(0, math.pi))
    seen = raster(outline, frame, 0.5 * width)
    if seen is None:
        return None
    depth, radius = -seen.signed_nm, width / 2
    solid = _chord(depth, radius)
    shell = rng.uniform(0.12, 0.2) * width
    if rng.random() < 0.25:
        solid = solid - rng.uniform(0.6, 0.95) * _chord(depth - shell, radius - shell)
    bumps = rng.uniform(0.05, 0.12) * width
    turn = rng.uniform(0, math.pi)
    u = (seen.x_nm - centre[0]) * math.cos(turn) + (seen.y_nm - centre[1]) * math.sin(turn)
    v = (seen.y_nm - centre[1]) * math.cos(turn) - (seen.x_nm - centre[0]) * math.sin(turn)
    texture = np.cos(2 * np.pi * u / bumps) * np.cos(2 * np.pi * v / bumps)
    solid = solid * (1.0 + rng.uniform(0.03, 0.12) * texture)
    return _body(seen.window, solid, seen.signed_nm, truth_of(outline, frame.field_nm), centre, width * 0.6)


def filament(rng: np.random.Generator, centre: Floats, width: float, frame: Frame) -> Body | None:
    """A bent tube with cross striations and, in half of the cases, a channel into which stain creeps."""
    width = max(0.45 * width, 0.6 * SMALLEST_PX * frame.pixel_size_nm)
    length = width * rng.uniform(4.0, 12.0)
    line = place(curve(rng, length, abs(rng.normal(0.0, 0.35)), 60), centre, rng.uniform(0, math.pi))
    wire = Wire(line, width / 2)
    wide = project(Wire(line, width), frame)
    narrow = project(wire, frame)
    if wide is None or narrow is None:
        return None
    # The wider tube's thickness gives the distance to the centre line, out to its rim.
    distance = np.sqrt(np.maximum(width**2 - (wide.thickness_nm / 2) ** 2, 0.0))
    solid = _chord(width / 2 - distance, width / 2)
    if rng.random() < 0.5:
        channel = rng.uniform(0.15, 0.3) * width
        solid = solid - 0.9 * _chord(channel / 2 - distance, channel / 2)
    pitch = rng.uniform(0.35, 0.8) * width
    solid = solid * (1.0 + rng.uniform(0.0, 0.12) * np.cos(2 * np.pi * wide.arc_nm / pitch))
    mask = np.zeros((frame.padded_px, frame.padded_px), bool)
    mask[narrow.window] = narrow.mask
    facts = {
        "x_nm": float(line[len(line) // 2, 0]),
        "y_nm": float(line[len(line) // 2, 1]),
        "width_nm": width,
        "contour_length_nm": wire.contour_length_nm,
        "length_nm": wire.contour_length_nm + width,
        "end_to_end_nm": wire.end_to_end_nm,
        # A tube about a curve that does not meet itself has the area of the straight one.
        "area_nm2": width * wire.contour_length_nm + math.pi * width**2 / 4,
        "visible_length_nm": wire.visible_length_nm(frame.field_nm),
        "border_cut": wire.is_cut(frame.field_nm),
        "centre_line_nm": np.round(line, 4).tolist(),
    }
    rim = np.maximum(distance - width / 2, 0.0)
    seen = Projection(wide.window, np.maximum(solid, 0.0), mask[wide.window], wide.arc_nm)
    reach = float(np.hypot(*(line - centre).T).max()) + width / 2
    return Body(seen, rim, facts, centre, reach)


def enveloped(rng: np.random.Generator, centre: Floats, width: float, frame: Frame) -> Body | None:
    """A pleomorphic virion: a membrane about a core, with spikes on it.

    Its outline is ``r(t) = r0 (1 + sum a_k cos(k t + p_k))``, k = 2 to 4; the sizes follow from it by quadrature.
    """
    orders, shares = np.arange(2, 5), rng.uniform(0, 0.09, 3) / np.array([1.0, 1.5, 2.0])
    phases = rng.uniform(0, 2 * math.pi, 3)
    r0, spike = width / 2, rng.uniform(0.06, 0.12) * width

    def radius(t: Floats) -> Floats:
        waves = shares[:, None] * np.cos(orders[:, None] * t.ravel() + phases[:, None])
        return np.asarray(r0 * (1.0 + waves.sum(axis=0))).reshape(t.shape)

    t = np.linspace(0, 2 * math.pi, 1441)[:-1]
    points = centre + radius(t)[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1)
    seen = raster(Outline(points[::8], 0.0), frame, spike + 0.5 * width)
    if seen is None:
        return None
    dx, dy = seen.x_nm - centre[0], seen.y_nm - centre[1]
    theta, rho = np.arctan2(dy, dx), np.hypot(dx, dy)
    signed = rho - radius(theta)  # radial distance; the outline is where it is 0
    membrane = rng.uniform(0.04, 0.07) * width
    # A bilayer stands out from the core, into which some stain has gone.
    core = rng.uniform(0.5, 0.8)
    solid = _chord(-signed, r0) * np.where(-signed < membrane, 1.0, core)
    number = round(2 * math.pi * r0 / (spike * rng.uniform(0.7, 1.2)))
    fringe = (0.5 + 0.5 * np.cos(number * theta)) * np.clip(1.0 - np.abs(signed - spike / 2) / (spike / 2), 0.0, 1.0)
    solid = solid + 0.7 * spike * fringe
    facts = _star_facts(points, centre, frame.field_nm)
    return _body(seen.window, solid, signed, facts, centre, float(radius(t).max()) + spike)


def _star_facts(points: Floats, centre: Floats, field_nm: float) -> dict[str, Any]:
    """Sizes of a closed, finely sampled outline (n, 2)."""
    x, y = (points - centre).T
    area = abs(float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))) / 2
    perimeter = float(np.hypot(*(np.roll(points, -1, axis=0) - points).T).sum())
    turns = np.linspace(0, math.pi, 721)[:-1]
    spans = np.ptp(np.stack([x, y], axis=1) @ np.stack([np.cos(turns), np.sin(turns)]), axis=0)
    return {
        "x_nm": float(centre[0]),
        "y_nm": float(centre[1]),
        "width_nm": float(spans.min()),
        "length_nm": float(spans.max()),
        "area_nm2": area,
        "perimeter_nm": perimeter,
        "equivalent_diameter_nm": math.sqrt(4 * area / math.pi),
        "circularity": 4 * math.pi * area / perimeter**2,
        "border_cut": bool(points.min() < 0 or points.max() > field_nm),
    }


def _body(
    window: tuple[slice, slice], solid: Floats, signed: Floats, facts: dict[str, Any], centre: Floats, reach: float
) -> Body:
    thickness = np.maximum(solid, 0.0)
    seen = Projection(window, thickness, signed <= 0, np.zeros_like(thickness))
    return Body(seen, np.maximum(signed, 0.0), facts, centre, reach)


VIRUSES: dict[str, Callable[[np.random.Generator, Floats, float, Frame], Body | None]] = {
    "capsid": capsid,
    "enveloped": enveloped,
    "filament": filament,
}


def scatter(rng: np.random.Generator, label: str, frame: Frame) -> list[Body]:
    """Particles of one micrograph, whose middles lie in the field."""
    field = frame.field_nm
    width = max(rng.uniform(*WIDTH) * field, 1.6 * SMALLEST_PX * frame.pixel_size_nm)
    wanted = rng.uniform(*COVERAGE) * field**2
    spread, apart = rng.uniform(0.03, 0.15), rng.uniform(0.85, 1.1)
    found: list[Body] = []
    covered = 0.0
    for _ in range(300):
        centre = rng.uniform(0.03, 0.97, 2) * field
        size = max(width * math.exp(rng.normal(0, spread)), SMALLEST_PX * frame.pixel_size_nm)
        body = VIRUSES[label](rng, centre, size, frame)
        if body is None or not layer_of(body.projection, frame).any():
            continue
        if label != "filament" and any(
            float(np.hypot(*(body.centre - other.centre))) < apart * (body.reach_nm + other.reach_nm) for other in found
        ):
            continue
        found.append(body)
        covered += body.facts["area_nm2"]
        if covered >= wanted:
            break
    return found


def _stain(bodies: list[Body], unit_nm: float, frame: Frame, rng: np.random.Generator) -> Floats:
    """Thickness of the stain (n, n): a sheet that is uneven, higher around particles, and pushed aside by them."""
    size = frame.padded_px
    depth = unit_nm * rng.uniform(0.35, 0.8)
    sheet = depth * (1.0 + rng.uniform(0.1, 0.5) * specimen.smooth_field(size, 3, rng))
    grain = rng.normal(0.0, 1.0, (size, size))
    sheet = sheet + rng.uniform(0.02, 0.06) * depth * grain
    pile, fall = rng.uniform(0.4, 1.0) * depth, rng.uniform(0.08, 0.2) * unit_nm
    bank, solid = np.zeros((size, size)), np.zeros((size, size))
    for body in bodies:
        window = body.projection.window
        bank[window] = np.maximum(bank[window], np.exp(-body.rim_nm / fall))
        solid[window] += body.projection.thickness_nm
    # A film of stain stays above and below whatever stands in it.
    return np.maximum(sheet + pile * bank - solid, 0.1 * depth)


def _image(bodies: list[Body], made: Conditions, unit_nm: float, frame: Frame, seed: tuple[Any, ...]) -> Any:
    stain = _stain(bodies, unit_nm, frame, generator(*seed, "stain"))
    rng = generator(*seed, "noise")
    wave = specimen.exit_wave(stain, np.ones_like(stain), made.material, made.film, made.lens.voltage_kv, rng)
    lit = optics.image(wave, made.lens, frame.pixel_size_nm) * illumination(frame, made)
    return to_uint16(made.camera.counts(np.maximum(lit, 0.0), frame.pixel_size_nm, rng)[frame.inner])


def make_viruses(seed: int, label: str, index: int, settings: Settings) -> Micrograph:
    """Micrograph ``index`` of a class: a pure function of the arguments.

    Raises:
        UserError: ``label`` is none of :data:`VIRUSES`, or HAADF is asked for.
    """
    if label not in VIRUSES:
        raise UserError(f"no virus {label!r}; there are {', '.join(VIRUSES)}")
    if settings.haadf_share > 0:
        raise UserError("negative stain is taken in bright field only: leave --haadf-share out")
    frame = settings.frame()
    key = (seed, "synth-viruses", label, index)
    bodies = scatter(generator(*key, "layout"), label, frame)
    if not bodies:
        raise RuntimeError(f"no {label} found room for seed {seed}, index {index}")
    unit = float(np.mean([body.facts["width_nm"] for body in bodies]))
    made = conditions(generator(*key, "conditions"), False, unit, settings)
    # Uranium salts: strong absorption, no crystals.
    depth = generator(*key, "contrast").uniform(0.6, 1.6)
    material = replace(made.material, mean_free_path_nm=unit / depth, extinction_nm=0.0, atomic_number=92.0)
    made = replace(made, material=material)
    image = _image(bodies, made, unit, frame, key)
    instances = np.stack([layer_of(body.projection, frame) for body in bodies])
    rows = [{"object": n, **body.facts, **overlap(instances, n)} for n, body in enumerate(bodies)]
    return Micrograph(image, instances, truth(seed, "viruses", label, index, settings, instances, rows, asdict(made)))
