"""``python -m tests.e2e.measure_predicted [--work FOLDER] [--faint LOW] [--true-masks]``: predicted masks, measured.

The whole way of a user, by the commands of a user: ``nanodist synth`` makes micrographs with masks to train on (other
seeds than those of the test), ``pack`` and ``finetune`` train a small U-Net from nothing, ``predict`` segments 200
noisy, blurred micrographs, ``measure`` measures its masks. The test is that of ``tests.e2e.measure_truth``: the same
micrographs, wires of 4 to 60 pixels, and the truth is the geometry. Groups of wires:

- ``apart``: whole wires that touch no other; the bar of 8 % (median error of width and of length) is theirs;
- ``apart, border-cut``: against the length of the centre line inside the image;
- ``crossing``: wires of networks; ``bundled``: wires of bundles, which a mask does not hold one by one.

Each failure is listed with its kind: ``missed`` (the mask covers less than half of the wire), ``merged`` (the wire
that was traced runs along another true wire as well, or none was traced on a mask that is there), ``split`` (it was
traced in pieces), else ``off`` by more than 10 %. With ``--work`` the folder is kept, and only what is missing is done
again. The last line is one JSON object; exit code 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from scipy.spatial import cKDTree

from nanodist.synth import MORPHOLOGIES, Settings, make, read_instances
from nanodist.synth.write import write_image, write_instances
from tests.e2e import measure_truth
from tests.e2e.measure_truth import BANDS, PIXEL_NM, SIZES, WIDTHS, Wire, beside, failure, figures, line, touching

ROOT = Path(__file__).resolve().parents[2]
BAR = 0.08
TRAIN_SEED, CROP_PX = 1001, 128
# Micrographs of each class to train on, by size: about as many tiles of 192 px from each size.
TRAIN = {192: 20, 256: 16, 384: 9, 512: 6, 768: 4}
ALONG = 0.5  # share of a centre line that another has to cover to be along it
RECIPE: dict[str, Any] = {
    "task": "segmentation",
    "encoder": {
        "source": "timm:resnet18",
        "weights": "random",
        "trunk_options": {"channels": [16, 32, 64, 128]},
        "normalise": "image",
    },
    "decoder": {"name": "unet", "width": 64},
    "data": {"test_share": 0.02, "validation_share": 0.02},
    "views": {
        "size_px": CROP_PX,
        "crop_px": [CROP_PX, CROP_PX],
        "rotation": "right_angles",
        "contrast": 0.3,
        "brightness": 0.1,
        "gamma": 0.3,
        "blur_probability": 0.0,
        "noise_probability": 0.0,
    },
    "train": {
        "steps": 300,
        "global_batch_size": 8,
        "batch_norm": "batch",
        "evaluate_every_steps": 150,
        "patience": 0,
    },
    "optimizer": {"name": "adamw", "lr": 2.0e-3, "warmup_steps": 30, "clip_norm": 1.0, "weight_decay": 0.05},
    "symmetries": 1,
    "engine": {"device": "cpu", "threads": 1},
    "tracking": {"mode": "disabled"},
}
F64 = npt.NDArray[np.float64]


@dataclass
class Seen:
    """What ``nanodist measure`` wrote of one image: its row, the rows of its wires, their centre lines (x, y in nm)."""

    image: dict[str, str]
    wires: list[dict[str, Any]]
    lines: list[F64]


def nanodist(*arguments: str) -> None:
    """A command of nanodist; it has to succeed."""
    environ = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "nanodist", *arguments], env=environ, check=True)


def recipe_of(crop_px: int) -> dict[str, Any]:
    """The recipe with crops (and so windows) of another size, and as many fewer of them as they are longer."""
    views = {**RECIPE["views"], "size_px": crop_px, "crop_px": [crop_px, crop_px]}
    batch = RECIPE["train"]["global_batch_size"] * CROP_PX // crop_px
    return {**RECIPE, "views": views, "train": {**RECIPE["train"], "global_batch_size": batch}}


def trained(work: Path, steps: int, crop_px: int = CROP_PX) -> Path:
    """The run of a segmentation that was trained on synthetic micrographs."""
    for size, count in TRAIN.items():
        folder = work / "train" / str(size)
        if not folder.exists():
            made = ("--size", str(size), "--micrographs", str(count), "--seed", str(TRAIN_SEED))
            nanodist("synth", "wires", "--out", str(folder), *made, "--pixel-size-nm", str(PIXEL_NM))
    store, run = work / "store", work / "run"
    if not (store / "manifest.json").exists():
        tile = max(192, crop_px)
        sources = [str(work / "train" / str(size) / "images") for size in TRAIN if size >= tile]
        cut = ("--masks", "images=truth", "--tile", str(tile), "--near-duplicates", "keep")
        nanodist("pack", *sources, *cut, "--out", str(store))
    recipe = work / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(crop_px)))
    if not (run / "scores.json").exists():
        nanodist("finetune", str(recipe), f"data.store={store}", f"run_dir={run}", f"train.steps={steps}")
    return run


def test_jobs(micrographs: int) -> list[tuple[str, int]]:
    """(class, index) of the micrographs of ``tests.e2e.measure_truth``."""
    jobs = [(name, index) for index in range(-(-micrographs // len(MORPHOLOGIES))) for name in MORPHOLOGIES]
    return jobs[:micrographs]


def name_of(job: tuple[str, int]) -> str:
    """Name of a test micrograph's files."""
    return f"{job[0]}-{job[1]:05d}"


