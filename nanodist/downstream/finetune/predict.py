"""Predictions of a fine-tuned classifier for micrographs from a microscope: a table, a picture, and what went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from hpc import atomic
from hpc.devices import inference_device
from hpc.errors import UserError
from hpc.progress import Progress
from hpc.tables import csv_text
from nanodist.downstream.finetune.load import Loaded
from nanodist.micrographs import Micrograph, count_micrographs, read_micrograph
from nanodist.micrographs.read import is_named_like_one
from nanodist.pixels import to_unit
from nanodist.shards.sheet import draw_sheet, thumbnail
from nanodist.shards.tiles import tile_starts, to_depth

AT_ONCE = 32
SHOWN, SHOWN_PX = 64, 128
PREDICTIONS, REPORT, SHEET = "predictions.csv", "report.json", "contact-sheet.png"


@dataclass(frozen=True)
class Prediction:
    """Of a micrograph, means over its tiles: probabilities (classes,), features (d,), how unlike the training it is."""

    file: str
    page: int
    probabilities: npt.NDArray[np.float64]
    features: npt.NDArray[np.float64]
    unlike: float | None
    tiles: int
    picture: Any


def files_of(paths: Sequence[Path]) -> list[Path]:
    """Files as they are given, and every file below the folders, by name; hidden ones are left out.

    Raises:
        UserError: there is no such path, or nothing in it.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path} does not exist")
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: there is no file to predict")
    return found


T = TypeVar("T")


def read_each(paths: Sequence[Path], handle: Callable[[Path, int, Micrograph], T], problems: dict[str, str]) -> list[T]:
    """What ``handle`` gives for (file, number in it, micrograph) of every micrograph of ``paths``.

    ``problems`` takes the reason for each file, or page of a file, that cannot be read or handled (whose ``UserError``
    it is).

    Raises:
        UserError: no such path, or nothing of it could be handled.
    """
    files, done = files_of(paths), list[T]()
    bar = Progress(len(files), "predicting", "files")
    for file in files:
        try:
            if file not in paths and not is_named_like_one(file):
                raise UserError(f"{file}: by its name it is no micrograph")
            pages = count_micrographs(file)
        except UserError as error:
            problems[str(file)], pages = str(error), 0
        for page in range(pages):
            try:
                done.append(handle(file, page, read_micrograph(file, page)))
            except UserError as error:
                problems[str(file) if pages == 1 else f"{file}, page {page}"] = str(error)
        bar.update()
    bar.close()
    if not done:
        raise UserError(
            f"none of the {len(files)} files could be predicted; the first: {next(iter(problems.values()))}"
        )
    return done


def predict(loaded: Loaded, paths: Sequence[Path], out: Path) -> int:
    """Predict every micrograph of ``paths``, and write the table, the picture and the report to the folder ``out``.

    Returns:
        The number of files that could not be predicted; the report names each, with the reason.

    Raises:
        UserError: no such path, or none of the files is a micrograph.
    """
    problems: dict[str, str] = {}
    done = read_each(paths, lambda file, page, each: predict_one(loaded, file, page, each), problems)
    _write(loaded, done, problems, out)
    return len(problems)


def grey(file: Path, micrograph: Micrograph, least_px: int) -> npt.NDArray[np.uint8]:
    """The pixels (H, W) as packing would store them.

    Raises:
        UserError: a side is shorter than ``least_px``, or there is no contrast.
    """
    height, width = micrograph.pixels.shape
    if min(height, width) < least_px:
        raise UserError(f"{file} has {height} x {width} pixels, and {least_px} a side are the least that say anything")
    try:
        pixels, _ = to_depth(micrograph.pixels, 8, always=False)
    except ValueError:
        raise UserError(f"{file} has no contrast: every pixel has the same value") from None
    return np.asarray(pixels, np.uint8)


def predict_one(loaded: Loaded, file: Path, page: int, micrograph: Micrograph) -> Prediction:
    """The prediction of micrograph number ``page`` of ``file``.

    Raises:
        UserError: it is too small, or has no contrast.
    """
    pixels = grey(file, micrograph, min(loaded.tile_px) // 2)
    likely, features = [], []
    device = inference_device()
    loaded.model.to(device)
    for tiles in _batches(whole_tiles(pixels, loaded.tile_px)):
        p, f = loaded.model.looked_at(torch.from_numpy(np.stack([to_unit(t) for t in tiles]))[:, None].to(device))
        likely.append(p.double().cpu().numpy())
        features.append(f.double().cpu().numpy())
    rows, every, unlike = np.concatenate(features), np.concatenate(likely), None
    if loaded.reference is not None:
        unlike = float(np.median(loaded.reference.unlikeness(rows)))
    picture = thumbnail(pixels, SHOWN_PX)
    return Prediction(str(file), page, every.mean(0), rows.mean(0), unlike, len(every), picture)


def whole_tiles(pixels: npt.NDArray[Any], tile_px: tuple[int, int]) -> Iterator[npt.NDArray[Any]]:
    """Tiles of the size that was trained on, or all of a side that is shorter."""
    height, width = (min(own, tile) for own, tile in zip(pixels.shape, tile_px, strict=True))
    for y in tile_starts(pixels.shape[0], height, 0):
        for x in tile_starts(pixels.shape[1], width, 0):
            yield np.ascontiguousarray(pixels[y : y + height, x : x + width])


def _batches(tiles: Iterator[npt.NDArray[Any]]) -> Iterator[list[npt.NDArray[Any]]]:
    batch: list[npt.NDArray[Any]] = []
    for tile in tiles:
        batch.append(tile)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _write(loaded: Loaded, done: Sequence[Prediction], problems: dict[str, str], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    header, rows = ["file", "page", "predicted", "unlike_training", "tiles", *(f"p_{c}" for c in loaded.classes)], []
    counts = dict.fromkeys(loaded.classes, 0)
    for one in done:
        name = loaded.classes[int(one.probabilities.argmax())]
        counts[name] += 1
        unlike = "" if one.unlike is None else f"{one.unlike:.3f}"
        rows.append([one.file, one.page, name, unlike, one.tiles, *(f"{p:.6f}" for p in one.probabilities)])
    atomic.write_text(out / PREDICTIONS, csv_text(header, rows))
    strange = [one.file for one in done if one.unlike is not None and one.unlike > 1]
    document = {
        "schema": 1,
        "checkpoint": str(loaded.checkpoint),
        "predicted": len(done),
        "by_class": counts,
        "unlike_anything_in_training": strange,
        "not_predicted": problems,
    }
    atomic.write_json(out / REPORT, document)
    draw_sheet(_cells(loaded, done), out / SHEET, SHOWN_PX)


def _cells(loaded: Loaded, done: Sequence[Prediction]) -> list[tuple[Any, str]]:
    """Pictures by class, the surest first; a few of very many, evenly taken."""
    order = sorted(done, key=lambda one: (int(one.probabilities.argmax()), -float(one.probabilities.max())))
    chosen = np.unique(np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int))
    cells = []
    for one in (order[i] for i in chosen):
        best = int(one.probabilities.argmax())
        mark = " ?" if one.unlike is not None and one.unlike > 1 else ""
        cells.append((one.picture, f"{loaded.classes[best][:12]} {one.probabilities[best]:.2f}{mark}"))
    return cells
