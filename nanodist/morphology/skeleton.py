"""The skeleton of a mask as a graph, cleaned of spurs, and the wires that run through its junctions.

Pixels are given as (row, column) indices. Two skeleton pixels are neighbours where they share a side, or a corner and
no pixel that shares a side with both (mixed adjacency; A. Rosenfeld, *J. ACM* 17 (1970) 146), so that the corners of
a staircase are no junctions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from skimage.morphology import skeletonize

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

FREE = -1
# A spur reaches from the middle of a wire to its rim and little further.
SPUR = 1.25
# Two junctions belong to one crossing where the way between them is shorter than the crossing is wide.
CROSSING = 2.0
STRAIGHT_DEG = 40.0
ALIKE = 1.8  # largest ratio of widths of two branches that may be one wire
_TILE = 2048


@dataclass
class Branch:
    """A chain of skeleton pixels (n, 2) and the junctions at its first and last one (``FREE``: none)."""

    pixels: Ints
    ends: tuple[int, int]

    def length(self) -> float:
        """Length of the chain of pixel centres."""
        return float(np.hypot(*np.diff(self.pixels, axis=0).T).sum()) if len(self.pixels) > 1 else 0.0


@dataclass
class Graph:
    """Branches by number; junctions with their centre (2,) and the radius of the largest disc inside the mask there."""

    branches: dict[int, Branch] = field(default_factory=dict)
    centres: dict[int, Floats] = field(default_factory=dict)
    radii: dict[int, float] = field(default_factory=dict)


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


def distance_to_background(mask: Mask) -> npt.NDArray[np.float32]:
    """Distance of each pixel's centre to the nearest background pixel's; what lies outside the array is unknown.

    Large arrays are done in tiles, with a margin that grows until no distance reaches it: exact in bounded memory.
    """
    if mask.size <= _TILE * _TILE:
        return np.asarray(ndimage.distance_transform_edt(mask), np.float32)
    result = np.empty(mask.shape, np.float32)
    for top in range(0, mask.shape[0], _TILE):
        for left in range(0, mask.shape[1], _TILE):
            inner = slice(top, top + _TILE), slice(left, left + _TILE)
            result[inner] = _tile_distance(mask, top, left)
    return result


def _tile_distance(mask: Mask, top: int, left: int) -> npt.NDArray[np.float32]:
    bottom, right = min(top + _TILE, mask.shape[0]), min(left + _TILE, mask.shape[1])
    margin = 64
    while True:
        y, x = max(0, top - margin), max(0, left - margin)
        part = mask[y : bottom + margin, x : right + margin]
        found = ndimage.distance_transform_edt(part)[top - y : bottom - y, left - x : right - x]
        if part.shape == mask.shape or (found.max() < margin and not part.all()):
            return np.asarray(found, np.float32)
        margin *= 2


def graph_of(mask: Mask, distance: npt.NDArray[np.float32]) -> Graph:
    """The graph of the thinned ``mask`` (T. Y. Zhang and C. Y. Suen, *Commun. ACM* 27 (1984) 236), with all spurs."""
    pixels = np.argwhere(skeletonize(mask))
    links = _links(pixels, mask.shape)
    crowded = np.asarray(links.getnnz(axis=1)) >= 3
    graph = Graph()
    member = _junctions(graph, pixels, links, crowded, distance)
    pairs = links.tocoo()
    kept = ~(crowded[pairs.row] | crowded[pairs.col])
    loose = sparse.csr_matrix((pairs.data[kept], (pairs.row[kept], pairs.col[kept])), shape=links.shape)
    for chain in _chains(loose, ~crowded):
        ends = _ends(chain, links, member)
        graph.branches[len(graph.branches)] = Branch(pixels[chain], ends)
    return graph


def _links(pixels: Ints, shape: tuple[int, ...]) -> sparse.csr_matrix:
    """Symmetric adjacency of the skeleton pixels."""
    number = np.full((shape[0] + 2, shape[1] + 2), -1, np.int32)
    number[pixels[:, 0] + 1, pixels[:, 1] + 1] = np.arange(len(pixels), dtype=np.int32)
    rows, columns = pixels[:, 0] + 1, pixels[:, 1] + 1
    pairs = []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        other = number[rows + dy, columns + dx]
        there = other >= 0
        if dy and dx:
            there &= (number[rows + dy, columns] < 0) & (number[rows, columns + dx] < 0)
        pairs.append(np.stack([np.flatnonzero(there), other[there]]))
    a, b = np.concatenate(pairs, axis=1)
    n = len(pixels)
    ones = np.ones(2 * len(a), np.int8)
    return sparse.csr_matrix((ones, (np.concatenate([a, b]), np.concatenate([b, a]))), shape=(n, n))


def _junctions(
    graph: Graph, pixels: Ints, links: sparse.csr_matrix, crowded: Mask, distance: npt.NDArray[np.float32]
) -> Ints:
    """Fill in the junctions (groups of pixels with three neighbours or more); the junction of each pixel, or -1."""
    member = np.full(len(pixels), FREE, np.int64)
    where = np.flatnonzero(crowded)
    if len(where) == 0:
        return member
    _, group = csgraph.connected_components(links[where][:, where], directed=False)
    member[where] = group
    order = np.argsort(group, kind="stable")
    for number, at in enumerate(np.split(pixels[where[order]], np.flatnonzero(np.diff(group[order])) + 1)):
        graph.centres[number] = at.mean(axis=0)
        graph.radii[number] = float(distance[at[:, 0], at[:, 1]].max())
    return member


def _chains(links: sparse.csr_matrix, wanted: Mask) -> Iterator[list[int]]:
    """The pixels of each chain in order; a ring starts anywhere and ends beside its start."""
    starts, others = links.indptr.tolist(), links.indices.tolist()
    seen = [not w for w in wanted.tolist()]
    degree = np.diff(links.indptr)
    ends, rest = np.flatnonzero(wanted & (degree < 2)), np.flatnonzero(wanted & (degree >= 2))
    for first in (*ends.tolist(), *rest.tolist()):
        if seen[first]:
            continue
        chain, here = [], first
        while here >= 0:
            seen[here] = True
            chain.append(here)
            here = next((o for o in others[starts[here] : starts[here + 1]] if not seen[o]), -1)
        yield chain


def _ends(chain: list[int], links: sparse.csr_matrix, member: Ints) -> tuple[int, int]:
    def near(pixel: int) -> list[int]:
        found = member[links.indices[links.indptr[pixel] : links.indptr[pixel + 1]]]
        return [int(m) for m in found if m >= 0]

    first, last = near(chain[0]), near(chain[-1])
    if len(chain) == 1:
        return (first[0] if first else FREE), (first[1] if len(first) > 1 else FREE)
    return (first[0] if first else FREE), (last[0] if last else FREE)


def prune(graph: Graph) -> None:
    """Take out spurs, the shortest first, and join what then only passes through a junction."""
    at = _incidence(graph)
    for junction in list(at):
        _join_if_passed(graph, at, junction)
    while True:
        spurs = []
        for number, branch in graph.branches.items():
            if (branch.ends[0] == FREE) == (branch.ends[1] == FREE):
                continue
            end = 0 if branch.ends[1] == FREE else 1
            junction = branch.ends[end]
            tip = branch.pixels[-1 if end == 0 else 0]
            reach = float(np.hypot(*(tip - graph.centres[junction])))
            if reach <= SPUR * graph.radii[junction] + 1.5:
                spurs.append((reach / (graph.radii[junction] + 1e-9), number, junction))
        if not spurs:
            return
        # One at a junction and pass: with its shortest gone, the next may be part of a wire.
        used: set[int] = set()
        for _, number, junction in sorted(spurs):
            if junction in used or number not in graph.branches:
                continue
            used.add(junction)
            del graph.branches[number]
            at[junction] = [(b, e) for b, e in at[junction] if b != number]
            _join_if_passed(graph, at, junction)


def _incidence(graph: Graph) -> dict[int, list[tuple[int, int]]]:
    at: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, branch in graph.branches.items():
        for end in (0, 1):
            if branch.ends[end] != FREE:
                at[branch.ends[end]].append((number, end))
    return at


def _join_if_passed(graph: Graph, at: dict[int, list[tuple[int, int]]], junction: int) -> None:
    meeting = at[junction]
    if len(meeting) == 1:  # nothing else is left: the branch ends freely here
        number, end = meeting[0]
        branch = graph.branches[number]
        ends = (FREE, branch.ends[1]) if end == 0 else (branch.ends[0], FREE)
        graph.branches[number] = Branch(_with_centre(branch, end, graph.centres[junction]), ends)
        at[junction] = []
    if len(meeting) != 2:
        return
    (a, end_a), (b, end_b) = meeting
    first, second = graph.branches[a], graph.branches[b]
    if a == b:  # a ring that touches nothing else
        graph.branches[a] = Branch(first.pixels, (FREE, FREE))
        at[junction] = []
        return
    one = first.pixels if end_a == 1 else first.pixels[::-1]
    two = second.pixels if end_b == 0 else second.pixels[::-1]
    middle = np.rint(graph.centres[junction]).astype(np.int64)[None]
    far_one, far_two = first.ends[1 - end_a], second.ends[1 - end_b]
    del graph.branches[b]
    graph.branches[a] = Branch(np.concatenate([one, middle, two]), (far_one, far_two))
    at[junction] = []
    for far, number, end, side in ((far_one, a, 1 - end_a, 0), (far_two, b, 1 - end_b, 1)):
        if far != FREE:
            at[far].remove((number, end))
            at[far].append((a, side))


def _with_centre(branch: Branch, end: int, centre: Floats) -> Ints:
    point = np.rint(centre).astype(np.int64)[None]
    return np.concatenate([point, branch.pixels]) if end == 0 else np.concatenate([branch.pixels, point])


def merge_crossings(graph: Graph) -> None:
    """Make one junction of those that one crossing of wires broke into."""
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
    for length, number in short:
        a, b = (root(j) for j in graph.branches[number].ends)
        if length > CROSSING * max(graph.radii[j] for j in graph.branches[number].ends):
            continue
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


def _direction(graph: Graph, branch: Branch, end: int) -> Floats:
    """Unit vector from a junction along a branch, taken outside of the junction's disc."""
    junction = branch.ends[end]
    points = branch.pixels if end == 0 else branch.pixels[::-1]
    away = np.hypot(*(points - graph.centres[junction]).T)
    radius = graph.radii[junction]
    start = min(int(np.argmax(away >= radius)) if (away >= radius).any() else 0, max(0, len(points) - 2))
    stop = min(len(points) - 1, start + max(8, round(2 * radius)))
    step = (points[stop] - points[start]).astype(float)
    if not step.any():
        step = points[-1] - graph.centres[junction]
    return np.asarray(step / max(float(np.hypot(*step)), 1e-9))


