"""What is counted while packing: pixel statistics, and which pixels were there before."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from nanodist.shards.index import Sample
from nanodist.shards.near import Nearness
from nanodist.shards.pieces import PieceTile


class Tally:
    """Exact sums over all pixels, so that the statistics do not depend on any order."""

    def __init__(self) -> None:
        self.pixels = self.total = self.total_of_squares = 0
        self.seen: dict[str, tuple[str, str | None]] = {}
        self.known: dict[tuple[str, int, int, int], tuple[str, str | None]] = {}
        self.again = 0

    def know(self, sample: Sample) -> None:
        """Remember a sample of a store that grows; its pixels are in the sums already.

        The store does not keep the hash of pixels, so that such a sample is told by its encoded bytes.
        """
        self.known.setdefault((sample.xxh3, sample.size, sample.height, sample.width), (sample.key, sample.label))

    def is_new(self, tile: PieceTile, key: str, source: str, label: str | None, dropped: list[dict[str, str]]) -> bool:
        """Count a tile, unless the same pixels were there before; ``again`` counts a store's own samples."""
        stored = self.known.get((tile.xxh3, tile.size, tile.height, tile.width))
        if stored == (key, label):
            self.again += 1
            return False
        first, first_label = stored or self.seen.setdefault(tile.pixel_hash, (key, label))
        if first != key or stored:
            conflict = "" if label == first_label else ", which has another label"
            dropped.append({"source": source, "reason": f"exact duplicate{conflict}", "key": key, "of": first})
            return False
        self.pixels += tile.height * tile.width
        self.total += tile.total
        self.total_of_squares += tile.total_of_squares
        return True

    def mean_and_std(self, depth: int) -> tuple[float, float]:
        """Of pixel values divided by the largest of the depth."""
        top = 2**depth - 1
        variance = self.pixels * self.total_of_squares - self.total**2  # whole numbers: no cancellation
        return self.total / (self.pixels * top), math.sqrt(variance) / (self.pixels * top)


def statistics(samples: list[Sample], tally: Tally, depth: int, near: Nearness) -> dict[str, Any]:
    """What the manifest says about all samples together."""
    grouped: dict[str, list[str]] = {}
    for name, group in sorted(near.group_of.items()):
        grouped.setdefault(group, []).append(name)
    mean, std = tally.mean_and_std(depth)
    sizes_nm = [max(s.pixel_size_nm) for s in samples if s.pixel_size_nm]
    tiles = Counter(f"{s.height}x{s.width}" for s in samples)
    labels = Counter(s.label for s in samples if s.label is not None)
    return {
        "mean": mean,
        "std": std,
        "pixel_size_nm": [min(sizes_nm), max(sizes_nm)] if sizes_nm else None,
        "pixel_size_unknown": len(samples) - len(sizes_nm),
        "tile_sizes": dict(sorted(tiles.items())),
        "labels": dict(sorted(labels.items())),
        "groups": len({s.group for s in samples}),
        "sources": len({s.source for s in samples}),
        # Groups that near duplicates have brought together, by the name that all of them have now.
        "near_duplicates": dict(sorted(grouped.items())),
    }
