"""Metal nanoparticles in bright field or HAADF: spheres, rods, cubes and triangular plates, with their true sizes.

Number and size of the particles are drawn alike for every class, so that coverage and brightness do not tell the shape.
In half of the micrographs particles lie apart, in the others they may lie on each other, where thicknesses add up.
Every particle is a crystal with a direction of its own, so that some diffract strongly and are dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from hpc.seeding import generator, uniforms
from hpc.seeding import key as seed_key
from nanodist.synth.geometry import Frame, Projection, Wire, mean_chord
from nanodist.synth.micrograph import Micrograph, Settings, conditions, render
from nanodist.synth.outlines import Outline, disc, polygon, raster, rod, truth_of

Floats = npt.NDArray[np.float64]

COVERAGE = (0.05, 0.22)
DIAMETER = (0.05, 0.13)  # mean equivalent diameter, in units of the field
SMALLEST_PX = 6.0  # no particle is smaller
MOST = 60


def _sphere(rng: np.random.Generator, centre: Floats, area: float) -> tuple[Outline, float]:
    outline = disc(centre, math.sqrt(4 * area / math.pi))
    return outline, 2 * outline.radius_nm


def _rod(rng: np.random.Generator, centre: Floats, area: float) -> tuple[Outline, float]:
    aspect = rng.uniform(2.0, 5.0)
    width = math.sqrt(area / (aspect - 1 + math.pi / 4))
    return rod(centre, aspect * width, width, rng.uniform(0, math.pi)), width


def _cube(rng: np.random.Generator, centre: Floats, area: float) -> tuple[Outline, float]:
    share = rng.uniform(0.03, 0.18)
    edge = math.sqrt(area / (1 - (4 - math.pi) * share**2))
    return polygon(centre, 4, edge, share * edge, rng.uniform(0, math.pi)), edge


def _triangle(rng: np.random.Generator, centre: Floats, area: float) -> tuple[Outline, float]:
    share = rng.uniform(0.02, 0.10)  # of the edge
    lost = (3 * math.sqrt(3) - math.pi) * share**2
    edge = math.sqrt(area / (math.sqrt(3) / 4 - lost))
    return polygon(centre, 3, edge, share * edge, rng.uniform(0, 2 * math.pi)), rng.uniform(0.25, 0.5) * edge


# Outline, and height in nm, of a particle with a given projected area.
SHAPES: dict[str, Callable[[np.random.Generator, Floats, float], tuple[Outline, float]]] = {
    "cube": _cube,
    "rod": _rod,
    "sphere": _sphere,
    "triangle": _triangle,
}


def scatter(
    rng: np.random.Generator, shape: str, frame: Frame, shapes: dict[str, Any] = SHAPES
) -> list[tuple[Outline, float]]:
    """Particles of one micrograph that reach into the field; apart from each other, or free to overlap."""
    field = frame.field_nm
    diameter = max(rng.uniform(*DIAMETER) * field, 1.6 * SMALLEST_PX * frame.pixel_size_nm)
    count = int(np.clip(round(rng.uniform(*COVERAGE) * field**2 / (math.pi / 4 * diameter**2)), 2, MOST))
    spread = rng.uniform(0.05, 0.2)
    apart = rng.random() < 0.5
    found: list[tuple[Outline, float]] = []
    for _ in range(30 * count):
        centre = rng.uniform(-0.02, 1.02, 2) * field
        size = max(diameter * math.exp(rng.normal(0, spread)), SMALLEST_PX * frame.pixel_size_nm)
        one = shapes[shape](rng, centre, math.pi / 4 * size**2)
        if _reaches(one[0], field) and all(_clear(one[0], other, apart) for other, _ in found):
            found.append(one)
        if len(found) == count:
            break
    return found


def _reaches(outline: Outline, field_nm: float) -> bool:
    """Whether the middle lies in the field, so that what is seen is more than a sliver."""
    return bool(np.all((outline.centre > 0) & (outline.centre < field_nm)))


def _clear(a: Outline, b: Outline, apart: bool) -> bool:
    distance = float(np.hypot(*(a.centre - b.centre)))
    if apart:
        return distance > 1.05 * (a.feret_nm()[1] + b.feret_nm()[1]) / 2
    return distance > 0.7 * (a.feret_nm()[0] + b.feret_nm()[0]) / 2


def _projected(outline: Outline, height_nm: float, shape: str, frame: Frame) -> Projection | None:
    seen = raster(outline, frame)
    if seen is None:
        return None
    if shape in ("sphere", "rod"):
        half = frame.pixel_size_nm / 2
        thickness = mean_chord(outline.radius_nm + seen.signed_nm, outline.radius_nm, half)
        thickness = np.where(seen.signed_nm < half, thickness, 0.0)
    else:
        thickness = height_nm * seen.covered(frame.pixel_size_nm)
    axis = outline.corners[-1] - outline.corners[0]
    axis = axis / max(float(np.hypot(*axis)), 1e-9) if len(outline.corners) > 1 else np.array([1.0, 0.0])
    along = (seen.x_nm - outline.centre[0]) * axis[0] + (seen.y_nm - outline.centre[1]) * axis[1]
    return Projection(seen.window, thickness, seen.mask, along + outline.feret_nm()[1] / 2)


def make_particles(seed: int, shape: str, index: int, settings: Settings) -> Micrograph:
    """Micrograph ``index`` of a shape: a pure function of the arguments.

    Raises:
        UserError: ``shape`` is none of :data:`SHAPES`.
    """
    if shape not in SHAPES:
        raise UserError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
    frame = settings.frame()
    particles = scatter(generator(seed, "synth-particles", shape, index, "layout"), shape, frame)
    pairs = [(one, p) for one in particles if (p := _projected(*one, shape, frame)) is not None]
    pairs = [(one, p) for one, p in pairs if layer_of(p, frame).any()]
    outlines, seen = [one for one, _ in pairs], [p for _, p in pairs]
    haadf = bool(
        uniforms([seed_key(seed, "synth-particles", shape, index, "modality")], 1)[0, 0] < settings.haadf_share
    )
    width = float(np.mean([height for _, height in outlines]))
    made = conditions(generator(seed, "synth-particles", shape, index, "conditions"), haadf, width, settings)
    # What diffraction asks of a thing is a length and a radius.
    bodies = [Wire(o.centre + np.array([[-0.5, 0.0], [0.5, 0.0]]) * o.feret_nm()[1], h / 2) for o, h in outlines]
    image = render(bodies, seen, [], made, frame, generator(seed, "synth-particles", shape, index, "noise"))
    instances = np.stack([layer_of(p, frame) for p in seen])
    rows = [
        {"object": n, **truth_of(o, frame.field_nm), "height_nm": h, **overlap(instances, n)}
        for n, (o, h) in enumerate(outlines)
    ]
    return Micrograph(image, instances, truth(seed, "particles", shape, index, settings, instances, rows, asdict(made)))


def layer_of(projection: Projection, frame: Frame) -> npt.NDArray[np.bool_]:
    """A mask on the kept field."""
    full = np.zeros((frame.padded_px, frame.padded_px), bool)
    full[projection.window] = projection.mask
    return full[frame.inner]


def overlap(instances: npt.NDArray[np.bool_], number: int) -> dict[str, float]:
    """Share of a thing's seen pixels that others cover as well."""
    own = instances[number]
    others = instances.sum(axis=0) > 1
    return {"overlap_share": float((own & others).sum() / max(1, own.sum()))}


def truth(
    seed: int,
    kind: str,
    label: str,
    index: int,
    settings: Settings,
    instances: npt.NDArray[np.bool_],
    rows: list[dict[str, Any]],
    made: dict[str, Any],
) -> dict[str, Any]:
    """The truth of a micrograph of separate things."""
    return {
        "schema": 1,
        "kind": kind,
        "label": label,
        "seed": seed,
        "index": index,
        "size_px": settings.size_px,
        "pixel_size_nm": settings.pixel_size_nm,
        "coverage": float(instances.any(axis=0).mean()),
        "overlap_share": float((instances.sum(axis=0) > 1).sum() / max(1, instances.any(axis=0).sum())),
        "objects": rows,
        "conditions": made,
    }
