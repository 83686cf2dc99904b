"""What a segmentation scored: hard Dice, IoU and boundary F1 of every image and class, each over the whole image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from hpc import atomic
from hpc.seeding import generator
from hpc.tables import csv_text
from nanodist.downstream.finetune.recipe import FinetuneRecipe
from nanodist.downstream.segment.data import Masks

U8 = npt.NDArray[np.uint8]
SCHEMA = 1
SCORES_FILE, IMAGES_FILE = "scores.json", "images.csv"
RESAMPLES = 2000
BOUNDARY_PX = 2.0


@dataclass(frozen=True)
class ImageScores:
    """Of one image: ``number`` in the test part, and for each class its Dice, IoU and boundary F1.

    A class that neither the mask nor the prediction shows has no score (NaN).
    """

    number: int
    dice: list[float]
    iou: list[float]
    boundary_f1: list[float]


def image_scores(number: int, predicted: U8, truth: U8, classes: int) -> ImageScores:
    """Scores of one image from its predicted and true classes (H, W)."""
    dice, iou, boundary = [], [], []
    for c in range(classes):
        a, b = predicted == c, truth == c
        both, total = int((a & b).sum()), int(a.sum()) + int(b.sum())
        dice.append(2 * both / total if total else float("nan"))
        iou.append(both / (total - both) if total else float("nan"))
        boundary.append(boundary_f1(a, b) if total else float("nan"))
    return ImageScores(number, dice, iou, boundary)


def boundary_f1(predicted: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_], reach_px: float = BOUNDARY_PX) -> float:
    """F1 of two boundaries, a point counting as found within ``reach_px`` of the other (Csurka et al. 2013).

    1 where neither has a boundary, 0 where one of them has none.
    """
    edges = [mask & ~ndimage.binary_erosion(mask, border_value=1) for mask in (predicted, truth)]
    if not edges[0].any() or not edges[1].any():
        return float(edges[0].any() == edges[1].any())
    away = [ndimage.distance_transform_edt(~edge) for edge in edges]
    precision = float((away[1][edges[0]] <= reach_px).mean())
    recall = float((away[0][edges[1]] <= reach_px).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def write_scores(
    folder: Path,
    recipe: FinetuneRecipe,
    masks: Masks,
    scores: Sequence[ImageScores],
    checkpoint: str,
    fingerprint: str,
) -> str:
    """Write ``scores.json`` and ``images.csv``, and return the scores as one line."""
    groups = masks.targets.groups[masks.test]
    rows = []
    for name in ("dice", "iou", "boundary_f1"):
        table = np.asarray([getattr(one, name) for one in scores], np.float64)
        for c, value in enumerate(masks.values):
            rows.append({"metric": name, "class": value, **mean_with_interval(table[:, c], groups)})
        # Class 0 is the background, which is easy and large.
        shown = table[:, 1:]
        known = np.isfinite(shown)
        means = np.where(known.any(1), np.where(known, shown, 0).sum(1) / np.maximum(known.sum(1), 1), np.nan)
        rows.append({"metric": name, "class": "all but background", **mean_with_interval(means, groups)})
    what: dict[str, Any] = {
        "encoder": recipe.encoder.source,
        "weights": recipe.encoder.weights,
        "tuned": recipe.train.tuned,
        "decoder": recipe.decoder.name,
        "masks": recipe.data.budget,
        "split_seed": recipe.data.split_seed,
        "draw_seed": recipe.data.draw_seed,
        "seed": recipe.seed,
        "n_train": len(masks.train),
        "n_validation": len(masks.validation),
        "n_test": len(masks.test),
        "test_micrographs": len(np.unique(groups)),
    }
    document = {
        "schema": SCHEMA,
        "kind": "segmentation",
        "fingerprint": fingerprint,
        "checkpoint": checkpoint,
        "classes": list(masks.values),
        "boundary_reach_px": BOUNDARY_PX,
        "rows": [{**what, **row} for row in rows],
    }
    atomic.write_json(folder / SCORES_FILE, document)
    atomic.write_text(folder / IMAGES_FILE, _table(masks, scores))
    named = {(row["metric"], row["class"]): row for row in rows}
    said = [
        f"{label} {row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        for label, row in (
            ("Dice", named["dice", "all but background"]),
            ("IoU", named["iou", "all but background"]),
        )
    ]
    return (
        f"{', '.join(said)} without background, on {len(scores)} images of {what['test_micrographs']} unseen "
        f"micrographs; {folder / SCORES_FILE}"
    )


def mean_with_interval(values: npt.NDArray[np.float64], groups: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Mean over images, and 95 % of a bootstrap over ``groups`` (micrographs); images without a score are left out."""
    known = np.isfinite(values)
    if not known.any():
        return {"mean": None, "low": None, "high": None, "images": 0, "micrographs": 0}
    names, where = np.unique(groups[known], return_inverse=True)
    sums = np.bincount(where, values[known])
    counts = np.bincount(where)
    draws = generator(0, "segment-bootstrap").integers(0, len(names), (RESAMPLES, len(names)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    mean = float(values[known].mean())
    return {
        "mean": mean, "low": float(low), "high": float(high), "images": int(known.sum()), "micrographs": len(names)
    }  # fmt: skip


def _table(masks: Masks, scores: Sequence[ImageScores]) -> str:
    rows = []
    names = [f"{metric}_{value}" for metric in ("dice", "iou", "boundary_f1") for value in masks.values]
    for one in scores:
        number = int(masks.test[one.number])
        found = [*one.dice, *one.iou, *one.boundary_f1]
        cells = ["" if np.isnan(value) else f"{value:.6f}" for value in found]
        micrograph = masks.targets.group_names[masks.targets.groups[number]]
        rows.append([masks.dataset.keys[number], micrograph, *cells])
    return csv_text(["sample", "micrograph", *names], rows)
