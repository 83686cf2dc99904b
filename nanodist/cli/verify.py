"""``nanodist verify``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nanodist.cli import pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("store", type=Path, metavar="STORE", help="Folder that 'nanodist pack' wrote.")
    parser.add_argument("--workers", type=int, metavar="N", help="Threads that check; all cores unless given.")


def run(args: argparse.Namespace) -> int:
    """Print each fault; exit code 1 where there are any."""
    from nanodist.shards import verify
    from nanodist.shards.manifest import load_manifest
    from nanodist.shards.pair_manifest import is_pair_store

    if is_pair_store(args.store):
        return pairs.verify(args.store)
    faults = verify(args.store, args.workers)
    for fault in faults:
        print(f"{fault.shard}{', sample ' + fault.sample if fault.sample else ''}: {fault.fault}")
    manifest = load_manifest(args.store)
    print(f"{args.store}: {manifest.samples} samples in {len(manifest.shards)} shards, {len(faults)} faults")
    return 1 if faults else 0
