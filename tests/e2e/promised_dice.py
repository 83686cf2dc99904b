"""``python -m tests.e2e.promised_dice RUN...``: does the Dice that masks promise tell the poor ones from the good?

For finished segmentation runs with a test store: the promised Dice of each of its images
(:mod:`nanodist.downstream.segment.promise`) against the true one of ``images.csv``, as Spearman's correlation over
images; beside it that of the mean margin between the two likeliest classes over all pixels, the plain way; and the
true Dice of the third of images with the lowest promise and of the others. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from nanodist.downstream.finetune.recipe import load_recipe
from nanodist.downstream.segment.predict import LoadedSegmenter, load_segmenter
from nanodist.downstream.segment.promise import DicePromise
from nanodist.downstream.segment.windows import strips
from nanodist.shards import Store

COLUMNS = ("images", "Spearman, promised", "Spearman, margin", "Dice, lowest third", "Dice, others", "mean promise")


def true_dice(run: Path, values: tuple[int, ...]) -> dict[str, float]:
    """For each test image the mean Dice over its classes but the background, without those that nobody sees."""
    with open(run / "images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = [f"dice_{value}" for value in values if value] or [f"dice_{values[0]}"]
    means = {}
    for row in rows:
        each = [float(row[name]) for name in wanted if row[name]]
        if each and np.isfinite(each).any():
            means[row["sample"]] = float(np.nanmean(each))
    return means


def told(loaded: LoadedSegmenter, pixels: np.ndarray) -> tuple[float, float]:
    """The promised Dice of a mask, and the margin between the two likeliest classes, averaged over all pixels."""
    promise, total = DicePromise(len(loaded.values)), 0.0
    for _, likely in strips(loaded.model, pixels, loaded.crop_px, loaded.size_px, loaded.symmetries):
        promise.add(likely, likely.argmax(0))
        best = np.sort(likely, axis=0)[-2:]
        total += float((best[1] - best[0]).sum())
    return promise.dice(), total / pixels.size


def scored(run: Path) -> dict[str, Any]:
    """One row of the table."""
    loaded = load_segmenter(run)
    store = Store.open(load_recipe(str(run / "recipe.yaml"), []).data.test_store)
    places = {sample.key: i for i, sample in enumerate(store.samples)}
    true = {key: dice for key, dice in true_dice(run, loaded.values).items() if key in places}
    promised, plain = np.asarray([told(loaded, store.read(places[key])) for key in true]).T
    dice = np.asarray(list(true.values()))
    lowest = np.argsort(promised)[: len(dice) // 3]
    others = np.setdiff1d(np.arange(len(dice)), lowest)
    ranks = [float(spearmanr(each, dice).statistic) for each in (promised, plain)]
    return dict(
        zip(COLUMNS, [len(dice), *ranks, dice[lowest].mean(), dice[others].mean(), promised.mean()], strict=True)
    )


def main(argv: list[str] | None = None) -> int:
    """Predict, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    args = parser.parse_args(argv)
    print("| run | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (1 + len(COLUMNS)))
    found = {}
    for run in args.runs:
        row = found[run.name] = scored(run)
        print(f"| {run.name} | {row['images']} | " + " | ".join(f"{row[name]:.2f}" for name in COLUMNS[1:]) + " |")
    print(json.dumps({name: {key: float(value) for key, value in row.items()} for name, row in found.items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