def piece_of(job: tuple[str, int]) -> str:
    """The folder of a test micrograph: some of one size each, so that folders can be done side by side."""
    return f"{SIZES[job[1] % len(SIZES)]}-{job[1] // 15}"


def write_test(work: Path, jobs: Sequence[tuple[str, int]], seed: int) -> Path:
    """Write the micrographs of the test and their truth."""
    folder = work / "test"
    for part in ("images", "truth"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for job in jobs:
        done = folder / "truth" / f"{name_of(job)}.json"
        if done.exists():
            continue
        made = make(seed, *job, Settings(SIZES[job[1] % len(SIZES)], PIXEL_NM))
        images = folder / "images" / piece_of(job)
        images.mkdir(exist_ok=True)
        write_image(images / f"{name_of(job)}.tif", made.image, PIXEL_NM)
        write_instances(folder / "truth" / f"{name_of(job)}.instances.tif", made.instances, PIXEL_NM)
        done.write_text(json.dumps(made.truth))
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    """A CSV file as rows."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_measured(folder: Path) -> dict[str, Seen]:
    """What ``nanodist measure --rois`` wrote, by the name of the image."""
    wires: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows_of(folder / "wires.csv"):
        read = {k: float(row[k]) if row[k] else None for k in ("width_mean_nm", "contour_length_nm")}
        wires[row["image"]].append(read)
    found = {}
    for number, row in enumerate(rows_of(folder / "images.csv"), start=1):
        name = Path(row["image"]).stem
        lines: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for vertex in rows_of(folder / "rois" / f"{number:05d}-{name}.centre-lines.csv"):
            lines[int(vertex["index"])].append((float(vertex["axis-1"]) + 0.5, float(vertex["axis-0"]) + 0.5))
        dense = [_dense(np.asarray(lines[i])) * PIXEL_NM for i in range(len(wires[row["image"]]))]
        found[name] = Seen(row, wires[row["image"]], dense)
    return found


def _dense(vertices: F64) -> F64:
    """The polyline with a point every half a pixel."""
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(vertices, axis=0).T))])
    at = np.linspace(0.0, arc[-1], max(2, round(2 * arc[-1])))
    return np.stack([np.interp(at, arc, vertices[:, k]) for k in (0, 1)], axis=1)


def _along(points: F64, tree: cKDTree, reach: float) -> float:
    """Share of ``points`` that lie within ``reach`` of the points of ``tree``."""
    return float((tree.query(points)[0] <= reach).mean())


@dataclass
class Matched:
    """A true wire beside what was measured, and how it failed (empty: it did not)."""

    wire: Wire
    kind: str = ""


def check(name: str, truth: dict[str, Any], instances: npt.NDArray[np.bool_], mask: Any, seen: Seen) -> list[Matched]:
    """Match the wires of one micrograph to the traced ones.

    Args:
        name: said of failures.
        truth: JSON of ``nanodist synth``.
        instances: (n, H, W) true masks.
        mask: (H, W) predicted mask.
        seen: what was measured from it.
    """
    field_nm = truth["size_px"] * PIXEL_NM
    trees = [cKDTree(traced) for traced in seen.lines]
    visible = [_visible(wire, field_nm) for wire in truth["wires"]]
    reach = [0.35 * wire["width_nm"] + PIXEL_NM for wire in truth["wires"]]
    share = np.array([[_along(points, tree, r) if len(points) else 0.0 for tree in trees]
                      for points, r in zip(visible, reach, strict=True)]).reshape(len(visible), len(trees))  # fmt: skip
    meets = touching(instances)
    result = []
    for number, wire in enumerate(truth["wires"]):
        if not len(visible[number]):
            continue
        best = int(share[number].argmax()) if trees else -1
        row = seen.wires[best] if best >= 0 and share[number, best] >= ALONG else None
        one = beside(name, number, wire, _group(truth["morphology"], meets[number], wire["border_cut"]), row)
        own = cKDTree(visible[number])
        pieces = sum(_along(traced, own, reach[number]) >= 0.8 and share[number, j] >= 0.15
                     for j, traced in enumerate(seen.lines))  # fmt: skip
        kind = ""
        if failure(one):
            here = instances[number]
            if np.count_nonzero(mask[here]) < 0.5 * here.sum():
                kind = "missed"
            elif row is not None and (share[:, best] >= ALONG).sum() > 1:
                kind = "merged"
            elif pieces > 1:
                kind = "split"
            else:
                kind = "merged" if row is None else "off"
        result.append(Matched(one, kind))
    return result


def _visible(wire: dict[str, Any], field_nm: float) -> F64:
    points = np.asarray(wire["centre_line_nm"])
    return points[np.all((points >= 0) & (points <= field_nm), axis=1)]


def _group(morphology: str, meets: bool, border_cut: bool) -> str:
    if meets:
        return "bundled" if morphology == "bundle" else "crossing"
    return "apart, border-cut" if border_cut else "apart"


def report(matched: Sequence[Matched]) -> dict[str, Any]:
    """Print the table and the failures; the figures of each group."""
    groups: dict[str, list[Matched]] = defaultdict(list)
    for one in matched:
        if WIDTHS[0] <= one.wire.width <= WIDTHS[1]:
            groups[one.wire.group].append(one)
    print("| from predicted masks | wires | width: median error | 95 % below | bias | length: median error | 95 % below"
          " | bias | lost | missed, merged, split, off |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    found: dict[str, Any] = {}
    for name in [name for name in ("apart", "apart, border-cut", "crossing", "bundled") if name in groups]:
        rows = {name: groups[name]}
        if name == "apart":
            for low, high in pairwise(BANDS):
                rows[f"{name}, {low:g} to {high:g} px wide"] = [m for m in groups[name] if low <= m.wire.width < high]
        for label, part in rows.items():
            if part:
                kinds = Counter(m.kind for m in part)
                of = figures([m.wire for m in part])
                counted = {kind: kinds[kind] for kind in ("missed", "merged", "split", "off")}
                found[label] = {**of, **counted}
                print(line(label, of) + " " + ", ".join(map(str, counted.values())) + " |")
    print("\nfailures (not found, no width, or off by more than 10 %; of wires that meet only counted, in the table):")
    for one in matched:
        if one.kind and one.wire.group in ("apart", "apart, border-cut"):
            inside = WIDTHS[0] <= one.wire.width <= WIDTHS[1]
            beyond = "" if inside else " (not among the 4 to 60 px of the table)"
            print(f"- {one.wire.name}, {one.wire.group}: {one.kind}: {failure(one.wire)}{beyond}")
    return found


def percolation(jobs: Sequence[tuple[str, int]], truths: dict[str, dict[str, Any]], seen: dict[str, Seen]) -> float:
    """Print where percolation differs from that of the geometry; the share that agrees."""
    agree = 0
    for name in map(name_of, jobs):
        true = measure_truth.percolates(truths[name]["wires"], truths[name]["size_px"] * PIXEL_NM)
        row = seen[name].image if name in seen else {}
        said = tuple(row.get(f"spans_{way}") == "True" for way in ("left_right", "top_bottom"))
        agree += said == true
        if said != true:
            print(f"- {name}: percolation measured {said}, true {true}")
    print(f"\npercolation: {agree} of {len(jobs)} micrographs agree")
    return agree / len(jobs)


def measured(work: Path, run: Path, faint: float | None, images: Path) -> Path:
    """Predict the masks of a folder of micrographs and measure them; where the sizes are."""
    predicted, sizes = work / predicted_in(faint) / images.name, work / f"sizes{_mark(faint)}" / images.name
    if not (predicted / "report.json").exists():
        low = () if faint is None else (f"--faint={faint}",)
        nanodist("predict", str(run), str(images), "--out", str(predicted), "--threads", "1", *low)
    if not sizes.exists():
        sizes.parent.mkdir(parents=True, exist_ok=True)
        nanodist("measure", str(predicted / "masks"), "--as", "mask", "--rois", "--no-overlays", "--out", str(sizes))
    return sizes


def predicted_in(faint: float | None) -> str:
    """Name of the folder of predictions, of which there is one for each threshold."""
    return f"predicted{_mark(faint)}"


def _mark(faint: float | None) -> str:
    return "" if faint is None else f"-{faint:g}"


def compare(
    work: Path, run: Path, jobs: Sequence[tuple[str, int]], seed: int, workers: int, faint: float | None = None
) -> dict[str, Any]:
    """Predict, measure, compare with the truth, and print."""
    test = write_test(work, jobs, seed)
    seen: dict[str, Seen] = {}
    with ThreadPoolExecutor(workers) as pool:
        for sizes in pool.map(partial(measured, work, run, faint), sorted((test / "images").iterdir())):
            seen |= read_measured(sizes)
    truths, matched, dice = {}, [], []
    for job in jobs:
        name = name_of(job)
        truths[name] = truth = json.loads((test / "truth" / f"{name}.json").read_text())
        instances = read_instances(test / "truth" / f"{name}.instances.tif")
        mask = tifffile.imread(work / predicted_in(faint) / piece_of(job) / "masks" / f"{name}.tif") > 0
        union = instances.any(axis=0)
        dice.append(2 * np.count_nonzero(mask & union) / max(1, np.count_nonzero(mask) + np.count_nonzero(union)))
        none = Seen({}, [], [])
        matched += check(f"{name} ({truth['size_px']} px)", truth, instances, mask, seen.get(name, none))
    found = report(matched)
    found["dice_median"], found["dice_least"] = float(np.median(dice)), float(np.min(dice))
    print(f"\nDice of the masks: median {found['dice_median']:.3f}, least {found['dice_least']:.3f}")
    found["percolation_agreement"] = percolation(jobs, truths, seen)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run, print, and say whether the bars hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--micrographs", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2, help="Predictions and measurements at a time.")
    parser.add_argument("--seed", type=int, default=0, help="Of the test.")
    parser.add_argument("--steps", type=int, default=RECIPE["train"]["steps"], help="Of the training.")
    parser.add_argument("--crop-px", type=int, default=CROP_PX, help="Crops of the training, windows of the test.")
    parser.add_argument("--faint", type=float, help="Lower threshold of the predictions (default: none).")
    parser.add_argument("--work", type=Path, help="Folder that is kept; what is there is not done again.")
    parser.add_argument("--true-masks", action="store_true", help="Measure the true masks too, as measure_truth does.")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        work = work.resolve()
        found = compare(
            work,
            trained(work, args.steps, args.crop_px),
            test_jobs(args.micrographs),
            args.seed,
            args.workers,
            args.faint,
        )
    apart = found["apart"]
    fine = all(apart[f"{what}_median_error"] <= BAR for what in ("width", "length"))
    fine &= found["percolation_agreement"] == 1.0
    if args.true_masks:
        print("\nfrom true masks:")
        true = measure_truth.report(measure_truth.run(args.micrographs, args.workers, args.seed))
        found["true_masks"] = true
        fine &= all(measure_truth.holds(true[name]) for name in ("whole", "union, apart"))  # type: ignore[arg-type]
        fine &= true["percolation_agreement"] == 1.0
    print(json.dumps({**found, "holds": fine}))
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
