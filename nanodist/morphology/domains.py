"""Domain sizes of a two-phase image: chord lengths and the two-point correlation S2.

Sources: S. Torquato, *Random Heterogeneous Materials* (2002), chapters 2 and 12; P. Debye, H. R. Anderson and H.
Brumberger, *J. Appl. Phys.* 28 (1957) 679, for the slope of S2 at the origin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import fft
from scipy.signal import find_peaks

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
BLOCK = 1024
LARGEST_LAG = 1024


@dataclass(frozen=True)
class Correlation:
    """S2 averaged over directions.

    Attributes:
        r: (k,) distances in pixels, 0 first.
        s2: (k,) probability that two points at that distance both lie in the material; ``s2[0]`` is the coverage.
        correlation_length: integral of the autocovariance over r, divided by its value at 0, up to its first zero.
        spacing: distance of the first maximum behind the first minimum, NaN where there is none.
        interface: length of boundary on each area, from crossings with rows and columns (Crofton's formula), which is
            the slope of S2 at 0: ``-S2'(0) = interface / pi`` in the plane.
    """

    r: Floats
    s2: Floats
    correlation_length: float
    spacing: float
    interface: float


def chords(mask: Mask, axis: int) -> npt.NDArray[np.int64]:
    """Lengths in pixels of all whole runs of the material along rows (``axis`` 1) or columns (0).

    Runs that touch the border are left out.
    """
    lines = mask if axis == 1 else mask.T
    found = []
    for part in range(0, lines.shape[0], BLOCK):
        padded = np.pad(lines[part : part + BLOCK], ((0, 0), (1, 1)))
        step = np.diff(padded.astype(np.int8), axis=1)
        start, stop = np.nonzero(step == 1)[1], np.nonzero(step == -1)[1]
        found.append((stop - start)[(start > 0) & (stop < lines.shape[1])])
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def chord_summary(mask: Mask) -> dict[str, Any]:
    """Number, mean and length-weighted mean of the chords of material and of the gaps between it, in pixels.

    The length-weighted mean (what a random point of the phase sees) is not pulled down by many short chords.
    """
    result: dict[str, Any] = {}
    for name, phase in (("domain", mask), ("gap", ~mask)):
        lengths = np.concatenate([chords(phase, 0), chords(phase, 1)]).astype(float)
        n = len(lengths)
        result[f"{name}_chords"] = n
        result[f"{name}_chord_mean"] = float(lengths.mean()) if n else float("nan")
        result[f"{name}_chord_weighted_mean"] = float((lengths**2).sum() / lengths.sum()) if n else float("nan")
    return result


def two_point_correlation(mask: Mask, lag: int | None = None, tick: Callable[[], None] | None = None) -> Correlation:
    """S2 of the material up to ``lag`` pixels, over exactly the pairs of pixels that lie in the image.

    The image is not taken as periodic. Blocks are correlated with their surroundings by FFT and summed, so that the
    memory does not grow with the image.

    Args:
        mask: (height, width).
        lag: largest distance; by default half the shorter side, at most ``LARGEST_LAG``.
        tick: called after each block.
    """
    shape = mask.shape
    lag = min(lag or LARGEST_LAG, max(1, min(shape) // 2))
    size = fft.next_fast_len(min(BLOCK, max(shape)) + 2 * lag, real=True)
    total = np.zeros((size, size // 2 + 1), np.complex128)
    for top in range(0, shape[0], BLOCK):
        for left in range(0, shape[1], BLOCK):
            total += _block(mask, top, left, lag, size)
            if tick is not None:
                tick()
    pairs = np.roll(fft.irfft2(total, s=(size, size)), (lag, lag), axis=(0, 1))[: 2 * lag + 1, : 2 * lag + 1]
    offset = np.abs(np.arange(-lag, lag + 1))
    possible = (shape[0] - offset)[:, None] * (shape[1] - offset)[None, :].astype(float)
    ring = np.rint(np.hypot(offset[:, None], offset[None, :])).astype(int)
    inside = ring <= lag
    count = np.bincount(ring[inside], possible[inside], lag + 1)
    s2 = np.bincount(ring[inside], np.rint(pairs[inside]), lag + 1) / count
    distance = np.hypot(offset[:, None], offset[None, :])
    r = np.bincount(ring[inside], (possible * distance)[inside], lag + 1) / count
    return Correlation(r, s2, *_lengths(r, s2), interface=_interface(mask))


def _block(mask: Mask, top: int, left: int, lag: int, size: int) -> npt.NDArray[np.complex128]:
    """Transform of the counts of pairs between a block and all within ``lag`` of it; lag (0, 0) comes out at (0, 0)."""
    here = np.zeros((size, size), np.float32)
    part = mask[top : top + BLOCK, left : left + BLOCK]
    here[lag : lag + part.shape[0], lag : lag + part.shape[1]] = part
    around = np.zeros((size, size), np.float32)
    y, x = max(0, top - lag), max(0, left - lag)
    wide = mask[y : top + BLOCK + lag, x : left + BLOCK + lag]
    dy, dx = y - (top - lag), x - (left - lag)
    around[dy : dy + wide.shape[0], dx : dx + wide.shape[1]] = wide
    product = np.conj(fft.rfft2(here)) * fft.rfft2(around)
    return np.asarray(product, np.complex128)


def _lengths(r: Floats, s2: Floats) -> tuple[float, float]:
    phi = s2[0]
    if not 0.0 < phi < 1.0:
        return float("nan"), float("nan")
    covariance = (s2 - phi**2) / (phi - phi**2)
    crossing = np.flatnonzero(covariance <= 0)
    stop = int(crossing[0]) + 1 if len(crossing) else len(r)
    length = float(np.trapezoid(np.maximum(covariance[:stop], 0.0), r[:stop]))
    # A ripple of noise is no spacing: a maximum must stand out from the minima beside it.
    peaks, _ = find_peaks(covariance, prominence=0.01)
    return length, float(r[peaks[0]]) if len(peaks) else float("nan")


def _interface(mask: Mask) -> float:
    """Crossings of rows and columns with the boundary give its length by Crofton's formula: pi/4 of their mean sum."""
    crossings = np.count_nonzero(mask[:, 1:] != mask[:, :-1]) + np.count_nonzero(mask[1:] != mask[:-1])
    return math.pi / 4 * crossings / mask.size
