"""NT-Xent, the loss of SimCLR, over the global batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hpc.collectives import Group, gather_rows, group_rank, group_size, sum_of_shares


def nt_xent(a: Tensor, b: Tensor, temperature: float, group: Group = None, kin: Tensor | None = None) -> Tensor:
    """Normalised temperature-scaled cross entropy over 2N views (Chen et al. 2020, eq. 1).

    For each of the 2N views of the global batch, its partner has to be told from the other 2N - 2 views by cosine
    similarity; the mean over the 2N views is returned. Each rank handles the rows of its own 2n views against all
    2N, so the whole 2N x 2N matrix stands nowhere once there are several ranks.

    Args:
        a, b: projections (n, d) of the two views of this rank's samples, row i of one sample; any scale.
        temperature: divides the cosine similarities; must be positive.
        group: process group over which the batch is spread; ``None`` for one process.
        kin: (n,) integers; views of samples with equal numbers are not held against each other, as they may well
            show the same thing (tiles of one micrograph). ``None``: every other sample is a negative.

    Returns:
        The loss of the global batch, the same on every rank; gradients follow :mod:`hpc.collectives`.
    """
    a, b = (normalize(x if x.dtype == torch.float64 else x.float(), dim=1) for x in (a, b))
    n, total = a.shape[0], a.shape[0] * group_size(group)
    own = torch.cat([a, b])
    everyone = gather_rows(torch.stack([a, b], 1), group)  # (N, 2, d): sample-major, as ranks are contiguous
    everyone = torch.cat([everyone[:, 0], everyone[:, 1]])
    logits = own @ everyone.T / temperature
    # Row i of view a has itself in column first + i, row i of view b in column N + first + i.
    rows = torch.arange(2 * n, device=a.device)
    itself = rows % n + group_rank(group) * n + total * (rows >= n)
    left_out = torch.zeros_like(logits, dtype=torch.bool)
    if kin is not None:
        own_kin, all_kin = kin.repeat(2), gather_rows(kin, group).repeat(2)
        left_out = own_kin[:, None] == all_kin[None]
        left_out[rows, (itself + total) % (2 * total)] = False
    left_out[rows, itself] = True
    logits = logits.masked_fill(left_out, float("-inf"))
    positive = (a * b).sum(1) / temperature
    share = logits.logsumexp(1).sum() - 2 * positive.sum()
    return sum_of_shares(share, group) / (2 * total)
