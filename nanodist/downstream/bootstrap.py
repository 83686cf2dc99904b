"""Confidence intervals by a bootstrap over micrographs and over seeds.

Crops of a micrograph are not independent, and several splits of one set of micrographs test the same micrographs again:
neither counts as a sample. What is resampled is (1) the test micrographs, within each class, one draw for all splits
together; (2) the encoder seeds; (3) the seeds of the label draw; (4) splits whose test sets overlap, as these and their
labels are drawn at random, but not folds, which are the micrographs of (1) again. Two encoders are compared on the same
resamples (a paired bootstrap; Efron & Tibshirani, *An Introduction to the Bootstrap*, 1993).

A class with a single test micrograph adds no spread of its own, so an interval with such classes is too narrow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpc import seeding

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
_CHUNK = 100


@dataclass(frozen=True)
class Tally:
    """Right answers of one encoder, method and budget.

    Attributes:
        hits: (splits, encoder seeds, label draws, groups, classes) right answers among the samples of that group and
            class; 0 where the group is not in the split's test set.
        totals: (splits, groups, classes) test samples.
    """

    hits: F64
    totals: F64


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its interval."""

    mean: float
    low: float
    high: float


class Resamples:
    """Bootstrap resamples that all encoders of a comparison share.

    Args:
        totals: (splits, groups, classes) test samples; a group is drawn within the class that most of it belongs to.
        draws: number of label draws, resampled alike for all encoders.
        count: number of resamples.
        seed: of the resampling.

    Attributes:
        groups: (count, groups) how often each is drawn; ``splits`` (count, splits) alike.
        draws: (count, draws) share of each label draw.
        folds: whether there are several splits, and each group is tested in one of them.
    """

    def __init__(self, totals: F64, draws: int, count: int = 1000, seed: int = 0) -> None:
        self.count, self.seed = count, seed
        self.groups = _multiplicities(totals.max(axis=0), count, seed)
        self.draws = _shares(draws, count, seeding.generator(seed, "bootstrap-draws"))
        splits, again = len(totals), bool(((totals.sum(axis=2) > 0).sum(axis=0) > 1).any())
        self.folds = splits > 1 and not again
        self.splits = np.ones((count, splits))
        if again:
            self.splits = splits * _shares(splits, count, seeding.generator(seed, "bootstrap-splits"))

    def statistics(self, tally: Tally, name: str) -> F64:
        """Balanced accuracy of each resample, (count,); ``name`` keys the resampling of the encoder seeds.

        NaN where the splits that were drawn test none of the micrographs that were drawn.
        """
        encoders, draws = self.encoders(name, tally.hits.shape[1]), self.shares_of(tally.hits.shape[2])
        weights = (self.groups, encoders, draws, self.splits)
        parts = [
            _balanced_accuracy(tally, self.folds, *(each[i : i + _CHUNK] for each in weights))
            for i in range(0, self.count, _CHUNK)
        ]
        return np.concatenate(parts)

    def encoders(self, name: str, seeds: int) -> F64:
        """Shares (count, seeds) of the encoder seeds of ``name``."""
        return _shares(seeds, self.count, seeding.generator(self.seed, "bootstrap-encoders", name))

    def shares_of(self, draws: int) -> F64:
        """Shares (count, draws) of the label draws, of which there may be one where others have several."""
        return self.draws if draws > 1 else np.ones((self.count, 1))


def point(tally: Tally) -> float:
    """Balanced accuracy without resampling: mean over splits, encoder seeds and draws."""
    splits, encoders, draws, groups, _ = tally.hits.shape
    uniform = np.full((1, encoders), 1.0 / encoders), np.full((1, draws), 1.0 / draws), np.ones((1, splits))
    return float(_balanced_accuracy(tally, False, np.ones((1, groups)), *uniform)[0])


def interval(tally: Tally, resamples: Resamples, name: str, level: float = 0.95) -> Interval:
    """Percentile interval of the balanced accuracy."""
    return percentiles(point(tally), resamples.statistics(tally, name), level)


def paired_interval(
    tally: Tally, name: str, baseline: Tally, baseline_name: str, resamples: Resamples, level: float = 0.95
) -> Interval:
    """Percentile interval of the difference ``tally`` minus ``baseline``, on the same micrographs and label draws."""
    differences = resamples.statistics(tally, name) - resamples.statistics(baseline, baseline_name)
    return percentiles(point(tally) - point(baseline), differences, level)


def percentiles(mean: float, statistics: F64, level: float) -> Interval:
    """The interval of a score ``mean`` from those of the resamples (count,), of which NaN test nothing."""
    low, high = np.nanquantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def without_excess(score: float, statistics: F64) -> F64:
    """Resamples (count,) of a sum of absolute values, moved down by how much larger they are than ``score`` on average.

    A resample is noisier than the sample, which such a sum takes for signal. Of 15 micrographs of 5 crops and a true
    calibration error of 0.10, 95 % intervals held the truth in 88 % of 300 trials so, and in 72 % as they were.
    """
    return np.maximum(statistics - (np.nanmean(statistics) - score), 0.0)


def _balanced_accuracy(tally: Tally, folds: bool, groups: F64, encoders: F64, draws: F64, splits: F64) -> F64:
    """(b,) from multiplicities of groups (b, g) and splits (b, s) and shares of encoder seeds (b, e) and draws (b, d).

    The recall of a class is averaged over the splits in which the resample has a micrograph of it. Of ``folds`` each
    counts as often as its micrographs were drawn: where it tests one alone, its recall is the same however often.
    """
    hits = np.stack(
        [
            np.einsum("bedc,be,bd->bc", _weighted(groups, tally.hits[s]), encoders, draws, optimize=True)
            for s in range(len(tally.hits))
        ],
        axis=1,
    )
    totals = np.einsum("bg,sgc->bsc", groups, tally.totals)
    there = totals > 0
    recall = np.where(there, hits / np.where(there, totals, 1.0), 0.0)
    weight = there * splits[:, :, None]
    if folds:
        tested = (tally.totals > 0).astype(np.float64)
        weight = np.einsum("bg,sgc->bsc", groups, tested) / np.maximum(tested.sum(axis=1), 1.0)
    seen = weight.sum(axis=1)
    per_class = (recall * weight).sum(axis=1) / np.where(seen > 0, seen, 1.0)
    classes = np.count_nonzero(seen, axis=1)
    return np.where(classes > 0, per_class.sum(axis=1) / np.maximum(classes, 1), np.nan)


def _weighted(groups: F64, hits: F64) -> F64:
    """(b, e, d, c) from multiplicities (b, g) and hits (e, d, g, c)."""
    encoders, draws, count, classes = hits.shape
    flat = hits.transpose(2, 0, 1, 3).reshape(count, -1)
    return (groups @ flat).reshape(-1, encoders, draws, classes)


def _multiplicities(totals: F64, count: int, seed: int) -> F64:
    """How often each group is drawn, (count, groups), drawing within classes as many as there are."""
    result = np.zeros((count, len(totals)))
    tested = totals.sum(axis=1) > 0
    main = totals.argmax(axis=1)
    for c in np.unique(main[tested]):
        members = np.flatnonzero(tested & (main == c))
        result[:, members] = seeding.generator(seed, "bootstrap-groups", int(c)).multinomial(
            len(members), np.full(len(members), 1.0 / len(members)), count
        )
    return result


def _shares(n: int, count: int, generator: np.random.Generator) -> F64:
    """Shares (count, n) of n things drawn n times with replacement."""
    return generator.multinomial(n, np.full(n, 1.0 / n), count) / n
