"""``nanodist pack``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nanodist.cli import pairs

if TYPE_CHECKING:
    from nanodist.shards import PackOptions, Store
    from nanodist.shards.pack_ranks import Ranks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("sources", nargs="*", type=Path, metavar="SRC", help="Folder of micrographs (with all below it) or a file.")
    add("--out", type=Path, required=True, metavar="STORE", help="Folder of the store, new or empty.")
    add("--append", action="store_true", help="Add to the store at --out; its shards stay as they are.")
    add(
        "--labels",
        action="append",
        metavar="folder|masks|FILE.csv:COLUMN",
        help="Label by folder name, by a CSV with a 'file' column, or by the class that fills most of a tile's mask "
        "(repeatable: the first that says something about a file counts).",
    )
    add(
        "--masks",
        action="append",
        default=[],
        metavar="FOLDER=MASKS|FILE.csv:COLUMN",
        help="Where the masks of micrographs are, such as images=masks; they go into the shards (repeatable).",
    )
    add(
        "--groups",
        action="append",
        metavar="file|folder|FILE.csv:COLUMN",
        help="What no split may part: each file (the default), each folder, or a column of a CSV (repeatable).",
    )
    add(
        "--unlisted",
        default="error",
        choices=("error", "keep", "skip"),
        help="What to do with micrographs that a CSV does not list: stop, keep them unlabeled, or leave them out.",
    )
    add(
        "--calibration",
        type=Path,
        metavar="FILE.csv",
        help="Pixel sizes (columns file, pixel_size_nm, uncertainty) that take the place of the files' own.",
    )
    add("--exclude", action="append", default=[], metavar="GLOB", help="Leave out names such as '*mask*' (repeatable).")
    _add_split(parser)
    _add_tiles(parser)
    add("--shard-mb", type=float, metavar="MIB", help="Size of a shard in MiB (128).")
    add(
        "--skip-bad",
        action="store_true",
        help="Set broken files aside instead of stopping at the first; spectra and diffraction patterns always are.",
    )
    add(
        "--workers", type=int, metavar="N", help="Processes a rank that convert; they change the time and nothing else."
    )
    pairs.add_arguments(parser)


def _add_split(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--part", choices=("train", "test"), help="Pack only the groups to train on, or only the held-out ones.")
    add("--test-share", type=float, default=0.3, help="With --part: share of each label's groups that is held out.")
    add("--part-seed", type=int, default=0, help="With --part: seed of that choice.")


def _add_tiles(parser: argparse.ArgumentParser) -> None:
    """What becomes of a micrograph's pixels."""
    add = parser.add_argument
    add("--tile", type=_tile, metavar="PX|none", help="Side of the tiles in pixels (256), or none to keep all.")
    add("--overlap", type=int, metavar="PX", help="Pixels that neighbouring tiles share at least (0).")
    add(
        "--pixel-size-nm",
        type=float,
        metavar="NM",
        help="Bring all micrographs to pixels of this size; those of unknown or far coarser pixels are set aside.",
    )
    add(
        "--bars",
        choices=("keep", "cut", "mask"),
        help="Scale bars and information bars that are burned in: keep (default), cut off, or paint over.",
    )
    add(
        "--preview",
        type=Path,
        metavar="FILE.png",
        help="Pack nothing; draw what --bars would cut or paint over, on micrographs of all folders.",
    )
    add(
        "--empty-tiles",
        choices=("drop", "keep"),
        help="Tiles without contrast, or saturated over more than half: drop (default, and say so) or keep.",
    )
    add(
        "--near-duplicates",
        choices=("group", "drop", "keep"),
        help="Micrographs that show the same: put into one group (default), keep the first alone, or compare none.",
    )
    add("--depth", type=int, choices=(8, 16), help="Bits a pixel in the store (8).")
    add(
        "--normalise",
        choices=("auto", "always"),
        help="Scale each micrograph by its percentiles: where its depth differs from the store's (auto), or always.",
    )
    add(
        "--encoding",
        choices=("tif", "raw", "png", "jpg"),
        help="Of the tiles: tif (lossless, small and fast, the default), raw, png, or jpg (8 bits, loses a little).",
    )


