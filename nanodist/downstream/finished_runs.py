"""Finished fine-tunings as they stand on disk: what each was, and what it scored sample by sample."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.config import flatten, read_yaml, to_dict
from hpc.errors import UserError
from hpc.run_dir import RunDir
from nanodist.downstream.labels import Budget

F64 = npt.NDArray[np.float64]
Row = dict[str, Any]
Setting = tuple[str, str, str, str]  # encoder (or the name of its seeds), weights, tuned, values of the recipe
SCORES_FILE = "scores.json"
BALANCED_ACCURACY = "balanced accuracy"
SEGMENTATION_METRICS = ("dice", "iou", "boundary_f1")
EVERY_CLASS = "all but background"


@dataclass(frozen=True)
class Unit:
    """A test sample: its key, its micrograph, and the class that it counts for ("" in a segmentation)."""

    key: str
    group: str
    label: str


@dataclass(frozen=True)
class Finished:
    """One finished fine-tuning.

    Attributes:
        path: its run directory.
        kind: classification or segmentation.
        what: the first row of its scores.
        units: test samples.
        values: for each metric and class the value of each unit (n,), NaN where it has none.
        said: of a classification, the class that each unit is said to be of, and its probability.
        by: values of its recipe that tell its setting from others, in words.
    """

    path: Path
    kind: str
    what: Row
    units: tuple[Unit, ...]
    values: dict[tuple[str, str], F64]
    said: tuple[tuple[str, float], ...] = ()
    by: str = ""

    @property
    def encoder(self) -> str:
        """Where it began, as its recipe says."""
        return str(self.what["encoder"])

    def setting(self, families: Mapping[str, str]) -> Setting:
        """Encoder (its name in ``families``, where it has one), weights, what of it was tuned, and ``by``."""
        return families.get(self.encoder, self.encoder), str(self.what["weights"]), str(self.what["tuned"]), self.by

    @property
    def budget(self) -> Budget:
        """Labels a class, or masks."""
        found = self.what["labels_per_class"]
        return "all" if found == "all" else int(found)

    @property
    def replicate(self) -> tuple[int, int]:
        """Seed of the run and of the label draw."""
        return int(self.what["seed"]), int(self.what["draw_seed"])

    @property
    def split(self) -> int:
        """Number of the split."""
        return int(self.what["split_seed"])


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run directories with scores: the paths themselves, or those below a sweep's folder.

    Raises:
        UserError: a path has none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if (path / SCORES_FILE).is_file():
            found[path] = None
            continue
        below = sorted(path.glob(f"runs/*/{SCORES_FILE}")) or sorted(path.glob(f"*/{SCORES_FILE}"))
        if not below:
            raise UserError(
                f"{path} holds no {SCORES_FILE}: give run directories of nanodist finetune, or the folder of a sweep"
            )
        found |= dict.fromkeys(file.parent for file in below)
    return [*found]


def read_run(path: Path, by: Sequence[str] = ()) -> Finished:
    """What a run scored, sample by sample.

    Args:
        path: its directory.
        by: keys of its recipe, such as ``train.steps``, whose values are a part of its setting.

    Raises:
        UserError: it is no finished fine-tuning, an older version of nanodist wrote it, or its recipe lacks a key.
    """
    setting = ", ".join(f"{key} {value}" for key, value in recipe_values(path, by).items())
    try:
        document = json.loads((path / SCORES_FILE).read_text())
        kind, what = document["kind"], dict(document["rows"][0])
        what.setdefault("labels_per_class", what.get("masks", "all"))
        missing = [key for key in ("encoder", "weights", "tuned", "seed", "split_seed", "draw_seed") if key not in what]
        if missing:
            raise KeyError(missing[0])
        name = "predictions.csv" if kind == "classification" else "images.csv"
        with open(path / name, newline="") as file:
            rows = list(csv.DictReader(file))
        if kind != "classification":
            return Finished(path, kind, what, *_segmented(rows, document["classes"]), by=setting)
        said = tuple((row["predicted"], float(row[f"p_{row['predicted']}"])) for row in rows)
        return Finished(path, kind, what, *_classified(rows), said, setting)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path} holds no scores of a fine-tuning that can be compared ({error!r})") from None


def recipe_values(path: Path, keys: Sequence[str]) -> Row:
    """Values of the recipe of a run, by dotted key; of one older than a key, the value that it has by itself.

    Raises:
        UserError: the recipe cannot be read, or there is no such key.
    """
    file = RunDir(path).recipe_path
    given = flatten(read_yaml(file, "recipe")) if keys else {}
    if not given.keys() >= set(keys):
        from nanodist.downstream.finetune.recipe import FinetuneRecipe

        given = {**flatten(to_dict(FinetuneRecipe())), **given}
    for key in keys:
        if key not in given:
            raise UserError(f"{file} has no '{key}': write it as in the recipe, such as train.steps")
    return {key: given[key] for key in keys}


def _classified(rows: Sequence[dict[str, str]]) -> tuple[tuple[Unit, ...], dict[tuple[str, str], F64]]:
    units = tuple(Unit(row["sample"], row["micrograph"], row["label"]) for row in rows)
    right = np.asarray([row["label"] == row["predicted"] for row in rows], np.float64)
    return units, {(BALANCED_ACCURACY, ""): right}


def _segmented(
    rows: Sequence[dict[str, str]], classes: Sequence[int]
) -> tuple[tuple[Unit, ...], dict[tuple[str, str], F64]]:
    units = tuple(Unit(row["sample"], row["micrograph"], "") for row in rows)
    values: dict[tuple[str, str], F64] = {}
    for metric in SEGMENTATION_METRICS:
        for value in classes:
            cells = (row[f"{metric}_{value}"] for row in rows)
            values[metric, str(value)] = np.asarray([float(cell) if cell else np.nan for cell in cells])
        shown = np.stack([values[metric, str(value)] for value in classes[1:]])
        known = np.isfinite(shown)
        sums = np.where(known, shown, 0.0).sum(0)
        values[metric, EVERY_CLASS] = np.where(known.any(0), sums / np.maximum(known.sum(0), 1), np.nan)
    return units, values


def name_of(setting: Setting, several_encoders: bool) -> str:
    """A setting in words."""
    encoder, weights, tuned, by = setting
    how = {"all": "fine-tuned", "head": "frozen"}.get(tuned, f"{tuned} blocks tuned")
    if weights == "random":
        start = "from scratch" if tuned == "all" else f"random trunk, {how}"
    else:
        start = f"pretrained, {how}"
    start = f"{start}, {by}" if by else start
    return f"{Path(encoder).name}: {start}" if several_encoders else start
