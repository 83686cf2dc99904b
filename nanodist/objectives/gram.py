"""What Barlow Twins and VICReg share: moments of columns, and sums of squared correlations in two forms.

*Dense*: the d x d matrix, a panel of rows at a time, each rank adding what its rows of the batch give. *Gram*: for
C = X^T Y the sum of C_ij^2 is the inner product of X X^T and Y Y^T (N x N), so where the global batch N is smaller than
d the large matrix is not needed, nor is its reduction. Each rank then has a share of the columns, for all N rows: their
moments need no exchange, and the gradient of a column stays with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from hpc.collectives import Group, group_size
from nanodist.objectives.exchange import sum_over_ranks
from nanodist.objectives.given import wide

Way = Literal["auto", "dense", "gram"]
# Elements of a block of columns: what a CPU's cache holds a few times, or what fills a GPU; elements of a panel of C.
CPU_BLOCK, GPU_BLOCK, PANEL = 2**18, 2**24, 2**21


def takes_gram(way: Way, total: int, columns: int, ratio: float) -> bool:
    """Whether to use the Gram form: as asked, or for a global batch below ``ratio`` times the columns.

    The number of ranks has no say, so that a recipe is computed the same way on any.
    """
    return way == "gram" or (way == "auto" and total < ratio * columns)


def centred(x: Tensor, group: Group = None) -> Tensor:
    """Columns of ``x`` (n, d) less their mean over the rows of all ranks."""
    x = wide(x)
    return x - sum_over_ranks(x.sum(0), group) / (x.shape[0] * group_size(group))


def spread(z: Tensor, group: Group = None) -> Tensor:
    """Sum of squares (d,) of centred columns over the rows of all ranks.

    After :func:`centred`, as a mean that is large against the spread would cancel in E[z^2] - E[z]^2.
    """
    return sum_over_ranks(z.square().sum(0), group)


def blocks(columns: int, rows: int, device: torch.device) -> Iterator[slice]:
    """Columns block by block, for ``rows`` rows."""
    width = max(64, (CPU_BLOCK if device.type == "cpu" else GPU_BLOCK) // rows)
    for first in range(0, columns, width):
        yield slice(first, min(first + width, columns))


def panels(columns: int) -> Iterator[slice]:
    """Rows of a d x d matrix panel by panel."""
    height = max(64, PANEL // columns)
    for first in range(0, columns, height):
        yield slice(first, min(first + height, columns))


class Gram:
    """X X^T (N, N) of columns that come block by block; symmetric, so only its upper part is added to.

    Args:
        like: gives device; sums are in float32 at least.
        rows: N.
    """

    def __init__(self, like: Tensor, rows: int) -> None:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self._matrix = torch.zeros(rows, rows, dtype=dtype, device=like.device)
        self._height = max(128, -(-rows // 4))

    def add(self, x: Tensor) -> None:
        """Further columns (N, w)."""
        for top in range(0, x.shape[0], self._height):
            rows = slice(top, top + self._height)
            self._matrix[rows, top:].addmm_(x[rows], x[top:].T)

    def whole(self, group: Group) -> Tensor:
        """The matrix for the columns of all ranks."""
        for top in range(0, len(self._matrix), self._height):
            rows, below = slice(top, top + self._height), slice(top + self._height, None)
            self._matrix[below, rows] = self._matrix[rows, below].T
        return sum_over_ranks(self._matrix, group)
