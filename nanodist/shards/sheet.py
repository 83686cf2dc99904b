"""A contact sheet: what a store looks like, on one picture."""

from __future__ import annotations

from collections.abc import Sequence
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
    cells = []
    for i in chosen:
        sample = store.samples[i]
        cells.append((thumbnail(store.read(i), side), sample.label or sample.key))
    draw_sheet(cells, path, side)


def draw_sheet(cells: Sequence[tuple[Image.Image, str]], path: Path, side: int = 128, width: int | None = None) -> None:
    """Write a PNG of pictures with a caption (its end, where it is long) below each.

    The pictures are up to ``side`` pixels high and ``width`` (``side`` unless given) wide.
    """
    width = side if width is None else width
    columns = int(np.ceil(np.sqrt(len(cells) * side / width)))
    rows = -(-len(cells) // columns)
    cell = side + _GAP
    mode = "RGB" if any(picture.mode == "RGB" for picture, _ in cells) else "L"
    sheet = Image.new(mode, (columns * (width + _GAP) + _GAP, rows * (cell + _CAPTION) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (picture, caption) in enumerate(cells):
        row, column = divmod(place, columns)
        x, y = _GAP + column * (width + _GAP), _GAP + row * (cell + _CAPTION)
        sheet.paste(picture, (x, y))
        draw.text((x, y + side), caption[-width // 6 :].encode("ascii", "replace").decode(), fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")


def thumbnail(tile: npt.NDArray[Any], side: int) -> Image.Image:
    """A uint8 or uint16 (H, W) tile within ``side`` pixels; of 16 bits the upper 8."""
    image = Image.fromarray((tile >> 8).astype(np.uint8) if tile.dtype == np.uint16 else tile)
    image.thumbnail((side, side), Image.Resampling.BOX)
    return image
