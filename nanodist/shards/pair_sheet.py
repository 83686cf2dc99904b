"""A contact sheet of pairs: the pattern, as it is compressed, beside the micrograph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from nanodist.scattering.pattern import Pattern, compressed
from nanodist.shards.pair_store import PairStore
from nanodist.shards.sheet import draw_sheet, thumbnail

_MASKED, _NOTHING = 96, 255


def pair_sheet(store: PairStore, path: Path, count: int = 64, side: int = 192) -> None:
    """Write a PNG of ``count`` items, evenly spread over the store, each member within ``side`` pixels.

    Raises:
        UserError: an item is damaged.
    """
    chosen = np.unique(np.linspace(0, len(store) - 1, min(count, len(store))).round().astype(int)).tolist()
    cells = []
    for i in chosen:
        both = Image.new("L", (2 * side, side), _NOTHING)
        pattern, micrograph = store.pattern(i), store.micrograph(i)
        if pattern is not None:
            shown = Image.fromarray(picture(pattern, store.reference)).resize((side, side), Image.Resampling.BICUBIC)
            both.paste(shown, (0, 0))
        if micrograph is not None:
            both.paste(thumbnail(micrograph[0], side), (side, 0))
        cells.append((both, store.keys[i]))
    draw_sheet(cells, path, side, 2 * side)


def picture(pattern: Pattern, reference: float) -> npt.NDArray[np.uint8]:
    """A pattern as uint8 (size, size): asinh(I / I0) from its percentiles 0.5 to 99.9; grey where it is masked."""
    values = compressed(pattern.intensity, reference)
    low, high = np.percentile(values[pattern.mask], [0.5, 99.9])
    scaled: npt.NDArray[Any] = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * 255
    return np.where(pattern.mask, scaled, _MASKED).astype(np.uint8)
