"""``nanodist pairvae evaluate``: unseen items, both directions, beside baselines that learned nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from hpc import atomic
from hpc.errors import UserError
from hpc.seeding import generator
from hpc.tables import csv_of, csv_text
from nanodist.pairvae.baselines import mean_pattern, nearest, random_fields
from nanodist.pairvae.data import PairData, Pairs
from nanodist.pairvae.describe import describe_image, describe_pattern
from nanodist.pairvae.images import tiling
from nanodist.pairvae.load import Trained, load
from nanodist.pairvae.model import Geometry
from nanodist.pairvae.physics import CropScattering
from nanodist.pairvae.report import Row, write_figures
from nanodist.pairvae.run import open_store
from nanodist.pairvae.scores import Truth, consistency, median_with_interval, saxs_scores, sem_scores, truth_of
from nanodist.scattering.pattern import Pattern

F32 = npt.NDArray[np.float32]
_CROPS = 8
EVALUATION = "evaluation"
SCORES_FILE, ITEMS_FILE, TABLE_FILE = "scores.json", "items.csv", "scores.csv"


@dataclass(frozen=True)
class Unseen:
    """The items that were never trained on, and what the baselines know of those that were.

    Attributes:
        truths: of the items that have both members.
        known: patterns of the training items that have both members, ``crops`` of their micrographs.
        area_fraction: mean of the training items.
        scale: largest asinh(I / I0) of a training pattern.
    """

    truths: list[Truth]
    known: list[Pattern]
    crops: list[F32]
    area_fraction: float
    scale: float


def unseen(trained: Trained, data: PairData, test: PairData | None = None) -> Unseen:
    """The items of ``data`` that ``trained`` never saw, or all of ``test``, whose specimens have to be others.

    Raises:
        UserError: none is left with both members, or the run knows another grid.
    """
    geometry, store = trained.geometry, data.store
    for grid in [store.grid, *([test.store.grid] if test is not None else [])]:
        if grid != geometry.grid:
            raise UserError(f"the store's q grid is {grid}, and the run was trained on {geometry.grid}")
    seen = set(trained.train) if store.manifest_hash == trained.store else set()
    specimens = {name for key, name in zip(store.keys, store.samples, strict=True) if key in seen}
    known, crops, areas, tops = [], [], [], [1e-9]
    for number, key in enumerate(store.keys):
        pattern, image = data.pattern(number), data.image(number)
        if pattern is None or image is None or key not in seen:
            continue
        own = np.stack(tiling(image, geometry.size_px, _CROPS))
        known.append(pattern)
        crops.append(own)
        areas.append(describe_image(own[0], geometry.pixel_size_nm).area_fraction)
        tops.append(float(np.arcsinh(pattern.intensity[pattern.mask].max() / geometry.reference)))
    truths = _truths(data, geometry, specimens) if test is None else _truths(test, geometry, set())
    if not truths:
        raise UserError(
            "every pair of the store was trained on: give another one by --store, or train with data.test_share"
        )
    if not known:
        raise UserError(
            "the store holds none of the items that were trained on, which the baselines need: give that store"
        )
    return Unseen(truths, known, crops, float(np.nanmean(areas)), max(tops))


def _truths(data: PairData, geometry: Geometry, left_out: set[str]) -> list[Truth]:
    """Whole pairs of all specimens but ``left_out``."""
    found = []
    for number, (key, specimen) in enumerate(zip(data.store.keys, data.store.samples, strict=True)):
        pattern, image = data.pattern(number), data.image(number)
        if pattern is not None and image is not None and specimen not in left_out:
            own = np.stack(tiling(image, geometry.size_px, _CROPS))
            found.append(truth_of(key, specimen, pattern, own, geometry.pixel_size_nm, data.store.truth(number)))
    return found


def evaluate(
    run_dir: Path,
    store: str | None,
    out: Path,
    draws: int | None = None,
    seed: int = 0,
    test_store: str | None = None,
    draws_from: Literal["field", "prior"] | None = None,
) -> str:
    """Score a run, write tables and figures to ``out``, and return the table as text.

    Args:
        run_dir: of ``nanodist pairvae train``.
        store: that it was trained on, for the baselines; the recipe's unless given.
        out: a new folder.
        draws: images for each pattern; the recipe's unless given.
        seed: of the draws.
        test_store: of other specimens, which are then the whole test.
        draws_from: what draws of images begin with; as the recipe says unless given.

    Raises:
        UserError: run, store or folder do not suit.
    """
    trained = load(run_dir).drawing(draws_from)
    known = open_store(store or trained.recipe.data.store)
    test = open_store(test_store) if test_store else None
    return evaluate_pairs(trained, load(run_dir, "solo"), known, out, draws, seed, test)


def evaluate_pairs(
    trained: Trained, solo: Trained, store: Pairs, out: Path, draws: int | None, seed: int, test: Pairs | None = None
) -> str:
    """:func:`evaluate`, where run and stores are open."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} exists already; give a new folder")
    config = trained.recipe.data
    items = unseen(trained, PairData(store, config), PairData(test, config) if test is not None else None)
    made = [Made(trained, solo, items, truth, draws or trained.recipe.draws, seed) for truth in items.truths]
    rows = [row for one in made for row in one.rows()]
    with atomic.directory(out) as folder:
        atomic.write_text(folder / ITEMS_FILE, _table_of_items(rows))
        table = summary(rows, seed)
        atomic.write_json(folder / SCORES_FILE, {"run": str(trained.checkpoint), "items": len(made), "rows": table})
        atomic.write_text(folder / TABLE_FILE, csv_of(table, list(table[0])))
        write_figures(folder, trained, items.truths, items.known, [one.shown() for one in made])
    return as_text(table, len(made))


