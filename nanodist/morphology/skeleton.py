"""The skeleton of a mask as a graph, cleaned of spurs.

Pixels are given as (row, column) indices. Two skeleton pixels are neighbours where they share a side, or a corner and
no pixel that shares a side with both (mixed adjacency; A. Rosenfeld, *J. ACM* 17 (1970) 146), so that the corners of
a staircase are no junctions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from skimage.morphology import skeletonize

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Meetings = dict[int, list[tuple[int, int]]]

FREE = -1
# A spur reaches from the middle of a wire to its rim and little further.
SPUR = 1.25
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
    at = incidence(graph)
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


def incidence(graph: Graph) -> Meetings:
    """(branch, which end) of everything that meets in each junction."""
    at: Meetings = defaultdict(list)
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
