"""Barlow Twins over the global batch."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc.collectives import Group, group_size
from nanodist.objectives.exchange import columns_to_rows, rows_to_columns, sum_over_ranks
from nanodist.objectives.given import differentiable, wide
from nanodist.objectives.gram import Gram, Way, blocks, centred, panels, spread, takes_gram

Answer = tuple[Tensor, tuple[Tensor, Tensor] | None]
# Below this many samples a column the Gram form is faster (``bench_objectives --crossover``).
GRAM_BELOW = 0.8


def standardise(x: Tensor, group: Group = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Columns of ``x`` (n, d) with mean 0 and variance 1 over the *global* batch, and what divided them, inverted (d,).

    The variance is the biased one plus ``eps``, as in BatchNorm.
    """
    z = centred(x, group)
    inverse = (spread(z, group) / (x.shape[0] * group_size(group)) + eps).rsqrt()
    return z.mul_(inverse), inverse


def _before_standardising(g: Tensor, z: Tensor, inverse: Tensor, group: Group = None) -> Tensor:
    """Gradient by x of ``standardise(x)``, from that by z, in place of ``g`` (n, d)."""
    sums = sum_over_ranks(torch.stack([g.sum(0), (g * z).sum(0)]), group) / (g.shape[0] * group_size(group))
    return g.sub_(sums[0]).addcmul_(z, sums[1], value=-1).mul_(inverse)


def _dense(a: Tensor, b: Tensor, weight: float, group: Group, gradient: bool) -> Answer:
    """By panels of the correlations C (d, d); three products of n d^2."""
    total = a.shape[0] * group_size(group)
    (za, ia), (zb, ib) = (standardise(x, group) for x in (a, b))
    on, off = za.new_zeros(()), za.new_zeros(())
    ga, gb = (torch.zeros_like(z) if gradient else z for z in (za, zb))
    for panel in panels(a.shape[1]):
        c = sum_over_ranks(za[:, panel].T @ zb, group).div_(total)
        diagonal = c.diagonal(panel.start)
        missing = 1 - diagonal
        diagonal.zero_()
        on += missing.square().sum()
        off += c.square().sum()
        if gradient:
            c.mul_(2 * weight / total)
            diagonal.copy_(missing.mul_(-2 / total))
            ga[:, panel] = zb @ c.T
            gb.addmm_(za[:, panel], c)
    loss = on + weight * off
    if not gradient:
        return loss, None
    return loss, (_before_standardising(ga, za, ia, group), _before_standardising(gb, zb, ib, group))


def _gram(a: Tensor, b: Tensor, weight: float, group: Group, gradient: bool) -> Answer:
    """By sum C_ij^2 = <Za Za^T, Zb Zb^T> / N^2; at most four products of N^2 d."""
    d, (a, b) = a.shape[1], (rows_to_columns(x, group) for x in (a, b))
    n = a.shape[0]
    ka, kb, diagonal = Gram(a, n), Gram(b, n), wide(a.new_empty(a.shape[1]))
    for columns in blocks(a.shape[1], n, a.device):
        za, zb = (standardise(x[:, columns])[0] for x in (a, b))
        ka.add(za)
        kb.add(zb)
        diagonal[columns] = (za * zb).sum(0) / n
    kka, kkb = ka.whole(group), kb.whole(group)
    on, of_diagonal = sum_over_ranks(torch.stack([(1 - diagonal).square().sum(), diagonal.square().sum()]), group)
    loss = on + weight * ((kka * kkb).sum() / n**2 - of_diagonal)
    if not gradient:
        return loss, None
    pull = (-2 * (1 - diagonal) - 2 * weight * diagonal) / n  # the products below hold the diagonal's squares, too
    ga, gb = (torch.empty_like(x, dtype=diagonal.dtype) for x in (a, b))
    for columns in blocks(a.shape[1], n, a.device):
        (za, ia), (zb, ib) = (standardise(x[:, columns]) for x in (a, b))
        for out, z, inverse, other, k in ((ga, za, ia, zb, kkb), (gb, zb, ib, za, kka)):
            g = (other * pull[columns]).addmm_(k, z, alpha=2 * weight / n**2)
            out[:, columns] = _before_standardising(g, z, inverse)
    return loss, (columns_to_rows(ga, d, group), columns_to_rows(gb, d, group))


def barlow_twins(a: Tensor, b: Tensor, redundancy_weight: float, group: Group = None, way: Way = "auto") -> Tensor:
    """Redundancy reduction (Zbontar et al. 2021, eq. 1): sum_i (1 - C_ii)^2 + weight * sum_{i != j} C_ij^2.

    C is the cross-correlation over the global batch; the sums are not divided by d, as in the original. All sums and
    products are in float32 at least.

    Args:
        a, b: projections (n, d) of the two views of this rank's samples.
        redundancy_weight: weight of the off-diagonal terms; 0.0051 in the original.
        group: process group over which the batch is spread; ``None`` for one process.
        way: whether C is made (``dense``) or N x N products in its place (``gram``); ``auto`` takes the cheaper.

    Returns:
        The loss of the global batch, the same on every rank; gradients follow :mod:`hpc.collectives`.
    """
    total = a.shape[0] * group_size(group)
    form = _gram if takes_gram(way, total, a.shape[1], GRAM_BELOW) else _dense
    return differentiable(a, b, lambda a, b, gradient: form(a, b, redundancy_weight, group, gradient))
