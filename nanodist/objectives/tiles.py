"""Tiles of the similarity matrix of 2N views, which is symmetric: those above the diagonal are enough."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["nt_xent", "cross_view"]


@dataclass(frozen=True)
class Tile:
    """Rows [top, bottom) and columns [left, right) of the 2N x 2N matrix."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def beyond(self) -> int:
        """First column that is none of the rows: a square on the diagonal holds every pair of its rows twice."""
        return max(self.left, min(self.bottom, self.right))

    @property
    def work(self) -> int:
        """Products: similarities twice, their weights with the columns and, where they count, with the rows."""
        return (self.bottom - self.top) * (3 * (self.right - self.left) + self.right - self.beyond)


def grid(total: int, form: Form, rows: int, columns: int) -> list[Tile]:
    """Tiles of ``total`` = N samples that hold each pair of views once; ``columns`` is at least ``rows``.

    Views are numbered 0 .. N - 1 (a) and N .. 2N - 1 (b). ``nt_xent`` holds every view against all others: the upper
    triangle; ``cross_view`` only a against b: the block at the upper right.
    """
    last = 2 * total if form == "nt_xent" else total
    return [
        Tile(top, min(top + rows, last), left, min(left + columns, 2 * total))
        for top in range(0, last, rows)
        for left in range(top if form == "nt_xent" else total, 2 * total, columns)
    ]


def shared_out(tiles: list[Tile], rank: int, ranks: int) -> list[Tile]:
    """The tiles of ``rank``: the largest first, each to the rank that has least; the same answer on every rank."""
    loads = [(0, other) for other in range(ranks)]
    own = []
    for tile in sorted(tiles, key=lambda t: -t.work):
        load, taker = heapq.heappop(loads)
        heapq.heappush(loads, (load + tile.work, taker))
        if taker == rank:
            own.append(tile)
    return own


@dataclass(frozen=True)
class Sizes:
    """Rows and columns of a tile, for the products, and rows of a band of it, for what is done element by element."""

    rows: int
    columns: int
    band: int


def sizes(z: Tensor) -> Sizes:
    """Sizes that were fastest on a CPU, where a band is what its cache holds twice; a GPU wants few large calls."""
    if z.device.type != "cpu":
        return Sizes(4096, 8192, 4096)
    return Sizes(1024 if z.element_size() == 2 else 512, 1024, 128)


class Negatives:
    """Scaled similarities tile by tile, minus infinity where a pair of views is not held against each other.

    Args:
        z: views (2N, d), each scaled by the root of the similarities' factor; products are taken in its precision.
        dtype: in which sums and powers are taken.
        kin: (N,) integers; views of samples with equal numbers are no negatives of each other. ``None``: a view is no
            negative of itself and of its partner only.
        size: of the tiles that will be asked for.
    """

    def __init__(self, z: Tensor, dtype: torch.dtype, kin: Tensor | None, size: Sizes) -> None:
        self.z, self.total, self.band = z, z.shape[0] // 2, size.band
        # Numbered anew, since comparing half as many bytes is faster.
        self.kin = None if kin is None else torch.unique(kin, return_inverse=True)[1].int().repeat(2)
        columns = min(size.columns, len(z))
        self._products = z.new_empty(min(size.rows, len(z)) * columns)
        self._spare = z.new_empty(min(size.band, len(z)) * columns, dtype=dtype)
        self._wide = None if dtype == z.dtype else torch.empty_like(self._spare)

    def products(self, tile: Tile) -> Tensor:
        """Similarities (rows, columns) of ``tile`` as they are multiplied; the next call uses the memory again."""
        rows, columns = slice(tile.top, tile.bottom), slice(tile.left, tile.right)
        shape = (tile.bottom - tile.top, tile.right - tile.left)
        products = self._products[: shape[0] * shape[1]].view(shape)
        torch.mm(self.z[rows], self.z[columns].T, out=products)
        if self.kin is not None:
            return products.masked_fill_(self.kin[rows, None] == self.kin[columns], float("-inf"))
        for off in (0, self.total, -self.total):  # a view itself, its partner; the last only inside small squares
            diagonal = tile.top - tile.left + off
            if -shape[0] < diagonal < shape[1]:
                products.diagonal(diagonal).fill_(float("-inf"))
        return products

    def bands(self, products: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each band of ``products``: itself, its values in the wide precision (maybe itself), and space for as many.

        Space is laid out once a tile, as bands are small enough for each call to count.
        """
        shape = (min(self.band, len(products)), products.shape[1])
        spare, wide = (None if x is None else x[: shape[0] * shape[1]].view(shape) for x in (self._spare, self._wide))
        for band in products.split(self.band):
            if len(band) < shape[0]:
                spare, wide = (None if x is None else x[: len(band)] for x in (spare, wide))
            yield band, band if wide is None else wide.copy_(band), spare  # type: ignore[misc]
