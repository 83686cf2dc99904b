"""The pictures of reports in the docs: real runs on this machine, seen by headless Chromium.

``python -m tests.e2e.report_pictures --out docs/images [--work FOLDER] [--only run] [--sweep FOLDER] [--pairvae RUN]
[--segmentation RUN]``

- ``report-run.png``, ``report-phone.png``: synthetic wires, a pretraining of 150 steps with an online evaluation, its
  probe and the morphology of the true masks; on a desk, and 375 px wide.
- ``report-masks.png``: a segmentation of wires that starts from that encoder.
- ``report-sweep.png``: the pipeline of :mod:`tests.e2e.sweep_picture`, or the one in ``--sweep``.
- ``report-pairvae.png``: a PairVAE on synthetic pairs, short, or the run in ``--pairvae``.
- ``pairvae-*.png`` (``--only grids --pairvae RUN``): the figures of a run's evaluation, small enough for the docs.
- ``report-segmentation.png`` (``--only segmentation --segmentation RUN``): a segmentation that was trained before.

With ``--work`` the folder is kept, and only what is missing is run. The last line is JSON: bytes of pictures and pages.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.e2e.pairvae_proof import COMMON, SHORT
from tests.e2e.sweep_picture import FINETUNE, PRETRAIN, VIEWS, browser, pipeline, run

MOST_BYTES = 200_000
PAIRS = ("--samples", "24", "--seed", "0")


def wires(work: Path) -> None:
    """Synthetic wires with labels and masks, packed for training and for the test."""
    if not (work / "wires-test").is_dir():
        made = ("--micrographs", "120", "--size", "128", "--seed", "1", "--workers", "1")
        run(work, "nanodist", "synth", "wires", "--out", "wires-synth", *made)
        packed = ("wires-synth/images", "--labels", "folder", "--masks", "images=truth", "--tile", "128")
        for part in ("train", "test"):
            run(work, "nanodist", "pack", *packed, "--part", part, "--out", f"wires-{part}")


def pretraining(work: Path) -> Path:
    """A pretrained, probed and measured run."""
    wires(work)
    run_dir = work / "wires"
    recipe = {
        **PRETRAIN,
        "train": {"steps": 150, "global_batch_size": 32, "log_every_steps": 2},
        "evaluation": {"store": str(work / "wires-train"), "every_epochs": 10},
    }
    (work / "wires.yaml").write_text(json.dumps(recipe))
    run(work, "nanodist", "pretrain", "wires.yaml", "data.store=wires-train", "run_dir=wires")
    if not (run_dir / "probe" / "scores.json").is_file():
        stores = ("--store", "wires-train", "--test-store", "wires-test")
        budgets = ("--labels-per-class", "1,2,4,8,16", "--seeds", "5")
        run(work, "nanodist", "probe", "wires", *stores, *budgets, "--out", "wires/probe")
    if not (run_dir / "measured" / "summary.json").is_file():
        masks = [f"wires-synth/truth/{name}" for name in ("dispersed", "singular")]
        run(
            work,
            "nanodist",
            "measure",
            *_masks(work, masks),
            "--out",
            "wires/measured",
            "--no-overlays",
            "--pixel-size-nm",
            "1",
        )
    return run_dir


def _masks(work: Path, folders: Sequence[str]) -> list[str]:
    """Folders of masks alone, as the truth holds other files as well."""
    import shutil

    for folder in folders:
        target = work / "wires-masks" / Path(folder).name
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted((work / folder).glob("*.mask.png"))[:12]:
            shutil.copyfile(file, target / file.name)
    return [f"wires-masks/{Path(folder).name}" for folder in folders]


def segmentation(work: Path) -> Path:
    """Masks of wires, from the encoder of :func:`pretraining`."""
    pretraining(work)
    recipe = {**FINETUNE, "task": "segmentation", "decoder": {"width": 16}, "views": {**VIEWS, "size_px": 64}}
    recipe["train"] = {"steps": 60, "global_batch_size": 8, "evaluate_every_steps": 60, "log_every_steps": 5}
    (work / "masks.yaml").write_text(json.dumps(recipe))
    what = ("encoder.source=wires", "data.store=wires-train", "data.labels_per_class=16", "run_dir=masks")
    run(work, "nanodist", "finetune", "masks.yaml", *what)
    return work / "masks"


def pairvae(work: Path) -> Path:
    """A short PairVAE on synthetic pairs, evaluated."""
    if not (work / "pairs").is_dir():
        run(work, "nanodist", "synth", "pairs", "--out", "pairs-synth", *PAIRS)
        run(work, "nanodist", "pack", "--pairs", "pairs-synth/pairs.csv", "--out", "pairs")
    what = ("data.store=pairs", "run_dir=pairvae", *COMMON, *SHORT["modern"])
    run(work, "nanodist", "pairvae", "train", "modern", *what)
    return work / "pairvae"


def grids(run_dir: Path, out: Path) -> dict[str, int]:
    """The figures of an evaluation in ``out``; the bytes of each.

    Raises:
        SystemExit: one is missing, or does not fit into the bytes.
    """
    sizes = {}
    for name in ("saxs-to-sem", "sem-to-saxs", "iq", "latent"):
        source, target = run_dir / "evaluation" / f"{name}.png", out / f"pairvae-{name}.png"
        if not source.is_file():
            raise SystemExit(f"{source} is missing: evaluate the run into {source.parent}")
        shrink(Image.open(source).convert("RGB"), target)
        sizes[target.name] = target.stat().st_size
    return sizes


def shrink(image: Image.Image, out: Path) -> None:
    """An image as PNG of few colours, below :data:`MOST_BYTES`.

    Raises:
        SystemExit: it does not fit.
    """
    wide, high = image.size
    for scale, colours in ((1.0, 256), (1.0, 128), (0.8, 256), (0.8, 128), (0.65, 256), (0.65, 128), (0.5, 128)):
        small = image.resize((round(scale * wide), round(scale * high)), Image.Resampling.LANCZOS)
        for few in _few_colours(small, colours):
            few.save(out, optimize=True)
            if out.stat().st_size <= MOST_BYTES:
                return
    raise SystemExit(f"{out} takes {out.stat().st_size} bytes")


def _few_colours(image: Image.Image, colours: int) -> list[Image.Image]:
    """By each method, the nearest first: one is better with photographs, another with pale bands."""
    methods = (Image.Quantize.MAXCOVERAGE, Image.Quantize.MEDIANCUT, Image.Quantize.FASTOCTREE)
    made = [image.quantize(colours, method, dither=Image.Dither.NONE) for method in methods]
    true = np.asarray(image, np.float32)
    return sorted(made, key=lambda one: float(np.square(np.asarray(one.convert("RGB")) - true).mean()))


def picture(page: Path, out: Path, wide_px: int, high_px: int, top_px: int = 0) -> None:
    """A part of a page as PNG of few colours, below :data:`MOST_BYTES`.

    Raises:
        SystemExit: there is no Chromium, the browser complains about the page, or nothing fits into the bytes.
    """
    with tempfile.TemporaryDirectory() as folder:
        shot, frame = Path(folder) / "shot.png", Path(folder) / "frame.html"
        # A window is never as narrow as a phone; a frame is.
        frame.write_text(
            f'<body style="margin:0"><iframe src="{page.as_uri()}" '
            f'style="width:{wide_px}px;height:{top_px + high_px}px;border:0"></iframe>'
        )
        line = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={shot}"]
        line += ["--enable-logging=stderr", "--allow-file-access-from-files"]
        line += [f"--window-size={wide_px},{top_px + high_px}", frame.as_uri()]
        done = subprocess.run(line, check=True, capture_output=True, text=True)
        if "CONSOLE" in done.stderr or not shot.is_file():
            raise SystemExit(f"the browser complains about {page}:\n{done.stderr}")
        shrink(Image.open(shot).convert("RGB").crop((0, top_px, wide_px, top_px + high_px)), out)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    from nanodist.report.page import write_report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Folder of the pictures.")
    parser.add_argument("--work", type=Path, help="Folder to keep runs and pages in.")
    parser.add_argument("--sweep", type=Path, help="Folder of a pipeline or sweep that was run before.")
    parser.add_argument("--pairvae", type=Path, help="A PairVAE that was trained and evaluated before.")
    parser.add_argument("--segmentation", type=Path, help="A segmentation that was trained before.")
    parser.add_argument("--only", default="run,masks,sweep,pairvae", help="Which to make.")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="nanodist-pictures-") as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        made: dict[str, tuple[Callable[[], Path], Sequence[tuple[str, int, int]]]] = {
            "run": (lambda: pretraining(work), (("report-run", 1040, 3050), ("report-phone", 375, 1600))),
            "masks": (lambda: segmentation(work), (("report-masks", 1040, 1170),)),
            "sweep": (lambda: options.sweep or _pipeline(work), (("report-sweep", 1040, 1690),)),
            "pairvae": (lambda: options.pairvae or pairvae(work), (("report-pairvae", 1040, 1750),)),
            "segmentation": (
                lambda: needed(options.segmentation, "segmentation"),
                (("report-segmentation", 1040, 1175),),
            ),
        }
        sizes: dict[str, int] = {}
        for name in options.only.split(","):
            if name == "grids":
                sizes |= grids(needed(options.pairvae, "pairvae"), options.out.resolve())
                continue
            make, pictures = made[name]
            page = write_report([make()], work / f"{name}.html")
            sizes[page.name] = page.stat().st_size
            for stem, wide, high in pictures:
                target = options.out.resolve() / f"{stem}.png"
                picture(page.resolve(), target, wide, high)
                sizes[target.name] = target.stat().st_size
        print(json.dumps(sizes))
    return 0


def needed(given: Path | None, option: str) -> Path:
    """What an option names.

    Raises:
        SystemExit: it was not given.
    """
    if given is None:
        raise SystemExit(f"give --{option} RUN")
    return given


def _pipeline(work: Path) -> Path:
    return pipeline(work, ["simclr", "vicreg"]).parent


if __name__ == "__main__":
    sys.exit(main())
