from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.errors import UserError
from nanodist.downstream import labels as lab
from nanodist.downstream.probe import Protocol, plan_split, split_within


def targets_of(groups_per_class: list[int], crops: int = 4) -> lab.Targets:
    """Classes with so many micrographs each, of ``crops`` crops (the first micrograph has three times as many)."""
    labels, groups = [], []
    for c, count in enumerate(groups_per_class):
        for g in range(count):
            repeats = crops * (3 if g == 0 else 1)
            labels += [f"class{c}"] * repeats
            groups += [f"m{c}-{g}"] * repeats
    return lab.encode(labels, groups)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=2, max_size=5), st.floats(0.1, 0.9), st.integers(0, 10**6))
def test_no_micrograph_is_on_two_sides_and_every_class_is_on_both(counts: list[int], share: float, seed: int) -> None:
    targets = targets_of(counts)
    split = split_within(targets, share, seed, 0)
    assert len(split.train) + len(split.test) == len(targets.y)
    assert not set(targets.groups[split.train]) & set(targets.groups[split.test])
    for c, count in enumerate(counts):
        held = len(targets.groups_of(c, split.test))
        assert held == min(max(1, round(share * count)), count - 1)


def test_micrographs_with_several_classes_leave_every_class_on_both_sides() -> None:
    groups = [f"m{i // 6}" for i in range(36)]
    labels = ["abc"[i % 3] for i in range(36)]
    targets = lab.encode(labels, groups)
    split = split_within(targets, 0.3, 0, 0)
    assert not set(targets.groups[split.train]) & set(targets.groups[split.test])
    assert set(targets.y[split.train]) == set(targets.y[split.test]) == {0, 1, 2}
    assert len(set(targets.groups[split.test])) == 2


def test_splits_differ_by_number_and_repeat_by_seed() -> None:
    targets = targets_of([8, 8])
    tests = [split_within(targets, 0.3, 0, number).test for number in range(3)]
    assert not np.array_equal(tests[0], tests[1]) or not np.array_equal(tests[0], tests[2])
    np.testing.assert_array_equal(tests[1], split_within(targets, 0.3, 0, 1).test)


def test_labels_are_nested_and_spread_over_micrographs() -> None:
    targets = targets_of([5, 3])
    every = np.arange(len(targets.y))
    orders = lab.draw_order(targets, every, 0, 0)
    previous: set[int] = set()
    for budget in (1, 2, 3, 5, 8):
        chosen = set(lab.first(orders, budget).tolist())
        assert previous <= chosen
        previous = chosen
        for c, count in enumerate((5, 3)):
            mine = np.array([i for i in chosen if targets.y[i] == c])
            assert len(mine) == budget
            taken = np.bincount(targets.groups[mine])
            assert np.count_nonzero(taken) == min(budget, count)
            # Turns: no micrograph gives a second label before all have given a first.
            assert taken[taken > 0].max() - taken[taken > 0].min() <= 1
    assert set(lab.first(orders, "all").tolist()) == set(every.tolist())


def test_draws_depend_on_the_seed() -> None:
    targets = targets_of([5, 5])
    every = np.arange(len(targets.y))
    drawn = {tuple(lab.first(lab.draw_order(targets, every, seed, 0), 2)) for seed in range(6)}
    assert len(drawn) > 3


def test_a_short_class_is_named_with_what_it_has() -> None:
    targets = targets_of([2, 6], crops=1)
    orders = lab.draw_order(targets, np.arange(len(targets.y)), 0)
    assert lab.short_classes(targets, orders, 4) == {}
    assert lab.short_classes(targets, orders, 5) == {"class0": 4}
    assert lab.short_classes(targets, orders, "all") == {}


def test_a_plan_keeps_the_test_out_of_tuning_and_of_the_draws() -> None:
    targets = targets_of([6, 4, 2])
    plan = plan_split(targets, split_within(targets, 0.3, 0, 0), Protocol((1, 2, "all"), seeds=3))
    tested = set(targets.groups[plan.split.test])
    for draw in plan.draws:
        assert not tested & set(targets.groups[draw.samples])
    for tuning in plan.rounds:
        validated = set(targets.groups[tuning.validation])
        assert validated and not tested & validated
        fitted = set(targets.groups[np.concatenate(tuning.orders)])
        assert not fitted & (validated | tested)
        assert set(targets.y[np.concatenate(tuning.orders)]) == {0, 1, 2}
    used = set(np.concatenate([r.validation for r in plan.rounds]).tolist())
    assert plan.validation_samples == len(used)


def test_parse_budgets() -> None:
    assert lab.parse_budgets("8, 1,80,8") == [1, 8, 80, "all"]
    assert lab.parse_budgets("all,2") == [2, "all"]
    for bad in ("1,x", "0", "-2", "", "1,,2", "1.5"):
        with pytest.raises(UserError, match="--labels-per-class"):
            lab.parse_budgets(bad)


def test_unsplittable_labels_are_refused_by_name() -> None:
    targets = lab.encode(["a", "a", "b", "b"], ["m1", "m2", "m3", "m3"])
    with pytest.raises(UserError, match=r"'b' has one micrograph only"):
        lab.check_splittable(targets, np.arange(4), "store x")
    with pytest.raises(UserError, match="one class only"):
        lab.check_splittable(lab.encode(["a", "a"], ["m1", "m2"]), np.arange(2), "store x")
