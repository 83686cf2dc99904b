"""``nanodist masks``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="COCO.json|FOLDER|ROIS",
        help="COCO file, folder of coloured masks, or ROIs: ImageJ's sets (.zip, .roi) or napari's shapes (.csv).",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="New folder of masks of numbers.")
    parser.add_argument(
        "--instances", action="store_true", help="COCO, ROIs: number the objects of an image, not their classes."
    )
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="ROIs: the micrographs, whose names and sizes masks get."
    )
    parser.add_argument(
        "--value",
        type=int,
        default=1,
        metavar="N",
        help="ROIs: what masks hold where there is material, as those that they lie beside have it (default 1).",
    )
    parser.add_argument("--colors", type=Path, metavar="FILE.csv", help="Class of each colour (columns color, class).")
    parser.add_argument("--nearest", action="store_true", help="Other colours take the class of the nearest one.")


def _pictures(folder: Path) -> bool:
    from nanodist.micrographs import is_named_like_one

    return any(is_named_like_one(path) for path in folder.iterdir())


def run(args: argparse.Namespace) -> int:
    """Convert, and say what the numbers mean."""
    from hpc.errors import UserError
    from nanodist.morphology.corrected import convert_rois, roi_files
    from nanodist.shards.mask_codings import convert_coco, convert_colours, read_colours

    colours_wanted = args.colors is not None or args.nearest
    # A folder of coloured masks may hold their table too: --images says that ROIs are meant.
    rois = roi_files(args.source)
    if rois and (args.images is not None or args.source.is_file()):
        if colours_wanted or args.images is None:
            raise UserError(f"{args.source} holds ROIs: give --images FOLDER (their micrographs), and no colours")
        if not 1 <= args.value <= 65535 or (args.instances and args.value != 1):
            raise UserError("--value is a whole number from 1 to 65535, and of no use with --instances")
        count = convert_rois(args.source, args.images, args.out, args.instances, args.value)
        what = "objects from 1 on" if args.instances else f"{args.value} material"
        print(f"{args.out}: {count} masks, {what}, 0 background")
        return 0
    if not args.source.exists():
        raise UserError(f"{args.source} does not exist; give a COCO file, a folder of coloured masks, or ROIs")
    if rois and not _pictures(args.source):
        raise UserError(f"{args.source} holds ROIs: give --images FOLDER, their micrographs")
    if args.images is not None:
        raise UserError(f"--images is for ROIs of ImageJ or napari, and {args.source} holds none (.zip, .roi, .csv)")
    if args.source.is_dir():
        if args.instances:
            raise UserError("--instances is for COCO files and ROIs: colours tell classes")
        if args.nearest and args.colors is None:
            raise UserError("--nearest takes --colors FILE.csv, which says what there is to be near to")
        colours = read_colours(args.colors) if args.colors is not None else None
        legend = convert_colours(args.source, args.out, colours, args.nearest)
    else:
        if colours_wanted:
            raise UserError(f"--colors and --nearest are for a folder of coloured masks, and {args.source} is none")
        legend = convert_coco(args.source, args.out, "instances" if args.instances else "classes")
    names = legend["colours"] if "colours" in legend else legend["classes"]
    what = ", ".join(f"{number} {name}" for name, number in names.items())
    print(f"{args.out}: {'objects of' if legend.get('kind') == 'instances' else 'classes'} {what}")
    return 0
