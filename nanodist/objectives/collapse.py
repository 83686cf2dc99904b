"""Measures by which a collapse is seen early."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


@torch.no_grad()
def collapse_measures(a: Tensor, b: Tensor, most: int = 1024) -> dict[str, float]:
    """Health of projections ``a`` and ``b`` (N, d) of the global batch, from its first ``most`` samples.

    Returns:
        ``embedding_std``: mean over dimensions of the standard deviation of the unit vectors, times sqrt(d): 1 where
        they fill the sphere, 0 on a complete collapse (Chen and He 2021, sec. 4.1).
        ``effective_rank``: exp of the entropy of the normalised singular values (Roy and Vetterli 2007; RankMe,
        Garrido et al. 2023): 1 on a dimensional collapse, at most min(N, d).
        ``alignment``: mean squared distance of the two views; ``uniformity``: log of the mean of exp(-2 distance^2)
        over pairs of samples (both Wang and Isola 2020; lower is better).
    """
    a, b = (normalize(x[:most].double(), dim=1) for x in (a, b))
    spread = a.std(0, correction=0).mean() * a.shape[1] ** 0.5
    singular = torch.linalg.svdvals(a)
    share = singular / singular.sum().clamp_min(1e-12)
    rank = torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
    distances = torch.pdist(a).square()
    uniformity = (-2 * distances).exp().mean().clamp_min(1e-12).log() if a.shape[0] > 1 else torch.zeros(())
    return {
        "embedding_std": float(spread),
        "effective_rank": float(rank),
        "alignment": float((a - b).square().sum(1).mean()),
        "uniformity": float(uniformity),
    }
