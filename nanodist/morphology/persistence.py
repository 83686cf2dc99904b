"""Persistence length from how far apart points of a wire lie, over the arc between them.

``2d``: the wire bends in the plane of the image only, as one that lies flat on a film and has relaxed there:
``<R^2> = 4 P s (1 - 2 P / s (1 - exp(-s / 2 P)))`` (C. Rivetti, M. Guthold and C. Bustamante, *J. Mol. Biol.* 264
(1996) 919, eq. 8). ``projected``: the wire bends in space and the image shows its projection, as in a thick film or in
ice; both R and the arc are those of the projection, for which no closed form is known, so that the curve is taken from
simulated worm-like chains (always the same ones).

Points on one wire are pooled over all wires of an image, and intervals come from a bootstrap over wires.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hpc import seeding
from hpc.errors import UserError

Floats = npt.NDArray[np.float64]
MODELS = ("2d", "projected")
LAGS = 24
CANDIDATES = 400
RESAMPLES = 200
# R^2 / s^2 is known to about a part in 1000: what bends less over the longest arc than this tells nothing.
STIFFEST = 30.0


@dataclass(frozen=True)
class Persistence:
    """A persistence length with its 95 % interval, in pixels, from ``wires`` wires; ``why`` says why it is NaN."""

    length: float
    low: float
    high: float
    wires: int
    model: str
    why: str = ""


def mean_square_2d(s: Floats, persistence: Floats | float) -> Floats:
    """``<R^2>`` of a 2D worm-like chain over arcs ``s``, in the units of ``persistence`` squared."""
    x = s / (2 * persistence)
    # The series keeps the digits that the formula loses for stiff chains.
    series = s**2 * (1 - x / 3 + x**2 / 12 - x**3 / 60)
    return np.where(x < 1e-2, series, 4 * persistence * s * (1 - (1 - np.exp(-x)) / np.maximum(x, 1e-12)))


@lru_cache(maxsize=1)
def _projected_curve() -> tuple[Floats, Floats]:
    """Arc over P (k,) and ``<R^2> / s^2`` (k,) of projected 3D worm-like chains, both taken in the projection."""
    chains, step, steps = 600, 0.02, 500
    rng = seeding.generator(0, "projected-chains")
    tangent = rng.normal(size=(chains, 3))
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    track = np.zeros((chains, steps + 1, 2))
    for i in range(steps):
        track[:, i + 1] = track[:, i] + tangent[:, :2] * step
        kick = rng.normal(size=(chains, 3)) * np.sqrt(step)  # <t(0) t(s)> = exp(-s / P) in 3D, P = 1
        kick -= (kick * tangent).sum(1, keepdims=True) * tangent
        tangent = tangent + kick
        tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    at = np.concatenate([[0.0], np.geomspace(0.02, 4.0, 20)])
    ratio = np.ones(len(at))
    sums, counts = np.zeros(len(at)), np.zeros(len(at))
    for line in track:
        squares, n = _squares(line, at[1:], 0.05)
        sums[1:] += squares
        counts[1:] += n
    ratio[1:] = np.minimum.accumulate(sums[1:] / np.maximum(counts[1:], 1) / at[1:] ** 2)
    return at, np.minimum(ratio, 1.0)


def mean_square_projected(s: Floats, persistence: Floats | float) -> Floats:
    """``<R^2>`` of the projection of a 3D worm-like chain over projected arcs ``s``."""
    at, ratio = _projected_curve()
    return s**2 * np.interp(s / persistence, at, ratio)


def _squares(line: Floats, lags: Floats, spacing: float) -> tuple[Floats, Floats]:
    """Sum of squared distances and number of pairs at each lag (k,) along a polyline (n, 2)."""
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
    sums, counts = np.zeros(len(lags)), np.zeros(len(lags))
    for k, lag in enumerate(lags):
        if lag > arc[-1]:
            break
        start = np.arange(0.0, arc[-1] - lag + 1e-9, spacing)
        a, b = (np.stack([np.interp(start + more, arc, line[:, c]) for c in (0, 1)]) for more in (0.0, lag))
        sums[k], counts[k] = float(((a - b) ** 2).sum()), len(start)
    return sums, counts


def persistence_length(
    lines: Sequence[Floats],
    shortest: float,
    model: str = "2d",
    seed: int = 0,
    resamples: int = RESAMPLES,
    candidates: int = CANDIDATES,
) -> Persistence:
    """The persistence length of wires.

    Args:
        lines: centre lines (n, 2) in pixels.
        shortest: least arc to use: a few widths, below which the smoothing of the line shows.
        model: one of ``MODELS``.
        seed: of the bootstrap.
        resamples: number of resamples.
        candidates: number of lengths between which the fit interpolates.

    Raises:
        UserError: ``model`` is unknown.
    """
    if model not in MODELS:
        raise UserError(f"no persistence model {model!r}; there are {', '.join(MODELS)}")
    curve: Callable[[Floats, Floats], Floats] = mean_square_2d if model == "2d" else mean_square_projected
    lengths = np.array([np.hypot(*np.diff(line, axis=0).T).sum() for line in lines])
    used = [line for line, length in zip(lines, lengths, strict=True) if length >= 1.5 * shortest]
    nothing = float("nan")
    if not used:
        return Persistence(nothing, nothing, nothing, 0, model, "no wire is long enough for its width")
    longest = 0.75 * float(lengths.max())
    lags = np.geomspace(shortest, max(longest, shortest * 1.1), LAGS)
    tallies = [_squares(line, lags, max(1.0, shortest / 8)) for line in used]
    sums, counts = (np.array([t[i] for t in tallies]) for i in (0, 1))
    grid = np.geomspace(lags[0] / 10, 1e3 * lags[-1], candidates)
    curves = np.log(curve(lags[None], grid[:, None]))
    found = float(_fit(lags, sums.sum(0)[None], counts.sum(0)[None], grid, curves)[0])
    if not found < STIFFEST * longest:
        return Persistence(
            nothing, nothing, nothing, len(used), model, "stiffer than the wires are long enough to show"
        )
    if len(used) < 3:
        return Persistence(found, nothing, nothing, len(used), model)
    rng = seeding.generator(seed, "persistence")
    drawn = rng.multinomial(len(used), np.full(len(used), 1 / len(used)), resamples).astype(float)
    fits = _fit(lags, drawn @ sums, drawn @ counts, grid, curves)
    low, high = np.quantile(fits, [0.025, 0.975])
    return Persistence(found, float(low), float(high), len(used), model)


def _fit(lags: Floats, sums: Floats, counts: Floats, candidates: Floats, curves: Floats) -> Floats:
    """The best persistence length (n,) for each row of pooled sums and counts (n, k).

    Least squares of ``log <R^2>`` over the candidates (g,) with their curves (g, k), then a parabola about the best.
    """
    there = counts > 0
    seen = np.log(np.where(there, sums, 1.0) / np.where(there, counts, 1.0))
    # Pairs that overlap are not independent: about one for each arc of that length is.
    trust = np.where(there, counts, 0.0) / lags
    misfit = (trust * seen**2).sum(1)[:, None] - 2 * (trust * seen) @ curves.T + trust @ (curves**2).T
    best = np.clip(misfit.argmin(axis=1), 1, len(candidates) - 2)
    row = np.arange(len(best))
    left, middle, right = (misfit[row, best + d] for d in (-1, 0, 1))
    bend = np.maximum(left - 2 * middle + right, 1e-30)
    step = np.clip((left - right) / (2 * bend), -1.0, 1.0)
    log = np.log(candidates)
    return np.asarray(np.exp(log[best] + step * (log[1] - log[0])))
