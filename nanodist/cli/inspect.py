"""``nanodist inspect``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nanodist.cli import pairs
from nanodist.cli.facts import show

if TYPE_CHECKING:
    from nanodist.shards import Store

_LABELS_SHOWN = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("store", type=Path, metavar="STORE", help="Folder that 'nanodist pack' wrote.")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="Write a contact sheet of samples to this PNG.")
    parser.add_argument("--count", type=int, default=64, metavar="N", help="Samples on the contact sheet.")


def run(args: argparse.Namespace) -> int:
    """Print the table, and draw the sheet where one is asked for."""
    from nanodist.shards import Store
    from nanodist.shards.pair_manifest import is_pair_store
    from nanodist.shards.sheet import contact_sheet

    if is_pair_store(args.store):
        return pairs.inspect(args)
    store = Store.open(args.store)
    show(_rows(store), args, lambda path, count: contact_sheet(store, path, count))
    return 0


def _rows(store: Store) -> Iterator[tuple[str, str]]:
    from nanodist.shards.summary import folders, masks, set_aside

    manifest, facts = store.manifest, store.manifest.statistics
    yield "store", str(store.path)
    yield "hash", store.manifest_hash
    yield "samples", f"{len(store)} of {facts['sources']} files in {facts['groups']} groups"
    yield "shards", f"{len(manifest.shards)}, {sum(s.bytes for s in manifest.shards) / 1e6:.1f} MB"
    yield "tiles (rows x columns)", ", ".join(f"{size} ({n})" for size, n in list(facts["tile_sizes"].items())[:12])
    yield "bits a pixel", str(manifest.depth)
    yield "mean, std (of 0 to 1)", f"{facts['mean']:.4f}, {facts['std']:.4f}"
    sizes = facts["pixel_size_nm"]
    known = f"{sizes[0]:.4g} to {sizes[1]:.4g} nm" if sizes else "unknown"
    yield "pixel size", known + (f", unknown for {facts['pixel_size_unknown']}" if sizes else "")
    masked = masks(store)
    if masked:
        yield "masks", masked
    yield "packed with", ", ".join(f"{k}={v}" for k, v in manifest.options.items())
    for line in set_aside(manifest):
        yield "set aside", line
    joined = facts.get("near_duplicates") or {}
    if joined:
        yield "near duplicates", f"{sum(map(len, joined.values()))} groups became part of {len(joined)} others"
    other = manifest.provenance.get("other_files") or {}
    if other:
        yield "other files", ", ".join(f"{count} {suffix}" for suffix, count in other.items())
    yield from folders(store)
    groups: dict[str | None, set[str]] = {}
    for label, group in zip(store.labels, store.groups, strict=True):
        groups.setdefault(label, set()).add(group)
    for label, count in list(facts["labels"].items())[:_LABELS_SHOWN]:
        yield f"label {label}", f"{count} samples, {len(groups[label])} groups"
    if len(facts["labels"]) > _LABELS_SHOWN:
        yield "", f"and {len(facts['labels']) - _LABELS_SHOWN} labels more"
    if None in groups:
        yield "without label", f"{store.labels.count(None)} samples, {len(groups[None])} groups"
