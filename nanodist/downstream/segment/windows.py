"""Probabilities of every pixel of a micrograph of any size: windows that overlap, blended, strip by strip."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from nanodist.downstream.segment.model import Segmenter
from nanodist.encoders import symmetries
from nanodist.pixels import to_unit
from nanodist.shards.tiles import tile_starts

AT_ONCE = 8
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@torch.inference_mode()
def strips(
    model: Segmenter,
    pixels: npt.NDArray[Any],
    crop_px: int,
    size_px: int,
    turns: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, F32]]:
    """The first row, and probabilities (classes, rows, W) of the strip that begins there, from top to bottom.

    Windows of ``crop_px`` share half of their side with the next one, and weigh less towards their edges, where the
    network sees little around a pixel. Only two rows of windows are in memory, however large the micrograph is.

    Args:
        model: in eval mode.
        pixels: (H, W) uint8 or uint16.
        crop_px: side of a window in pixels of the micrograph.
        size_px: side to which a window is resized for the model, as a view was.
        turns: rotations and reflections that are averaged over.
        progress: called with the number of windows of each finished row.
    """
    height, width = pixels.shape
    pixels = _at_least(pixels, crop_px)
    weights = _weights(crop_px)
    columns = tile_starts(pixels.shape[1], crop_px, crop_px // 2)
    rows = tile_starts(pixels.shape[0], crop_px, crop_px // 2)
    device = next(model.parameters()).device
    held = np.zeros((model.classes + 1, crop_px, pixels.shape[1]), np.float32)
    for place, y in enumerate(rows):
        for first in range(0, len(columns), AT_ONCE):
            some = columns[first : first + AT_ONCE]
            windows = _cut(pixels, [(y, x) for x in some], crop_px).to(device)
            made = _probabilities(model, windows, size_px, turns).cpu().numpy()
            for x, p in zip(some, made, strict=True):
                held[:-1, :, x : x + crop_px] += p * weights
                held[-1, :, x : x + crop_px] += weights
        if progress is not None:
            progress(len(columns))
        done = (rows[place + 1] if place + 1 < len(rows) else pixels.shape[0]) - y
        finished = held[:, :done, :width]
        last = max(0, min(done, height - y))
        if last:
            yield y, finished[:-1, :last] / finished[-1, :last]
        held[:, : crop_px - done] = held[:, done:].copy()
        held[:, crop_px - done :] = 0


@torch.inference_mode()
def mean_features(model: Segmenter, pixels: npt.NDArray[Any], crop_px: int, size_px: int) -> F64:
    """Features (d,) of the trunk, averaged over the windows side by side that ``pixels`` (H, W) are seen in.

    Args:
        model: in eval mode.
        pixels, crop_px, size_px: as :func:`strips` has them.
    """
    pixels, device = _at_least(pixels, crop_px), next(model.parameters()).device
    rows, columns = (tile_starts(side, crop_px, 0) for side in pixels.shape)
    places, total = list(itertools.product(rows, columns)), torch.zeros((), dtype=torch.float64)
    for first in range(0, len(places), AT_ONCE):
        shown = _resized(_cut(pixels, places[first : first + AT_ONCE], crop_px).to(device), size_px)
        total = total + model.features(shown).double().sum(0).cpu()
    return np.asarray((total / len(places)).numpy())


def _at_least(pixels: npt.NDArray[Any], side: int) -> npt.NDArray[Any]:
    """A micrograph that is smaller than a window is continued by its mirror image."""
    pad = [(0, max(0, side - extent)) for extent in pixels.shape]
    return np.pad(pixels, pad, mode="symmetric") if any(more for _, more in pad) else pixels


def _cut(pixels: npt.NDArray[Any], places: Sequence[tuple[int, int]], side: int) -> Tensor:
    """The windows (n, 1, side, side) in [0, 1] that begin at ``places`` (y, x)."""
    windows = [to_unit(np.ascontiguousarray(pixels[y : y + side, x : x + side])) for y, x in places]
    return torch.from_numpy(np.stack(windows))[:, None]


def _resized(windows: Tensor, size_px: int) -> Tensor:
    if windows.shape[-1] == size_px:
        return windows
    return functional.interpolate(
        windows, size=(size_px, size_px), mode="bilinear", align_corners=False, antialias=True
    )


def window_count(shape: tuple[int, ...], crop_px: int) -> int:
    """Windows of a micrograph, for a progress line."""
    rows, columns = (len(tile_starts(max(side, crop_px), crop_px, crop_px // 2)) for side in shape)
    return rows * columns


def _probabilities(model: Segmenter, windows: Tensor, size_px: int, turns: int) -> Tensor:
    crop_px, shown = windows.shape[-1], _resized(windows, size_px)
    total = torch.zeros(())
    for number, turned in enumerate(symmetries(shown, turns)):
        total = total + turned_back(model.predict(turned), number)
    total = total / turns
    if crop_px != size_px:
        total = functional.interpolate(total, size=(crop_px, crop_px), mode="bilinear", align_corners=False)
    return total


def turned_back(maps: Tensor, number: int) -> Tensor:
    """``maps`` of the ``number``-th symmetry in the orientation of the image."""
    back = torch.rot90(maps, -(number % 4), dims=(-2, -1))
    return back.flip(-1) if number >= 4 else back


def _weights(side: int) -> F32:
    """(side, side): falls off linearly from the middle to the edges, and is nowhere 0."""
    along = 1 - np.abs((np.arange(side) + 0.5) * 2 / side - 1) + 1e-3
    return np.outer(along, along).astype(np.float32)
