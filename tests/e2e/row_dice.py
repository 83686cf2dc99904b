"""``python -m tests.e2e.row_dice [--work FOLDER] [--micrographs 60]``: Dice as Lu et al. 2022 scored it, and per image.

Their Dice of an image is soft (of probabilities) and averaged over its rows of pixels; nanodist's is hard and of the
whole image. Both are taken of the same predictions here: of the segmentation that ``tests.e2e.measure_predicted``
trains (with ``--work``, its folder), on its noisy micrographs. Beside the sums of both goes ``SMOOTH``, so that a row
without a wire is near 1 where nothing at all is predicted, and far below it where small probabilities add up along the
row. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from nanodist.downstream.segment.predict import load_segmenter
from nanodist.downstream.segment.windows import strips
from nanodist.synth import read_instances
from tests.e2e.measure_predicted import RECIPE, name_of, piece_of, test_jobs, trained, write_test

SMOOTH = 1.0  # what is added to numerator and denominator
F64 = npt.NDArray[np.float64]
NAMES = ("hard, per image", "soft, per image", "soft, averaged over rows")


def dice(one: F64, other: F64, axis: int | None = None, smooth: float = SMOOTH) -> F64:
    """Dice of two maps (H, W) in [0, 1], over all pixels or along an axis."""
    both, sizes = (one * other).sum(axis), one.sum(axis) + other.sum(axis)
    return np.asarray((2 * both + smooth) / (sizes + smooth), np.float64)


def scores(likely: F64, truth: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    """The three of ``NAMES`` from probabilities (H, W) of a wire and the true mask (H, W)."""
    true = truth.astype(np.float64)
    hard = dice((likely > 0.5).astype(np.float64), true, smooth=1e-9)
    return float(hard), float(dice(likely, true)), float(dice(likely, true, axis=1).mean())


def main(argv: list[str] | None = None) -> int:
    """Predict, score both ways, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="Folder of measure_predicted; what is there is not done again.")
    parser.add_argument("--micrographs", type=int, default=60)
    args = parser.parse_args(argv)
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        loaded = load_segmenter(trained(work, RECIPE["train"]["steps"]))
        jobs = test_jobs(args.micrographs)
        folder = write_test(work, jobs, seed=0)
        for job in jobs:
            pixels = tifffile.imread(folder / "images" / piece_of(job) / f"{name_of(job)}.tif")
            shape = (loaded.crop_px, loaded.size_px, loaded.symmetries)
            likely = np.zeros(pixels.shape)
            for y, part in strips(loaded.model, pixels, *shape, lambda _: None):
                likely[y : y + part.shape[1]] = part[1:].sum(0)
            truth = read_instances(folder / "truth" / f"{name_of(job)}.instances.tif").any(axis=0)
            found[job[0]].append(scores(likely, truth))
    print("| class | micrographs | " + " | ".join(NAMES) + " |\n|" + "---|" * 5)
    document: dict[str, Any] = {}
    for name, rows in [*found.items(), ("all", [row for part in found.values() for row in part])]:
        means = np.mean(rows, axis=0)
        document[name] = dict(zip(NAMES, means.tolist(), strict=True))
        print(f"| {name} | {len(rows)} | " + " | ".join(f"{value:.3f}" for value in means) + " |")
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
