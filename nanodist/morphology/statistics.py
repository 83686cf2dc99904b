"""Weighted sizes of many objects, and the difference between specimens with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc import seeding

Floats = npt.NDArray[np.float64]
RESAMPLES = 2000


def weighted_median(values: Floats, weights: Floats) -> float:
    """The value below which half of the weight lies."""
    order = np.argsort(values)
    share = np.cumsum(weights[order]) - 0.5 * weights[order]
    return float(np.interp(0.5 * weights.sum(), share, values[order]))


def sizes(name: str, values: Sequence[float], weights: Sequence[float], volumes: Sequence[float]) -> dict[str, Any]:
    """Number-weighted mean, median and spread and volume-weighted mean of a size, with the number they rest on.

    Args:
        name: of the size; it begins the names of the results.
        values: one a thing.
        weights: Miles-Lantuejoul weights, 0 for what the border cuts.
        volumes: proportional to the volume of each thing.
    """
    x, w, v = (np.asarray(a, float) for a in (values, weights, volumes))
    use = np.isfinite(x) & np.isfinite(v) & (w > 0) & (v > 0)
    x, w, v = x[use], w[use], v[use]
    result: dict[str, Any] = {f"{name}_n": len(x)}
    nothing = float("nan")
    if len(x) == 0:
        return {**result, **dict.fromkeys((f"{name}_{k}" for k in _KINDS), nothing)}
    mean = float((w * x).sum() / w.sum())
    spread = float(np.sqrt((w * (x - mean) ** 2).sum() / w.sum()))
    volume = float((w * v * x).sum() / (w * v).sum())
    return {
        **result,
        **{f"{name}_{k}": x for k, x in zip(_KINDS, (mean, weighted_median(x, w), spread, volume), strict=True)},
    }


_KINDS = ("number_mean", "number_median", "number_sd", "volume_mean")


@dataclass(frozen=True)
class Difference:
    """Means of a quantity over the images of two specimens, and ``second - first`` with its 95 % interval."""

    quantity: str
    first: str
    second: str
    first_mean: float
    second_mean: float
    difference: float
    low: float
    high: float
    first_images: int
    second_images: int
    note: str = ""


def bootstrap_difference(
    quantity: str, names: tuple[str, str], groups: tuple[Floats, Floats], weights: tuple[Floats, Floats], seed: int = 0
) -> Difference:
    """Compare two specimens by a bootstrap over their images, since objects of one image are not independent.

    Args:
        quantity: what is compared.
        names: of the specimens.
        groups: value of each image, (n,) and (m,).
        weights: what each image counts (the number of objects behind its value, or 1), alike.
        seed: of the resampling.
    """
    use = [np.isfinite(g) & (w > 0) for g, w in zip(groups, weights, strict=True)]
    values = [g[u] for g, u in zip(groups, use, strict=True)]
    sizes_ = [w[u] for w, u in zip(weights, use, strict=True)]
    counts = [len(v) for v in values]
    nothing = float("nan")
    means = [float((v * w).sum() / w.sum()) if len(v) else nothing for v, w in zip(values, sizes_, strict=True)]
    low, high, note = nothing, nothing, ""
    if min(counts) == 0:
        note = "no image has it"
    elif min(counts) < 2:
        note = "one image has no spread: give more images of each specimen"
    else:
        draws = []
        for name, v, w in zip(names, values, sizes_, strict=True):
            rng = seeding.generator(seed, "specimens", quantity, name)
            times = rng.multinomial(len(v), np.full(len(v), 1 / len(v)), RESAMPLES)
            draws.append((times @ (v * w)) / np.maximum(times @ w, 1e-30))
        low, high = (float(q) for q in np.quantile(draws[1] - draws[0], [0.025, 0.975]))
        note = "fewer than 5 images: the interval is too narrow" if min(counts) < 5 else ""
    difference = means[1] - means[0]
    return Difference(quantity, *names, means[0], means[1], difference, low, high, counts[0], counts[1], note)


def mean_interval(values: Floats, weights: Floats, seed: int, *key: str) -> tuple[float, float, float]:
    """Mean over images and its 95 % bootstrap interval (NaN below two images)."""
    use = np.isfinite(values) & (weights > 0)
    v, w = values[use], weights[use]
    nothing = float("nan")
    if len(v) == 0:
        return nothing, nothing, nothing
    mean = float((v * w).sum() / w.sum())
    if len(v) < 2:
        return mean, nothing, nothing
    times = seeding.generator(seed, "specimen-mean", *key).multinomial(len(v), np.full(len(v), 1 / len(v)), RESAMPLES)
    low, high = np.quantile((times @ (v * w)) / np.maximum(times @ w, 1e-30), [0.025, 0.975])
    return mean, float(low), float(high)


def column_of(rows: Sequence[Mapping[str, Any]], name: str) -> Floats:
    """A column of rows as floats, NaN where a row has none."""
    return np.array([float("nan") if row.get(name) is None else float(row[name]) for row in rows])
