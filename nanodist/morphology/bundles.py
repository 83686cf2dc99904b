"""Which wires run side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse import csgraph
from scipy.spatial import cKDTree

Floats = npt.NDArray[np.float64]
PARALLEL_DEG = 20.0
TOUCHING = 1.5  # largest distance of centre lines, in units of the mean width
SHARE = 0.5  # of the shorter wire that must run along the other


def bundles(lines: Sequence[Floats], widths: Sequence[float]) -> npt.NDArray[np.int64]:
    """The bundle of each wire, numbered from 0.

    Two wires are of one bundle where at least half of the shorter one runs within 1.5 mean widths of the other's centre
    line and within 20 degrees of its direction.

    Args:
        lines: centre lines (n, 2) in pixels, one a wire.
        widths: width of each wire in pixels.
    """
    if not lines:
        return np.zeros(0, np.int64)
    owner = np.concatenate([np.full(len(line), i) for i, line in enumerate(lines)])
    points = np.concatenate(lines)
    heading = np.concatenate([np.gradient(line, axis=0) for line in lines])
    heading /= np.maximum(np.hypot(*heading.T), 1e-9)[:, None]
    size = np.asarray(widths, float)
    reach = TOUCHING * float(np.nanmax(size)) if np.isfinite(size).any() else 0.0
    tree = cKDTree(points)
    along: dict[tuple[int, int], float] = {}
    for i, line in enumerate(lines):
        near = tree.query_ball_point(line[::2], reach)
        hits: dict[int, int] = {}
        for k, found in enumerate(near):
            here, direction = line[2 * k], heading[np.searchsorted(owner, i) + 2 * k]
            others = np.array([f for f in found if owner[f] != i], int)
            if len(others) == 0:
                continue
            close = np.hypot(*(points[others] - here).T) <= TOUCHING * (size[i] + size[owner[others]]) / 2
            parallel = np.abs(heading[others] @ direction) >= np.cos(np.radians(PARALLEL_DEG))
            for j in np.unique(owner[others[close & parallel]]):
                hits[int(j)] = hits.get(int(j), 0) + 1
        for j, count in hits.items():
            along[i, j] = count / max(1, len(near))
    linked = [(i, j) for (i, j), share in along.items() if share >= SHARE and len(lines[i]) <= len(lines[j]) * 1.001]
    rows, columns = np.array(linked, int).reshape(-1, 2).T
    graph = sparse.coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(lines), len(lines)))
    return np.asarray(csgraph.connected_components(graph, directed=False)[1], np.int64)
