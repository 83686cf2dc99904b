"""``python -m tests.e2e.label_efficiency [--work FOLDER] [--figure FILE.png]``: paper 1's protocol on synthetic wires.

Five encoders (SimCLR, five seeds) are pretrained on 832 synthetic micrographs; 400 others in the four classes of Lu et
al. 2022 are classified with 1 to 80 labels a class over 20 splits of 80 to 20. As in the published set, the class
``singular`` is made of few micrographs and copies of them that are rotated or reflected (25, and three copies of each);
here the copies are known, and are one group. ``nanodist probe`` then scores the same frozen features

- by the sound protocol: splits by micrograph, settings chosen on training micrographs; and with each flaw;
- as published (``--protocol lu2022``), with all of its flaws, with each alone, and with none.

The whole network is then fine-tuned from each encoder and from random weights (``nanodist finetune``, the same splits
and labels, fewer splits since each is a training), and put together by ``nanodist compare``. Flaw 6, Dice averaged over
rows, is of masks: ``tests.e2e.row_dice``.

Printed are the label-efficiency tables and what each flaw adds; the figure has the curves. Small trunks and short
pretrainings: it is the difference between protocols that is looked at. With ``--work`` the folder is kept, and only
what is missing is done again. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from nanodist.cli import main as main_of_nanodist
from nanodist.synth.write import write_image

ROOT = Path(__file__).resolve().parents[2]
SIZE, PIXEL_NM = 128, 1.0
PRETRAIN_SEED, LABELLED_SEED = 2001, 2002
PRETRAIN_A_CLASS, LABELLED_A_CLASS, COPIES = 208, 100, 4
ENCODERS = 5
BUDGETS = "1,2,4,8,16,32,80"
SHARED = ("--splits", "20", "--test-share", "0.2", "--seeds", "1")
PRINTED = ("sound", "lu2022", "lu2022 without flaws")
# Options of nanodist probe. Baselines are there where they are drawn.
SOUND = ("--protocol", "sound", *SHARED)
PROTOCOLS = {
    "sound": (*SOUND, "--baselines", "random,texture", "--random-seeds", "2"),
    "lu2022": ("--protocol", "lu2022", "--baselines", "random,texture", "--random-seeds", "2"),
    "lu2022 without flaws": ("--protocol", "lu2022", "--flaws", "none", "--baselines", "none"),
    "lu2022, choice-on-test": ("--protocol", "lu2022", "--flaws", "choice-on-test", "--baselines", "none"),
    "lu2022, split-by-image": ("--protocol", "lu2022", "--flaws", "split-by-image", "--baselines", "none"),
    "sound, choice-on-test": ("--flaws", "choice-on-test", *SHARED, "--baselines", "none"),
    "sound, split-by-image": ("--flaws", "split-by-image", *SHARED, "--baselines", "none"),
}
DIFFERENCES = {
    "as published: the model chosen on the test": ("lu2022, choice-on-test", "lu2022 without flaws"),
    "as published: copies on both sides of a split": ("lu2022, split-by-image", "lu2022 without flaws"),
    "as published: both": ("lu2022", "lu2022 without flaws"),
    "sound, but for settings chosen on the test": ("sound, choice-on-test", "sound"),
    "sound, but for copies on both sides of a split": ("sound, split-by-image", "sound"),
    "published with its flaws over sound": ("lu2022", "sound"),
}
Curve = dict[str, tuple[float, float, float]]
RECIPE = (
    "encoder={trunk: resnet10t, trunk_options: {channels: [16, 32, 64, 128]}, normalise: image,"
    " looks: [[0.5, 0, 8], [1.0, 0, 2]]}",
    "views.size_px=48",
    "projector.widths=[256, 64]",
    "train.global_batch_size=64",
    "train.epochs=15",
    "optimizer.warmup_steps=20",
    "engine.threads=1",
    "tracking.mode=disabled",
)
TUNED_BUDGETS = (1, 8, 80)
TUNED = (
    "views={size_px: 48, crop_px: [110, 128], crop_share: null, rotation: free, exposure: image, contrast: 0.0,"
    " brightness: 0.0, gamma: 0.5, invert_probability: 0.5, blur_probability: 0.0, noise_std: [0.0, 0.09],"
    " noise_probability: 0.8}",
    "data.test_share=0.2",
    "train.steps=60",
    "train.evaluate_every_steps=15",
    "optimizer.warmup_steps=6",
    "symmetries=4",
    "engine.threads=1",
    "tracking.mode=disabled",
)
STARTS = {
    "given": ("train.layer_decay=0.75", "train.batch_norm=frozen"),
    "random": ("train.layer_decay=1.0", "train.batch_norm=batch"),
}


def nanodist(*arguments: str) -> None:
    """A command of nanodist; it has to succeed."""
    environ = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "nanodist", *arguments], env=environ, check=True)


def synthesise(folder: Path, count: int, seed: int, *more: str) -> None:
    """Micrographs of 128 px, that many of each class, bright field and HAADF mixed."""
    if not folder.exists():
        made = ("--size", str(SIZE), "--micrographs", str(count), "--seed", str(seed), "--haadf-share", "0.4")
        nanodist("synth", "wires", "--out", str(folder), *made, "--pixel-size-nm", str(PIXEL_NM), *more)


def stores(work: Path) -> tuple[Path, Path]:
    """The store to pretrain on, and the labelled one."""
    unlabelled, labelled = work / "pretrain", work / "labelled"
    synthesise(work / "synth", PRETRAIN_A_CLASS, PRETRAIN_SEED)
    if not (unlabelled / "manifest.json").exists():
        kept = ("--tile", str(SIZE), "--near-duplicates", "keep", "--out", str(unlabelled))
        nanodist("pack", str(work / "synth" / "images"), *kept)
    if not (labelled / "manifest.json").exists():
        table = labelled_images(work)
        asked = ("--labels", f"{table}:label", "--groups", f"{table}:micrograph")
        kept = ("--tile", str(SIZE), "--near-duplicates", "keep", "--out", str(labelled))
        nanodist("pack", str(work / "images"), *asked, *kept)
    return unlabelled, labelled


def labelled_images(work: Path) -> Path:
    """Write 100 images a class, those of ``singular`` with copies; the table of their labels and micrographs."""
    synthesise(work / "whole", LABELLED_A_CLASS, LABELLED_SEED)
    rows = []
    for path in sorted((work / "whole" / "images").rglob("*.tif")):
        label, number = path.parent.name, int(path.stem.rsplit("-", 1)[1])
        pixels = tifffile.imread(path)
        copies = COPIES if label == "singular" else 1
        if number >= LABELLED_A_CLASS // copies:
            continue
        for copy in range(copies):
            target = work / "images" / label / f"{path.stem}-{copy}.tif"
            target.parent.mkdir(parents=True, exist_ok=True)
            turned = np.rot90(pixels, copy)
            write_image(target, np.ascontiguousarray(turned[:, ::-1] if copy % 2 else turned), PIXEL_NM)
            rows.append([f"{label}/{target.name}", label, path.stem])
    table = work / "labels.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([["file", "label", "micrograph"], *rows])
    return table


def encoders(folder: Path, store: Path, seeds: Sequence[int], changes: Sequence[str] = ()) -> list[Path]:
    """Runs in ``folder`` of encoders that are pretrained with ``changes`` of the recipe."""
    runs = [folder / str(seed) for seed in seeds]
    for seed, run in zip(seeds, runs, strict=True):
        whole = run.with_suffix(".whole")
        if not whole.exists():
            nanodist("pretrain", "demo", f"data.store={store}", f"run_dir={run}", f"seed={seed}", *RECIPE, *changes)
            whole.touch()
    return runs


def probe(work: Path, runs: Mapping[str, Sequence[Path]], store: Path, name: str, *options: str) -> dict[str, Any]:
    """The scores of one protocol for encoders and their seeds, from features that are shared by all."""
    out = work / "probes" / name
    if not (out / "scores.json").exists():
        asked = [f"{encoder}={run}" for encoder, each in runs.items() for run in each]
        shared = ("--labels-per-class", BUDGETS, "--short-classes", "cap", "--features", str(work / "features"))
        if main_of_nanodist(["probe", *asked, "--store", str(store), "--out", str(out), *shared, *options]):
            raise SystemExit(f"the probe {name} failed")
    found: dict[str, Any] = json.loads((out / "scores.json").read_text())
    return found


def tuned(work: Path, encoders: Sequence[Path], store: Path, splits: int) -> dict[str, Any]:
    """The whole network, fine-tuned from each encoder and from as many random starts; what they scored, compared."""
    runs = []
    for split, budget in itertools.product(range(splits), TUNED_BUDGETS):
        for (seed, encoder), (weights, options) in itertools.product(enumerate(encoders), STARTS.items()):
            run = work / "tuned" / f"{weights}-{budget}-{split}-{seed}"
            runs.append(str(run))
            if (run / "scores.json").exists():
                continue
            asked = (f"encoder.source={encoder}", f"encoder.weights={weights}", f"run_dir={run}", f"seed={seed}")
            labels = (f"data.labels_per_class={budget}", f"data.split_seed={split}", f"data.store={store}")
            if main_of_nanodist(["finetune", "general", *asked, *labels, *TUNED, *options]):
                raise SystemExit(f"the fine-tuning {run} failed")
            shutil.rmtree(run / "checkpoints")
    out = work / "compared"
    seeds = f"resnet10t={','.join(map(str, encoders))}"
    if main_of_nanodist(["compare", *runs, "--encoders", seeds, "--out", str(out)]):
        raise SystemExit("the comparison of the fine-tunings failed")
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return found


def tuned_curves(compared: dict[str, Any]) -> dict[str, Curve]:
    """Of each start the mean and interval over labels per class."""
    found: dict[str, Curve] = {}
    for row in compared["rows"]:
        found.setdefault(row["setting"], {})[str(row["labels"])] = (row["mean"], row["low"], row["high"])
    return found


def curves(scores: dict[str, Any]) -> dict[str, Curve]:
    """Of each encoder the mean and interval of a linear probe over labels per class."""
    found: dict[str, Curve] = {}
    for row in scores["summary"]:
        if row["method"] == "linear" and row["labels_per_class"] != "all":
            bounds = (row["mean"], row["low"], row["high"])
            found.setdefault(row["encoder"], {})[str(row["labels_per_class"])] = bounds
    return found


def report(all_curves: dict[str, dict[str, Curve]]) -> dict[str, Any]:
    """Print the curves, and what each flaw adds to those of the pretrained encoder; the differences."""
    budgets = BUDGETS.split(",")
    print("| protocol | features | " + " | ".join(budgets) + " |\n|" + "---|" * (2 + len(budgets)))
    for protocol in PRINTED:
        for encoder, curve in all_curves[protocol].items():
            cells = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in (curve[b] for b in budgets)]
            print(f"| {protocol} | {encoder} | " + " | ".join(cells) + " |")
    print("\n| what the flaw adds | " + " | ".join(budgets) + " |\n|" + "---|" * (1 + len(budgets)))
    added: dict[str, Any] = {}
    for label, (protocol, base) in DIFFERENCES.items():
        new, old = all_curves[protocol]["simclr"], all_curves[base]["simclr"]
        added[label] = {b: new[b][0] - old[b][0] for b in budgets}
        print(f"| {label} | " + " | ".join(f"{value:+.3f}" for value in added[label].values()) + " |")
    return added


def print_tuned(compared: dict[str, Any], splits: int) -> None:
    """The fine-tuned networks, and their paired differences."""
    budgets = [str(b) for b in TUNED_BUDGETS]
    print(f"\n| fine-tuned, sound, {splits} splits | " + " | ".join(budgets) + " |\n|" + "---|" * (1 + len(budgets)))
    for name, curve in tuned_curves(compared).items():
        cells = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in (curve[b] for b in budgets)]
        print(f"| {name} | " + " | ".join(cells) + " |")
    apart = {str(row["labels"]): row for row in compared["differences"]}
    cells = [f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" for row in (apart[b] for b in budgets)]
    print("| difference, paired | " + " | ".join(cells) + " |")


LINES = {
    "simclr": ("pretrained, linear", "#0072b2", "o-"),
    "texture": ("texture features, linear", "#e69f00", "o-"),
    "random": ("random trunk, linear", "#999999", "o-"),
    "pretrained, fine-tuned": ("pretrained, fine-tuned", "#0072b2", "s--"),
    "from scratch": ("from scratch", "#999999", "s--"),
}


def draw(path: Path, panels: dict[str, dict[str, Curve]]) -> None:
    """The label-efficiency figure: a panel for each protocol, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.9), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    ticks = [int(b) for b in BUDGETS.split(",")]
    for ax, (title, panel) in zip(axes, panels.items(), strict=True):
        for name, curve in panel.items():
            label, colour, style = LINES[name]
            mean, low, high = np.array(list(curve.values())).T
            at = [int(b) for b in curve]
            ax.plot(at, mean, style, color=colour, markersize=4, linewidth=1.2, label=label)
            ax.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
        ax.set(xscale="log", xlabel="labels per class", title=title, ylim=(0.2, 1.0))
        ax.set_xticks(ticks, [str(value) for value in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("balanced accuracy")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print the tables, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="Folder that is kept; what is there is not done again.")
    parser.add_argument("--figure", type=Path, help="Where to draw the curves, as PNG.")
    parser.add_argument("--tuned-splits", type=int, default=1, help="Of the fine-tunings; 0: none.")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        unlabelled, labelled = stores(work)
        runs = encoders(work / "runs", unlabelled, range(ENCODERS))
        scores = {name: probe(work, {"simclr": runs}, labelled, name.replace(", ", "-").replace(" ", "-"), *options)
                  for name, options in PROTOCOLS.items()}  # fmt: skip
        all_curves = {name: curves(one) for name, one in scores.items()}
        added = report(all_curves)
        panels = {"sound": dict(all_curves["sound"]), "as published, with its flaws": all_curves["lu2022"]}
        found: dict[str, Any] = {"curves": all_curves, "added": added}
        if args.tuned_splits:
            compared = tuned(work, runs, labelled, args.tuned_splits)
            print_tuned(compared, args.tuned_splits)
            panels["sound"] |= tuned_curves(compared)
            found["tuned"] = {"rows": compared["rows"], "differences": compared["differences"]}
    if args.figure:
        draw(args.figure, panels)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
