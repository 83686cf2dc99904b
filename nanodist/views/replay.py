"""What a sample looked like at a step of a run."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from hpc import atomic
from hpc.errors import UserError
from nanodist.pixels import to_unit
from nanodist.shards import GroupPartners
from nanodist.shards.order import Batches
from nanodist.shards.windows import Tiles
from nanodist.views import ViewsConfig, draw, render

_COLOURS = ((230, 120, 0), (0, 110, 200))
_GAP, _LINE, _SIDE = 8, 14, 256


@dataclass(frozen=True)
class Replay:
    """One sample at one step.

    Attributes:
        key: of the sample.
        step: as ``metrics.jsonl`` counts, from 1.
        epoch: of the sample at that step, from 0.
        tiles: the two tiles (H, W) that were shown: the same twice, unless positives are of one group.
        outlines: (2, 4, 2) corners (x, y) of each view's crop in its tile, in pixels.
        views: (2, size_px, size_px) float32 in [0, 1], as the encoder got them.
        pixel_size_nm: (2, 2), the (y, x) of each view; nan where unknown.
    """

    key: str
    step: int
    epoch: int
    tiles: tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]
    outlines: npt.NDArray[np.float64]
    views: npt.NDArray[np.float32]
    pixel_size_nm: npt.NDArray[np.float64]


def steps_of(order: Batches, sample: int, near: int, count: int = 3) -> list[int]:
    """The ``count`` steps (from 1) nearest to step ``near`` whose batch holds ``sample``."""
    return [step + 1 for step in order.steps_of(sample, near - 1, count)]


def epoch_at(order: Batches, key: str, sample: int, step: int, steps_total: int) -> int:
    """The epoch of ``sample`` in the batch of ``step``.

    Raises:
        UserError: no such step, or one whose batch does not hold the sample; names steps that do.
    """
    if not 1 <= step <= steps_total:
        raise UserError(f"the recipe has no step {step}; its steps run from 1 to {steps_total}")
    epochs, indices = order.arrays(step - 1)
    here = np.flatnonzero(indices == sample)
    if len(here):
        return int(epochs[here[0]])
    seen = [s for s in steps_of(order, sample, step) if s <= steps_total]
    where = f"it is at step {', '.join(map(str, seen))}" if seen else "the run ends before it is"
    raise UserError(f"sample {key} is not in the batch of step {step}; {where}")


def replay(
    store: Tiles,
    config: ViewsConfig,
    order: Batches,
    key: str,
    step: int | None,
    steps_total: int,
    group_positives: bool = False,
) -> Replay:
    """Make the views of the sample ``key`` at ``step`` (``None``: the first that shows it) again.

    Args:
        store: of the run.
        config: the run's section ``views``.
        order: of the run's batches; its seed is the run's.
        key: of the sample.
        step: as ``metrics.jsonl`` counts, from 1.
        steps_total: of the run.
        group_positives: the second view shows another tile of the sample's group.

    Raises:
        UserError: the store holds no such sample, or the step did not show it.
    """
    keys = store.keys
    if key not in keys:
        raise UserError(f"{store.path} holds no sample '{key}'; its keys look like '{keys[0]}'")
    sample = keys.index(key)
    if step is None:
        step = steps_of(order, sample, 0, 1)[0]
    epoch = epoch_at(order, key, sample, step, steps_total)
    second = sample
    if group_positives:
        second = int(GroupPartners(store, order.seed)(np.array([epoch]), np.array([sample]))[0])
    tiles = (store.read(sample), store.read(second))
    known = store.pixel_size_nm[[sample]]
    views, outlines, pixel_sizes = [], [], []
    for number, tile in enumerate(tiles):
        height, width = tile.shape
        drawn = draw(config, order.seed, [epoch], [key], number, height, width, known, step - 1)
        views.append(render(torch.tensor(tile[None]), drawn, config)[0, 0].numpy())
        edge = config.size_px - 0.5
        corners = np.array([[-0.5, -0.5, 1], [edge, -0.5, 1], [edge, edge, 1], [-0.5, edge, 1]])
        outlines.append(corners @ drawn.matrix[0].T)
        pixel_sizes.append(drawn.pixel_size_nm[0])
    return Replay(key, step, epoch, tiles, np.stack(outlines), np.stack(views), np.stack(pixel_sizes))


def write_replays(replays: list[Replay], path: Path) -> None:
    """Write a PNG, a row a sample: the tile with both crops drawn in, and the views beside it, pixel by pixel.

    Views are enlarged by whole factors, so that what is seen is what the encoder got.
    """
    rows = [_row(one) for one in replays]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    atomic.write_bytes(path, buffer.getvalue())


def _row(one: Replay) -> Image.Image:
    same = one.tiles[0] is one.tiles[1] or np.array_equal(one.tiles[0], one.tiles[1])
    cells = [_tile(one.tiles[0], one.outlines, _COLOURS)] if same else []
    for number in (0, 1):
        if not same:
            cells.append(_tile(one.tiles[number], one.outlines[number : number + 1], _COLOURS[number : number + 1]))
        factor = max(1, round(_SIDE / one.views.shape[-1]))
        view = (one.views[number] * 255).round().astype(np.uint8).repeat(factor, 0).repeat(factor, 1)
        framed = Image.new("RGB", (view.shape[1] + 4, view.shape[0] + 4), _COLOURS[number])
        framed.paste(Image.fromarray(view), (2, 2))
        cells.append(framed)
    height = max(cell.height for cell in cells) + 2 * _GAP + _LINE
    row = Image.new("RGB", (sum(cell.width + _GAP for cell in cells) + _GAP, height), "white")
    ImageDraw.Draw(row).text((_GAP, 2), caption(one), fill="black")
    left = _GAP
    for cell in cells:
        row.paste(cell, (left, _LINE + _GAP))
        left += cell.width + _GAP
    return row


def _tile(
    tile: npt.NDArray[np.generic], outlines: npt.NDArray[np.float64], colours: tuple[tuple[int, int, int], ...]
) -> Image.Image:
    factor = _SIDE / max(tile.shape)
    size = (round(tile.shape[1] * factor), round(tile.shape[0] * factor))
    grey = Image.fromarray((to_unit(tile) * 255).round().astype(np.uint8))
    image = grey.resize(size, Image.Resampling.BOX if factor < 1 else Image.Resampling.NEAREST).convert("RGB")
    pen = ImageDraw.Draw(image)
    for outline, colour in zip(outlines, colours, strict=True):
        corners = [tuple(corner) for corner in ((outline + 0.5) * factor).tolist()]
        pen.line([*corners, corners[0]], fill=colour, width=2)
    return image


def caption(one: Replay) -> str:
    """One line about the sample, its step and the pixel sizes of its views."""
    text = f"{one.key}, step {one.step}, epoch {one.epoch}"
    if np.isfinite(one.pixel_size_nm).all():
        text += ", views of " + " and ".join(f"{size:.3g}" for size in one.pixel_size_nm.mean(1)) + " nm/px"
    return text
