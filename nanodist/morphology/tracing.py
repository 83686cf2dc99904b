"""The wires that run through the junctions of a skeleton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanodist.morphology.skeleton import FREE, Branch, Graph, Meetings, incidence

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Two junctions belong to one crossing where the way between them is shorter than the crossing is wide.
CROSSING = 2.0
# The same where the way is thicker than what leads up to it: two wires that cross at a small angle share it.
SHARED, THICKER = 10.0, 1.12
STRAIGHT_DEG = 40.0
ALIKE = 1.8  # largest ratio of widths of two branches that may be one wire


@dataclass(frozen=True)
class Path:
    """One wire on the skeleton: its pixels in order, what its two ends are, and the junctions that it passes.

    ``ends`` are ``FREE`` or the number of the junction in which the wire ends; ``crossings`` holds (row, column,
    radius) of each junction that it passes or ends in.
    """

    pixels: Ints
    ends: tuple[int, int]
    crossings: Floats
    closed: bool


def _widths(graph: Graph, distance: npt.NDArray[np.float32]) -> dict[int, float]:
    return {n: float(np.median(distance[b.pixels[:, 0], b.pixels[:, 1]])) for n, b in graph.branches.items()}


def _is_shared(graph: Graph, number: int, length: float, widths: dict[int, float], at: Meetings) -> bool:
    """Whether a branch between two junctions is where wires lie on each other, and no piece of one wire."""
    ends = graph.branches[number].ends
    radius = max(graph.radii[j] for j in ends)
    if length <= CROSSING * radius:
        return True
    arms = [widths[b] for j in ends for b, _ in at[j] if b != number]
    return bool(length <= SHARED * radius and arms and widths[number] >= THICKER * float(np.median(arms)))


def merge_crossings(graph: Graph, distance: npt.NDArray[np.float32]) -> None:
    """Make one junction of those that one crossing of wires broke into."""
    widths, at = _widths(graph, distance), incidence(graph)
    parent = {j: j for j in graph.centres}

    def root(j: int) -> int:
        while parent[j] != j:
            j = parent[j]
        return j

    weight = dict.fromkeys(graph.centres, 1)
    short = sorted(
        (branch.length(), number)
        for number, branch in graph.branches.items()
        if FREE not in branch.ends and branch.ends[0] != branch.ends[1]
    )
    shared = [number for length, number in short if _is_shared(graph, number, length, widths, at)]
    for number in shared:
        a, b = (root(j) for j in graph.branches[number].ends)
        del graph.branches[number]
        if a == b:
            continue
        total = weight[a] + weight[b]
        graph.centres[a] = (weight[a] * graph.centres[a] + weight[b] * graph.centres[b]) / total
        reach = float(np.hypot(*(graph.centres[a] - graph.centres[b])))
        graph.radii[a] = max(graph.radii[a], graph.radii[b], reach)
        weight[a], parent[b] = total, a
    for branch in graph.branches.values():
        branch.ends = (_root_or_free(branch.ends[0], root), _root_or_free(branch.ends[1], root))
    for j in list(graph.centres):
        if root(j) != j:
            del graph.centres[j], graph.radii[j]


def _root_or_free(junction: int, root: Callable[[int], int]) -> int:
    return FREE if junction == FREE else root(junction)


def _arm(graph: Graph, branch: Branch, end: int) -> tuple[Floats, Floats]:
    """Where a branch leaves a junction's disc, and the unit vector along it from there."""
    junction = branch.ends[end]
    points = branch.pixels if end == 0 else branch.pixels[::-1]
    away = np.hypot(*(points - graph.centres[junction]).T)
    radius = graph.radii[junction]
    start = min(int(np.argmax(away >= radius)) if (away >= radius).any() else 0, max(0, len(points) - 2))
    stop = min(len(points) - 1, start + max(8, round(2 * radius)))
    step = (points[stop] - points[start]).astype(float)
    if not step.any():
        step = points[-1] - graph.centres[junction]
    return points[start].astype(float), step / max(float(np.hypot(*step)), 1e-9)


