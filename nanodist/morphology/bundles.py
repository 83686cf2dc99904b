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
    size = np.asarray(widths, float)
    # Points as far apart as a quarter of the thinnest wire's width, and 4 pixels at least, tell as much as all.
    step = max(4, round(float(np.nanmin(size)) / 4)) if np.isfinite(size).any() else 4
    kept = [line[::step] for line in lines]
    owner = np.concatenate([np.full(len(line), i) for i, line in enumerate(kept)])
    points = np.concatenate(kept)
    heading = np.concatenate([np.gradient(line, axis=0)[::step] for line in lines])
    heading /= np.maximum(np.hypot(*heading.T), 1e-9)[:, None]
    reach = TOUCHING * float(np.nanmax(size)) if np.isfinite(size).any() else 0.0
    pairs = cKDTree(points).query_pairs(reach, output_type="ndarray")
    pairs = pairs[owner[pairs[:, 0]] != owner[pairs[:, 1]]]
    a, b = pairs.T
    close = np.hypot(*(points[a] - points[b]).T) <= TOUCHING * (size[owner[a]] + size[owner[b]]) / 2
    parallel = np.abs((heading[a] * heading[b]).sum(axis=1)) >= np.cos(np.radians(PARALLEL_DEG))
    both = pairs[close & parallel]
    # Each point of a wire counts once for each other wire that it runs along.
    sides = np.concatenate([np.stack([both[:, k], owner[both[:, 1 - k]]], axis=1) for k in (0, 1)])
    sides = np.unique(sides, axis=0)
    found, hits = np.unique(np.stack([owner[sides[:, 0]], sides[:, 1]], axis=1), axis=0, return_counts=True)
    counts = np.array([len(line) for line in kept])
    linked = [
        (i, j)
        for (i, j), hit in zip(found.tolist(), hits.tolist(), strict=True)
        if hit >= SHARE * counts[i] and counts[i] <= counts[j] * 1.001 + 1
    ]
    rows, columns = np.array(linked, int).reshape(-1, 2).T
    graph = sparse.coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(lines), len(lines)))
    return np.asarray(csgraph.connected_components(graph, directed=False)[1], np.int64)
