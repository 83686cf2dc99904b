"""Which micrographs are worth a mask next, by a fine-tuned segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from hpc.devices import inference_device
from hpc.tables import csv_text
from nanodist.downstream.finetune.predict import SHOWN_PX, grey, read_each
from nanodist.downstream.finetune.suggest import choose, write_suggested
from nanodist.downstream.segment.predict import LoadedSegmenter, features_of, least_px, overlay, segment
from nanodist.micrographs import Micrograph
from nanodist.shards.sheet import thumbnail

COLUMNS = ("rank", "file", "page", "expected_dice", "distance", "unlike_training")


@dataclass(frozen=True)
class _Looked:
    file: str
    page: int
    expected_dice: float
    features: npt.NDArray[np.float64]
    picture: Image.Image


def suggest_masks(loaded: LoadedSegmenter, paths: Sequence[Path], out: Path, count: int = 20) -> int:
    """Write the micrographs of ``paths`` that are worth a mask to ``suggested.csv`` in ``out``, with a contact sheet.

    They are those whose mask promises a poor Dice (:mod:`nanodist.downstream.segment.promise`) and that lie far, in the
    trunk's features, from everything that was trained on or is suggested before them, as
    :func:`nanodist.downstream.finetune.suggest.choose` has it.

    Returns:
        The number of files that could not be read; the report names each, with the reason.

    Raises:
        UserError: no such path, or none of the files is a micrograph.
    """
    problems: dict[str, str] = {}
    loaded.model.to(inference_device())
    done = read_each(paths, lambda file, page, each: _look(loaded, file, page, each), problems)
    features = np.stack([one.features for one in done])
    known = loaded.reference.rows if loaded.reference is not None else None
    unlike = None if loaded.reference is None else loaded.reference.unlikeness(features)
    unsure = np.asarray([1.0 - one.expected_dice for one in done])
    table, cells = [], []
    for rank, (i, distance) in enumerate(choose(unsure, features, known, count), 1):
        one = done[i]
        strange = "" if unlike is None else f"{unlike[i]:.3f}"
        table.append([rank, one.file, one.page, f"{one.expected_dice:.4f}", f"{distance:.4f}", strange])
        cells.append((one.picture, f"{rank} Dice {one.expected_dice:.2f}?"))
    write_suggested(out, csv_text(COLUMNS, table), cells, len(done), problems)
    return len(problems)


def _look(loaded: LoadedSegmenter, file: Path, page: int, micrograph: Micrograph) -> _Looked:
    pixels = grey(file, micrograph, least_px(loaded))
    made = segment(loaded, pixels, progress=pixels.size > 2**24)
    picture = thumbnail(overlay(pixels, made.classes), SHOWN_PX)
    return _Looked(str(file), page, made.expected_dice, features_of(loaded, pixels), picture)
