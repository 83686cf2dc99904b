"""Scores of a classifier, from the confusion matrix alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
CALIBRATION_BINS = 10


def confusion_matrix(truth: I64, predicted: I64, classes: int) -> I64:
    """Counts (classes, classes): row = true class, column = predicted class."""
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def recalls(confusion: npt.NDArray[np.number]) -> F64:
    """Share of each true class that was found, (..., classes); NaN for a class without samples."""
    totals = confusion.sum(-1)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    return np.where(totals > 0, hits / np.where(totals > 0, totals, 1), np.nan)


def balanced_accuracy(confusion: npt.NDArray[np.number]) -> float:
    """Mean recall over the classes that have samples; one over their number is chance."""
    return float(np.nanmean(recalls(confusion)))


def macro_f1(confusion: npt.NDArray[np.number]) -> float:
    """Mean F1 over the classes that occur in the truth or in the predictions (as in scikit-learn)."""
    return float(f1_of_counts(np.diagonal(confusion), confusion.sum(0) + confusion.sum(1)))


def f1_of_counts(hits: npt.NDArray[np.number], either: npt.NDArray[np.number]) -> F64:
    """Macro F1 (...) from the right answers of each class (..., classes) and the samples that are of it plus those
    said to be of it; classes with none of either are left out."""
    there = either > 0
    f1 = np.where(there, 2.0 * hits / np.where(there, either, 1), 0.0)
    return np.asarray(f1.sum(-1) / np.maximum(there.sum(-1), 1), np.float64)


def accuracy(confusion: npt.NDArray[np.number]) -> float:
    """Share of samples that are right."""
    return float(np.trace(confusion) / confusion.sum())


def calibration_error(probabilities: F64, truth: I64, bins: int = CALIBRATION_BINS) -> float:
    """How far confidence is from being right, 0 to 1: the expected calibration error (Guo et al. 2017) over ``bins``
    equal steps of the largest of ``probabilities`` (n, classes)."""
    return error_of(calibration_gaps(probabilities.max(1), probabilities.argmax(1) == truth, bins))


def calibration_gaps(confidence: F64, right: npt.NDArray[np.bool_], bins: int = CALIBRATION_BINS) -> F64:
    """Confidence less being right (0 or 1) of each sample in the column of its bin, (n, bins)."""
    gaps = np.zeros((len(right), bins))
    gaps[np.arange(len(right)), calibration_bins(confidence, bins)] = confidence - right
    return gaps


def calibration_bins(confidence: F64, bins: int = CALIBRATION_BINS) -> I64:
    """Which of ``bins`` equal steps of [0, 1] each confidence (n,) is in."""
    return np.minimum((confidence * bins).astype(np.int64), bins - 1)


def error_of(gaps: F64) -> float:
    """The calibration error of :func:`calibration_gaps`."""
    return float(np.abs(gaps.sum(0)).sum() / len(gaps))
