"""``nanodist index``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("store", type=Path, metavar="STORE", help="Folder of *.tar that webdataset wrote.")
    parser.add_argument(
        "--image",
        default="",
        metavar="ENDING",
        help="Ending of the images (such as seg.png) where samples have several.",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="Threads; all cores unless given.")


def run(args: argparse.Namespace) -> int:
    """Write manifest and index beside the shards, and say what they hold."""
    from nanodist.shards.foreign import index_shards

    manifest = index_shards(args.store, args.image, args.workers)
    facts = manifest.statistics
    sizes = ", ".join(f"{size} ({count})" for size, count in facts["tile_sizes"].items())
    print(
        f"{args.store}: {manifest.samples} samples of {manifest.depth} bits in {len(manifest.shards)} shards, "
        f"{facts['groups']} groups, {len(facts['labels'])} labels; tiles: {sizes}"
    )
    for entry in manifest.dropped:
        print(f"set aside: {entry['reason']} in {entry['source']}")
    return 0
