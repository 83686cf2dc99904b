from __future__ import annotations

import numpy as np
import pytest

from nanodist.downstream.bootstrap import Resamples, Tally, interval, paired_interval, point


def tally_of(groups: int, crops: int, rate: np.ndarray, seed: int = 0, draws: int = 1) -> Tally:
    """One split, one class a group in turn, ``rate`` (groups,) of right answers."""
    generator = np.random.default_rng(seed)
    totals = np.zeros((1, groups, 2))
    totals[0, np.arange(groups), np.arange(groups) % 2] = crops
    hits = np.zeros((1, 1, draws, groups, 2))
    for g in range(groups):
        hits[0, 0, :, g, g % 2] = generator.binomial(crops, rate[g], draws)
    return Tally(hits, totals)


def test_the_point_is_the_mean_balanced_accuracy() -> None:
    totals = np.array([[[4.0, 0], [0, 2.0], [2.0, 0]]])
    hits = np.array([[[[[4.0, 0], [0, 1.0], [0, 0]], [[2.0, 0], [0, 2.0], [1.0, 0]]]]])
    assert point(Tally(hits, totals)) == pytest.approx(np.mean([(4 / 6 + 1 / 2) / 2, (3 / 6 + 2 / 2) / 2]))


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for trial in range(60):
        rate = np.clip(np.random.default_rng(trial).normal(0.6, 0.2, 40), 0, 1)
        tally = tally_of(40, 20, rate, seed=trial)
        found = interval(tally, Resamples(tally.totals, 1, 300, trial), "x")
        covered += found.low <= 0.6 - 0.006 <= found.high  # clipping takes about 0.006 off the mean
    assert covered >= 50  # 57 of 60 are expected


def test_many_crops_of_few_micrographs_do_not_narrow_the_interval() -> None:
    rate = np.tile([1.0, 1.0, 0.0, 0.0], 3)
    widths = []
    for crops in (5, 500):
        tally = tally_of(12, crops, rate)
        found = interval(tally, Resamples(tally.totals, 1), "x")
        widths.append(found.high - found.low)
    assert widths[1] == pytest.approx(widths[0], rel=0.15)
    assert widths[1] > 0.3


def test_repeated_splits_are_not_independent_samples() -> None:
    one = tally_of(20, 10, np.linspace(0, 1, 20))
    many = Tally(np.repeat(one.hits, 8, axis=0), np.repeat(one.totals, 8, axis=0))
    narrow = interval(one, Resamples(one.totals, 1), "x")
    repeated = interval(many, Resamples(many.totals, 1), "x")
    assert (repeated.low, repeated.high) == pytest.approx((narrow.low, narrow.high))


def test_encoder_seeds_widen_the_interval() -> None:
    totals = np.full((1, 30, 1), 10.0)
    same = Tally(np.full((1, 2, 1, 30, 1), 5.0), totals)
    apart = Tally(np.concatenate([np.full((1, 1, 1, 30, 1), 2.0), np.full((1, 1, 1, 30, 1), 8.0)], axis=1), totals)
    shared = Resamples(totals, 1)
    assert interval(same, shared, "x").high == pytest.approx(0.5)
    assert interval(apart, shared, "x").high == pytest.approx(0.8)


def test_splits_widen_the_interval_where_their_tests_overlap() -> None:
    totals = np.full((2, 30, 1), 10.0)
    hits = np.stack([np.full((1, 1, 30, 1), 2.0), np.full((1, 1, 30, 1), 8.0)])
    found = interval(Tally(hits, totals), Resamples(totals, 1), "x")
    assert (found.low, found.mean, found.high) == pytest.approx((0.2, 0.5, 0.8))
    # Folds leave each micrograph out once: they are resampled as micrographs already.
    folds = np.zeros((2, 30, 1))
    folds[0, :15], folds[1, 15:] = 10.0, 10.0
    apart = Tally(hits * (folds > 0)[:, None, None], folds)
    found = interval(apart, Resamples(folds, 1), "x")
    assert (found.low, found.mean, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_pairing_takes_the_difficulty_of_micrographs_out_of_the_difference() -> None:
    rate = np.tile(np.linspace(0.0, 0.8, 20), 1)
    base = tally_of(20, 1000, rate)
    better = Tally(base.hits + 0.1 * base.totals[:, None, None], base.totals)
    shared = Resamples(base.totals, 1)
    alone = interval(better, shared, "a")
    paired = paired_interval(better, "a", base, "b", shared)
    assert alone.high - alone.low > 0.1
    assert (paired.mean, paired.low, paired.high) == pytest.approx((0.1, 0.1, 0.1))


def test_a_resample_without_a_class_in_one_split_uses_the_other_splits() -> None:
    totals = np.zeros((2, 3, 2))
    totals[0, 0, 0] = totals[1, 1, 0] = totals[:, 2, 1] = 4
    hits = (totals * 0.5)[:, None, None]
    tally = Tally(hits, totals)
    found = interval(tally, Resamples(totals, 1, 200), "x")
    assert (found.low, found.high) == pytest.approx((0.5, 0.5))
