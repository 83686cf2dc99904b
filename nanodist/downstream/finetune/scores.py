"""What a fine-tuned classifier scored on its test micrographs: ``scores.json`` and ``predictions.csv``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc import atomic
from hpc.tables import csv_text
from nanodist.downstream import metrics
from nanodist.downstream.bootstrap import Resamples, Tally, interval, without_excess
from nanodist.downstream.finetune.data import Labels
from nanodist.downstream.finetune.recipe import FinetuneRecipe

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
SCHEMA = 1
SCORES_FILE, PREDICTIONS_FILE = "scores.json", "predictions.csv"
RESAMPLES = 1000


def write_scores(
    folder: Path, recipe: FinetuneRecipe, labels: Labels, probabilities: F64, checkpoint: str, fingerprint: str
) -> str:
    """Write both files, and return the scores as one line.

    Args:
        folder: run directory.
        recipe, labels: of the fine-tuning.
        probabilities: (n, classes) of ``labels.test``.
        checkpoint: name of the one that predicted.
        fingerprint: of the run.
    """
    row = score_row(recipe, labels, probabilities)
    targets = labels.targets
    truth, predicted = targets.y[labels.test], probabilities.argmax(1)
    there = sorted(set(truth.tolist()))
    document = {
        "schema": SCHEMA,
        "kind": "classification",
        "fingerprint": fingerprint,
        "checkpoint": checkpoint,
        "chance": 1.0 / len(there),
        "classes": list(targets.classes),
        "test_micrographs": {targets.classes[c]: len(targets.groups_of(c, labels.test)) for c in there},
        "fewer_labels_than_asked": labels.short,
        "confusion": metrics.confusion_matrix(truth, predicted, len(targets.classes)).tolist(),
        "rows": [row],
    }
    atomic.write_json(folder / SCORES_FILE, document)
    atomic.write_text(folder / PREDICTIONS_FILE, _predictions(labels, probabilities))
    return (
        f"balanced accuracy {row['balanced_accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}] on {row['n_test']} "
        f"samples of {row['test_micrographs']} unseen micrographs (chance {document['chance']:.2f}); "
        f"{folder / SCORES_FILE}"
    )


def score_row(recipe: FinetuneRecipe, labels: Labels, probabilities: F64) -> dict[str, Any]:
    """The tidy row of one fine-tuning: what it was, and every score with what it is made of.

    ``low`` and ``high`` bound the balanced accuracy, ``macro_f1_low`` and so on the others: 95 % of one bootstrap over
    the test micrographs, within classes.
    """
    targets, test = labels.targets, labels.test
    y, predicted, classes = targets.y[test], probabilities.argmax(1), len(targets.classes)
    confusion = metrics.confusion_matrix(y, predicted, classes)
    tally = _tally(labels, predicted)
    resamples = Resamples(tally.totals, 1, RESAMPLES)
    found = interval(tally, resamples, "finetune")
    return {
        "encoder": recipe.encoder.source,
        "weights": recipe.encoder.weights,
        "tuned": recipe.train.tuned,
        "labels_per_class": recipe.data.budget,
        "split_seed": recipe.data.split_seed,
        "draw_seed": recipe.data.draw_seed,
        "seed": recipe.seed,
        "balanced_accuracy": metrics.balanced_accuracy(confusion),
        "low": found.low,
        "high": found.high,
        "macro_f1": metrics.macro_f1(confusion),
        "accuracy": metrics.accuracy(confusion),
        "calibration_error": metrics.calibration_error(probabilities, y),
        "log_loss": float(_losses(probabilities, y).mean()),
        **_bounds(probabilities, y, resamples.groups[:, targets.groups[test]]),
        "n_train": len(labels.train),
        "n_validation": len(labels.validation),
        "n_test": len(test),
        "test_micrographs": len(np.unique(targets.groups[test])),
    }


def _tally(labels: Labels, predicted: I64) -> Tally:
    targets, test = labels.targets, labels.test
    shape = (len(targets.group_names), len(targets.classes))
    hits, totals = np.zeros((1, 1, 1, *shape)), np.zeros((1, *shape))
    cells = (targets.groups[test], targets.y[test])
    np.add.at(hits[0, 0, 0], cells, predicted == targets.y[test])
    np.add.at(totals[0], cells, 1)
    return Tally(hits, totals)


def _losses(probabilities: F64, y: I64) -> F64:
    likely: F64 = probabilities[np.arange(len(y)), y]
    return -np.log(np.clip(likely, 1e-12, 1.0))


def _bounds(probabilities: F64, y: I64, weights: F64) -> dict[str, float]:
    """95 % intervals of the scores but the balanced accuracy, from how often each resample has each sample (b, n)."""
    predicted, everything = probabilities.argmax(1), weights.sum(1)
    gaps = metrics.calibration_gaps(probabilities.max(1), predicted == y)
    kinds = np.eye(probabilities.shape[1])
    either = weights @ (kinds[y] + kinds[predicted])
    hits = weights @ (kinds[y] * kinds[predicted])
    drawn = {
        "macro_f1": metrics.f1_of_counts(hits, either),
        "accuracy": hits.sum(1) / everything,
        "calibration_error": without_excess(metrics.error_of(gaps), np.abs(weights @ gaps).sum(1) / everything),
        "log_loss": weights @ _losses(probabilities, y) / everything,
    }
    bounds: dict[str, float] = {}
    for name, values in drawn.items():
        low, high = np.quantile(values, [0.025, 0.975])
        bounds |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return bounds


def _predictions(labels: Labels, probabilities: F64) -> str:
    targets, rows = labels.targets, []
    for number, row in zip(labels.test.tolist(), probabilities, strict=True):
        names = (targets.classes[targets.y[number]], targets.classes[int(row.argmax())])
        micrograph = targets.group_names[targets.groups[number]]
        rows.append([labels.dataset.keys[number], micrograph, *names, *(f"{p:.6f}" for p in row)])
    return csv_text(["sample", "micrograph", "label", "predicted", *(f"p_{name}" for name in targets.classes)], rows)
