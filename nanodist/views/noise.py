"""Counter-based noise in tensor operations: integer arithmetic, so that CPU and GPU draw the same."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
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


class NoiseWords:
    """The sums of bytes behind :func:`unit_noise`, one view at a time: for the CPU, where numpy's unsigned integers
    need no masks. ``scratch`` (2, size^2) float32 is memory that others may use between two calls.

    Attributes:
        scale: what brings the sums to variance 1.
    """

    scale = _SCALE

    def __init__(self, size: int, scratch: Tensor) -> None:
        pixels = _pixels(size * size, torch.device("cpu")).numpy().view(np.uint32)
        # The first step of the hash, x ^ x >> 16, is the same for the xor of two words as the xor of theirs.
        self._pixels = pixels ^ (pixels >> np.uint32(16))
        words, other = scratch
        self._sums, self._noise = words.view(torch.int32), other
        self._words, self._other = (part.numpy().view(np.uint32) for part in (words, other))
        self._shape = (size, size)

    def sums(self, hashed: np.uint32) -> Tensor:
        """Whole numbers (size, size) of mean 0, to be multiplied by ``scale``, in scratch; see :func:`hashed`."""
        words, other = np.bitwise_xor(self._pixels, hashed ^ (hashed >> np.uint32(16)), out=self._words), self._other
        _mix_unsigned(words, other, begun=True)
        # Two bytes each: what is shifted out of a half needs no mask.
        halves, upper = words.view(np.uint16), other.view(np.uint16)
        np.right_shift(halves, np.uint16(8), out=upper)
        np.bitwise_and(halves, np.uint16(0xFF), out=halves)
        np.add(halves, upper, out=halves)
        np.multiply(words, np.uint32(0x00010001), out=words)
        np.right_shift(words, np.uint32(16), out=words)
        return self._noise.copy_(self._sums).sub_(510.0).view(self._shape)

    def free(self) -> Tensor:
        """A buffer (size, size) that may be used until the next call: it holds nothing of what :meth:`sums` gave."""
        return self._sums.view(torch.float32).view(self._shape)


def hashed(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    """What :class:`NoiseWords` wants of ``keys`` (n,) of 31 bits."""
    words = keys.astype(np.uint32)
    _mix_unsigned(words, np.empty_like(words))
    return words


def _mix_unsigned(x: npt.NDArray[np.uint32], other: npt.NDArray[np.uint32], begun: bool = False) -> None:
    """:func:`_mix` of uint32 in place, all of it or what follows its first step; ``other`` is overwritten."""
    for shift, factor in ((0 if begun else 16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        if shift:
            np.right_shift(x, np.uint32(shift), out=other)
            np.bitwise_xor(x, other, out=x)
        if factor != 1:
            np.multiply(x, np.uint32(factor), out=x)
