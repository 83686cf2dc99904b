"""``nanodist synth``: synthetic micrographs of wires, particles or viruses with exact ground truth."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpc.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``nanodist synth``."""
    parser.add_argument(
        "kind",
        choices=["wires", "particles", "viruses"],
        help="What to make: wires (TEM of nanowires in four morphologies), particles (metal spheres, rods, cubes and"
        " triangles) or viruses (negative stain: capsids, filaments, enveloped).",
    )
    parser.add_argument("--out", type=Path, required=True, help="New directory for images/, truth/ and meta.csv.")
    parser.add_argument("--micrographs", type=int, default=100, help="Micrographs of each class (default: 100).")
    parser.add_argument("--size", type=int, default=256, help="Side of a micrograph in pixels (default: 256).")
    parser.add_argument("--pixel-size-nm", type=float, default=1.0, help="Side of a pixel in nm (default: 1.0).")
    parser.add_argument("--seed", type=int, default=0, help="Seed; the same seed gives the same bytes (default: 0).")
    parser.add_argument(
        "--classes",
        help="Comma-separated classes to make (default: all): bundle,dispersed,network,singular for wires,"
        " cube,rod,sphere,triangle for particles, capsid,enveloped,filament for viruses.",
    )
    parser.add_argument(
        "--haadf-share", type=float, default=0.0, help="Share, 0 to 1, taken as HAADF-STEM (default: 0)."
    )
    parser.add_argument(
        "--dose", type=float, help="Electrons per nm^2 (default: drawn for each, 40 to 1500 electrons a pixel)."
    )
    parser.add_argument("--workers", type=int, default=1, help="Processes; they do not change the result (default: 1).")


def run(args: argparse.Namespace) -> int:
    """Write the data set, then say what to do with it."""
    from nanodist.synth import KINDS, Settings, write_dataset

    given = args.classes if args.classes is not None else ",".join(KINDS[args.kind])
    classes = [name.strip() for name in given.split(",") if name.strip()]
    settings = Settings(args.size, args.pixel_size_nm, args.dose, args.haadf_share)
    try:
        rows = write_dataset(args.out, args.seed, args.micrographs, classes, settings, args.workers, args.kind)
    except OSError as error:
        raise UserError(
            f"cannot write {args.out}: {error}; choose a directory with room that you may write to"
        ) from error
    print(f"{len(rows)} micrographs of {', '.join(classes)} in {args.out}")
    print(f"pack them with: nanodist pack {args.out / 'images'} --labels folder --out STORE")
    return 0
