"""A contact sheet: what a store looks like, on one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from nanodist.shards.store import Store

_CAPTION = 14
_GAP = 4


def contact_sheet(store: Store, path: Path, count: int = 64, side: int = 128) -> None:
    """Write a PNG of ``count`` samples, evenly spread over the store, each within ``side`` pixels, with its label.

    16-bit samples are shown by their upper 8 bits.

    Raises:
        UserError: a sample is damaged.
    """
    count = min(count, len(store))
    chosen = np.unique(np.linspace(0, len(store) - 1, count).round().astype(int)).tolist()
    columns = int(np.ceil(np.sqrt(len(chosen))))
    rows = -(-len(chosen) // columns)
    cell = side + _GAP
    sheet = Image.new("L", (columns * cell + _GAP, rows * (cell + _CAPTION) + _GAP), 255)
    draw = ImageDraw.Draw(sheet)
    for place, i in enumerate(chosen):
        row, column = divmod(place, columns)
        x, y = _GAP + column * cell, _GAP + row * (cell + _CAPTION)
        sheet.paste(_thumbnail(store.read(i), side), (x, y))
        sample = store.samples[i]
        caption = (sample.label or sample.key)[-side // 6 :].encode("ascii", "replace").decode()
        draw.text((x, y + side), caption, fill=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")


def _thumbnail(tile: npt.NDArray[Any], side: int) -> Image.Image:
    image = Image.fromarray((tile >> 8).astype(np.uint8) if tile.dtype == np.uint16 else tile)
    image.thumbnail((side, side), Image.Resampling.BOX)
    return image
