"""Counter-based noise in tensor operations: integer arithmetic, so that CPU and GPU draw the same."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
# Each byte has mean 127.5 and variance (256^2 - 1) / 12, so the sum of four has mean 510 and this scale to variance 1.
_SCALE = (3.0 / (256**2 - 1)) ** 0.5


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash (lowbias32, C. Wellons 2018) of int32 tensors, in place.

    int32 has half the bytes of int64. Products wrap as those of uint32 do; right shifts copy the sign and are masked.
    """
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - 2**32)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


@lru_cache(maxsize=4)
def _pixels(count: int, device: torch.device) -> Tensor:
    """Hashes (count,) of the pixels' numbers: the same for every view."""
    numbers = (torch.arange(count, dtype=torch.int64, device=device) + 0x9E3779B9) & _MASK
    return _mix(_wrapped(numbers))


def _wrapped(x: Tensor) -> Tensor:
    """Numbers below 2^32 in int64 as the int32 of the same bits."""
    return torch.where(x >= 2**31, x - 2**32, x).to(torch.int32)


def unit_noise(keys: Tensor, height: int, width: int) -> Tensor:
    """Noise (n, 1, height, width) of mean 0 and variance 1, keyed by ``keys`` (n,) int64 of 31 bits.

    Each value is the sum of the four bytes of a 32-bit hash (an Irwin-Hall distribution, close to a Gaussian and
    bounded by 3.5 standard deviations): no logarithm or cosine that devices would round differently.
    """
    words = _mix(_pixels(height * width, keys.device)[None] ^ _mix(keys.to(torch.int32))[:, None])
    pairs = (words >> 8).bitwise_and_(0x00FF00FF).add_(words.bitwise_and_(0x00FF00FF))
    # The sum of both halves lands in the upper one, at most 1020, so that its sign bit stays clear.
    total = pairs.mul_(0x00010001).bitwise_right_shift_(16)
    return total.to(torch.float32).sub_(510.0).mul_(_SCALE).view(-1, 1, height, width)
