"""Look-alikes of a micrograph in a store, by the features of an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc import atomic
from hpc.devices import inference_device
from hpc.tables import csv_text
from nanodist.downstream.features import store_features
from nanodist.downstream.finetune.predict import grey, read_each, whole_tiles
from nanodist.downstream.neighbours import unit_rows
from nanodist.encoders import Encoder
from nanodist.shards import Store
from nanodist.shards.sheet import draw_sheet, thumbnail

TABLE, SHEET, REPORT = "similar.csv", "similar.png", "report.json"
SHOWN_PX, LEAST_PX = 128, 16
COLUMNS = ("file", "page", "rank", "similarity", "sample", "micrograph", "label")


def find_similar(
    encoder: Encoder, store: Store, paths: Sequence[Path], out: Path, count: int = 12, per_micrograph: int = 1
) -> int:
    """Write the ``count`` most similar tiles of a store for every micrograph of ``paths`` to the folder ``out``.

    A micrograph that is larger than a tile is cut into tiles, whose features are averaged. Similarity is the cosine of
    features. The table is ``similar.csv``; ``similar.png`` shows a row for each of the first micrographs.

    Args:
        encoder: from any run or export.
        store: that is searched; its features are kept in ``out/features``.
        paths: files, or folders of them.
        out: folder to write.
        count: tiles for each micrograph.
        per_micrograph: tiles at most that come from one micrograph of the store.

    Returns:
        The number of files that could not be read; the report names each, with the reason.

    Raises:
        UserError: no such path, or none of the files is a micrograph.
    """
    problems: dict[str, str] = {}
    tile_px = max(store.tile_sizes)
    encoder.to(inference_device())

    def embedded(file: Path, page: int, micrograph: Any) -> tuple[str, int, npt.NDArray[np.float64], Any]:
        pixels = grey(file, micrograph, LEAST_PX)
        rows = unit_rows(encoder.embed(whole_tiles(pixels, tile_px)))
        return str(file), page, unit_rows(rows.mean(0)[None])[0], thumbnail(pixels, SHOWN_PX)

    asked = read_each(paths, embedded, problems)
    part, features = store_features(store, encoder, out / "features")
    rows = unit_rows(features)
    groups, labels = store.groups, store.labels
    table: list[list[Any]] = []
    cells: list[tuple[Any, str]] = []
    for file, page, feature, picture in asked:
        cells.append((picture, Path(file).name))
        likeness = rows @ feature
        places = _best(likeness, [groups[i] for i in part.indices], count, per_micrograph)
        for rank, place in enumerate(places, 1):
            i = part.indices[place]
            table.append([file, page, rank, f"{likeness[place]:.4f}", part.keys[place], groups[i], labels[i] or ""])
            cells.append((thumbnail(store.read(i), SHOWN_PX), f"{likeness[place]:.2f} {part.keys[place]}"))
    _write(out, table, problems)
    # A square sheet shows as many micrographs as fit, each with its look-alikes behind it.
    draw_sheet(cells[: max(1, 144 // (count + 1)) * (count + 1)], out / SHEET, SHOWN_PX)
    return len(problems)


def _best(likeness: npt.NDArray[np.float64], groups: Sequence[str], count: int, most: int) -> list[int]:
    """Places of the largest values, at most ``most`` of one group."""
    taken: dict[str, int] = {}
    places: list[int] = []
    for place in np.argsort(-likeness, kind="stable").tolist():
        if taken.get(groups[place], 0) < most:
            taken[groups[place]] = taken.get(groups[place], 0) + 1
            places.append(place)
        if len(places) == count:
            break
    return places


def _write(out: Path, table: Sequence[Sequence[Any]], problems: dict[str, str]) -> None:
    atomic.write_text(out / TABLE, csv_text(COLUMNS, table))
    atomic.write_json(out / REPORT, {"schema": 1, "not_read": problems})
