"""Counter-based noise in tensor operations: integer arithmetic, so that CPU and GPU draw the same."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash in int64 tensors (lowbias32, C. Wellons 2018)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def unit_noise(keys: Tensor, height: int, width: int) -> Tensor:
    """Noise (n, 1, height, width) of mean 0 and variance 1, keyed by ``keys`` (n,) int64 of 31 bits.

    Each value is the sum of the four bytes of a 32-bit hash (an Irwin-Hall distribution, close to a Gaussian and
    bounded by 3.5 standard deviations): no logarithm or cosine that devices would round differently.
    """
    pixels = torch.arange(height * width, device=keys.device, dtype=torch.int64)
    words = _mix(_mix(pixels[None] + 0x9E3779B9 & _MASK) ^ _mix(keys)[:, None])
    total = (words & 255) + ((words >> 8) & 255) + ((words >> 16) & 255) + (words >> 24)
    # Each byte has mean 127.5 and variance (256^2 - 1) / 12.
    noise = (total.to(torch.float32) - 510.0) * (3.0 / (256**2 - 1)) ** 0.5
    return noise.view(-1, 1, height, width)
