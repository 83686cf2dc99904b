"""Whether the material spans the image: paper 1's rule.

S. Lu, B. Montz, T. Emrick and A. Jayaraman, *Digital Discovery* 1 (2022) 816, tell networks from dispersed wires by
clusters of wire pixels (DBSCAN with a reach of 2 pixels, so that a gap of one pixel is bridged) that span the image in
both directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage, sparse
from scipy.sparse import csgraph

Mask = npt.NDArray[np.bool_]
_ROWS = 512


@dataclass(frozen=True)
class Percolation:
    """Whether one cluster reaches from left to right, from top to bottom, and both; and the share of its pixels.

    Attributes:
        left_right: a cluster touches the first and the last column.
        top_bottom: a cluster touches the first and the last row.
        both: both; in the plane two such clusters must cross, so that they are one.
        clusters: number of clusters.
        largest_share: share of the material's pixels in the largest cluster, 0 for an empty mask.
    """

    left_right: bool
    top_bottom: bool
    both: bool
    clusters: int
    largest_share: float


def percolation(mask: Mask, reach_px: int = 2) -> Percolation:
    """Clusters of pixels whose centres are at most ``reach_px`` (1.5 or 2: 8 neighbours, or over a gap of one) apart.

    Args:
        mask: (height, width).
        reach_px: 1 joins the 8 neighbours only, 2 is the paper's rule.
    """
    label, count = ndimage.label(mask, np.ones((3, 3)), output=np.int32)
    if count == 0:
        return Percolation(False, False, False, 0, 0.0)
    cluster = np.arange(count + 1, dtype=np.int32)
    if reach_px >= 2:
        cluster = _bridged(label, count)
    sizes = np.bincount(cluster, _counts(label, count))
    sizes[cluster[0]] = 0.0

    def joined(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> bool:
        return bool(len(np.intersect1d(cluster[a[a > 0]], cluster[b[b > 0]])))

    across = joined(label[:, 0], label[:, -1])
    down = joined(label[0], label[-1])
    found = int((sizes > 0).sum())
    return Percolation(across, down, across and down, found, float(sizes.max() / sizes.sum()))


def _counts(label: npt.NDArray[np.int32], count: int) -> npt.NDArray[np.float64]:
    """Pixels of each label; a block of rows at a time, since bincount makes 64 bits of what it counts."""
    pixels = np.zeros(count + 1)
    for top in range(0, len(label), _ROWS):
        pixels += np.bincount(label[top : top + _ROWS].ravel(), minlength=count + 1)
    return pixels


def _bridged(label: npt.NDArray[np.int32], count: int) -> npt.NDArray[np.int32]:
    """The cluster of each label, where labels two pixels apart in a row or column are one."""
    links = [np.zeros((0, 2), np.int32)]
    for a, b in ((label[:, :-2], label[:, 2:]), (label[:-2], label[2:])):
        differ = (a != b) & (a > 0) & (b > 0)
        links.append(np.unique(np.stack([a[differ], b[differ]], axis=1), axis=0))
    rows, columns = np.concatenate(links).T
    graph = sparse.coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(count + 1, count + 1))
    return np.asarray(csgraph.connected_components(graph, directed=False)[1], np.int32)