def pairs_at(graph: Graph, junction: int, meeting: list[tuple[int, int]], widths: dict[int, float]) -> list[list[int]]:
    """Which of the branches that meet continue each other, as pairs of positions in ``meeting``."""
    if len(meeting) == 2:
        return [[0, 1]] if meeting[0][0] != meeting[1][0] else []
    directions = [_direction(graph, graph.branches[b], e) for b, e in meeting]
    candidates = []
    for i in range(len(meeting)):
        for j in range(i):
            a, b = widths[meeting[i][0]], widths[meeting[j][0]]
            turn = float(np.degrees(np.arccos(np.clip(-directions[i] @ directions[j], -1, 1))))
            if turn <= STRAIGHT_DEG and max(a, b) <= ALIKE * min(a, b) + 1 and meeting[i][0] != meeting[j][0]:
                candidates.append((turn, j, i))
    found: list[list[int]] = []
    used: set[int] = set()
    for _, i, j in sorted(candidates):
        if i not in used and j not in used:
            used |= {i, j}
            found.append([i, j])
    return found


def paths(graph: Graph, distance: npt.NDArray[np.float32]) -> list[Path]:
    """Wires: branches chained through the junctions that they pass straight."""
    widths = {n: float(np.median(distance[b.pixels[:, 0], b.pixels[:, 1]])) for n, b in graph.branches.items()}
    after: dict[tuple[int, int], tuple[int, int]] = {}
    for junction, meeting in _incidence(graph).items():
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
