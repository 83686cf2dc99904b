"""``nanodist synth``: synthetic micrographs of wires, particles or viruses, SEM and SAXS pairs, with their truth."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpc.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``nanodist synth``."""
    parser.add_argument(
        "kind",
        choices=["wires", "particles", "viruses", "pairs"],
        help="What to make: wires (TEM of nanowires in four morphologies), particles (metal spheres, rods, cubes and"
        " triangles), viruses (negative stain: capsids, filaments, enveloped) or pairs (SEM images and SAXS patterns of"
        " block copolymer films and spinodal mixtures, for 'nanodist pack --pairs').",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="New directory for images/, truth/ and meta.csv (or pairs.csv)."
    )
    parser.add_argument("--micrographs", type=int, default=100, help="Micrographs of each class (default: 100).")
    parser.add_argument("--size", type=int, help="Side of a micrograph in pixels (default: 256, of pairs 512).")
    parser.add_argument("--pixel-size-nm", type=float, help="Side of a pixel in nm (default: 1.0, of pairs 2.0).")
    parser.add_argument("--seed", type=int, default=0, help="Seed; the same seed gives the same bytes (default: 0).")
    parser.add_argument(
        "--classes",
        help="Comma-separated classes to make (default: all): bundle,dispersed,network,singular for wires,"
        " cube,rod,sphere,triangle for particles, capsid,enveloped,filament for viruses,"
        " lamellae,lying_cylinders,standing_cylinders,dots,mixed,spinodal for pairs.",
    )
    parser.add_argument(
        "--haadf-share", type=float, default=0.0, help="Share, 0 to 1, taken as HAADF-STEM (default: 0)."
    )
    parser.add_argument(
        "--dose", type=float, help="Electrons per nm^2 (default: drawn for each, 40 to 1500 electrons a pixel)."
    )
    parser.add_argument("--workers", type=int, default=1, help="Processes; they do not change the result (default: 1).")
    pairs = parser.add_argument_group("pairs")
    pairs.add_argument(
        "--samples", type=int, default=72, help="Specimens (default: 72); --micrographs says nothing here."
    )
    pairs.add_argument("--images-per-sample", type=int, default=1, help="SEM images of each specimen (default: 1).")
    pairs.add_argument("--fields", type=int, default=64, help="Fields that a pattern is averaged over (default: 64).")
    pairs.add_argument("--periods-nm", default="20,64", help="Lowest and highest period (default: 20,64).")


def run(args: argparse.Namespace) -> int:
    """Write the data set, then say what to do with it."""
    if args.kind == "pairs":
        return _pairs(args)
    from nanodist.synth import KINDS, Settings, write_dataset

    size, pixel = (
        args.size if args.size is not None else 256,
        args.pixel_size_nm if args.pixel_size_nm is not None else 1.0,
    )
    given = args.classes if args.classes is not None else ",".join(KINDS[args.kind])
    classes = [name.strip() for name in given.split(",") if name.strip()]
    settings = Settings(size, pixel, args.dose, args.haadf_share)
    try:
        rows = write_dataset(args.out, args.seed, args.micrographs, classes, settings, args.workers, args.kind)
    except OSError as error:
        raise UserError(
            f"cannot write {args.out}: {error}; choose a directory with room that you may write to"
        ) from error
    print(f"{len(rows)} micrographs of {', '.join(classes)} in {args.out}")
    print(f"pack them with: nanodist pack {args.out / 'images'} --labels folder --out STORE")
    return 0


def _pairs(args: argparse.Namespace) -> int:
    from nanodist.synth.copolymers import MORPHOLOGIES
    from nanodist.synth.pairs import PairSettings, write_pairs
    from nanodist.synth.sem import SemSettings

    if args.dose is not None or args.haadf_share:
        raise UserError(
            "--dose and --haadf-share are of transmission images, and pairs hold SEM images: leave them out"
        )
    try:
        low, high = (float(value) for value in args.periods_nm.split(","))
    except ValueError:
        raise UserError(f"--periods-nm is '{args.periods_nm}'; give two numbers, such as 20,64") from None
    names = (
        MORPHOLOGIES
        if args.classes is None
        else tuple(name.strip() for name in args.classes.split(",") if name.strip())
    )
    sem = SemSettings(
        args.size if args.size is not None else 512, args.pixel_size_nm if args.pixel_size_nm is not None else 2.0
    )
    settings = PairSettings(args.samples, args.images_per_sample, args.fields, sem, names, (low, high))
    try:
        rows = write_pairs(args.out, args.seed, settings, args.workers)
    except OSError as error:
        raise UserError(
            f"cannot write {args.out}: {error}; choose a directory with room that you may write to"
        ) from error
    print(f"{len(rows)} pairs of {args.samples} specimens in {args.out}")
    print(f"pack them with: nanodist pack --pairs {args.out / 'pairs.csv'} --out STORE")
    return 0
