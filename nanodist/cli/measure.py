"""``nanodist measure``: sizes, shapes and domains of what masks show, in nanometres."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanodist.morphology import Options
    from nanodist.morphology.files import Skipped
    from nanodist.morphology.run import Request, Rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``nanodist measure``."""
    parser.add_argument(
        "masks",
        nargs="+",
        type=Path,
        metavar="MASKS",
        help="Mask files, or folders of them; each folder is a specimen, and specimens are compared.",
    )
    parser.add_argument(
        "--run",
        type=Path,
        metavar="RUN",
        help="Segmentation run of nanodist finetune: MASKS are micrographs, which it segments first (OUT/predicted).",
    )
    parser.add_argument(
        "--faint",
        type=float,
        metavar="PROBABILITY",
        help="With --run: pixels of at least this probability (such as 0.15) belong to likelier ones they continue.",
    )
    parser.add_argument("--out", type=Path, required=True, help="New folder for tables, summary and figures.")
    parser.add_argument("--pixel-size-nm", type=float, help="Side of a pixel in nm, for files that do not state one.")
    parser.add_argument(
        "--override-pixel-size", action="store_true", help="Take --pixel-size-nm for files that state another one too."
    )
    parser.add_argument(
        "--as",
        dest="meaning",
        choices=("auto", "mask", "labels", "layers"),
        default="auto",
        help="What pixels mean: material or not, a number for each object, or a page for each (default: found out).",
    )
    parser.add_argument("--class", dest="value", type=int, metavar="VALUE", help="Measure the pixels of this value.")
    parser.add_argument(
        "--shape",
        choices=("auto", "wires", "particles"),
        default="auto",
        help="auto takes as wires what is 3 times longer than wide; particles traces nothing (default: auto).",
    )
    parser.add_argument("--min-area-px", type=int, default=16, help="Leave out smaller objects (default: 16 pixels).")
    parser.add_argument(
        "--persistence-model",
        choices=("2d", "projected"),
        default="2d",
        help="2d: bent in the plane; projected: bent in space and seen in projection (default: 2d).",
    )
    parser.add_argument(
        "--percolation-reach-px",
        type=int,
        choices=(1, 2),
        default=2,
        help="Pixels this far apart are connected: 2 as in Lu et al. 2022, 1 for the 8 neighbours (default: 2).",
    )
    parser.add_argument("--rois", action="store_true", help="Also write objects for ImageJ and napari.")
    parser.add_argument("--no-overlays", action="store_true", help="Write no picture of each mask.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the bootstraps (default: 0).")


def run(args: argparse.Namespace) -> int:
    """Measure, write, and say what was found; 1 where files that look like images could not be measured."""
    from hpc.errors import UserError
    from nanodist.morphology import Options
    from nanodist.morphology.run import Request, measure_files

    options = Options(
        shape=args.shape,
        min_area_px=args.min_area_px,
        model=args.persistence_model,
        percolation_reach_px=args.percolation_reach_px,
        seed=args.seed,
    )
    request = Request(
        args.pixel_size_nm, args.override_pixel_size, args.meaning, args.value, not args.no_overlays, args.rois
    )
    if args.faint is not None and args.run is None:
        raise UserError("--faint is for micrographs that --run segments; of masks there are no probabilities")
    try:
        if args.run is None:
            images, skipped = measure_files(args.masks, args.out, options, request)
        else:
            images, skipped = _segmented_first(args, options, request)
    except OSError as error:
        raise UserError(
            f"cannot write {args.out}: {error}; choose a directory with room that you may write to"
        ) from error
    print(report(args.out, images))
    failed = [one for one in skipped if one.error]
    for one in failed:
        print(f"nanodist measure: not measured: {one.reason}", file=sys.stderr)
    if failed:
        print(
            f"nanodist measure: {len(failed)} of {len(images) + len(failed)} files failed (skipped.csv)",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _segmented_first(args: argparse.Namespace, options: Options, request: Request) -> tuple[Rows, list[Skipped]]:
    """Segment the micrographs of each specimen, and measure their masks; what could not be read is skipped."""
    import torch

    from hpc.environment import threads_of_rank
    from hpc.errors import UserError
    from nanodist.downstream.segment.predict import load_segmenter, predict_masks
    from nanodist.morphology.files import Skipped
    from nanodist.morphology.run import measure_files, refuse

    refuse(args.out, request)
    gone = next((path for path in args.masks if not path.exists()), None)
    if gone is not None:
        raise UserError(f"{gone} does not exist; give micrographs, or folders of them")
    torch.set_num_threads(threads_of_rank(1))
    loaded = load_segmenter(args.run, args.faint)
    if args.value is not None and args.value not in loaded.values:
        known = ", ".join(map(str, loaded.values))
        raise UserError(f"--class {args.value}: {args.run} tells the classes {known} apart; give one of them")
    materials = [value for value in loaded.values if value]
    if args.value is None and args.meaning == "auto" and len(materials) > 1:
        known = ", ".join(map(str, materials))
        raise UserError(f"{args.run} tells several materials apart; say with --class which is measured: {known}")
    specimens = {str(path): [path] for path in args.masks if path.is_dir()}
    loose = [path for path in args.masks if not path.is_dir()]
    specimens |= {"files": loose} if loose else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}-") as temporary:
        predicted, names, unread = Path(temporary) / "predicted", dict[Path, str](), list[Skipped]()
        for number, (name, paths) in enumerate(specimens.items(), start=1):
            folder = predicted / f"{number:02d}-{Path(name).name}"
            try:
                problems = predict_masks(loaded, paths, folder)
            except UserError as error:
                # Of several specimens the others are measured all the same.
                unread.append(Skipped(Path(name), f"{name}: {error}", True))
                continue
            names[folder / "masks"] = name
            unread += [Skipped(Path(file), reason, True) for file, reason in problems.items()]
        if not names:
            raise UserError("; ".join(one.reason for one in unread))
        found = measure_files(list(names), args.out, options, request, names, unread)
        os.replace(predicted, args.out / "predicted")
    return found


def report(out: Path, images: list[dict[str, Any]]) -> str:
    """The summary table as text."""
    import json

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    lines = [f"{len(images)} images, {summary['objects']} objects, {summary['wires']} wires in {out}"]
    for row in summary["specimens"]:
        if row["mean"] is None:
            continue
        interval = "" if row["low"] is None else f" [{row['low']:.4g}, {row['high']:.4g}]"
        n = f", n = {row['n']}" if row["n"] is not None else ""
        lines.append(
            f"{row['specimen']:<20} {row['quantity']:<36} {row['mean']:.4g}{interval} ({row['images']} images{n})"
        )
    for row in summary["comparison"]:
        if row["low"] is not None and not row["note"] and (row["low"] > 0 or row["high"] < 0):
            lines.append(
                f"{row['second']} differs from {row['first']} in {row['quantity']} by {row['difference']:.4g}"
                f" [{row['low']:.4g}, {row['high']:.4g}]"
            )
    return "\n".join(lines)
