"""Where wires lie: singular, dispersed, bundle or network (the four morphologies of Lu et al. 2022).

The classes of S. Lu, B. Montz, T. Emrick and A. Jayaraman, *Digital Discovery* 1 (2022) 816. All draw the covered share
of the field from one distribution, and widths follow from it, so that coverage and brightness do not tell them apart:
a singular wire is thick, those of a network are thin. Layouts are drawn in units of the field's side, from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from nanodist.synth.geometry import Frame, Wire, segment_distance

Floats = npt.NDArray[np.float64]

COVERAGE = (0.10, 0.24)  # covered share of the field, uniform, for every class
WIDTH = (0.014, 0.32)  # allowed widths, in units of the field
GAP = 0.02  # least clear distance between dispersed wires: two pixels at the smallest size allowed
GRID = 64  # points a side on which the coverage is solved
TRIES = 400

Layout = Callable[[np.random.Generator, float], "tuple[list[Floats], Floats] | None"]


class Infeasible(Exception):
    """No layout was found; the caller draws again."""


def curve(rng: np.random.Generator, length: float, bend: float, points: int = 25) -> Floats:
    """A smooth centre line (points, 2) about the origin, along x: its heading is a sum of two slow cosines.

    ``bend`` is the amplitude of the heading in rad; 0 is straight.
    """
    s = (np.arange(points - 1) + 0.5) / (points - 1)
    heading = np.zeros(points - 1)
    for order in (1, 2):
        heading += bend / order * rng.normal() * np.cos(np.pi * order * s + rng.uniform(0, np.pi))
    steps = length / (points - 1) * np.stack([np.cos(heading), np.sin(heading)], axis=1)
    line = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    return line - line[points // 2]


def place(line: Floats, centre: Floats, angle: float) -> Floats:
    """``line`` turned by ``angle`` (rad, from x towards y) and moved to ``centre`` (2,)."""
    c, s = np.cos(angle), np.sin(angle)
    return line @ np.array([[c, s], [-s, c]]) + centre


def _stiffness(rng: np.random.Generator) -> float:
    return abs(float(rng.normal(0.0, 0.22)))


def _line(rng: np.random.Generator, lengths: tuple[float, float], centres: tuple[float, float], bend: float) -> Floats:
    line = curve(rng, rng.uniform(*lengths), bend)
    return place(line, rng.uniform(*centres, 2), rng.uniform(0, np.pi))


def distances(points: Floats, line: Floats) -> Floats:
    """Distance of each of ``points`` (n, 2) to the polyline ``line`` (m, 2), as (n,)."""
    starts, ends = line[:-1], line[1:]
    deltas = ends - starts
    relative = points[:, None, :] - starts
    along = np.clip((relative * deltas).sum(-1) / np.maximum((deltas**2).sum(-1), 1e-30), 0.0, 1.0)
    across = relative - along[..., None] * deltas
    return np.sqrt((across**2).sum(-1).min(axis=1))


def clearance(a: Floats, b: Floats) -> float:
    """Least distance between two polylines, taken at their vertices."""
    return float(min(distances(a, b).min(), distances(b, a).min()))


def solve_scale(lines: Sequence[Floats], radii: Floats, coverage: float) -> float:
    """The factor on ``radii`` with which the wires cover that share of the field.

    A point is covered at factor k where ``min_i distance_i / radius_i < k``, so k is a quantile of that minimum.
    """
    axis = (np.arange(GRID) + 0.5) / GRID
    nearest = np.full((GRID, GRID), np.inf)
    for line, radius in zip(lines, radii, strict=True):
        squared = np.full((GRID, GRID), np.inf)
        for start, end in zip(line[:-3:3], line[3::3], strict=True):
            near, _ = segment_distance(axis[None, :], axis[:, None], start, end)
            np.minimum(squared, near, out=squared)
        np.minimum(nearest, np.sqrt(squared) / radius, out=nearest)
    return float(np.quantile(nearest, coverage))


def _radii(rng: np.random.Generator, count: int) -> Floats:
    return np.exp(rng.normal(0.0, 0.12, count))


def singular(rng: np.random.Generator, coverage: float) -> tuple[list[Floats], Floats] | None:
    """One wire, most of whose length may be seen."""
    line = _line(rng, (0.7, 1.8), (0.3, 0.7), _stiffness(rng))
    radii = np.ones(1)
    return [line], radii * solve_scale([line], radii, coverage)


def dispersed(rng: np.random.Generator, coverage: float) -> tuple[list[Floats], Floats] | None:
    """Two to eight wires of any direction; ``None`` where two of them come closer than ``GAP``."""
    count, bend = int(rng.integers(2, 9)), _stiffness(rng)
    lengths = (0.3, 0.95)
    room = coverage / (0.5 * sum(lengths) * count) + GAP
    lines: list[Floats] = []
    for _ in range(12 * count):
        line = _line(rng, lengths, (0.08, 0.92), bend)
        if all(clearance(line, other) > room for other in lines):
            lines.append(line)
        if len(lines) == count:
            break
    if len(lines) < 2:
        return None
    radii = _radii(rng, len(lines))
    radii = radii * solve_scale(lines, radii, coverage)
    for i, line in enumerate(lines):
        for j in range(i):
            if clearance(line, lines[j]) < radii[i] + radii[j] + GAP:
                return None
    return lines, radii


def bundle(rng: np.random.Generator, coverage: float) -> tuple[list[Floats], Floats] | None:
    """Three to nine wires side by side along one guide line, touching or nearly so."""
    count = int(rng.integers(3, 10))
    guide = _line(rng, (0.7, 1.6), (0.35, 0.65), _stiffness(rng))
    tangent = np.gradient(guide, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1) / np.linalg.norm(tangent, axis=1, keepdims=True)
    relative, spacing = _radii(rng, count), rng.uniform(0.88, 1.08, count)
    trims = rng.integers(0, 6, (count, 2)) * (rng.random((count, 2)) < 0.7)
    fray = rng.normal(0.0, 0.02, (count, 1)) * np.linspace(-1, 1, len(guide)) ** 3 * rng.uniform(0.2, 1.0)
    sideways = np.cumsum(np.concatenate([[0.0], (relative[1:] + relative[:-1]) * spacing[1:]]))
    sideways -= sideways.mean()
    scale = coverage / (2 * relative.sum())
    for _ in range(4):
        lines = [
            (guide + (sideways[i] * scale + fray[i])[:, None] * normal)[trims[i, 0] : len(guide) - trims[i, 1]]
            for i in range(count)
        ]
        # Offsets grow with the radius, hence a few rounds; the last only changes how closely the wires touch.
        factor = solve_scale(lines, relative * scale, coverage)
        scale *= factor
    return (lines, relative * scale) if 0.9 < factor < 1.1 else None


def network(rng: np.random.Generator, coverage: float) -> tuple[list[Floats], Floats] | None:
    """Five to eleven long wires, all joined inside the field, that reach all four sides."""
    count, bend = int(rng.integers(5, 12)), _stiffness(rng)
    lines = [_line(rng, (0.7, 1.5), (0.08, 0.92), bend) for _ in range(count)]
    radii = _radii(rng, count)
    inside = [line[((line > 0) & (line < 1)).all(axis=1)] for line in lines]
    joined = _largest_group(lines, inside, 0.8 * coverage / count)
    if len(joined) < 4:
        return None
    lines, radii, seen = [lines[i] for i in joined], radii[joined], np.concatenate([inside[i] for i in joined])
    edge = 0.05
    if (
        seen.min() > edge
        or seen.max() < 1 - edge
        or (seen.min(axis=0) > edge).any()
        or (seen.max(axis=0) < 1 - edge).any()
    ):
        return None
    return lines, radii * solve_scale(lines, radii, coverage)


def _largest_group(lines: Sequence[Floats], inside: Sequence[Floats], reach: float) -> list[int]:
    """Indices of the largest set of wires that are linked by meeting within ``reach`` inside the field."""
    group = list(range(len(lines)))
    for i in range(len(lines)):
        for j in range(i):
            if group[i] != group[j] and len(inside[i]) and distances(inside[i], lines[j]).min() < reach:
                old, new = group[i], group[j]
                group = [new if g == old else g for g in group]
    best = max(set(group), key=lambda g: (group.count(g), -g))
    return [i for i, g in enumerate(group) if g == best]


MORPHOLOGIES: dict[str, Layout] = {
    "bundle": bundle,
    "dispersed": dispersed,
    "network": network,
    "singular": singular,
}


def layout(rng: np.random.Generator, morphology: str, frame: Frame) -> list[Wire]:
    """Wires of one micrograph, in nm; their coverage is drawn before and apart from the morphology.

    Raises:
        Infeasible: no layout was found in ``TRIES`` tries (the caller draws again).
    """
    coverage = rng.uniform(*COVERAGE)
    smallest = max(WIDTH[0], 2.0 / frame.size_px)
    for attempt in range(TRIES):
        found = MORPHOLOGIES[morphology](rng, coverage)
        if found is not None:
            lines, radii = found
            if smallest <= 2 * radii.min() and 2 * radii.max() <= WIDTH[1]:
                return [
                    Wire(_refined(line, frame.size_px) * frame.field_nm, float(radius) * frame.field_nm)
                    for line, radius in zip(lines, radii, strict=True)
                ]
        if attempt % 50 == 49:  # an extreme coverage that this class can hardly have: towards the middle
            coverage += 0.3 * (sum(COVERAGE) / 2 - coverage)
    raise Infeasible(morphology)


def _refined(line: Floats, size_px: int) -> Floats:
    """The line with vertices dense enough that its corners stay below a tenth of a pixel (cubic through the points)."""
    steps = max(1, round((size_px / 256) ** 0.5 * 2))
    at = np.linspace(0, len(line) - 1, (len(line) - 1) * steps + 1)
    left = np.clip(at.astype(int), 0, len(line) - 2)
    t = (at - left)[:, None]
    slope = np.gradient(line, axis=0)
    h00, h10 = 2 * t**3 - 3 * t**2 + 1, t**3 - 2 * t**2 + t
    h01, h11 = -2 * t**3 + 3 * t**2, t**3 - t**2
    return h00 * line[left] + h10 * slope[left] + h01 * line[left + 1] + h11 * slope[left + 1]
