"""Terms of an evidence lower bound, one number a sample; nothing here couples samples.

What was not measured weighs nothing. Likelihoods are means over the measured pixels, so that a pattern with a large
beam stop counts as much as one with a small one; a Kullback-Leibler term is divided by the number of pixels for the
same reason, and a weight of 1 on both is the bound itself, up to that factor.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reparameterised(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """A draw of a diagonal Gaussian (Kingma and Welling 2014); ``noise`` is standard normal, of the same shape."""
    return mean + torch.exp(0.5 * log_variance) * noise.to(mean.dtype)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL (n,) of a diagonal Gaussian from the standard normal, in nats; (n, ...) each."""
    each = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
    return each.flatten(1).sum(1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean (n,) of ``values`` over what ``mask`` (both (n, ...)) keeps; 0 where it keeps nothing."""
    weight = mask.to(values.dtype)
    return (values * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1.0)


def poisson_nll(log_rate: Tensor, counts: Tensor, mask: Tensor) -> Tensor:
    """Half the Poisson deviance (n,) of raw ``counts`` a measured pixel, over their mean count.

    The deviance is the negative log likelihood without what does not depend on the rate. Dividing by the mean count
    lets a long exposure weigh as much as a short one; without it the brightest pattern would be all that is learned.

    Args:
        log_rate: (n, H, W), natural logarithm of the expected counts.
        counts, mask: (n, H, W).
    """
    mean = masked_mean(counts, mask).clamp_min(1.0)
    logs = torch.where(counts > 0, counts.clamp_min(1e-6).log(), torch.zeros_like(counts))
    deviance = log_rate.exp() - counts + counts * (logs - log_rate)
    return masked_mean(deviance, mask) / mean


def gaussian_nll(intensity: Tensor, data: Tensor, sigma: Tensor, mask: Tensor) -> Tensor:
    """Half the squared residuals in units of the propagated ``sigma`` (n,), a measured pixel, over the mean of
    (I / sigma)^2, for the reason of :func:`poisson_nll`.

    Args:
        intensity: expected, (n, H, W), in the unit of ``data``.
        data, sigma, mask: (n, H, W); negative data stay what they are.
    """
    good = mask.bool() & (sigma > 0)
    safe = torch.where(good, sigma, torch.ones_like(sigma))
    strength = masked_mean((data / safe).square(), good).clamp_min(1.0)
    return masked_mean(0.5 * ((intensity - data) / safe).square(), good) / strength


def bernoulli_nll(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy (n,) a pixel of ``target`` (n, 1, H, W) in [0, 1], in nats."""
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return each.flatten(1).mean(1)


def pixel_nll(image: Tensor, target: Tensor, log_sigma: Tensor) -> Tensor:
    """Gaussian negative log likelihood (n,) a pixel of images (n, 1, H, W), with one learned standard deviation."""
    each = 0.5 * ((image - target) * torch.exp(-log_sigma)).square() + log_sigma
    return each.flatten(1).mean(1)
