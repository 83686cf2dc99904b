"""k nearest neighbours by cosine similarity, for many ``k`` from one sorting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nanodist.downstream.linear import balanced_weights

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


def unit_rows(x: npt.NDArray[np.floating]) -> F64:
    """Rows scaled to length 1; a row of zeros stays zero."""
    x = np.asarray(x, np.float64)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(lengths > 0, lengths, 1.0)


def knn_predict(similarity: F64, y: I64, classes: int, ks: Sequence[int]) -> I64:
    """Classes of m samples by the vote of their ``k`` most similar training samples, as (len(ks), m).

    A vote weighs the inverse of its class's number of training samples, so that a large class does not win by its size.
    Ties go to the class whose voters are nearer.

    Args:
        similarity: (m, n) cosine similarities to the n training samples.
        y: (n,) classes of the training samples.
        ks: numbers of neighbours, each at most n.
    """
    most = max(ks)
    weights = balanced_weights(y, classes)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :most]
    rows = np.arange(len(similarity))
    votes = np.zeros((len(similarity), classes))
    out = np.zeros((len(ks), len(similarity)), np.int64)
    for rank in range(most):
        who = nearest[:, rank]
        votes[rows, y[who]] += weights[who] * (1.0 + 1e-6 * similarity[rows, who])
        for place, k in enumerate(ks):
            if k == rank + 1:
                out[place] = votes.argmax(axis=1)
    return out


def knn_predict_surely(similarity: F64, y: I64, classes: int, k: int) -> tuple[I64, F64]:
    """Classes (m,) as :func:`knn_predict` gives them at ``k``, and the share of the votes that each has (m,)."""
    predicted = knn_predict(similarity, y, classes, [k])[0]
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    weights = balanced_weights(y, classes)[nearest]
    shares = (weights * (y[nearest] == predicted[:, None])).sum(axis=1) / weights.sum(axis=1)
    # Rounded so that 3 of 5 votes are one confidence, whatever the order of the sum.
    return predicted, np.round(shares, 9)