def _bend(one: tuple[Floats, Floats], two: tuple[Floats, Floats]) -> float:
    """How far a wire would have to bend in a junction to come in by one arm and leave by the other, in degrees."""
    (a, out_a), (b, out_b) = one, two
    chord = b - a
    length = float(np.hypot(*chord))
    turns = [-out_a @ out_b]
    if length > 0:
        turns += [-out_a @ chord / length, out_b @ chord / length]
    return float(np.degrees(np.arccos(np.clip(turns, -1, 1))).mean())


def _matching(costs: dict[tuple[int, int], float], count: int) -> list[list[int]]:
    """As many pairs as there can be, and of these the ones that bend least in all."""
    if count > 8:  # too many to try them all: the straightest first
        chosen: list[list[int]] = []
        for _, (i, j) in sorted((cost, pair) for pair, cost in costs.items()):
            if not any(i in pair or j in pair for pair in chosen):
                chosen.append([i, j])
        return chosen

    def best(left: tuple[int, ...]) -> tuple[int, float, list[list[int]]]:
        if len(left) < 2:
            return 0, 0.0, []
        first, rest = left[0], left[1:]
        found = best(rest)
        for other in rest:
            cost = costs.get((first, other))
            if cost is not None:
                pairs, total, chosen = best(tuple(k for k in rest if k != other))
                found = min(found, (pairs - 1, total + cost, [[first, other], *chosen]), key=lambda f: f[:2])
        return found

    return best(tuple(range(count)))[2]


def pairs_at(graph: Graph, junction: int, meeting: list[tuple[int, int]], widths: dict[int, float]) -> list[list[int]]:
    """Which of the branches that meet continue each other, as pairs of positions in ``meeting``."""
    if len(meeting) == 2:
        return [[0, 1]] if meeting[0][0] != meeting[1][0] else []
    arms = [_arm(graph, graph.branches[b], e) for b, e in meeting]
    costs = {}
    for i in range(len(meeting)):
        for j in range(i + 1, len(meeting)):
            a, b = widths[meeting[i][0]], widths[meeting[j][0]]
            bend = _bend(arms[i], arms[j])
            if bend <= STRAIGHT_DEG and max(a, b) <= ALIKE * min(a, b) + 1 and meeting[i][0] != meeting[j][0]:
                costs[i, j] = bend
    return _matching(costs, len(meeting))


def paths(graph: Graph, distance: npt.NDArray[np.float32]) -> list[Path]:
    """Wires: branches chained through the junctions that they pass straight."""
    widths = _widths(graph, distance)
    after: dict[tuple[int, int], tuple[int, int]] = {}
    for junction, meeting in incidence(graph).items():
        for i, j in pairs_at(graph, junction, meeting, widths):
            after[meeting[i]], after[meeting[j]] = meeting[j], meeting[i]
    found: list[Path] = []
    used: set[int] = set()
    starts = [(n, e) for n in graph.branches for e in (0, 1) if (n, e) not in after]
    for first in (*starts, *((n, 0) for n in graph.branches)):
        if first[0] in used:
            continue
        found.append(_follow(graph, first, after, used))
    return found


def _follow(
    graph: Graph, first: tuple[int, int], after: dict[tuple[int, int], tuple[int, int]], used: set[int]
) -> Path:
    pieces: list[Ints] = []
    passed: list[int] = []
    number, end = first
    start = graph.branches[number].ends[end]
    while True:
        used.add(number)
        branch = graph.branches[number]
        pieces.append(branch.pixels if end == 0 else branch.pixels[::-1])
        leave = (number, 1 - end)
        stop = branch.ends[1 - end]
        if leave not in after or after[leave][0] in used:
            closed = leave in after and after[leave] == first and len(pieces) > 1
            break
        passed.append(stop)
        number, end = after[leave]
    pixels = np.concatenate(pieces)
    if start == FREE == stop and len(pixels) > 8 and np.abs(pixels[0] - pixels[-1]).max() <= 2:
        closed = True
    touched = [*passed, *(j for j in (start, stop) if j != FREE)]
    rows = [[*graph.centres[j], graph.radii[j]] for j in touched]
    return Path(pixels, (start, stop), np.array(rows, float).reshape(-1, 3), closed)
