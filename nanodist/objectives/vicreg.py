"""VICReg over the global batch."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc.collectives import Group, group_size
from hpc.errors import UserError
from nanodist.objectives.exchange import columns_to_rows, rows_to_columns, sum_over_ranks
from nanodist.objectives.given import differentiable, wide
from nanodist.objectives.gram import Gram, Way, blocks, centred, panels, spread, takes_gram

# Below this many samples a column the Gram form is faster (``bench_objectives --crossover``).
GRAM_BELOW = 1.0
EPS = 1e-4


def _hinge(variance: Tensor, freedom: int) -> tuple[Tensor, Tensor]:
    """max(0, 1 - standard deviation) of each column (d,), and the factor of z in its gradient."""
    deviation = (variance + EPS).sqrt()
    return (1 - deviation).clamp_min(0), (deviation < 1) / (-freedom * deviation)


def _dense(x: Tensor, variance_weight: float, weight: float, group: Group, gradient: bool) -> tuple[Tensor, Tensor]:
    """Variance and covariance terms of one view (n, d), and their gradient, by panels of the covariance (d, d)."""
    freedom, d = x.shape[0] * group_size(group) - 1, x.shape[1]
    z = centred(x, group)
    short, pull = _hinge(spread(z, group) / freedom, freedom)
    off = z.new_zeros(())
    g = z * (pull * (variance_weight / d)) if gradient else z
    for panel in panels(d):
        c = sum_over_ranks(z[:, panel].T @ z, group).div_(freedom)
        c.diagonal(panel.start).zero_()
        off += c.square().sum()
        if gradient:
            g[:, panel].addmm_(z, c.T, alpha=4 * weight / (d * freedom))  # C is symmetric: rows and columns alike
    return variance_weight * short.mean() + weight * off / d, g


def _gram(x: Tensor, variance_weight: float, weight: float, group: Group, gradient: bool) -> tuple[Tensor, Tensor]:
    """The same as :func:`_dense` by sum C_ij^2 = |Z Z^T|^2 / (N - 1)^2, each rank having a share of the columns."""
    d, x = x.shape[1], rows_to_columns(x, group)
    freedom = x.shape[0] - 1
    gram, variance = Gram(x, len(x)), wide(x.new_empty(x.shape[1]))
    for columns in blocks(x.shape[1], len(x), x.device):
        z = centred(x[:, columns])
        variance[columns] = spread(z) / freedom
        gram.add(z)
    k = gram.whole(group)
    short, pull = _hinge(variance, freedom)
    missing, of_diagonal = sum_over_ranks(torch.stack([short.sum(), variance.square().sum()]), group)
    value = (variance_weight * missing + weight * (k.square().sum() / freedom**2 - of_diagonal)) / d
    if not gradient:
        return value, x
    pull = (pull * variance_weight - variance * (4 * weight / freedom)) / d
    g = torch.empty_like(x, dtype=variance.dtype)
    for columns in blocks(x.shape[1], len(x), x.device):
        z = centred(x[:, columns])
        g[:, columns] = (z * pull[columns]).addmm_(k, z, alpha=4 * weight / (d * freedom**2))
    return value, columns_to_rows(g, d, group)


def vicreg(
    a: Tensor,
    b: Tensor,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    group: Group = None,
    way: Way = "auto",
) -> Tensor:
    """Variance, invariance and covariance (Bardes et al. 2022, eq. 6, as its algorithm 1 has the terms).

    invariance * mean squared difference of the views (over samples *and* columns) + variance * mean over the columns
    of max(0, 1 - sqrt(variance + 1e-4)) + covariance * (sum of squared off-diagonal covariances) / d, the last two for
    either view and added. Moments are those of the global batch, divided by N - 1. All sums and products are in
    float32 at least. (The authors' program halves the variance terms: a weight of 12.5 here.)

    Args:
        a, b: projections (n, d) of the two views of this rank's samples.
        invariance_weight, variance_weight, covariance_weight: weights of the three terms.
        group: process group over which the batch is spread; ``None`` for one process.
        way: whether covariances are made (``dense``) or N x N products in their place (``gram``); ``auto`` takes the
            cheaper.

    Returns:
        The loss of the global batch, the same on every rank; gradients follow :mod:`hpc.collectives`.

    Raises:
        UserError: the global batch is a single sample, which has no variance.
    """
    total, d = a.shape[0] * group_size(group), a.shape[1]
    if total < 2:
        raise UserError("VICReg takes variances over the global batch and needs at least 2 samples in it")
    form = _gram if takes_gram(way, total, d, GRAM_BELOW) else _dense

    def rule(a: Tensor, b: Tensor, gradient: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        apart = wide(a) - wide(b)
        loss = sum_over_ranks(apart.square().sum(), group) * (invariance_weight / (total * d))
        found = []
        for x, sign in ((a, 1), (b, -1)):
            value, g = form(x, variance_weight, covariance_weight, group, gradient)
            loss = loss + value
            if gradient:
                found.append(g.add_(apart, alpha=sign * 2 * invariance_weight / (total * d)))
        return loss, (found[0], found[1]) if gradient else None

    return differentiable(a, b, rule)
