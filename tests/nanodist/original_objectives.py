"""The losses as their papers write them, on one process, for comparison."""

import torch
from torch.nn.functional import cross_entropy, mse_loss, normalize, relu


def original_nt_xent(a, b, temperature, kin=None, cross=False):
    """Chen et al. 2020, algorithm 1, written out with loops over pairs; ``cross``: Lu et al. 2022."""
    n = len(a)
    z = torch.cat([normalize(a, dim=1), normalize(b, dim=1)])
    kin = torch.arange(n) if kin is None else kin
    total = z.new_zeros(())
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        others = [k for k in range(2 * n) if k != i and (k == partner or kin[k % n] != kin[i % n])]
        others = [k for k in others if not cross or (k < n) != (i < n)]
        logits = torch.stack([z[i] @ z[k] / temperature for k in others])
        total = total + cross_entropy(logits[None], torch.tensor([others.index(partner)]))
    return total / (2 * n)


def original_barlow_twins(a, b, weight):
    """Zbontar et al. 2021, with torch's BatchNorm for the normalisation, as their code has it."""
    n, d = a.shape
    norm = torch.nn.BatchNorm1d(d, affine=False).to(a.dtype)
    c = norm(a).T @ norm(b) / n
    on = torch.diagonal(c).add(-1).pow(2).sum()
    off = c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten().pow(2).sum()
    return on + weight * off


def original_vicreg(a, b, invariance, variance, covariance):
    """Bardes et al. 2022, algorithm 1."""
    n, d = a.shape
    loss = invariance * mse_loss(a, b)
    for z in (a, b):
        loss = loss + variance * relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean()
        z = z - z.mean(dim=0)
        cov = z.T @ z / (n - 1)
        loss = loss + covariance * cov.flatten()[:-1].view(d - 1, d + 1)[:, 1:].pow(2).sum() / d
    return loss