def measured_alone(pattern: Pattern) -> F32:
    """Intensity (S, S) with NaN where nothing was measured."""
    return np.where(pattern.mask, pattern.intensity, np.nan).astype(np.float32)


class Made:
    """All that is made for one unseen item, by the model and by the baselines."""

    def __init__(self, trained: Trained, solo: Trained, items: Unseen, truth: Truth, draws: int, seed: int) -> None:
        geometry = trained.geometry
        self.truth, self.items, self.geometry = truth, items, geometry
        self.crops = CropScattering(geometry.size_px, geometry.pixel_size_nm)
        self.nearest = nearest(truth.pattern, items.known)
        given = list(truth.crops)
        rng = generator(seed, "pairvae-random-field", truth.key)
        self.sem: dict[str, F32] = {
            "PairVAE": trained.sem_of(truth.pattern, draws, seed, truth.key),
            "nearest neighbour": items.crops[self.nearest],
            "random field": random_fields(truth.pattern, self.crops, items.area_fraction, draws, rng),
            "solo VAE (SEM to SEM)": solo.sem_again(given),
            "paired VAE (SEM to SEM)": trained.sem_again(given),
        }
        average = mean_pattern(items.known, geometry.reference)
        self.saxs: dict[str, F32] = {
            "PairVAE": trained.saxs_of(given),
            "nearest neighbour": measured_alone(items.known[self.nearest]),
            "training mean": measured_alone(average),
            "solo VAE (SAXS to SAXS)": solo.saxs_again(truth.pattern),
            "paired VAE (SAXS to SAXS)": trained.saxs_again(truth.pattern),
        }

    def rows(self) -> Iterator[Row]:
        """Scores of everything, one a method."""
        key, specimen = self.truth.key, self.truth.specimen
        for method, images in self.sem.items():
            yield Row("SAXS to SEM", method, key, specimen, sem_scores(images, self.truth, self.crops))
        yield Row("SAXS to SEM", "training mean", key, specimen, self._mean_sem())
        floor = sem_scores(self.truth.crops, self.truth, self.crops)
        # The other errors of an image against itself are 0 and say nothing.
        kept = {name: floor[name] for name in ("period_error", "orientation_error_deg", "scattering_mismatch")}
        yield Row("SAXS to SEM", "the true image itself", key, specimen, kept)
        for method, intensity in self.saxs.items():
            scores = saxs_scores(intensity, self.truth, self.geometry.reference, self.items.scale)
            yield Row("SEM to SAXS", method, key, specimen, scores)

    def _mean_sem(self) -> dict[str, float]:
        """The mean of the training micrographs' own figures; a mean picture of them would be grey."""
        pixel = self.geometry.pixel_size_nm
        parts = [describe_image(crops[0], pixel) for crops in self.items.crops]
        period = float(np.nanmean([describe_pattern(pattern).period_nm for pattern in self.items.known]))
        s2 = np.nanmean([part.s2 for part in parts], 0)
        chord = float(np.nanmean([part.chord_nm for part in parts]))
        every = np.concatenate(self.items.crops)
        return {
            "period_error": abs(period / self.truth.period_nm - 1),
            "s2_error": float(np.abs(s2 - self.truth.s2).mean()),
            "chord_error": abs(chord / self.truth.chord_nm - 1),
            "area_error": abs(self.items.area_fraction - self.truth.area_fraction),
            "scattering_mismatch": consistency(every[:: max(1, len(every) // 64)], self.truth.pattern, self.crops),
        }

    def shown(self) -> dict[str, F32]:
        """What figures show."""
        return {
            "nearest SAXS": self.saxs["nearest neighbour"],
            "nearest SEM": self.items.crops[self.nearest][0],
            "SEM": self.sem["PairVAE"],
            "SAXS": self.saxs["PairVAE"],
            "random field": self.sem["random field"][0],
        }


def summary(rows: Sequence[Row], seed: int = 0) -> list[dict[str, object]]:
    """Median of each score over the items, with its interval over specimens, for each direction and method."""
    table: list[dict[str, object]] = []
    order = list(dict.fromkeys((row.direction, row.method) for row in rows))
    for direction, method in order:
        mine = [row for row in rows if (row.direction, row.method) == (direction, method)]
        for name in dict.fromkeys(name for row in mine for name in row.scores):
            if name in ("period_nm", "centre_distance_nm"):
                continue
            values = [row.scores.get(name, float("nan")) for row in mine]
            median, low, high = median_with_interval(values, [row.specimen for row in mine], seed)
            count = int(np.isfinite(values).sum())
            if count:
                entry = {"direction": direction, "method": method, "score": name, "items": count}
                table.append({**entry, "median": median, "low": low, "high": high})
    return table


def _table_of_items(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    cells = []
    for row in rows:
        values = [f"{row.scores[name]:.6g}" if name in row.scores else "" for name in names]
        cells.append([row.direction, row.method, row.key, row.specimen, *values])
    return csv_text(["direction", "method", "key", "sample", *names], cells)


def as_text(table: Sequence[dict[str, object]], items: int) -> str:
    """The table as Markdown: a line a method, a column a score, medians with intervals."""
    lines = [f"Medians over {items} unseen items, with 95 % intervals over specimens."]
    for direction in dict.fromkeys(entry["direction"] for entry in table):
        mine = [entry for entry in table if entry["direction"] == direction]
        names = list(dict.fromkeys(str(entry["score"]) for entry in mine))
        lines += ["", f"| {direction} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for method in dict.fromkeys(entry["method"] for entry in mine):
            cells = {str(entry["score"]): entry for entry in mine if entry["method"] == method}
            texts = [
                f"{cells[n]['median']:.3g} ({cells[n]['low']:.2g} to {cells[n]['high']:.2g})" if n in cells else "-"
                for n in names
            ]
            lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return "\n".join(lines)
