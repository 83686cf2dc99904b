from __future__ import annotations

import numpy as np
import pytest

from nanodist.downstream.bootstrap import Resamples, Tally, interval, paired_interval, point, without_excess
from nanodist.downstream.metrics import calibration_gaps, confusion_matrix, error_of, macro_f1
from nanodist.downstream.run_scores import Answers, run_intervals


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
    shared = Resamples(folds, 1)
    found = interval(apart, shared, "x")
    means = shared.groups @ np.repeat([0.2, 0.8], 15) / 30
    assert (found.low, found.mean, found.high) == pytest.approx(
        (*np.quantile(means, [0.025]), 0.5, *np.quantile(means, [0.975]))
    )


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


def test_a_resample_that_tests_nothing_is_left_out() -> None:
    """Three splits that each hold out one of four micrographs of a class, which often is not among those drawn."""
    totals = np.zeros((3, 8, 2))
    for split, out in enumerate((0, 1, 0)):
        totals[split, out, 0] = totals[split, out + 4, 1] = 3
    perfect = Tally(totals[:, None, None].copy(), totals)
    shared = Resamples(totals, 1, 2000)
    assert np.isnan(shared.statistics(perfect, "x")).any()
    found = interval(perfect, shared, "x")
    assert (found.low, found.high) == (1.0, 1.0)
    runs = []
    for split in range(3):
        groups = np.repeat(np.flatnonzero(totals[split].any(axis=1)), 3)
        truth = groups // 4
        runs.append(Answers((split, 0, 0), groups, truth, truth, np.full(len(truth), 0.9)))
    scores = run_intervals(perfect, runs, shared, "x", level=0.998)
    assert [(scores[name].low, scores[name].high) for name in ("macro_f1", "accuracy")] == [(1.0, 1.0)] * 2
    assert scores["calibration_error"].mean == pytest.approx(0.1) and np.isfinite(scores["calibration_error"].high)


def test_folds_of_one_micrograph_have_the_interval_of_micrographs() -> None:
    """Leave-one-group-out: each resample is the mean over classes of the mean of what was drawn, as often as drawn."""
    recalls = np.random.default_rng(3).random(12)
    totals = np.zeros((12, 12, 2))
    totals[np.arange(12), np.arange(12), np.arange(12) % 2] = 10.0
    tally = Tally((totals * recalls[:, None, None])[:, None, None], totals)
    shared = Resamples(totals, 1, 500)
    assert shared.folds
    by_hand = [np.mean([np.average(recalls[c::2], weights=times[c::2]) for c in range(2)]) for times in shared.groups]
    np.testing.assert_allclose(shared.statistics(tally, "x"), by_hand)


def answers(folds: bool) -> tuple[Tally, list[Answers]]:
    """2 splits x 2 encoder seeds x 2 draws of 24 samples in 8 micrographs of 3 classes, answered at random."""
    generator = np.random.default_rng(5)
    groups, sides = np.repeat(np.arange(8), 3), [range(4), range(4, 8)] if folds else [range(6), range(2, 8)]
    truth = groups % 3
    tally, runs = Tally(np.zeros((2, 2, 2, 8, 3)), np.zeros((2, 8, 3))), []
    for s, e, d in np.ndindex(2, 2, 2):
        test = np.flatnonzero(np.isin(groups, sides[s]))
        predicted = np.where(generator.random(len(test)) < 0.5, truth[test], generator.integers(0, 3, len(test)))
        confidence = generator.uniform(0.34, 1.0, len(test))
        runs.append(Answers((s, e, d), groups[test], truth[test], predicted, confidence))
        np.add.at(tally.hits[s, e, d], (groups[test], truth[test]), predicted == truth[test])
        tally.totals[s] = np.bincount(groups[test] * 3 + truth[test], minlength=24).reshape(8, 3)
    return tally, runs


def scored_by_hand(run: Answers, times: np.ndarray) -> tuple[float, float, float]:
    """Macro F1, accuracy and calibration error of the samples of a run, each micrograph as often as ``times`` says."""
    again = np.repeat(np.arange(len(run.truth)), times[run.groups].astype(int))
    truth, predicted = run.truth[again], run.predicted[again]
    gaps = calibration_gaps(run.confidence[again], truth == predicted)
    return macro_f1(confusion_matrix(truth, predicted, 3)), float((truth == predicted).mean()), error_of(gaps)


@pytest.mark.parametrize("folds", [False, True])
def test_every_score_has_the_interval_of_samples_that_are_really_drawn_again(folds: bool) -> None:
    tally, runs = answers(folds)
    shared = Resamples(tally.totals, 2, 120)
    assert shared.folds is folds
    seeds = shared.encoders("x", 2)
    if folds:  # both together are one test of all micrographs
        pairs = [(a, b) for a in runs for b in runs if a.at[0] < b.at[0] and a.at[1:] == b.at[1:]]
        names = ("groups", "truth", "predicted", "confidence")
        runs_of = [Answers(a.at, *(np.append(getattr(a, n), getattr(b, n)) for n in names)) for a, b in pairs]
    else:
        runs_of = runs
    drawn = np.zeros((3, 120))
    for b in range(120):
        splits = np.ones(2) if folds else shared.splits[b] / 2
        weights = [splits[r.at[0]] * seeds[b, r.at[1]] * shared.draws[b, r.at[2]] for r in runs_of]
        drawn[:, b] = np.transpose([scored_by_hand(r, shared.groups[b]) for r in runs_of]) @ weights
    points = np.mean([scored_by_hand(r, np.ones(8)) for r in runs_of], axis=0)
    drawn[2] = without_excess(points[2], drawn[2])
    assert abs(drawn[2].mean() - points[2]) < 0.02
    found = run_intervals(tally, runs, shared, "x")
    for each, point_, values in zip(found.values(), points, drawn, strict=True):
        assert (each.mean, each.low, each.high) == pytest.approx((point_, *np.quantile(values, [0.025, 0.975])))
    assert [*found] == ["macro_f1", "accuracy", "calibration_error"]
