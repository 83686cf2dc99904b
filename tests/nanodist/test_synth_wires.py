"""Morphologies, their truth, and that plain statistics do not give the class away."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.measure import label
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hpc.errors import UserError
from nanodist.synth import MORPHOLOGIES, Settings, make

SMALL = Settings(size_px=128)
EACH = 50


@pytest.fixture(scope="module")
def made():
    return {name: [make(11, name, index, SMALL) for index in range(EACH)] for name in MORPHOLOGIES}


def test_networks_percolate_by_crossing_wires_that_keep_their_own_masks(made):
    for one in made["network"]:
        assert one.truth["spans_left_right"] and one.truth["spans_top_bottom"]
        assert len(one.instances) >= 3
        # Pixels where wires cross belong to several layers: layers hold more pixels than their union.
        assert one.instances.sum() > one.instances.any(axis=0).sum()
        assert one.truth["crossing_share"] > 0


def test_dispersed_wires_do_not_touch(made):
    for one in made["dispersed"]:
        apart = sum(label(mask, connectivity=2).max() for mask in one.instances)
        assert len(one.instances) >= 2
        assert label(one.instances.any(axis=0), connectivity=2).max() == apart
        assert one.truth["crossing_share"] == 0


def test_singular_is_one_wire_and_a_bundle_is_aligned(made):
    assert all(len(one.instances) == 1 for one in made["singular"])
    for one in made["bundle"]:
        turns = np.radians([2 * wire["orientation_deg"] for wire in one.truth["wires"]])
        assert len(turns) >= 2
        assert abs(np.exp(1j * turns).mean()) > 0.97


def test_truth_agrees_with_masks(made):
    for ones in made.values():
        for one in ones[:15]:
            union = one.instances.any(axis=0)
            assert one.truth["coverage"] == pytest.approx(union.mean())
            for wire, mask in zip(one.truth["wires"], one.instances, strict=True):
                assert wire["area_nm2"] == mask.sum() > 0
                line = np.asarray(wire["centre_line_nm"])
                inside = ((line > 0) & (line < 128)).all(axis=1)
                x, y = line[inside].astype(int).T
                assert mask[y, x].all()
                if not wire["border_cut"]:
                    width, length = wire["width_nm"], wire["contour_length_nm"]
                    assert mask.sum() == pytest.approx(width * length + np.pi * width**2 / 4, rel=0.08)
                    assert wire["visible_length_nm"] == pytest.approx(length)


def test_wires_are_darker_in_bright_field_and_brighter_in_haadf():
    for share, sign in ((0.0, 1), (1.0, -1)):
        settings = Settings(size_px=128, haadf_share=share)
        for name in MORPHOLOGIES:
            one = make(2, name, 0, settings)
            wire = one.instances.any(axis=0)
            assert one.truth["conditions"]["modality"] == ("haadf" if share else "bright_field")
            assert sign * (one.image[~wire].mean() - one.image[wire].mean()) > 0
            assert one.image.dtype == np.uint16


def test_dose_sets_the_noise():
    """The noise of the empty film, relative to its mean, falls with the root of the dose."""
    spread = []
    for dose in (20.0, 320.0):
        one = make(4, "singular", 3, Settings(size_px=128, dose_e_nm2=dose))
        empty = one.image[~one.instances.any(axis=0)].astype(float)
        spread.append(np.abs(np.diff(empty)).mean() / empty.mean())
    assert spread[0] > 1.8 * spread[1]


def _statistics(image: np.ndarray) -> list[float]:
    values = image.astype(float)
    return [values.mean(), values.std(), *np.percentile(values, [1, 5, 25, 50, 75, 95, 99])]


def _score(features: np.ndarray, labels: np.ndarray) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(balanced_accuracy_score(labels, cross_val_predict(model, features, labels, cv=5)))


def test_plain_statistics_do_not_give_the_class_away(made):
    """Chance is 0.25. What tells the classes apart must be how wires lie, not how much of the field is dark."""
    labels = np.repeat(list(made), EACH)
    everything = [one for ones in made.values() for one in ones]
    brightness = np.array([_statistics(one.image) for one in everything])
    coverage = np.array([[one.truth["coverage"]] for one in everything])
    scores = {
        "brightness": _score(brightness, labels),
        "coverage": _score(coverage, labels),
        "both": _score(np.hstack([brightness, coverage]), labels),
    }
    print(scores)
    assert scores["brightness"] < 0.5, scores
    assert scores["coverage"] < 0.4, scores
    assert scores["both"] < 0.5, scores
    # The same classifier finds the class at once when it is told how wires lie, so the test can fail.
    lying = np.array([[len(o.instances), o.truth["crossing_share"], o.truth["spans_left_right"]] for o in everything])
    assert _score(lying.astype(float), labels) > 0.75


def test_plain_statistics_do_not_give_the_class_away_in_haadf():
    settings, each = Settings(size_px=96, haadf_share=1.0), 30
    statistics = [_statistics(make(11, name, i, settings).image) for name in MORPHOLOGIES for i in range(each)]
    score = _score(np.array(statistics), np.repeat(list(MORPHOLOGIES), each))
    print(score)
    assert score < 0.55


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"size_px": 32}, "size"),
        ({"pixel_size_nm": 0.0}, "pixel size"),
        ({"pixel_size_nm": float("nan")}, "pixel size"),
        ({"dose_e_nm2": -1.0}, "dose"),
        ({"haadf_share": 1.5}, "HAADF"),
    ],
)
def test_impossible_settings_are_refused_by_name(options, word):
    with pytest.raises(UserError, match=word):
        Settings(**options)


def test_unknown_morphology_names_the_known_ones():
    with pytest.raises(UserError, match=r"'mesh'.*network"):
        make(0, "mesh", 0, SMALL)