_OPTIONS = (
    "tile", "overlap", "pixel_size_nm", "bars", "empty_tiles", "near_duplicates", "depth", "normalise", "encoding",
    "shard_mb",
)  # fmt: skip


def _tile(text: str) -> int | str:
    if text.lower() == "none":
        return "none"  # where None means that the option was not given
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of pixels nor 'none'") from None


def run(args: argparse.Namespace) -> int:
    """Pack, on as many ranks as a launcher started, then say what is in the store and what is not."""
    from nanodist.shards.pack_ranks import OtherRankFailed, find_place, join

    place = find_place()
    try:
        with join(place) as ranks:
            return _pack(args, ranks)
    except OtherRankFailed as error:
        print(f"nanodist pack: rank {place.rank} stops: {error}", file=sys.stderr)
        return 1


def _pack(args: argparse.Namespace, ranks: Ranks) -> int:
    from nanodist.shards import Part, pack

    if args.pairs is not None:
        ranks.first(lambda: pairs.pack(args))
        return 0
    pairs.refuse_alone(args)
    if args.preview is not None:
        return _preview(args) if ranks.rank == 0 else 0
    began = time.monotonic()
    store = pack(
        args.sources,
        args.out,
        _options(args),
        labels=args.labels,
        groups=args.groups,
        unlisted=args.unlisted,
        exclude=args.exclude,
        part=Part(args.part, args.test_share, args.part_seed) if args.part else None,
        calibration=args.calibration,
        masks=args.masks,
        workers=args.workers,
        append=args.append,
        ranks=ranks,
    )
    if ranks.rank == 0:
        _print(store, time.monotonic() - began)
        if args.append and args.masks:
            print("images that the store had keep the masks that they had: to take corrected ones, pack a new store")
    return 0


def _preview(args: argparse.Namespace) -> int:
    from hpc.errors import UserError
    from nanodist.shards.preview import preview_bars
    from nanodist.shards.sources import find_sources

    if args.preview.suffix.lower() != ".png" or args.bars not in ("cut", "mask"):
        raise UserError("--preview must name a .png file, and shows what '--bars cut' or '--bars mask' does: say which")
    sources, _ = find_sources(args.sources, args.exclude)
    shown, found = preview_bars(sources, args.preview)
    print(f"{args.preview}: {shown} of {len(sources)} files, bars in {found} of them; nothing was packed")
    return 0


def _options(args: argparse.Namespace) -> PackOptions:
    """What was given; the rest is as in the store that grows, or the default."""
    from nanodist.shards import PackOptions
    from nanodist.shards.grow import stored_options

    given = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    if given.get("tile") == "none":
        given["tile"] = None
    base = stored_options(args.out) if args.append else PackOptions()
    return dataclasses.replace(base, **given, skip_bad=args.skip_bad)


def _print(store: Store, seconds: float) -> None:
    from nanodist.shards.summary import masks, set_aside

    facts = store.manifest.statistics
    labels = f", {len(facts['labels'])} labels" if facts["labels"] else ""
    print(
        f"{store.path}: {len(store)} samples of {facts['sources']} files in {facts['groups']} groups{labels}, "
        f"{len(store.manifest.shards)} shards, {sum(s.bytes for s in store.manifest.shards) / 1e6:.1f} MB, "
        f"{seconds:.1f} s"
    )
    if masked := masks(store):
        print(f"masks: {masked}")
    for line in set_aside(store.manifest):
        print(f"set aside {line}")
    joined = facts.get("near_duplicates") or {}
    if joined:
        first = next(iter(joined))
        print(
            f"near duplicates: {sum(map(len, joined.values()))} groups became part of {len(joined)} others (such as "
            f"{joined[first][0]} of {first})"
        )
