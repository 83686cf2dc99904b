"""What ``nanodist pack``, ``inspect`` and ``verify`` do about stores of pairs."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hpc.errors import UserError
from nanodist.cli.facts import show

if TYPE_CHECKING:
    from nanodist.shards.pair_manifest import PairManifest
    from nanodist.shards.pair_store import PairStore

# Options of `pack` that say something about pairs as well; `--unlisted error` and the like stay at their defaults.
_SHARED = {
    "pairs", "out", "unpaired", "grid_size", "q_max_inv_nm", "bars", "pixel_size_nm", "normalise", "shard_mb",
    "skip_bad", "workers",
}  # fmt: skip
_DEFAULTS = {"unlisted": "error", "test_share": 0.3, "part_seed": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``pack --pairs``."""
    group = parser.add_argument_group("pairs of SAXS patterns and SEM images")
    add = group.add_argument
    add(
        "--pairs",
        type=Path,
        metavar="FILE.csv",
        help="Pack pairs, not micrographs: a table with the columns saxs, sem (paths from its folder) and sample.",
    )
    add(
        "--unpaired",
        choices=("error", "keep", "skip"),
        help="With --pairs: rows whose saxs or sem is empty stop the packing (default), are kept, or left out.",
    )
    add("--grid-size", type=int, metavar="PX", help="With --pairs: side of the q grid in pixels (192).")
    add(
        "--q-max-inv-nm",
        type=float,
        metavar="Q",
        help="With --pairs: |q_x| at the edge of the grid, in 1/nm (the largest that every pattern reaches).",
    )


def pack(args: argparse.Namespace) -> None:
    """Pack the pairs, then say what is in the store.

    Raises:
        UserError: options that say nothing about pairs, or what :func:`nanodist.shards.pair_pack.pack_pairs` raises.
    """
    from nanodist.shards.pair_pack import PairOptions, pack_pairs

    _refuse_others(args)
    names = ("unpaired", "grid_size", "q_max_inv_nm", "bars", "pixel_size_nm", "normalise", "shard_mb")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    began = time.monotonic()
    options = PairOptions(**given, skip_bad=args.skip_bad)
    manifest, unused = pack_pairs(args.pairs, args.out, options, args.workers or 1)
    size, seconds = sum(shard.bytes for shard in manifest.shards) / 1e6, time.monotonic() - began
    print(f"{args.out}: {_counts(manifest)}, {len(manifest.shards)} shards, {size:.1f} MB, {seconds:.1f} s")
    print(f"q grid: {_grid(manifest)}")
    for line in _set_aside(manifest):
        print(f"set aside {line}")
    if unused:
        print(f"columns that were not used: {', '.join(unused)}")


def _refuse_others(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        if name in _SHARED or value in (None, False, [], _DEFAULTS.get(name)):
            continue
        what = "folders and files" if name == "sources" else f"--{name.replace('_', '-')}"
        raise UserError(f"{what} and --pairs do not go together: all that is packed stands in {args.pairs}")


def refuse_alone(args: argparse.Namespace) -> None:
    """Refuse options of pairs, and no source, without ``--pairs``."""
    for name in ("unpaired", "grid_size", "q_max_inv_nm"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is about pairs: give --pairs FILE.csv, or leave it out")
    if not args.sources:
        raise UserError("nothing to pack: name a folder of micrographs, or a table of pairs with --pairs FILE.csv")


def inspect(args: argparse.Namespace) -> int:
    """Print a table of a pair store, and draw its sheet where one is asked for."""
    from nanodist.shards.pair_sheet import pair_sheet
    from nanodist.shards.pair_store import PairStore

    store = PairStore.open(args.store)
    show(_rows(store), args, lambda path, count: pair_sheet(store, path, count))
    return 0


def verify(path: Path) -> int:
    """Print each fault of a pair store; 1 where there are any."""
    from nanodist.shards.pair_verify import verify_pairs

    manifest, faults = verify_pairs(path)
    for fault in faults:
        print(f"{fault.shard}{', item ' + fault.sample if fault.sample else ''}: {fault.fault}")
    print(f"{path}: {len(manifest.items)} items in {len(manifest.shards)} shards, {len(faults)} faults")
    return 1 if faults else 0


def _rows(store: PairStore) -> Iterator[tuple[str, str]]:
    manifest = store.manifest
    yield "pair store", str(store.path)
    yield "hash", store.manifest_hash
    yield "items", _counts(manifest)
    yield "shards", f"{len(manifest.shards)}, {sum(s.bytes for s in manifest.shards) / 1e6:.1f} MB"
    yield "q grid", _grid(manifest)
    unit = "counts a grid pixel" if manifest.kind == "counts" else "the patterns' own unit"
    yield "patterns", f"{manifest.kind}, compressed as asinh(I / {manifest.reference:.4g} {unit})"
    sizes = [size for item in manifest.items if item.pixel_size_nm for size in item.pixel_size_nm]
    if sizes:
        yield "pixel size", f"{min(sizes):.4g} to {max(sizes):.4g} nm"
    shapes = Counter(f"{item.height} x {item.width}" for item in manifest.items if item.sem)
    yield "images (rows x columns)", ", ".join(f"{shape} ({n})" for shape, n in shapes.most_common(12)) or "none"
    truths = [store.truth(i) for i in range(len(store))]
    kinds = Counter(str(truth["morphology"]) for truth in truths if truth)
    if kinds:
        periods = [float(truth["period_nm"]) for truth in truths if truth.get("period_nm")]
        yield "synthetic", ", ".join(f"{name} ({n})" for name, n in sorted(kinds.items()))
        yield "periods", f"{min(periods):.1f} to {max(periods):.1f} nm" if periods else "not stated"
    yield "packed with", ", ".join(f"{k}={v}" for k, v in manifest.options.items())
    for line in _set_aside(manifest):
        yield "set aside", line


def _counts(manifest: PairManifest) -> str:
    items = manifest.items
    both = sum(1 for item in items if item.saxs and item.sem)
    alone = [
        f", {count} {name} alone"
        for name, count in (
            ("pattern", sum(1 for item in items if not item.sem)),
            ("SEM image", sum(1 for item in items if not item.saxs)),
        )
        if count
    ]
    return f"{both} pairs{''.join(alone)} of {len({item.sample for item in items})} specimens"


def _grid(manifest: PairManifest) -> str:
    grid = manifest.grid
    return f"{grid.size} x {grid.size}, |q_x| up to {grid.q_max_inv_nm:g} 1/nm, step {grid.q_step_inv_nm:.4g} 1/nm"


def _set_aside(manifest: PairManifest) -> Iterator[str]:
    counts = Counter(entry["reason"] for entry in manifest.dropped)
    for reason, count in counts.most_common():
        example = min(entry["source"] for entry in manifest.dropped if entry["reason"] == reason)
        yield f"{count}: {reason} (such as {example})"
