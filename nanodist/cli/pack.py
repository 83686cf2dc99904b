"""``nanodist pack``."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="SRC", help="Folder of micrographs (with all below it) or a file.")
    add("--out", type=Path, required=True, metavar="STORE", help="Folder of the store, new or empty.")
    add("--labels", metavar="folder|FILE.csv:COLUMN", help="Label by folder name, or by a CSV with a 'file' column.")
    add(
        "--groups",
        default="file",
        metavar="file|folder|FILE.csv:COLUMN",
        help="What no split may part: each file (the default), each folder, or a column of a CSV.",
    )
    add(
        "--unlisted",
        default="error",
        choices=("error", "keep", "skip"),
        help="What to do with micrographs that a CSV does not list: stop, keep them unlabeled, or leave them out.",
    )
    add("--exclude", action="append", default=[], metavar="GLOB", help="Leave out names such as '*mask*' (repeatable).")
    add("--part", choices=("train", "test"), help="Pack only the groups to train on, or only the held-out ones.")
    add("--test-share", type=float, default=0.3, help="With --part: share of each label's groups that is held out.")
    add("--part-seed", type=int, default=0, help="With --part: seed of that choice.")
    add("--tile", type=_tile, default=256, metavar="PX|none", help="Side of the tiles in pixels, or none to keep all.")
    add("--overlap", type=int, default=0, metavar="PX", help="Pixels that neighbouring tiles share at least.")
    add("--depth", type=int, default=8, choices=(8, 16), help="Bits a pixel in the store.")
    add(
        "--normalise",
        default="auto",
        choices=("auto", "always"),
        help="Scale each micrograph by its percentiles: only where its depth differs from the store's, or always.",
    )
    add("--shard-mb", type=float, default=128.0, metavar="MIB", help="Size of a shard in MiB.")
    add("--skip-bad", action="store_true", help="Set unreadable files aside instead of stopping at the first.")
    add("--workers", type=int, metavar="N", help="Processes that convert; they change the time and nothing else.")


def _tile(text: str) -> int | None:
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of pixels nor 'none'") from None


def run(args: argparse.Namespace) -> int:
    """Pack, then say what is in the store and what is not."""
    from nanodist.shards import PackOptions, Part, pack

    options = PackOptions(args.tile, args.overlap, args.depth, args.normalise, args.shard_mb, args.skip_bad)
    store = pack(
        args.sources,
        args.out,
        options,
        labels=args.labels,
        groups=args.groups,
        unlisted=args.unlisted,
        exclude=args.exclude,
        part=Part(args.part, args.test_share, args.part_seed) if args.part else None,
        workers=args.workers,
    )
    facts = store.manifest.statistics
    labels = f", {len(facts['labels'])} labels" if facts["labels"] else ""
    print(
        f"{store.path}: {len(store)} samples of {facts['sources']} files in {facts['groups']} groups{labels}, "
        f"{len(store.manifest.shards)} shards, {sum(s.bytes for s in store.manifest.shards) / 1e6:.1f} MB"
    )
    for reason, count in Counter(entry["reason"] for entry in store.manifest.dropped).most_common():
        example = next(entry["source"] for entry in store.manifest.dropped if entry["reason"] == reason)
        print(f"set aside {count}: {reason} (such as {example})")
    return 0
