"""``python -m tests.e2e.corruptions [--count 200] [--seed 0]``: random damage to a store, and who finds it.

Each case damages a fresh copy once: a flipped bit, a file cut short, or two places (or shards) swapped; at least half
of the cases touch the bytes of images. ``verify`` has to find every one; the loader has to stop at every damaged image,
naming shard and sample, and with ``corrupt="replace"`` go on with the same samples on one rank and on two. Last line:
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hpc.errors import UserError
from nanodist.decoding.codec import ENCODINGS
from nanodist.shards import Loader, Order, PackOptions, Store, pack, verify

SAMPLES, BATCH = 24, 8
KINDS = ("payload bit", "payload bit", "payload swap", "any bit", "cut", "shard swap", "manifest bit", "index bit")


def make_store(folder: Path, encoding: str) -> Store:
    """24 tiles in several shards."""
    (folder / "src").mkdir(parents=True)
    for i in range(SAMPLES):
        rng = np.random.default_rng(i)
        smooth = np.cumsum(rng.integers(-3, 4, (48, 48)), 1) + 128
        Image.fromarray(np.clip(smooth, 0, 255).astype(np.uint8)).save(folder / "src" / f"m{i:02d}.png")
    return pack([folder / "src"], folder / encoding, PackOptions(tile=None, shard_mb=0.015, encoding=encoding))


def payload_places(store: Store, shard: int) -> np.ndarray[Any, Any]:
    """All bytes of images in a shard."""
    spans = [np.arange(s.offset, s.offset + s.size) for s in store.samples if s.shard == shard]
    return np.concatenate(spans)


def flip(path: Path, places: np.ndarray[Any, Any], rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[int(rng.choice(places))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def damage(store: Store, kind: str, rng: np.random.Generator) -> None:
    """Damage the store's files once."""
    number = int(rng.integers(len(store.manifest.shards)))
    path = store.path / store.manifest.shards[number].file
    size = path.stat().st_size
    if kind == "payload bit":
        flip(path, payload_places(store, number), rng)
    elif kind == "any bit":
        flip(path, np.arange(size), rng)
    elif kind == "manifest bit":
        flip(store.path / "manifest.json", np.arange((store.path / "manifest.json").stat().st_size), rng)
    elif kind == "index bit":
        flip(store.path / "index.npz", np.arange((store.path / "index.npz").stat().st_size), rng)
    elif kind == "cut":
        os.truncate(path, int(rng.integers(size)))
    elif kind == "payload swap":
        data, places = bytearray(path.read_bytes()), payload_places(store, number)
        while True:
            a, b = (int(place) for place in rng.choice(places, 2, replace=False))
            if data[a] != data[b]:
                data[a], data[b] = data[b], data[a]
                break
        path.write_bytes(data)
    else:  # two shards change their names
        other = store.path / store.manifest.shards[number - 1].file
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)


def damaged_images(whole: Store, copy: Store) -> set[str]:
    """Keys of the samples whose image bytes are not what they were, by comparison with the store of before."""
    bad = set()
    for s in whole.samples:
        name = whole.manifest.shards[s.shard].file
        spans = [store.path / name for store in (whole, copy)]
        before, after = (path.read_bytes()[s.offset : s.offset + s.size] for path in spans)
        if before != after:
            bad.add(s.key)
    return bad


def load(store: Store, corrupt: Any, ranks: int) -> tuple[list[list[str]], str]:
    """Keys of an epoch's batches and the error, if one stopped it."""
    loaders = [Loader(store, Order(SAMPLES, 1, BATCH), r, ranks, corrupt=corrupt) for r in range(ranks)]
    batches: list[list[str]] = []
    try:
        for _ in range(SAMPLES // BATCH):
            batches.append([key for loader in loaders for key in next(loader).keys])
    except UserError as error:
        return batches, str(error)
    return batches, ""


def check(whole: Store, folder: Path, kind: str, rng: np.random.Generator) -> dict[str, bool]:
    """One case: what found the damage."""
    target = folder / "case"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(whole.path, target)
    damage(Store.open(target), kind, rng)
    try:
        found = bool(verify(target, 1))
    except UserError:
        found = True
    copy = Store(target, whole.manifest, whole.samples)  # as a run has it open that began before the damage
    bad = damaged_images(whole, copy)
    _, error = load(copy, "error", 1)
    stopped = any(f"sample {key}:" in error for key in bad) if bad else not error
    one, two = (load(copy, "replace", ranks) for ranks in (1, 2))
    replaced = one == two and (len(bad) > SAMPLES // 2 or (not one[1] and not bad & {k for b in one[0] for k in b}))
    return {"verify": found, "loader": stopped, "replace": replaced, "payload": bool(bad)}


def run(count: int, seed: int) -> dict[str, Any]:
    """All cases; the figures."""
    rng, missed = np.random.default_rng(seed), []
    tally: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        stores = [make_store(Path(name) / encoding, encoding) for encoding in ENCODINGS]
        for number in range(count):
            kind, whole = KINDS[number % len(KINDS)], stores[number // len(KINDS) % len(stores)]
            result = check(whole, Path(name), kind, rng)
            tally.update({key: int(value) for key, value in result.items()})
            if not all(result[key] for key in ("verify", "loader", "replace")):
                missed.append(f"case {number}: {kind}, {whole.path.name}: {result}")
    return {"cases": count, **{key: tally[key] for key in ("payload", "verify", "loader", "replace")}, "missed": missed}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = run(options.count, options.seed)
    print(f"{result['cases']} random corruptions, {result['payload']} of them in bytes of images")
    for key, words in (("verify", "found by verify"), ("loader", "right in the loader"), ("replace", "replaced alike")):
        print(f"{words}: {result[key]}")
    print(*result["missed"], sep="\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
