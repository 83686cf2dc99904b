"""Fine-tunings beside each other: scores over the number of labels, with intervals, and paired differences.

Runs of one setting that differ in their seeds (label draw, head and views, split) are replicates. What is resampled are
the test micrographs and the replicates; settings are compared on the same resamples (see
:mod:`nanodist.downstream.bootstrap`). Balanced accuracy is a mean over classes of the share of samples that are right;
Dice, IoU and boundary F1 are means over images.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from nanodist.downstream.bootstrap import Interval, Resamples, Tally, interval, paired_interval
from nanodist.downstream.labels import Budget

F64 = npt.NDArray[np.float64]
Row = dict[str, Any]
Setting = tuple[str, str, str]  # encoder, weights, tuned
SCORES_FILE = "scores.json"
BALANCED_ACCURACY = "balanced accuracy"
SEGMENTATION_METRICS = ("dice", "iou", "boundary_f1")
EVERY_CLASS = "all but background"
RESAMPLES = 2000


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
    """

    path: Path
    kind: str
    what: Row
    units: tuple[Unit, ...]
    values: dict[tuple[str, str], F64]

    @property
    def setting(self) -> Setting:
        """Encoder, weights and what of it was tuned."""
        return str(self.what["encoder"]), str(self.what["weights"]), str(self.what["tuned"])

    @property
    def budget(self) -> Budget:
        """Labels a class, or masks."""
        found = self.what["labels_per_class"]
        return "all" if found == "all" else int(found)

    @property
    def replicate(self) -> tuple[int, int]:
        """Seed of the run and of the label draw."""
        return int(self.what["seed"]), int(self.what["draw_seed"])


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


def read_run(path: Path) -> Finished:
    """What a run scored, sample by sample.

    Raises:
        UserError: it is no finished fine-tuning, or an older version of nanodist wrote it.
    """
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
        made = _classified(rows) if kind == "classification" else _segmented(rows, document["classes"])
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path} holds no scores of a fine-tuning that can be compared ({error!r})") from None
    return Finished(path, kind, what, *made)


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
    encoder, weights, tuned = setting
    how = {"all": "fine-tuned", "head": "frozen"}.get(tuned, f"{tuned} blocks tuned")
    if weights == "random":
        start = "from scratch" if tuned == "all" else f"random trunk, {how}"
    else:
        start = f"pretrained, {how}"
    return f"{Path(encoder).name}: {start}" if several_encoders else start


