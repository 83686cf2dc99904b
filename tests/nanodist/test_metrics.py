from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from nanodist.downstream import metrics


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    truth, predicted = generator.integers(0, 4, 60), generator.integers(0, 5, 60)
    matrix = metrics.confusion_matrix(truth, predicted, 6)
    np.testing.assert_array_equal(matrix, reference.confusion_matrix(truth, predicted, labels=range(6)))
    with pytest.warns(UserWarning, match="not in y_true"):
        expected = reference.balanced_accuracy_score(truth, predicted)
    assert metrics.balanced_accuracy(matrix) == pytest.approx(expected)
    assert metrics.macro_f1(matrix) == pytest.approx(reference.f1_score(truth, predicted, average="macro"))
    assert metrics.accuracy(matrix) == pytest.approx(reference.accuracy_score(truth, predicted))


def test_recall_of_an_absent_class_is_nan() -> None:
    found = metrics.recalls(np.array([[3, 1], [0, 0]]))
    assert found[0] == pytest.approx(0.75)
    assert np.isnan(found[1])
