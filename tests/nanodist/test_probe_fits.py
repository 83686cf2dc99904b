"""The classifiers of the probe against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from nanodist.downstream.linear import SoftmaxRegression, balanced_weights
from nanodist.downstream.neighbours import knn_predict, knn_predict_surely, unit_rows
from nanodist.downstream.probe import feature_spaces


def blobs(counts: list[int], d: int, seed: int = 0, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(len(counts), d))
    y = np.repeat(np.arange(len(counts)), counts)
    x = centres[y] + spread * generator.normal(size=(len(y), d)) + 3.0
    return x / np.sqrt(d), y


@pytest.mark.parametrize(("counts", "d"), [([5, 9, 14], 4), ([4, 4, 4, 4], 60), ([1, 1, 1], 30), ([7, 3], 12)])
@pytest.mark.parametrize("c", [0.1, 10.0, 1000.0])
def test_the_optimum_is_that_of_scikit_learn(counts: list[int], d: int, c: float) -> None:
    x, y = blobs(counts, d, spread=1.5)
    ours = SoftmaxRegression(x, y, len(counts), tolerance=1e-9, max_iterations=3000).fit(c)
    same = 2 * c if len(counts) == 2 else c  # scikit-learn has one weight vector for two classes
    theirs = LogisticRegression(C=same, class_weight="balanced", tol=1e-8, max_iter=10000).fit(x, y)
    probes = np.random.default_rng(1).normal(size=(50, d)) / np.sqrt(d) + x.mean(0)
    logits = probes @ ours[:-1] + ours[-1]
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    assert np.abs(shares - theirs.predict_proba(probes)).max() < 1e-3
    fitted = SoftmaxRegression(x, y, len(counts), tolerance=1e-9, max_iterations=3000)
    answers, confidence = fitted.predict_surely(probes, c)
    np.testing.assert_allclose(confidence, shares.max(1), atol=1e-6)
    np.testing.assert_array_equal(answers, shares.argmax(1))
    quick = SoftmaxRegression(x, y, len(counts)).predict(probes, [c])[0]
    assert (quick == theirs.predict(probes)).mean() >= 0.96


def test_a_path_gives_what_single_fits_give() -> None:
    x, y = blobs([6, 6, 6], 20, spread=2.0)
    grid = (100.0, 0.1, 1.0)
    path = SoftmaxRegression(x, y, 3).predict(x, grid)
    for row, c in zip(path, grid, strict=True):
        single = LogisticRegression(C=c, class_weight="balanced", tol=1e-8, max_iter=5000).fit(x, y)
        assert (row == single.predict(x)).mean() > 0.99


def test_absent_classes_and_constant_features() -> None:
    x, y = blobs([5, 5], 3, spread=0.1)
    predicted = SoftmaxRegression(x, np.where(y == 0, 1, 3), 5).predict(x, [1000.0])
    np.testing.assert_array_equal(predicted[0], np.where(y == 0, 1, 3))
    assert set(SoftmaxRegression(np.ones((4, 2)), np.array([0, 1, 0, 1]), 2).predict(np.ones((3, 2)), [1.0])[0]) <= {
        0,
        1,
    }
    assert set(SoftmaxRegression(x, np.full(10, 2), 3).predict(x, [1.0])[0]) == {2}


def test_balanced_weights() -> None:
    weights = balanced_weights(np.array([0, 0, 0, 2]), 3)
    np.testing.assert_allclose(weights, [2 / 3, 2 / 3, 2 / 3, 2.0])


def test_knn_equals_scikit_learn_where_there_is_no_tie() -> None:
    x, y = blobs([20, 20], 6, spread=2.0)
    asked, _ = blobs([30, 30], 6, seed=5, spread=2.0)
    ks = (5, 1, 3)  # odd and two classes: no ties
    found = knn_predict(unit_rows(asked) @ unit_rows(x).T, y, 2, ks)
    for row, k in zip(found, ks, strict=True):
        reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(x, y)
        np.testing.assert_array_equal(row, reference.predict(asked))
        answers, confidence = knn_predict_surely(unit_rows(asked) @ unit_rows(x).T, y, 2, k)
        np.testing.assert_array_equal(answers, row)
        np.testing.assert_allclose(confidence, reference.predict_proba(asked).max(1))


def test_knn_votes_weigh_against_large_classes_and_ties_go_to_the_nearer() -> None:
    similarity = np.array([[0.9, 0.8, 0.7, 0.6]])
    assert knn_predict(similarity, np.array([1, 0, 0, 0]), 2, [4])[0, 0] == 1
    # Of three votes of 2/3 of one class and one of 2 of the other, shares are a half.
    assert knn_predict_surely(similarity, np.array([1, 0, 0, 0]), 2, 4)[1].tolist() == [0.5]
    assert knn_predict(similarity, np.array([1, 0, 0, 1]), 2, [2])[0, 0] == 1
    assert knn_predict(similarity[:, ::-1], np.array([1, 0, 0, 1]), 2, [4])[0, 0] in (0, 1)


def test_rotating_to_principal_axes_keeps_all_products_of_training_rows() -> None:
    features = np.random.default_rng(0).normal(size=(12, 40)) * np.linspace(0.1, 5, 40)
    train = np.arange(9)
    space = feature_spaces(features, train)["standardised"]
    standard = (features - features[train].mean(0)) / features[train].std(0)
    standard = np.clip(standard, -8, 8)
    standard -= standard[train].mean(0)
    standard /= np.sqrt((standard[train] ** 2).sum(1).mean())
    np.testing.assert_allclose(space @ space[train].T, standard @ standard[train].T, atol=1e-8)
    assert space.shape[1] <= 8


def test_a_collapsed_encoder_gives_finite_spaces() -> None:
    for space in feature_spaces(np.full((6, 5), 0.3), np.arange(4)).values():
        assert np.isfinite(space).all()
