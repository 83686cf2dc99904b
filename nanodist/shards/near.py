"""Near duplicates: micrographs that show the same, told by a perceptual hash, so that no split parts them.

The hash is that of Zauner (2010), "Implementation and benchmarking of perceptual image hash functions", with 255 bits:
which of the lowest 16 x 16 coefficients of a micrograph's cosine transform lie above their median. The limit lies
between what JPEG, noise, brightness, contrast, gamma, half the size and a shift or crop by 1 % change and what
unrelated micrographs differ in (``python -m tests.e2e.packing_rules``). Turned and mirrored copies are not found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.fft import dctn

NEAR_BITS = 48
_SIDE, _KEPT = 64, 16
_ROWS = 1024
MODES = ("group", "drop", "keep")


def perceptual_hash(pixels: npt.NDArray[Any]) -> str:
    """255 bits of (H, W) ``pixels``, as 64 hex digits."""
    step = max(1, min(pixels.shape) // 4096)
    small = Image.fromarray(pixels[::step, ::step].astype(np.float32)).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    low = dctn(np.asarray(small, np.float64), norm="ortho")[:_KEPT, :_KEPT].ravel()[1:]
    # Rounded, so that what is zero by symmetry is zero on every machine.
    low = np.round(low, 6)
    return np.packbits(low > np.median(low)).tobytes().hex()


def near_pairs(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (i, k), i < k, of near duplicates in ``old`` and ``new`` together, at least one of them in ``new``.

    Every pair is compared: 10,000 micrographs take a few seconds, 100,000 some minutes.
    """
    signs = _signs([*old, *new])
    bits = signs.shape[1]
    pairs: list[tuple[int, int]] = []
    for start in range(len(old), len(signs), _ROWS):
        rows = signs[start : start + _ROWS]
        differing = (bits - rows @ signs[: start + len(rows)].T) / 2
        for row, other in zip(*np.nonzero(differing <= NEAR_BITS), strict=True):
            if other < start + row:
                pairs.append((int(other), start + int(row)))
    return sorted(pairs)


def _signs(hashes: Sequence[str]) -> npt.NDArray[np.float32]:
    data = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(len(hashes), -1)
    # The last of 256 bits is padding, and the same in all.
    return np.unpackbits(data, axis=1).astype(np.float32) * 2 - 1


@dataclass
class Nearness:
    """What near duplicates make of groups and of micrographs.

    Attributes:
        group_of: the group that a group has become part of; groups that stay are not in it.
        of: new micrographs to drop, by number, and which one of old and new together each is a near duplicate of.
        micrographs: how many micrographs have a near duplicate before them.
    """

    group_of: dict[str, str] = field(default_factory=dict)
    of: dict[int, int] = field(default_factory=dict)
    micrographs: int = 0

    def group(self, name: str) -> str:
        """The group that ``name`` is part of."""
        return self.group_of.get(name, name)


def find_near(mode: str, old: Sequence[tuple[str, str]], new: Sequence[tuple[str, str]]) -> Nearness:
    """Compare micrographs, each given as (group, hash).

    Args:
        mode: ``group`` (near duplicates bring their groups together under the name of the first), ``drop`` (of near
            duplicates the first stays) or ``keep`` (nothing is compared).
        old: micrographs that are in the store, whose groups keep their names.
        new: micrographs to come, in their order.
    """
    found = Nearness()
    if mode == "keep" or not new:
        return found
    groups = [group for group, _ in [*old, *new]]
    pairs = near_pairs([bits for _, bits in old], [bits for _, bits in new])
    found.micrographs = len({later for _, later in pairs})
    if mode == "drop":
        for first, later in sorted(pairs, key=lambda pair: pair[1]):
            # One that is near to a dropped one alone is nobody's copy.
            if first - len(old) not in found.of:
                found.of.setdefault(later - len(old), first)
        return found
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.get(name, name) != name:
            name = parent[name]
        return name

    order = {name: number for number, name in reversed(list(enumerate(groups)))}
    for first, later in pairs:
        a, b = sorted((root(groups[first]), root(groups[later])), key=order.__getitem__)
        parent[b] = a
    found.group_of = {name: root(name) for name in order if root(name) != name}
    return found
