"""``nanodist export``: hand a trained encoder to others."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc.errors import UserError
from nanodist.export.loading import FORMATS, TITLES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``nanodist export``."""
    parser.add_argument("run", metavar="RUN", type=Path, help="Run directory, one checkpoint of it, or another export.")
    parser.add_argument("--to", metavar="DIR", required=True, type=Path, help="Folder to write; it must not exist yet.")
    parser.add_argument(
        "--format",
        default="",
        metavar="FORMAT,...",
        help=f"What to write, joined by commas: {', '.join(FORMATS)} (default timm; of a classifier, a segmentation "
        "and a PairVAE onnx, the other graph being torch-export).",
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "fp16"),
        help="Of the weights; graphs compute in it too. fp16 halves the files (not of a PairVAE).",
    )
    parser.add_argument("--license", default="", help="Licence of the weights as an SPDX name, for the model card.")
    parser.add_argument(
        "--data", default="", help="A sentence for the model card on the training data and its licence."
    )
    parser.add_argument("--name", default="", help="Name on the model card (default: the run's name).")
    parser.add_argument(
        "--push",
        default="",
        metavar="OWNER/NAME",
        help="Upload the finished folder to this model repository of the Hugging Face hub, which is made, private, "
        "where there is none; the token is that of HF_TOKEN or of 'hf auth login'.",
    )


def run(args: argparse.Namespace) -> int:
    """Export, and say what was checked and how to load the result."""
    if args.push:
        from nanodist.export.push import require_push

        require_push(args.push)  # before the work, not after it
    _export(args)
    _trace(args)
    if args.push:
        from nanodist.export.push import push

        print(f"uploaded: {push(args.to, args.push)}")
    return 0


def _export(args: argparse.Namespace) -> None:
    from nanodist.downstream.finetune.load import kind_of

    wanted = [name.strip() for name in args.format.split(",") if name.strip()]
    if (args.run / "pair" / "checkpoints").is_dir() and (args.run / "solo").is_dir():
        return _pairvae(args, wanted or ["onnx"])
    kind = kind_of(args.run)
    if kind == "classification":
        return _classifier(args, wanted or ["onnx"])
    if kind == "segmentation":
        return _segmentation(args, wanted or ["onnx"])
    wanted = wanted or ["timm"]
    from nanodist.encoders import load_encoder
    from nanodist.export.folder import export, require

    require(wanted)
    encoder = load_encoder(args.run)
    card = card_of(args.run, encoder, args.name, args.license, args.data)
    _show(args.to, export(encoder, args.to, card, wanted, args.precision), "features")
    if "timm" in wanted:
        print(f'load it with: timm.create_model("local-dir:{args.to}", pretrained=True)')
    print(f"{args.to / 'README.md'} has the code for {', '.join(TITLES[name] for name in FORMATS if name in wanted)}")
    return None


def _trace(args: argparse.Namespace) -> None:
    """In W&B the export becomes an output of the run, where W&B has the run."""
    from hpc.lineage import of_folder
    from hpc.wandb_after import tell

    stage = args.run / "pair"  # of a PairVAE, whose last stage is what was exported
    tell(stage if (stage / "run.json").is_file() else args.run, lambda: [of_folder(args.to)])


def _show(to: Path, parity: Mapping[str, Any], answers: str) -> None:
    """Where an export is, and how far each format's answers are from the run's."""
    from nanodist.export.card import libraries_of

    print(to)
    for row in parity["formats"]:
        apart = f"{answers} differ by {row['relative_difference']:.1e} at most"
        print(f"{row['format']}: loaded with {libraries_of(row)}; {apart}")
        if row["format"] == "huggingface" and "transformers" not in row["loaded_with"]:
            print("transformers is not installed: the folder was checked with timm, which transformers wraps")


def _classifier(args: argparse.Namespace, wanted: list[str]) -> None:
    from nanodist.downstream.finetune.load import load_classifier
    from nanodist.export.classifier import export_classifier

    loaded = load_classifier(args.run)
    name, card = _fine_tuned(args)
    _show(args.to, export_classifier(loaded, args.to, wanted, name, card, args.precision), "probabilities")
    print(f"{args.to / 'README.md'} has the code that runs it")


