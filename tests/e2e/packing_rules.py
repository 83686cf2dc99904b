"""``python -m tests.e2e.packing_rules``: the limits of ``nanodist pack`` on real micrographs (NANODIST_DATA).

Printed are, for each data set, in how many micrographs bars are found; how many of the 255 bits of the perceptual hash
copies of a micrograph change and micrographs that are none differ in; and the contrast of tiles. The last line is one
JSON object. Which micrographs of the figures of papers have a bar was told by eye (tests/nanodist/test_pack_bars.py).
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nanodist.micrographs import read_micrograph
from nanodist.micrographs.burned_in import find_bars, free_rectangle
from nanodist.shards.near import NEAR_BITS, perceptual_hash
from nanodist.shards.quality import LEAST_CONTRAST, contrast, fault_of, span_of
from nanodist.shards.tiles import tile_starts

SETS = {
    "gold": "tem_au_nanoparticle_shape/*/*.png",
    "nanowires": "tem_nanowire_seg/images/*.png",
    "figures": "em_emps_particles/images/*.png",
    "catalysts": "stem_catalyst_np/images/*.jpg",
    "viruses": "tem_virus/*/*.png",
    "membranes": "sstem_membrane/images/*.png",
    "superalloy": "sem_nasa_superalloy_seg/images/*.png",
}
COPIES = ("JPEG", "half the size", "gamma 0.7", "noise", "2 pixels further", "without 1 %", "half the contrast")
_COPIED = 150


def main() -> int:
    """Print the tables."""
    data = Path(os.environ.get("NANODIST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    found: dict[str, Any] = {"bars": {}}
    pixels: dict[Path, np.ndarray] = {}
    contrasts: list[float] = []
    dropped = 0
    for name, pattern in SETS.items():
        paths = sorted(data.glob(pattern))
        with_bar = 0
        for path in paths:
            whole = read_micrograph(path).pixels
            bars = find_bars(whole)
            with_bar += bool(bars)
            y, x, height, width = free_rectangle((whole.shape[0], whole.shape[1]), bars)
            pixels[path] = whole
            for tile, span in tiles(whole[y : y + height, x : x + width]):
                contrasts.append(contrast(tile)[1] / span if span else 0.0)
                dropped += fault_of(tile, span) is not None
        found["bars"][name] = [with_bar, len(paths)]
        print(f"{name}: bars found in {with_bar} of {len(paths)}", flush=True)
    found["hash"] = hashes(data, pixels)
    shares = np.quantile(contrasts, (0.01, 0.02, 0.05, 0.1, 0.5)).round(4).tolist()
    found["tiles"] = {"count": len(contrasts), "dropped": dropped, "contrast_quantiles": shares}
    print(
        f"tiles: {len(contrasts)}, contrast at 1, 2, 5, 10 and 50 %: {shares} (limit {LEAST_CONTRAST}), "
        f"{dropped} dropped"
    )
    print(json.dumps(found))
    return 0


def tiles(pixels: np.ndarray, side: int = 256) -> Iterator[tuple[np.ndarray, float]]:
    """Tiles of a micrograph, each with the micrograph's range of values."""
    if min(pixels.shape) < side:
        return
    span = span_of(pixels)
    rows, columns = (tile_starts(length, side, 0) for length in pixels.shape)
    for y in rows:
        for x in columns:
            yield pixels[y : y + side, x : x + side], span


def copies(pixels: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """In the order of :data:`COPIES`."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    yield np.asarray(Image.open(buffer))
    yield np.asarray(image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX))
    yield 255 * (pixels / 255) ** 0.7
    yield pixels + rng.normal(0, 8, pixels.shape)
    yield np.roll(pixels, (2, 2), (0, 1))
    yield pixels[pixels.shape[0] // 100 :, pixels.shape[1] // 100 :]
    yield pixels * 0.5 + 60


def hashes(data: Path, pixels: dict[Path, np.ndarray]) -> dict[str, Any]:
    """Bits that copies change, and in which micrographs of different objects differ."""
    bits = {path: int(perceptual_hash(p), 16) for path, p in pixels.items()}
    rng = np.random.default_rng(0)
    paths = sorted(pixels)
    worst, known = dict.fromkeys(COPIES, 0), dict.fromkeys(COPIES, 0)
    for i in rng.choice(len(paths), _COPIED, replace=False):
        for name, copy in zip(COPIES, copies(pixels[paths[i]], rng), strict=True):
            changed = (bits[paths[i]] ^ int(perceptual_hash(copy), 16)).bit_count()
            worst[name] = max(worst[name], changed)
            known[name] += changed <= NEAR_BITS
    print(f"bits that copies of {_COPIED} micrographs change, at most: {worst} (limit {NEAR_BITS})")
    print(f"copies that are known as such, of {_COPIED}: {known}", flush=True)
    object_of = objects(data, paths)
    signs = np.array([[(bits[p] >> k) & 1 for k in range(256)] for p in paths], np.float32) * 2 - 1
    differ = ((256 - signs @ signs.T) / 2).astype(int)
    other = np.array([[a != b for b in object_of] for a in object_of]) & np.triu(np.ones(differ.shape, bool), 1)
    least = np.sort(differ[other])[:6].tolist()
    print(f"micrographs of different objects: {int(other.sum())} pairs, the least different differ in {least} bits")
    rows, columns = np.nonzero(other & (differ <= NEAR_BITS))
    for a, b in zip(rows, columns, strict=True):
        print(f"  taken for near duplicates: {paths[a].name} and {paths[b].name} of {paths[a].parent.parent.name}")
    return {"copies": worst, "known": known, "others_least": least, "pairs": int(other.sum())}


def objects(data: Path, paths: list[Path]) -> list[str]:
    """What each micrograph shows: a virus micrograph, a frame of a film, or itself."""
    with open(data / "tem_virus" / "meta.csv") as file:
        of = {str(data / "tem_virus" / row["file"]): "virus " + row["micrograph"] for row in csv.DictReader(file)}
    with open(data / "tem_nanowire_seg" / "meta.csv") as file:
        wires = data / "tem_nanowire_seg" / "images"
        of |= {str(wires / f"{row['name']}.png"): "film " + row["group"] for row in csv.DictReader(file)}
    return [of.get(str(path), str(path)) for path in paths]


if __name__ == "__main__":
    raise SystemExit(main())
