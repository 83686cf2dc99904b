"""Pictures of predicted masks beside the true ones: single images from the worst on, and a sheet of a few."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc import atomic
from nanodist.downstream.segment.scores import ImageScores
from nanodist.pixels import to_unit

U8 = npt.NDArray[np.uint8]
FOLDER, INDEX = "overlays", "index.json"
WORST = 12
SHOWN = 6
SIDE_PX = 256
# Okabe and Ito: apart for colour-blind readers too, and one is dashed.
TRUE, PREDICTED = (86, 180, 233), (230, 159, 0)
_DASH_PX = 4


@dataclass(frozen=True)
class Overlay:
    """One test image: ``number`` in the test part, ``iou`` and ``dice`` without background, and the PNG."""

    number: int
    iou: float
    dice: float
    png: bytes


def draw(image: npt.NDArray[Any], truth: U8, predicted: U8) -> bytes:
    """PNG of an image (H, W), and beside it the same with outlines of true and predicted classes (H, W).

    Large ones are drawn smaller, by whole steps; small ones larger.
    """
    from PIL import Image

    pair = _pair(image, truth, predicted)
    buffer = io.BytesIO()
    Image.fromarray(pair).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _pair(image: npt.NDArray[Any], truth: U8, predicted: U8) -> U8:
    step = max(1, -(-max(truth.shape) // (2 * SIDE_PX)))
    grey, truth, predicted = to_unit(image)[::step, ::step], truth[::step, ::step], predicted[::step, ::step]
    low, high = np.quantile(grey, [0.005, 0.995])
    grey = np.clip((grey - low) / max(float(high - low), 1e-6), 0, 1)
    times = max(1, SIDE_PX // max(grey.shape))
    grey, truth, predicted = (np.kron(x, np.ones((times, times), x.dtype)) for x in (grey, truth, predicted))
    plain = np.repeat((255 * grey).astype(np.uint8)[..., None], 3, 2)
    drawn = plain.copy()
    drawn[_outline(truth)] = TRUE
    rows, columns = np.indices(truth.shape)
    drawn[_outline(predicted) & (((rows + columns) // _DASH_PX) % 2 == 0)] = PREDICTED
    gap = np.full((len(plain), 4, 3), 255, np.uint8)
    pair: U8 = np.concatenate([plain, gap, drawn], 1)
    return pair


def _outline(classes: U8) -> npt.NDArray[np.bool_]:
    """Pixels next to one of another class; two wide."""
    from scipy import ndimage

    small, large = ndimage.minimum_filter(classes, 3), ndimage.maximum_filter(classes, 3)
    edge: npt.NDArray[np.bool_] = small != large
    return edge


def overlay(score: ImageScores, image: npt.NDArray[Any], truth: U8, predicted: U8) -> Overlay:
    """The picture of one scored image; class 0 is the background."""
    return Overlay(score.number, _mean(score.iou[1:]), _mean(score.dice[1:]), draw(image, truth, predicted))


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def worst(found: Sequence[Overlay], count: int = WORST) -> list[Overlay]:
    """The ``count`` worst by IoU, the worst first; images without any class beside the background last."""
    return sorted(found, key=lambda one: (np.isnan(one.iou), one.iou, one.number))[:count]


def write(folder: Path, found: Sequence[Overlay], names: Sequence[tuple[str, str]]) -> None:
    """Write pictures and ``index.json`` to a new ``folder/overlays``, in place of an older one.

    Args:
        folder: ``report`` of the run directory.
        found: in order.
        names: sample and micrograph of each.
    """
    import shutil

    target, fresh = folder / FOLDER, folder / f".{FOLDER}.{os.getpid()}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    rows = []
    with atomic.directory(fresh) as root:
        for place, (one, (sample, micrograph)) in enumerate(zip(found, names, strict=True)):
            file = f"{place:02d}.png"
            (root / file).write_bytes(one.png)
            figures = {name: None if np.isnan(v) else round(v, 6) for name, v in (("iou", one.iou), ("dice", one.dice))}
            rows.append({"file": file, "sample": sample, "micrograph": micrograph, **figures})
        (root / INDEX).write_text(json.dumps(rows, indent=1))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)


def sheet(pngs: Sequence[bytes]) -> bytes:
    """Pictures of :func:`draw` under one another, as PNG."""
    from PIL import Image

    pictures = [Image.open(io.BytesIO(data)) for data in pngs]
    wide = max(picture.width for picture in pictures)
    made = Image.new("RGB", (wide, sum(picture.height + 4 for picture in pictures) - 4), "white")
    top = 0
    for picture in pictures:
        made.paste(picture, (0, top))
        top += picture.height + 4
    buffer = io.BytesIO()
    made.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
