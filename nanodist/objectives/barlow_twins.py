"""Barlow Twins over the global batch."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc.collectives import Group, all_reduce_sum, group_size, sum_of_shares


def standardise(z: Tensor, group: Group = None, eps: float = 1e-5) -> Tensor:
    """Columns of ``z`` (n, d) with mean 0 and variance 1 over the *global* batch (biased variance, as BatchNorm).

    Two passes, since a mean that is large against the spread would cancel in E[z^2] - E[z]^2.
    """
    total = z.shape[0] * group_size(group)
    centred = z - all_reduce_sum(z.sum(0), group) / total
    variance = all_reduce_sum(centred.square().sum(0), group) / total
    return centred * (variance + eps).rsqrt()


def barlow_twins(a: Tensor, b: Tensor, redundancy_weight: float, group: Group = None) -> Tensor:
    """Redundancy reduction (Zbontar et al. 2021, eq. 1): sum_i (1 - C_ii)^2 + weight * sum_{i != j} C_ij^2.

    C is the cross-correlation over the global batch; the sums are not divided by d, as in the original.

    Args:
        a, b: projections (n, d) of the two views of this rank's samples.
        redundancy_weight: weight of the off-diagonal terms; 0.0051 in the original.
        group: process group over which the batch is spread; ``None`` for one process.

    Returns:
        The loss of the global batch, the same on every rank; gradients follow :mod:`hpc.collectives`.
    """
    a, b = (x if x.dtype == torch.float64 else x.float() for x in (a, b))
    total = a.shape[0] * group_size(group)
    c = sum_of_shares(standardise(a, group).T @ standardise(b, group), group) / total
    diagonal = c.diagonal()
    on = (1 - diagonal).square().sum()
    off = c.square().sum() - diagonal.square().sum()
    return on + redundancy_weight * off
