"""Stores for ``bench_loader``: the same tiles in every encoding, in the formats of the peers, and very many of them."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image

from nanodist.decoding.codec import ENCODINGS
from nanodist.shards import PackOptions, Sample, Store, pack
from nanodist.shards.foreign import index_shards
from nanodist.shards.index import to_bytes

DATA = Path(os.environ.get("NANODIST_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
TILE = 256


def tiles(count: int) -> list[np.ndarray]:
    """Real micrographs of 256 x 256 pixels, or synthetic ones where the real ones are not there."""
    found = []
    for path in sorted((DATA / "tem_virus").glob("*/*.png")):
        pixels = np.asarray(Image.open(path))
        if pixels.shape == (TILE, TILE) and pixels.dtype == np.uint8:
            found.append(pixels)
    rng = np.random.default_rng(0)
    while len(found) < count:
        smooth = np.cumsum(np.cumsum(rng.normal(size=(TILE, TILE)), 0), 1)
        noisy = 128 + 40 * smooth / np.abs(smooth).max() + rng.normal(size=(TILE, TILE)) * 9
        found.append(np.clip(noisy, 0, 255).astype(np.uint8))
    step = len(found) / count
    return [found[int(i * step)] for i in range(count)]


def packed(folder: Path, pixels: list[np.ndarray], depth: int = 8) -> dict[str, Store]:
    """A store of each encoding; ``folder/loose`` holds the tiles as single PNGs."""
    loose = folder / "loose"
    loose.mkdir(parents=True)
    for i, tile in enumerate(pixels):
        Image.fromarray(tile).save(loose / f"t{i:05d}.png")
    made = {}
    for encoding in ENCODINGS:
        if encoding == "jpg" and depth == 16:
            continue
        options = PackOptions(tile=None, depth=depth, encoding=encoding, shard_mb=16)
        made[encoding] = pack([loose], folder / encoding, options, workers=0)
    return made


def foreign(loose: Path, folder: Path, suffix: str) -> Store:
    """The images of ``loose`` as Pillow writes them by default, in shards of webdataset's own writer."""
    import webdataset

    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "part-%03d.tar"), maxcount=500, verbose=0) as writer:  # type: ignore[no-untyped-call]
        for path in sorted(loose.iterdir()):
            buffer = io.BytesIO()
            Image.open(path).save(buffer, {"png": "PNG", "jpg": "JPEG"}[suffix])
            writer.write({"__key__": path.stem, suffix: buffer.getvalue()})  # type: ignore[no-untyped-call]
    index_shards(folder)
    return Store.open(folder)


def multiplied(source: Store, folder: Path, samples: int, keys: str = "tile-{:07d}") -> Store:
    """A store of ``samples`` samples whose shards are all hard links to the first one of ``source``."""
    folder.mkdir()
    first = source.manifest.shards[0]
    base = [source.samples[i] for i in range(first.samples)]
    links = -(-samples // len(base))
    shards = []
    for k in range(links):
        name = f"shard-{k:06d}.tar"
        os.link(source.path / first.file, folder / name)
        shards.append(replace(first, file=name))
    many = (
        Sample(**{**vars(base[i]), "key": keys.format(k * len(base) + i), "shard": k, "group": f"g{k}"})
        for k in range(links)
        for i in range(len(base))
    )
    data = to_bytes(list(many))
    (folder / "index.npz").write_bytes(data)
    index = {"file": "index.npz", "bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}
    manifest = replace(source.manifest, shards=shards, samples=links * len(base), index=index)
    (folder / "manifest.json").write_text(json.dumps(manifest.to_dict()))
    return Store.open(folder)


def small_tiles(folder: Path, count: int) -> Store:
    """One shard of raw 32 x 32 tiles."""
    (folder / "src").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(folder / "src" / f"t{i:05d}.png")
    return pack([folder / "src"], folder / "store", PackOptions(tile=None, encoding="raw", shard_mb=1024), workers=0)
