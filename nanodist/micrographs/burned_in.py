"""Scale bars and information bars that a program has burned into the pixels: found, then cut off or painted over.

What is drawn by a program is flat, as nothing that a detector records is: a scale bar is a horizontal bar of one
extreme value with straight ends near the top or the bottom, an information bar a strip over the whole width that ends
in one straight line. Letters of figure panels that stand far from a bar are not looked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

_BAND = 0.3  # share of the height, at the top and at the bottom, in which bars are looked for
_TOLERANCE = 0.06  # of the range of values that counts as "one value": JPEG leaves ripples
_MARGIN = 3  # pixels around what was found: outlines and ripples
_BAR_WIDTH = (0.035, 0.7)  # of the width of the micrograph
_SHORTEST = 16
_BAR_HEIGHT = 0.06  # of the shorter side, at most
_BAR_ASPECT = 2.5
_STRIP_HEIGHT = (0.012, 0.25)  # of the height of the micrograph
_CONTRAST = 0.12  # of the range, between a bar and the rows above and below it

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Bar:
    """A rectangle of pixels that were drawn: ``kind`` is ``scale bar`` (with its caption) or ``information bar``."""

    kind: str
    y: int
    x: int
    height: int
    width: int


def find_bars(pixels: npt.NDArray[Any]) -> list[Bar]:
    """The bars burned into (H, W) ``pixels``, from the top down."""
    height, width = pixels.shape
    low, high = float(pixels.min()), float(pixels.max())
    if high <= low or min(height, width) < 64:
        return []
    depth = round(_BAND * height)
    found: list[Bar] = []
    for top in (0, height - depth):
        band = (pixels[top : top + depth].astype(np.float32) - np.float32(low)) / np.float32(high - low)
        strip = _strip(band, at_top=top == 0, height=height)
        if strip is not None:
            found.append(Bar("information bar", top + strip[0], 0, strip[1], width))
            # What is drawn inside it goes with it.
            band[strip[0] : strip[0] + strip[1]] = 0.5
        found += [Bar(bar.kind, top + bar.y, bar.x, bar.height, bar.width) for bar in _scale_bars(band, height)]
    return sorted(found, key=lambda bar: (bar.y, bar.x))


def _strip(band: npt.NDArray[np.float32], at_top: bool, height: int) -> tuple[int, int] | None:
    """First row and number of rows of an information bar at the outer edge of a band."""
    rows = band if at_top else band[::-1]
    least, most = (round(share * height) for share in _STRIP_HEIGHT)
    for flags in (rows <= _TOLERANCE, rows >= 1 - _TOLERANCE):
        share = flags.mean(axis=1)
        inner = share[2:] < 0.5  # the outermost rows may be those of a frame
        end = 2 + int(np.argmax(inner)) if inner.any() else len(share)
        if not max(least, 4) <= end <= most or np.median(share[:end]) < 0.75:
            continue
        # One straight line: no share of a micrograph's own dark or bright ground falls so much from row to row.
        if share[end - 1] - share[min(end + 1, len(share) - 1)] >= 0.4:
            return (0, end) if at_top else (len(rows) - end, end)
    return None


def _scale_bars(band: npt.NDArray[np.float32], height: int) -> list[Bar]:
    bars: list[Bar] = []
    for flags in (band <= _TOLERANCE, band >= 1 - _TOLERANCE, band <= 2 * _TOLERANCE, band >= 1 - 2 * _TOLERANCE):
        runs = _long_runs(flags, max(_SHORTEST, round(_BAR_WIDTH[0] * band.shape[1])))
        if not runs.any():
            continue
        labels, _ = ndimage.label(flags)
        places = ndimage.find_objects(labels)
        for number in np.unique(labels[:, : runs.shape[1]][runs]):
            core = _core(labels[places[number - 1]] == number, places[number - 1], band, height)
            if core is not None:
                bars.append(_with_box_and_caption(core, band, flags))
    return _joined(bars, band.shape)


def _long_runs(flags: Flags, length: int) -> Flags:
    """Where a run of ``length`` pixels of a row begins: without one, there is no bar among them."""
    sums = np.cumsum(flags, axis=1, dtype=np.int32)
    sums = np.concatenate([np.zeros((len(flags), 1), np.int32), sums], axis=1)
    return np.asarray(sums[:, length:] - sums[:, :-length] == length)


def _core(shape: Flags, place: tuple[slice, slice], band: npt.NDArray[np.float32], height: int) -> Bar | None:
    """The horizontal bar that a connected piece is, without ticks at its ends; ``None`` where it is none."""
    width = band.shape[1]
    y, x = place[0].start, place[1].start
    tall, wide = shape.shape
    if not _BAR_WIDTH[0] * width <= wide <= _BAR_WIDTH[1] * width or wide < _SHORTEST or tall > wide:
        return None
    full = shape.mean(axis=1) >= 0.97
    rows = np.flatnonzero(full)
    if len(rows) == 0 or np.ptp(rows) + 1 != len(rows):
        return None
    thick = len(rows)
    if thick > max(2.0, _BAR_HEIGHT * min(height, width)) or wide < _BAR_ASPECT * thick:
        return None
    # Beyond its full rows and their blurred edges a bar has at most ticks at its ends.
    rest = shape[~ndimage.binary_dilation(full, iterations=2)]
    if len(rest) and rest.mean() > 0.35:
        return None
    top, end = y + int(rows[0]), y + int(rows[-1]) + 1
    inside = band[top:end, x : x + wide]
    if inside.std() > 0.03:
        return None
    # Sharp above and below, nearly everywhere along it: a particle's edge is neither straight nor even.
    middle = np.median(inside)
    for rows_beside in ((top - 2, top - 3), (end + 1, end + 2)):
        beside = [band[row, x : x + wide] for row in rows_beside if 0 <= row < len(band)]
        if max(((np.abs(row - middle) > _CONTRAST).mean() for row in beside), default=0.0) < 0.6:
            return None
    return Bar("scale bar", top, x, thick, wide)


def _with_box_and_caption(core: Bar, band: npt.NDArray[np.float32], flags: Flags) -> Bar:
    """The bar with the box that it is drawn in, if there is one, and with the writing beside it."""
    rows, columns = band.shape
    reach_y, reach_x = max(4 * core.height, round(0.08 * columns)), max(core.width, round(0.12 * columns))
    y0, y1 = max(0, core.y - reach_y), min(rows, core.y + core.height + reach_y)
    x0, x1 = max(0, core.x - reach_x), min(columns, core.x + core.width + reach_x)
    window = band[y0:y1, x0:x1]
    drawn = np.zeros(window.shape, bool)
    drawn[core.y - y0 : core.y - y0 + core.height, core.x - x0 : core.x - x0 + core.width] = True
    box = _box(core, band, flags)
    # Writing: strong edges close together, of either colour.
    edges = np.abs(ndimage.laplace(window)) > _edge(band)
    extreme = (window <= _TOLERANCE) | (window >= 1 - _TOLERANCE)
    strokes = (edges & ndimage.binary_dilation(extreme, iterations=2)) | drawn
    joined = ndimage.binary_closing(strokes, np.ones((5, max(9, columns // 60))))
    labels, _ = ndimage.label(joined | drawn, np.ones((3, 3)))
    boxes = [core] if box is None else [core, box]
    most = max(3 * core.height, round(0.075 * columns))
    for number, place in enumerate(ndimage.find_objects(labels), start=1):
        tall, wide = (part.stop - part.start for part in place)
        # Letters, and not what the micrograph shows near the bar: not too tall, not touching the window's outer side.
        if tall <= most and wide >= 2 and tall >= 3 and strokes[place][labels[place] == number].mean() > 0.2:
            boxes.append(Bar("", y0 + place[0].start, x0 + place[1].start, tall, wide))
    bar = _around(boxes, "scale bar", band.shape)
    # A bar in a corner goes to the side of the micrograph: gray writing between them is not told from the grain.
    near = round(0.13 * columns)
    left = 0 if bar.x <= near else bar.x
    right = columns if columns - bar.x - bar.width <= near else bar.x + bar.width
    return Bar(bar.kind, bar.y, left, bar.height, right - left)


def _edge(band: npt.NDArray[np.float32]) -> float:
    """An edge that is stronger than the noise of the micrograph: of 999 in 1000 pixels."""
    return max(0.25, float(np.quantile(np.abs(ndimage.laplace(band[:: max(1, len(band) // 256)])), 0.98)))


def _box(core: Bar, band: npt.NDArray[np.float32], flags: Flags) -> Bar | None:
    """A filled rectangle of the other extreme around the bar."""
    dark = bool(flags[core.y, core.x + core.width // 2])
    other = band >= 1 - _TOLERANCE if dark and band[core.y, core.x + core.width // 2] < 0.5 else band <= _TOLERANCE
    row = core.y - 3
    if row < 0 or other[row, core.x : core.x + core.width].mean() < 0.9:
        return None
    labels, _ = ndimage.label(other)
    number = int(np.bincount(labels[row, core.x : core.x + core.width]).argmax())
    if number == 0:
        return None
    place = ndimage.find_objects(labels)[number - 1]
    tall, wide = (part.stop - part.start for part in place)
    filled = ndimage.binary_fill_holes(labels[place] == number)
    if tall * wide > 0.3 * band.size or filled.mean() < 0.85:
        return None
    return Bar("", place[0].start, place[1].start, tall, wide)


def _around(boxes: Sequence[Bar], kind: str, shape: tuple[int, ...], margin: int = _MARGIN) -> Bar:
    y0 = max(0, min(box.y for box in boxes) - margin)
    x0 = max(0, min(box.x for box in boxes) - margin)
    y1 = min(shape[0], max(box.y + box.height for box in boxes) + margin)
    x1 = min(shape[1], max(box.x + box.width for box in boxes) + margin)
    return Bar(kind, y0, x0, y1 - y0, x1 - x0)


def _joined(bars: list[Bar], shape: tuple[int, ...]) -> list[Bar]:
    """Bars that overlap, such as one and its outline, as one."""
    left = list(bars)
    while True:
        pair = next(((a, b) for a, b in itertools.combinations(left, 2) if _overlap(a, b)), None)
        if pair is None:
            return left
        left = [bar for bar in left if bar not in pair] + [_around(pair, "scale bar", shape, 0)]


def _overlap(a: Bar, b: Bar) -> bool:
    return a.y < b.y + b.height and b.y < a.y + a.height and a.x < b.x + b.width and b.x < a.x + a.width


def free_rectangle(shape: tuple[int, int], bars: Iterable[Bar]) -> tuple[int, int, int, int]:
    """(y, x, height, width) of the largest rectangle of a micrograph of ``shape`` that no bar touches."""
    blocked = list(bars)
    tops = sorted({0, *(bar.y + bar.height for bar in blocked)})
    ends = sorted({shape[0], *(bar.y for bar in blocked)})
    best = (0, 0, 0, 0)
    for top, end in itertools.product(tops, ends):
        x = 0
        inside = sorted((b.x, b.x + b.width) for b in blocked if b.y < end and top < b.y + b.height)
        for start, stop in [*inside, (shape[1], shape[1])]:
            if (end - top) * (start - x) > best[2] * best[3] and end > top:
                best = (top, x, end - top, start - x)
            x = max(x, stop)
    return best


def paint_over(pixels: npt.NDArray[Any], bars: Iterable[Bar]) -> npt.NDArray[Any]:
    """A copy of ``pixels`` in which each bar shows, mirrored, what lies beside it towards the middle.

    The grain of the micrograph goes on there, so that no flat patch tells where a bar was.
    """
    painted = np.array(pixels)
    for bar in bars:
        rows = np.arange(bar.y, bar.y + bar.height)
        below = bar.y + bar.height / 2 < pixels.shape[0] / 2
        edge = bar.y + bar.height if below else bar.y - 1
        mirrored = 2 * edge - rows + (-1 if below else 1)
        # Where the micrograph is too short to mirror all rows, the last ones are those of the far edge.
        sources = np.clip(mirrored, 0, pixels.shape[0] - 1)
        columns = slice(bar.x, bar.x + bar.width)
        painted[rows, columns] = painted[sources, columns]
    return painted