class Comparison:
    """Runs of one test set (or of the same several), by setting and number of labels.

    Args:
        runs: as :func:`read_run` gives them.
        level: of the intervals.
        resamples: of the bootstrap.

    Raises:
        UserError: runs of two kinds or test sets, two runs that differ in nothing, or replicates that others lack.
    """

    def __init__(self, runs: Sequence[Finished], level: float = 0.95, resamples: int = RESAMPLES) -> None:
        self._runs, self._level, self._count = runs, level, resamples
        self._check()
        self.kind = runs[0].kind
        settings = sorted({run.setting for run in runs}, key=_order)
        several = len({encoder for encoder, _, _ in settings}) > 1
        self.names = {setting: name_of(setting, several) for setting in settings}
        self.metrics = [*runs[0].values]
        self._curves: dict[tuple[Setting, Budget], list[Finished]] = {}
        for setting in settings:
            for budget in sorted({run.budget for run in runs}, key=lambda b: (b == "all", b)):
                mine = [run for run in runs if (run.setting, run.budget) == (setting, budget)]
                if mine:
                    self._curves[setting, budget] = mine

    def _check(self) -> None:
        kinds = {run.kind for run in self._runs}
        if len(kinds) > 1:
            raise UserError("classifications and segmentations are not compared: give runs of one kind")
        known: dict[tuple[Any, ...], Path] = {}
        units: dict[int, tuple[Path, tuple[Unit, ...]]] = {}
        for run in self._runs:
            split = int(run.what["split_seed"])
            key = (run.setting, run.budget, run.replicate, split)
            if key in known:
                raise UserError(f"{known[key]} and {run.path} differ in nothing that is compared: give one of them")
            known[key] = run.path
            first = units.setdefault(split, (run.path, run.units))
            if first[1] != run.units:
                raise UserError(f"{first[0]} and {run.path} were tested on different samples, which are not compared")

    def rows(self, metric: str, label: str) -> list[Row]:
        """For each setting and number of labels: mean, interval, and what they are made of."""
        found = []
        for (setting, budget), runs in self._curves.items():
            replicates = [run.replicate for run in runs]
            tally = self._tally(runs, sorted(set(replicates)), metric, label)
            said = interval(tally, self._resamples(tally), self.names[setting], self._level)
            sizes = {"runs": len(runs), "images": int(tally.totals.max(0).sum()), "n_train": runs[0].what["n_train"]}
            sizes["micrographs"] = int((tally.totals.max(0).sum(1) > 0).sum())
            found.append({**self._said(metric, label, setting, budget), **_bounds(said), **sizes})
        return found

    def differences(self, metric: str, label: str) -> list[Row]:
        """Each setting with pretrained weights minus each with random ones, over the replicates that both have."""
        found = []
        for (setting, budget), runs in self._curves.items():
            for other, name in self.names.items():
                if setting[1] == "random" or other[1] != "random" or (other, budget) not in self._curves:
                    continue
                base = self._curves[other, budget]
                both = sorted({run.replicate for run in runs} & {run.replicate for run in base})
                if both:
                    one, two = (self._tally(each, both, metric, label) for each in (runs, base))
                    # One name for both: replicates are label draws, which are resampled alike.
                    said = paired_interval(one, "", two, "", self._resamples(one), self._level)
                    row = {**self._said(metric, label, setting, budget), "baseline": name}
                    found.append({**row, **_bounds(said), "runs": len(both)})
        return found

    def _said(self, metric: str, label: str, setting: Setting, budget: Budget) -> Row:
        return {"metric": metric, "class": label, "setting": self.names[setting], "labels": budget}

    def _resamples(self, tally: Tally) -> Resamples:
        return Resamples(tally.totals, tally.hits.shape[2], self._count)

    def _tally(self, runs: Sequence[Finished], replicates: Sequence[tuple[int, int]], metric: str, label: str) -> Tally:
        """Sums and numbers of values by split, replicate, micrograph and class."""
        splits = sorted({int(run.what["split_seed"]) for run in self._runs})
        units = {int(run.what["split_seed"]): run.units for run in self._runs}
        every = [unit for split in splits for unit in units[split]]
        groups = {name: i for i, name in enumerate(sorted({unit.group for unit in every}))}
        labels = {name: i for i, name in enumerate(sorted({unit.label for unit in every}))}
        totals = np.zeros((len(splits), len(groups), len(labels)))
        hits = np.zeros((len(splits), 1, len(replicates), len(groups), len(labels)))
        for s, split in enumerate(splits):
            counts = self._counts(split, metric, label)
            cells = tuple(np.asarray([[groups[u.group], labels[u.label]] for u in units[split]]).T)
            np.add.at(totals[s], cells, counts)
            mine = {run.replicate: run for run in runs if int(run.what["split_seed"]) == split}
            for r, replicate in enumerate(replicates):
                if replicate not in mine:
                    raise UserError(
                        f"{self.names[runs[0].setting]} with {runs[0].budget} labels lacks seed {replicate[0]}, draw "
                        f"{replicate[1]} of split {split}: run it, or leave the other splits of it out"
                    )
                # What neither mask nor prediction shows is right; see _counts.
                values = np.nan_to_num(mine[replicate].values[metric, label], nan=1.0)
                np.add.at(hits[s, 0, r], cells, values * counts)
        return Tally(hits, totals)

    def _counts(self, split: int, metric: str, label: str) -> F64:
        """(n,) 1 for each unit of a split that has a value in some run, so that all runs are compared on the same."""
        there = [run.values[metric, label] for run in self._runs if int(run.what["split_seed"]) == split]
        return np.asarray(np.isfinite(np.stack(there)).any(0), np.float64)


def _order(setting: Setting) -> tuple[bool, bool, str, str]:
    """Pretrained before random, fine-tuned before frozen."""
    return setting[1] == "random", setting[2] == "head", setting[0], setting[2]


def _bounds(found: Interval) -> Row:
    return {"mean": round(found.mean, 6), "low": round(found.low, 6), "high": round(found.high, 6)}
