"""``nanodist export``: hand a trained encoder to others."""

from __future__ import annotations

import argparse
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
        help=f"What to write, joined by commas: {', '.join(FORMATS)} (default timm; of a classifier onnx, the other "
        "graph being torch-export).",
    )
    parser.add_argument("--license", default="", help="Licence of the weights as an SPDX name, for the model card.")
    parser.add_argument(
        "--data", default="", help="A sentence for the model card on the training data and its licence."
    )
    parser.add_argument("--name", default="", help="Name on the model card (default: the run's name).")


def run(args: argparse.Namespace) -> int:
    """Export, and say what was checked and how to load the result."""
    from nanodist.downstream.finetune.load import kind_of

    kind = kind_of(args.run)
    if kind == "segmentation":
        raise UserError(
            f"{args.run} is a segmentation, which cannot be exported yet; its encoder is where it came from"
        )
    wanted = [name.strip() for name in args.format.split(",") if name.strip()]
    if kind == "classification":
        code = _classifier(args, wanted or ["onnx"])
        _trace(args)
        return code
    wanted = wanted or ["timm"]
    from nanodist.encoders import load_encoder
    from nanodist.export.folder import export, require

    require(wanted)
    encoder = load_encoder(args.run)
    parity = export(encoder, args.to, card_of(args.run, encoder, args.name, args.license, args.data), wanted)
    _show(args.to, parity, "features")
    if "timm" in wanted:
        print(f'load it with: timm.create_model("local-dir:{args.to}", pretrained=True)')
    print(f"{args.to / 'README.md'} has the code for {', '.join(TITLES[name] for name in FORMATS if name in wanted)}")
    _trace(args)
    return 0


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


def _classifier(args: argparse.Namespace, wanted: list[str]) -> int:
    import json

    from nanodist.downstream.finetune.load import load_classifier
    from nanodist.export.card import without_paths
    from nanodist.export.classifier import export_classifier
    from nanodist.report.collect import read_run

    loaded = load_classifier(args.run)
    scores = args.run / "scores.json"
    card = {
        "license": args.license,
        "data_note": args.data,
        "recipe": without_paths(read_run(args.run).recipe),
        "scores": json.loads(scores.read_text())["rows"] if scores.is_file() else [],
    }
    name = args.name or args.run.resolve().name
    parity = export_classifier(loaded, args.to, wanted, name, card)
    _show(args.to, parity, "probabilities")
    print(f"{args.to / 'README.md'} has the code that runs it")
    return 0


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
    return facts(name or encoder.name, recipe, info, encoder.seen, scores, license_name, data_note)


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
