"""Intervals of the scores that are no mean over classes: macro F1, accuracy and calibration error.

The resamples are those of the balanced accuracy (:mod:`nanodist.downstream.bootstrap`): in each of them every run
(split, encoder seed, label draw) is scored anew from how often its micrographs are drawn, and the scores are averaged
over the runs. Folds that leave each micrograph out once are put together before they are scored, as one fold may hold
a single class, of which there is no F1.

Intervals of the calibration error are moved down by the excess that resampling adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanodist.downstream.bootstrap import Interval, Resamples, Tally, percentiles, without_excess
from nanodist.downstream.metrics import CALIBRATION_BINS, calibration_bins, f1_of_counts

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

RUN_SCORES = ("macro_f1", "accuracy", "calibration_error")
_CHUNK = 100


@dataclass(frozen=True)
class Answers:
    """What one run says of its test samples.

    Attributes:
        at: places of its split, encoder seed and label draw in the tally.
        groups, truth, predicted: (m,) micrograph, class, and class that it says.
        confidence: (m,) probability of the class that it says.
    """

    at: tuple[int, int, int]
    groups: I64
    truth: I64
    predicted: I64
    confidence: F64


def run_intervals(
    tally: Tally, runs: Sequence[Answers], resamples: Resamples, name: str, level: float = 0.95
) -> dict[str, Interval]:
    """Each of ``RUN_SCORES`` with its interval.

    Args:
        tally: of the runs, all of its cells filled.
        runs: what they say.
        resamples: of the tally's splits.
        name: keys the resampling of the encoder seeds.
        level: of the intervals.
    """
    counts = _counts(tally, runs)
    splits, encoders, draws = tally.hits.shape[:3]
    everything = np.ones((1, tally.hits.shape[3]))
    same = np.full((1, encoders), 1.0 / encoders), np.full((1, draws), 1.0 / draws), np.ones((1, splits))
    points = _scores(counts, resamples.folds, everything, *same)[:, 0]
    weights = (resamples.groups, resamples.encoders(name, encoders), resamples.shares_of(draws), resamples.splits)
    parts = [
        _scores(counts, resamples.folds, *(each[i : i + _CHUNK] for each in weights))
        for i in range(0, resamples.count, _CHUNK)
    ]
    drawn = np.concatenate(parts, axis=1)
    drawn[-1] = without_excess(float(points[-1]), drawn[-1])
    return {score: percentiles(float(p), d, level) for score, p, d in zip(RUN_SCORES, points, drawn, strict=True)}


def _counts(tally: Tally, runs: Sequence[Answers]) -> F64:
    """(splits, encoders, draws, groups, 3 classes + bins): right, said and true of each class, and gaps by bin."""
    splits, encoders, draws, groups, classes = tally.hits.shape
    counts = np.zeros((splits, encoders, draws, groups, 3 * classes + CALIBRATION_BINS))
    counts[..., :classes] = tally.hits
    counts[..., 2 * classes : 3 * classes] = tally.totals[:, None, None]
    for run in runs:
        here = counts[run.at]
        np.add.at(here, (run.groups, classes + run.predicted), 1.0)
        gap = run.confidence - (run.predicted == run.truth)
        np.add.at(here, (run.groups, 3 * classes + calibration_bins(run.confidence)), gap)
    return counts


def _scores(counts: F64, folds: bool, groups: F64, encoders: F64, draws: F64, splits: F64) -> F64:
    """(3, b) from multiplicities of groups (b, g) and splits (b, s), shares of encoder seeds (b, e) and draws (b, d).

    ``counts`` is what :func:`_counts` gives; ``folds`` says to put all splits together.
    """
    if folds:
        counts, splits = counts.sum(axis=0, keepdims=True), np.ones((len(groups), 1))
    classes = (counts.shape[4] - CALIBRATION_BINS) // 3
    total, weight = np.zeros((len(RUN_SCORES), len(groups))), np.zeros(len(groups))
    for s, split in enumerate(counts):
        tested = np.flatnonzero(split[0, 0, :, 2 * classes : 3 * classes].any(axis=1))
        flat = split[:, :, tested].transpose(2, 0, 1, 3).reshape(len(tested), -1)
        found = (groups[:, tested] @ flat).reshape(len(groups), *split.shape[:2], -1)
        hits, said, true = (found[..., i * classes : (i + 1) * classes] for i in range(3))
        samples = true.sum(axis=-1)
        there = samples[:, 0, 0] > 0
        samples = np.where(samples > 0, samples, 1.0)
        each = np.stack(
            [
                f1_of_counts(hits, said + true),
                hits.sum(axis=-1) / samples,
                np.abs(found[..., 3 * classes :]).sum(axis=-1) / samples,
            ]
        )
        share = splits[:, s] * there
        total += share * np.einsum("kbed,be,bd->kb", each, encoders, draws, optimize=True)
        weight += share
    # Where the splits that were drawn test none of the micrographs that were drawn, there is no score.
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), np.nan)
