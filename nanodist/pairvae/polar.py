"""Scattering in polar coordinates: logarithm of q down the rows, the angle modulo 180 degrees along the columns.

The pattern of a real density is point symmetric (Friedel), so half a turn holds all of it; a magnification of the
structure shifts its rows, and a rotation its columns, around the edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nanodist.scattering.pattern import QGrid


@dataclass(frozen=True)
class PolarGrid:
    """Nodes at ``q_low * (q_high / q_low) ** (i / (rows - 1))`` and at the angles ``180 * j / columns`` degrees."""

    q_low_inv_nm: float
    q_high_inv_nm: float
    rows: int = 64
    columns: int = 32

    def vectors(self) -> Tensor:
        """(rows * columns, 2) vectors (q_x, q_y upwards) of the nodes, in 1/nm."""
        share = torch.arange(self.rows, dtype=torch.float64) / (self.rows - 1)
        q = self.q_low_inv_nm * (self.q_high_inv_nm / self.q_low_inv_nm) ** share
        angle = math.pi * torch.arange(self.columns, dtype=torch.float64) / self.columns
        x, y = q[:, None] * torch.cos(angle), q[:, None] * torch.sin(angle)
        return torch.stack([x.flatten(), y.flatten()], 1)

    def at(self, maps: Tensor, vectors: Tensor) -> Tensor:
        """Values (n, c, m) of ``maps`` (n, c, rows, columns) at ``vectors`` (n, m, 2), interpolated linearly.

        Beyond the first and the last row the map goes on as it is there.
        """
        modulus = vectors.norm(dim=2).clamp_min(1e-12)
        row = torch.log(modulus / self.q_low_inv_nm) / math.log(self.q_high_inv_nm / self.q_low_inv_nm)
        turn = torch.remainder(torch.atan2(vectors[..., 1], vectors[..., 0]) / math.pi, 1.0)
        places = torch.stack([2 * turn - 1, 2 * row - 1], 2).to(maps.dtype)[:, None]
        closed = torch.cat([maps, maps[..., :1]], 3)
        return functional.grid_sample(closed, places, "bilinear", "border", align_corners=True)[:, :, 0]


def polar_grid(grid: QGrid) -> PolarGrid:
    """Polar nodes over all of a q grid, from the second pixel off the beam to the corners."""
    return PolarGrid(1.5 * grid.q_step_inv_nm, math.sqrt(2.0) * grid.q_max_inv_nm)


def grid_vectors(grid: QGrid) -> Tensor:
    """(size * size, 2) vectors (q_x, q_y upwards) of the pixels of a q grid, in 1/nm."""
    q_y, q_x = grid.q()
    return torch.stack([torch.from_numpy(q_x).flatten(), torch.from_numpy(q_y).flatten()], 1)


def sampled(planes: Tensor, middle_px: float, step_inv_nm: float, vectors: Tensor) -> Tensor:
    """Values (n, c, m) of Cartesian ``planes`` (n, c, S, S) at ``vectors`` (n, m, 2); 0 outside.

    Args:
        middle_px: index of q = 0 along both axes.
        step_inv_nm: side of a pixel.
    """
    side = planes.shape[-1]
    x = middle_px + vectors[..., 0] / step_inv_nm
    y = middle_px - vectors[..., 1] / step_inv_nm
    places = torch.stack([x, y], 2) * (2.0 / (side - 1)) - 1.0
    return functional.grid_sample(planes, places.to(planes.dtype)[:, None], "bilinear", "zeros", align_corners=True)[
        :, :, 0
    ]


def folded(
    values: Tensor, mask: Tensor, middle_px: float, step_inv_nm: float, vectors: Tensor
) -> tuple[Tensor, Tensor]:
    """What was measured of ``values`` (n, S, S) at ``vectors`` (n, m, 2) and at their opposites, and how much of it.

    Returns:
        Mean (n, m) over both, of measured pixels alone (0 where there is none), and the share (n, m) that was measured.
    """
    weight = mask.to(values.dtype)
    planes = torch.stack([values * weight, weight], 1)
    both = sampled(planes, middle_px, step_inv_nm, vectors) + sampled(planes, middle_px, step_inv_nm, -vectors)
    total, share = both[:, 0], both[:, 1] / 2
    return total / both[:, 1].clamp_min(1e-3) * (share > 1e-3), share


def turned(vectors: Tensor, matrices: Tensor) -> Tensor:
    """Where ``vectors`` (m, 2) of turned structures lie in the patterns as measured: A^T q, as (n, m, 2)."""
    return torch.einsum("mi,nij->nmj", vectors.to(matrices.dtype), matrices)


def turned_back(vectors: Tensor, matrices: Tensor) -> Tensor:
    """The inverse of :func:`turned`: where ``vectors`` of measured patterns lie after the turn."""
    return turned(vectors, torch.linalg.inv(matrices))
