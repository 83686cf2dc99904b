"""The published protocol: its softmax layer, and that each flaw adds to a score what it should not have."""

from __future__ import annotations

import numpy as np
import pytest

from hpc.errors import UserError
from nanodist.downstream import lu2022
from nanodist.downstream.labels import Targets, encode
from nanodist.downstream.lu2022 import SPLIT_BY_IMAGE, by_image, fit_heads, parse_flaws
from nanodist.downstream.probe import CHOICE_ON_TEST, Prober, Protocol, plan_split, split_within


def noise(micrographs: int = 16, crops: int = 4, d: int = 24) -> tuple[np.ndarray, Targets, list[str]]:
    """Features that tell micrographs apart and nothing of their class."""
    rng = np.random.default_rng(0)
    labels = [f"class {m % 2}" for m in range(micrographs) for _ in range(crops)]
    groups = [f"micrograph {m}" for m in range(micrographs) for _ in range(crops)]
    rows = np.repeat(rng.normal(size=(micrographs, d)), crops, axis=0) + 0.05 * rng.normal(size=(len(labels), d))
    return rows, encode(labels, groups), [f"{i:04d}" for i in range(len(labels))]


def score(name: str, flaws: tuple[str, ...]) -> float:
    rows, targets, keys = noise()
    targets = by_image(targets, keys) if SPLIT_BY_IMAGE in flaws else targets
    protocol = Protocol((16,), seeds=1, rounds=2 * (name == "sound"), cap=True, name=name, flaws=flaws)
    plans = [plan_split(targets, split_within(targets, 0.25, 0, number), protocol) for number in range(6)]
    if name == "lu2022":
        found = lu2022.outcomes(rows, targets, plans, protocol)
        sure = np.concatenate([one.confidence for _, one in found if one.confidence is not None])
        assert len(sure) == 6 * 16 and (sure > 0.5).all() and (sure <= 1.0).all() and sure.std() > 0.01
    else:
        found = [(plan, one) for plan in plans for one in Prober(rows, targets, plan, protocol).outcomes(["linear"])]
    return float(np.mean([(one.predicted == targets.y[plan.split.test]).mean() for plan, one in found]))


@pytest.mark.parametrize("name", ["sound", "lu2022"])
def test_each_flaw_lifts_the_score_of_features_that_know_nothing(name: str) -> None:
    none = score(name, ())
    assert none < 0.65
    assert score(name, (CHOICE_ON_TEST,)) > none
    assert score(name, (SPLIT_BY_IMAGE,)) > 0.85
    assert score(name, (CHOICE_ON_TEST, SPLIT_BY_IMAGE)) > 0.85


def test_a_softmax_layer_stops_on_what_it_watches_and_not_on_what_is_trained_beside_it() -> None:
    rng = np.random.default_rng(1)
    y = np.arange(60) % 3
    rows = np.eye(3)[y].repeat(4, axis=1) + 0.3 * rng.normal(size=(60, 12))
    trains, watches = [np.arange(30), np.arange(12)], [np.arange(30, 45), np.arange(0)]
    both, epochs = fit_heads(rows, y, 3, trains, watches, [5, 6])
    alone, epoch = fit_heads(rows, y, 3, trains[1:], watches[1:], [6])
    assert np.array_equal(both[1], alone[0]) and epochs[1] == epoch[0] == lu2022.EPOCHS
    for head in both:
        assert ((rows[45:] @ head[:-1] + head[-1]).argmax(axis=1) == y[45:]).mean() > 0.9
    turned = (y + 1) % 3  # watched labels that training cannot fit: the loss rises at once
    mixed = np.where(np.arange(60) < 30, y, turned)
    assert fit_heads(rows, mixed, 3, trains[:1], watches[:1], [5])[1][0] < 10


def test_flaws_are_named() -> None:
    assert parse_flaws(None, "sound") == () and parse_flaws(None, "lu2022") == tuple(lu2022.FLAWS)
    assert parse_flaws("split-by-image, choice-on-test", "sound") == tuple(lu2022.FLAWS)
    assert parse_flaws("none", "lu2022") == ()
    with pytest.raises(UserError, match="'leak' does not exist; allowed: choice-on-test, split-by-image or none"):
        parse_flaws("leak", "sound")
