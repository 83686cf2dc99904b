"""A picture of what ``--bars`` would cut off or paint over, to look at before anything is packed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hpc.errors import UserError
from nanodist.micrographs import Micrograph, read_micrograph
from nanodist.micrographs.burned_in import Bar, find_bars, free_rectangle
from nanodist.shards.sources import Source
from nanodist.shards.tiles import to_depth

_SHOWN, _SIDE, _CAPTION, _GAP = 64, 256, 14, 4
_COLOURS = {"scale bar": (255, 0, 0), "information bar": (0, 90, 255)}
_KEPT = (0, 200, 0)


def preview_bars(sources: Sequence[Source], path: Path, shown: int = _SHOWN) -> tuple[int, int]:
    """Write a PNG of up to ``shown`` of the ``sources``, evenly spread; gives how many are on it, and with bars.

    Scale bars are framed in red, information bars in blue, and what ``--bars cut`` keeps in green.

    Raises:
        UserError: none of them can be read.
    """
    chosen = np.unique(np.linspace(0, len(sources) - 1, min(shown, len(sources))).round().astype(int)).tolist()
    found: list[tuple[str, Micrograph, list[Bar]]] = []
    for i in chosen:
        try:
            micrograph = read_micrograph(sources[i].path)
        except UserError:  # packing itself says what is wrong with it
            continue
        found.append((sources[i].name, micrograph, find_bars(micrograph.pixels)))
    if not found:
        raise UserError(f"none of {len(chosen)} files (such as {sources[chosen[0]].name}) holds a micrograph to show")
    columns = int(np.ceil(np.sqrt(len(found))))
    rows = -(-len(found) // columns)
    cell = _SIDE + _GAP
    sheet = Image.new("RGB", (columns * cell + _GAP, rows * (cell + _CAPTION) + _GAP), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for place, (name, micrograph, bars) in enumerate(found):
        row, column = divmod(place, columns)
        x, y = _GAP + column * cell, _GAP + row * (cell + _CAPTION)
        sheet.paste(_framed(micrograph, bars), (x, y))
        draw.text((x, y + _SIDE), name[-_SIDE // 6 :].encode("ascii", "replace").decode(), fill=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")
    return len(found), sum(bool(bars) for _, _, bars in found)


def _framed(micrograph: Micrograph, bars: list[Bar]) -> Image.Image:
    pixels = micrograph.pixels
    try:
        image = Image.fromarray(to_depth(pixels, 8, False)[0])
    except ValueError:  # without contrast
        image = Image.new("L", (pixels.shape[1], pixels.shape[0]), 128)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX)
    framed = image.convert("RGB")
    draw = ImageDraw.Draw(framed)
    scale = image.width / pixels.shape[1]

    def frame(y: int, x: int, height: int, width: int, colour: tuple[int, int, int]) -> None:
        left, top = x * scale, y * scale
        draw.rectangle(
            (left, top, max(left, (x + width) * scale - 1), max(top, (y + height) * scale - 1)), outline=colour, width=2
        )

    if bars:
        frame(*free_rectangle((pixels.shape[0], pixels.shape[1]), bars), _KEPT)
    for bar in bars:
        frame(bar.y, bar.x, bar.height, bar.width, _COLOURS[bar.kind])
    return framed
