"""Multinomial logistic regression for few labels and many features, exact and fast enough to run thousands of times.

The problem is scikit-learn's ``LogisticRegression(C=C, class_weight="balanced")``: it minimises
``0.5 |W|^2 + C sum_i w_i loss_i`` with a free intercept, and the same optimum is reached (with two classes as well the
softmax has one weight vector a class, which is scikit-learn's binary form at 2 C). Two things make it quick.
The weights of the optimum lie in the span of the centred training rows (representer theorem), so n rows of d features
become n x min(n, d) by a rotation. In that rotated basis the curvature at the start is diagonal, so L-BFGS runs on
variables scaled to unit curvature, and a path over ``C`` starts each fit from the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


def balanced_weights(y: I64, classes: int) -> F64:
    """Weight of each sample so that all classes present weigh the same and the mean weight is 1."""
    counts = np.bincount(y, minlength=classes)
    return len(y) / (np.count_nonzero(counts) * counts[y].astype(np.float64))


class SoftmaxRegression:
    """Logistic regression on rows ``x`` (n, d) with classes ``y`` (n,) in ``range(classes)``.

    A class without a training row is never predicted.

    Args:
        tolerance: largest entry of the gradient, in units where the loss is a weighted mean, at which a fit ends.
        max_iterations: bound of L-BFGS iterations a fit; features this many iterations away from separable are rare.
    """

    def __init__(
        self, x: npt.NDArray[np.floating], y: I64, classes: int, tolerance: float = 1e-5, max_iterations: int = 300
    ) -> None:
        self._present, self._y = np.unique(y, return_inverse=True)
        self._classes, self._tolerance, self._max_iterations = classes, tolerance, max_iterations
        self._weights = balanced_weights(np.asarray(self._y), len(self._present)) / len(y)
        values: F64 = np.asarray(x, np.float64)
        self._centre = self._weights @ values
        rows: F64 = values - self._centre
        self._basis, self._curvature = _rotation(rows * np.sqrt(self._weights)[:, None])
        self._z = rows @ self._basis
        self._start = np.zeros((self._z.shape[1] + 1, len(self._present)))

    def fit(self, c: float) -> F64:
        """Coefficients (d + 1, classes present) at inverse regularisation ``c``; the last row is the intercept."""
        kinds = len(self._present)
        if kinds == 1:
            return self._unrotate(self._start)
        ridge = 1.0 / (c * len(self._y))
        scale = 1.0 / np.sqrt(np.append(self._curvature / kinds + ridge, 1.0 / kinds))[:, None]
        target = np.zeros((len(self._y), kinds))
        target[np.arange(len(self._y)), self._y] = 1.0

        def objective(flat: F64) -> tuple[float, F64]:
            full = flat.reshape(-1, kinds) * scale
            logits = self._z @ full[:-1] + full[-1]
            logits -= logits.max(axis=1, keepdims=True)
            exponentials = np.exp(logits)
            totals = exponentials.sum(axis=1, keepdims=True)
            loss = self._weights @ (np.log(totals[:, 0]) - logits[np.arange(len(logits)), self._y])
            residual = (exponentials / totals - target) * self._weights[:, None]
            slope = np.concatenate([self._z.T @ residual + ridge * full[:-1], residual.sum(axis=0)[None]])
            return float(loss + 0.5 * ridge * (full[:-1] ** 2).sum()), (slope * scale).ravel()

        options = {
            "maxiter": self._max_iterations,
            "gtol": self._tolerance,
            "ftol": 1e-4 * self._tolerance,
            "maxcor": 20,
        }
        found = minimize(objective, (self._start / scale).ravel(), jac=True, method="L-BFGS-B", options=options)
        self._start = found.x.reshape(-1, kinds) * scale
        return self._unrotate(self._start)

    def predict(self, x: npt.NDArray[np.floating], cs: Sequence[float]) -> I64:
        """Predicted classes of rows ``x`` (m, d) at each of ``cs``, as (len(cs), m), fitted in ascending order."""
        out = np.zeros((len(cs), len(x)), np.int64)
        for place in np.argsort(np.asarray(cs), kind="stable"):
            coefficients = self.fit(cs[place])
            out[place] = self._present[(x @ coefficients[:-1] + coefficients[-1]).argmax(axis=1)]
        return out

    def predict_surely(self, x: npt.NDArray[np.floating], c: float) -> tuple[I64, F64]:
        """Predicted classes of rows ``x`` (m, d) at ``c``, and the probability of each (m,)."""
        coefficients = self.fit(c)
        logits = x @ coefficients[:-1] + coefficients[-1]
        likely = np.exp(logits - logits.max(axis=1, keepdims=True))
        return self._present[logits.argmax(axis=1)], 1.0 / likely.sum(axis=1)

    def _unrotate(self, rotated: F64) -> F64:
        weights = self._basis @ rotated[:-1]
        return np.concatenate([weights, (rotated[-1] - self._centre @ weights)[None]])


def _rotation(rows: F64) -> tuple[F64, F64]:
    """An orthonormal basis (d, r) of the span of ``rows`` (n, d) along their principal axes, and r eigenvalues."""
    small = rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows
    values, vectors = np.linalg.eigh(small)
    keep = values > max(float(values[-1]), 1e-300) * 1e-12
    values, vectors = values[keep], vectors[:, keep]
    if rows.shape[0] < rows.shape[1]:
        vectors = (rows.T @ vectors) / np.sqrt(values)
    return vectors, values