def _segmentation(args: argparse.Namespace, wanted: list[str]) -> None:
    from nanodist.downstream.segment.predict import load_segmenter
    from nanodist.export.segmentation import export_segmentation

    loaded = load_segmenter(args.run)
    name, card = _fine_tuned(args)
    _show(args.to, export_segmentation(loaded, args.to, wanted, name, card, args.precision), "probabilities")
    print(f"{args.to / 'README.md'} has the code that segments micrographs of any size")


def _pairvae(args: argparse.Namespace, wanted: list[str]) -> None:
    from nanodist.export.card import without_paths
    from nanodist.export.pairvae import export_pairvae
    from nanodist.pairvae.load import load

    scores = args.run / "evaluation" / "scores.json"
    card = {
        "license": args.license,
        "data_note": args.data,
        "recipe": without_paths(recipe_of(args.run)),
        "scores": json.loads(scores.read_text())["rows"] if scores.is_file() else [],
    }
    name = args.name or args.run.resolve().name
    _show(args.to, export_pairvae(load(args.run), args.to, wanted, name, card, args.precision), "answers")
    print(f"{args.to / 'README.md'} has the code for both directions")


def _fine_tuned(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Name and card of a run of ``nanodist finetune``."""
    from nanodist.export.card import without_paths

    recipe = recipe_of(args.run)
    scores = args.run / "scores.json"
    card = {
        "license": args.license,
        "data_note": args.data,
        "recipe": without_paths(recipe),
        "scores": json.loads(scores.read_text())["rows"] if scores.is_file() else [],
        "pixel_size_nm": pixel_sizes_of(recipe),
    }
    return args.name or args.run.resolve().name, card


def recipe_of(run_dir: Path) -> dict[str, Any]:
    """The recipe of a run directory as it ran."""
    from nanodist.report.collect import read_run

    return dict(read_run(run_dir).recipe)


def pixel_sizes_of(recipe: Mapping[str, Any]) -> list[float] | None:
    """Least and largest pixel size in nm of the store that a recipe names, where that still lies there and says one."""
    import numpy as np

    from nanodist.shards import Store

    data = recipe.get("data")
    path = data.get("store") if isinstance(data, Mapping) else None
    if not isinstance(path, str) or not Path(path).is_dir():
        return None
    try:
        sizes = np.asarray(Store.open(path).pixel_size_nm, np.float64)
    except (UserError, OSError):
        return None
    known = sizes[np.isfinite(sizes) & (sizes > 0)]
    return [float(known.min()), float(known.max())] if known.size else None


def card_of(run_dir: Path, encoder: Any, name: str = "", license_name: str = "", data_note: str = "") -> dict[str, Any]:
    """The facts of the model card, from the files of a run (an export or a lone checkpoint has fewer)."""
    from nanodist.export.card import facts
    from nanodist.report.collect import read_run

    recipe: dict[str, Any] = {}
    info: dict[str, Any] = {}
    if (run_dir / "recipe.yaml").is_file():
        found = read_run(run_dir)
        recipe, info = found.recipe, found.info
    scores = scores_of(run_dir, encoder.name)
    sizes = pixel_sizes_of(recipe)
    return facts(name or encoder.name, recipe, info, encoder.seen, scores, license_name, data_note, sizes)


def scores_of(run_dir: Path, encoder: str) -> list[dict[str, Any]]:
    """The scores of ``encoder`` and of the baselines in RUN/probe, unless a later checkpoint made them stale."""
    from hpc.checkpoint.files import latest_checkpoint
    from nanodist.report.collect import read_probe

    file = run_dir / "probe" / "scores.json"
    if not file.is_file():
        return []
    if file.stat().st_mtime < latest_checkpoint(run_dir / "checkpoints").stat().st_mtime:
        print(
            f"{file} is older than the checkpoint, so the card leaves it out: run 'nanodist probe' again",
            file=sys.stderr,
        )
        return []
    return [row for row in read_probe(file).summary if row.get("kind") != "pretrained" or row.get("encoder") == encoder]
