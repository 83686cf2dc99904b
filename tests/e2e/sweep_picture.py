"""The picture of a pipeline's page in the README: a small real pipeline on this machine, seen by headless Chromium.

``python -m tests.e2e.sweep_picture --out docs/sweep.png [--work FOLDER]``: synthetic wires, two pretrainings (SimCLR,
VICReg) of 120 steps, 36 fine-tunings over labels per class, seeds and tuned layers, 6 probes; then the
upper part of the page as PNG. With ``--work`` the pipeline's folder is kept, and only what is missing is run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
VIEWS = {"size_px": 48, "crop_px": [72, 96], "rotation": "free", "exposure": "image"}
HOW = {"engine": {"device": "cpu", "threads": 1}, "tracking": {"mode": "disabled"}}
PRETRAIN = {
    "views": VIEWS,
    "encoder": {"trunk": "resnet10t", "trunk_options": {"channels": [16, 32, 48, 64]}, "normalise": "image"},
    "projector": {"widths": [128, 64]},
    "train": {"steps": 120, "global_batch_size": 32, "log_every_steps": 5},
    "optimizer": {"lr": 2.0e-3, "warmup_steps": 10},
    **HOW,
}
FINETUNE = {
    "views": VIEWS,
    "symmetries": 2,
    "train": {"steps": 40, "global_batch_size": 16, "layer_decay": 0.75},
    "optimizer": {"lr": 2.0e-3, "warmup_steps": 4},
    **HOW,
}
GRID = {"labels_per_class": [1, 4, 16], "draw_seed": [0, 1, 2], "tuned_layers": [0, None]}


def run(work: Path, *arguments: str) -> None:
    """A command of ``python -m`` in ``work``; it has to succeed."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *arguments], cwd=work, env=environ, check=True)


def pipeline(work: Path, objectives: Sequence[str]) -> Path:
    """Run what is missing of the pipeline in ``work``; its page."""
    if not (work / "store").is_dir():
        made = ("--micrographs", "40", "--size", "96", "--seed", "0", "--workers", "1")
        run(work, "nanodist", "synth", "wires", "--out", "synth", *made)
        run(work, "nanodist", "pack", "synth/images", "--labels", "folder", "--tile", "96", "--out", "store")
    (work / "pretrain.yaml").write_text(json.dumps(PRETRAIN))
    (work / "finetune.yaml").write_text(json.dumps(FINETUNE))
    shared = {"store": str(work / "store")}
    probes = {**shared, "labels_per_class": "1,4,16", "splits": 1, "seeds": 4}
    sweeps = {
        "fine-tuned": {"job": "finetune", "recipe": "finetune.yaml", "overrides": shared, "grid": GRID, "pack": 24},
        "frozen": {"job": "probe", "overrides": probes, "grid": {"seed": [0, 1, 2]}, "pack": 3},
    }
    sweeps = {name: {**value, "side_by_side": 2} for name, value in sweeps.items()}
    pretrain = {"recipe": "pretrain.yaml", "overrides": shared, "grid": {"objective.name": [*objectives]}}
    (work / "wires.yaml").write_text(json.dumps({"pretrain": pretrain, "sweeps": sweeps}))
    run(work, "launch", "pipeline", "wires.yaml", "--cluster", "local", "--max-parallel", "1")
    return work / "pipelines" / "wires" / "report.html"


def browser() -> str:
    """A Chromium.

    Raises:
        SystemExit: there is none.
    """
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is installed")
    return found


def picture(page: Path, out: Path, height_px: int) -> None:
    """The upper ``height_px`` of a page as PNG.

    Raises:
        SystemExit: there is no Chromium, or it wrote nothing.
    """
    line = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={out}"]
    subprocess.run([*line, f"--window-size=1040,{height_px}", page.as_uri()], check=True, capture_output=True)
    if not out.is_file():
        raise SystemExit("the browser wrote no picture")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="PNG to write.")
    parser.add_argument("--work", type=Path, help="Folder to keep the pipeline in.")
    parser.add_argument("--objectives", default="simclr,vicreg", help="A pretraining each.")
    parser.add_argument("--height-px", type=int, default=1690, help="How much of the page.")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="nanodist-picture-") as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        picture(pipeline(work, options.objectives.split(",")), options.out.resolve(), options.height_px)
    return 0


if __name__ == "__main__":
    sys.exit(main())
