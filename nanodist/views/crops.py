"""Crops of tiles by bilinear sampling, one at a time, from no more of the tile than they reach."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanodist.views.parameters import ViewParameters

Array = npt.NDArray[np.float64]


class Crops:
    """The crops of n tiles of ``height`` x ``width`` pixels; what lies outside a tile is its mirror image.

    A crop without rotation is two interpolations, along the rows and along the columns, and any other one a sampling
    at the places of a grid. ``scratch`` (2, size, size) float32 is memory that others may use between two calls.
    """

    def __init__(self, parameters: ViewParameters, size: int, height: int, width: int, scratch: Tensor) -> None:
        halved = 2.0 ** parameters.level[:, None]
        # From centres of the tile's pixels to those of the halved tile's.
        matrix = parameters.matrix / halved[..., None]
        matrix[..., 2] += 0.5 / halved - 0.5
        extent = np.array([width, height]) // halved.astype(int)
        first, stop, inside = _windows(matrix, size, extent)
        self._halved = halved[:, 0].astype(int).tolist()
        self._first, self._stop, self._inside = first.tolist(), stop.tolist(), inside.tolist()
        upright = (matrix[:, 0, 1] == 0) & (matrix[:, 1, 0] == 0)
        self._upright = upright.tolist()
        space = scratch
        if upright.any():
            self._lines = _Lines(matrix, first, stop, space)
        if upright.all():
            return
        # Along each axis a place in the window, -1 at its first pixel and 1 at its last, is along[j] + down[i].
        matrix = matrix * (2 / (stop - 1 - first))[..., None]
        matrix[..., 2] -= 2 * first / (stop - 1 - first) + 1
        places = np.arange(size)
        along, down = matrix[..., 0, None] * places, matrix[..., 1, None] * places + matrix[..., 2, None]
        self._along = torch.from_numpy(along.astype(np.float32))[:, :, None].unbind()
        self._down = torch.from_numpy(down.astype(np.float32))[..., None].unbind()
        self._places = space
        self._grid = self._places.permute(1, 2, 0)[None]

    def sample(self, tile: Tensor, i: int) -> Tensor:
        """Crop ``i`` (size, size) float32 of ``tile`` (height, width), in the counts of the tile."""
        (left, top), (right, bottom), halved = self._first[i], self._stop[i], self._halved[i]
        window = tile[top * halved : bottom * halved, left * halved : right * halved].to(torch.float32)
        if halved > 1:
            window = _averaged(window, halved)
        if self._upright[i]:
            return self._lines.sample(window, i)
        torch.add(self._along[i], self._down[i], out=self._places)
        # Where nothing lies outside, all paddings are one, and this one costs least.
        padding = "border" if self._inside[i] else "reflection"
        return torch.nn.functional.grid_sample(window[None, None], self._grid, "bilinear", padding, align_corners=True)[
            0, 0
        ]


def _averaged(window: Tensor, times: int) -> Tensor:
    """Means of squares of ``times`` x ``times`` pixels: sums of whole numbers, so that none is rounded.

    Two by two, each a pass over whole rows and one over columns, takes half the time of ``avg_pool2d``.
    """
    factor = 1 / times**2
    while times > 1:
        window = window[::2] + window[1::2]
        window = window[:, ::2] + window[:, 1::2]
        times //= 2
    return window.mul_(factor)


class _Lines:
    """Two neighbours and the second one's weight, for every row and column of upright crops."""

    def __init__(
        self, matrix: Array, first: npt.NDArray[np.int64], stop: npt.NDArray[np.int64], scratch: Tensor
    ) -> None:
        steps = np.stack([matrix[:, 0, 0], matrix[:, 1, 1]], 1)
        places = steps[..., None] * np.arange(scratch.shape[-1]) + (matrix[..., 2] - first)[..., None]
        last = (stop - first - 1)[..., None]
        # Mirrored at the centres of the first and the last pixel.
        places = last - np.abs(last - np.mod(np.abs(places), 2 * last))
        near = np.minimum(np.floor(places).astype(np.int64), last - 1)
        weight = (places - near).astype(np.float32)
        parts = [torch.from_numpy(part) for part in (near, near + 1, weight)]
        self._x, self._y = (list(zip(*(part[:, axis].unbind() for part in parts), strict=True)) for axis in (0, 1))
        self._near, self._far = scratch

    def sample(self, window: Tensor, i: int) -> Tensor:
        """The crop of the window, in memory that the next one overwrites."""
        (x, x_far, x_weight), (y, y_far, y_weight) = self._x[i], self._y[i]
        rows = window.index_select(0, y).lerp_(window.index_select(0, y_far), y_weight[:, None])
        near, far = self._near, self._far
        torch.index_select(rows, 1, x, out=near)
        torch.index_select(rows, 1, x_far, out=far)
        return near.lerp_(far, x_weight)


def _windows(
    matrix: Array, size: int, extent: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """First pixel and end (n, 2) in x and y of what the crops reach within ``extent``, and (n,) whether that is all.

    Where a crop reaches over an edge, what is mirrored there lies inside its window, since the crop's middle does.
    """
    reach = (size - 1) * matrix[..., :2]
    low = matrix[..., 2] + np.minimum(reach, 0).sum(-1)
    high = matrix[..., 2] + np.maximum(reach, 0).sum(-1)
    first = np.clip(np.floor(low).astype(np.int64), 0, extent - 2)
    stop = np.maximum(np.minimum(extent, np.ceil(high).astype(np.int64) + 2), first + 2)
    return first, stop, ((low >= 0) & (high <= extent - 1)).all(1)
