"""Counter-based randomness: a value is a pure function of its key, never of what was drawn before it.

The generator is Philox4x32-10 (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011), written over
numpy arrays so that the draws of a whole batch cost one call. Nothing here has state, so ranks, workers and resumes
cannot change a draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

U32 = npt.NDArray[np.uint32]
_MULTIPLIER = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def stable_hash(text: str) -> int:
    """A 64-bit hash of ``text`` that is the same on every machine and in every process (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def key(seed: int, purpose: str, *words: int | str) -> int:
    """A 64-bit key for ``(seed, purpose, *words)``, such as ``key(0, "view", epoch, sample_id, 1)``."""
    return stable_hash("\x1f".join([str(int(seed)), purpose, *(str(w) for w in words)]))


def philox(counters: U32, keys: U32) -> U32:
    """Philox4x32-10: ``counters`` (..., 4) and ``keys`` (..., 2) give (..., 4) uniform 32-bit words."""
    c0, c1, c2, c3 = (counters[..., i].astype(np.uint32) for i in range(4))
    k0, k1 = (keys[..., i].astype(np.uint32) for i in range(2))
    with np.errstate(over="ignore"):
        for _ in range(10):
            p0 = _MULTIPLIER[0] * c0.astype(np.uint64)
            p1 = _MULTIPLIER[1] * c2.astype(np.uint64)
            hi0, lo0 = (p0 >> _SHIFT).astype(np.uint32), (p0 & _LOW).astype(np.uint32)
            hi1, lo1 = (p1 >> _SHIFT).astype(np.uint32), (p1 & _LOW).astype(np.uint32)
            c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
            k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return np.stack([c0, c1, c2, c3], axis=-1)


def uniforms(keys: Sequence[int], count: int) -> npt.NDArray[np.float64]:
    """``count`` uniform numbers in [0, 1) for each 64-bit key, as (len(keys), count) with 32 random bits each."""
    blocks = -(-count // 4)
    counters = np.zeros((len(keys), blocks, 4), np.uint32)
    counters[..., 0] = np.arange(blocks, dtype=np.uint32)
    packed = np.asarray([(k & 0xFFFFFFFF, k >> 32) for k in keys], np.uint64).astype(np.uint32).reshape(-1, 1, 2)
    words = philox(counters, np.broadcast_to(packed, (len(keys), blocks, 2)))
    return np.asarray(words.reshape(len(keys), -1)[:, :count] * 2.0**-32, np.float64)


def generator(seed: int, purpose: str, *words: int | str) -> np.random.Generator:
    """A numpy generator keyed by ``(seed, purpose, *words)``, for draws that are not per sample (orders, splits)."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *words)))


def permutation(n: int, seed: int, purpose: str, *words: int | str) -> npt.NDArray[np.int64]:
    """A permutation of ``range(n)`` keyed by ``(seed, purpose, *words)``.

    Sorts keyed 64-bit draws, so that the result depends only on Philox, not on numpy's shuffling algorithm.
    """
    draws = generator(seed, purpose, *words).integers(0, 2**63, n, dtype=np.int64)
    order = np.argsort(draws)
    if n and (np.diff(draws[order]) == 0).any():  # only then does it matter how a sort treats equal values
        order = np.argsort(draws, kind="stable")
    return order.astype(np.int64, copy=False)


def permutation_tail(n: int, length: int, seed: int, purpose: str, *words: int | str) -> npt.NDArray[np.int64]:
    """The last ``length`` places of :func:`permutation`, without sorting the others."""
    draws = generator(seed, purpose, *words).integers(0, 2**63, n, dtype=np.int64)
    if not 0 < length < n:
        return np.argsort(draws, kind="stable").astype(np.int64)[n - length :] if length else np.empty(0, np.int64)
    smallest = np.partition(draws, n - length)[n - length]
    last = np.flatnonzero(draws >= smallest)  # one more than asked for where draws are equal
    return last[np.argsort(draws[last], kind="stable")][len(last) - length :].astype(np.int64)
