"""Fine-tunings beside each other: scores over the number of labels, with intervals, and paired differences.

Runs of one setting that differ in their seeds are replicates. What is resampled are the test micrographs, the seeds of
the encoder (pretrainings that are named as seeds of one; of random weights the seed of the run), the label draws (with
the seed of head and views) and the splits; settings are compared on the same resamples (see
:mod:`nanodist.downstream.bootstrap`). Balanced accuracy is a mean over classes of the share of samples that are right;
Dice, IoU and boundary F1 are means over images. Macro F1, accuracy and calibration error of classifiers are no such
means: their intervals score each resample anew (:mod:`nanodist.downstream.run_scores`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from nanodist.downstream.bootstrap import Interval, Resamples, Tally, interval, paired_interval
from nanodist.downstream.finished_runs import BALANCED_ACCURACY, Finished, Row, Setting, Unit, name_of
from nanodist.downstream.labels import Budget
from nanodist.downstream.run_scores import Answers, run_intervals

F64 = npt.NDArray[np.float64]
Draw = tuple[int, int | None]  # seed of the label draw, and of the run where several runs share that draw
RESAMPLES = 2000
_SAID = {"macro_f1": "macro F1", "accuracy": "accuracy", "calibration_error": "calibration error"}


@dataclass(frozen=True)
class Axes:
    """Which encoder seed and which label draw each run of a curve is.

    Attributes:
        of: for each run its encoder seed and its draw.
        encoders, draws: what there is of them, in order.
    """

    of: dict[Path, tuple[str, Draw]]
    encoders: list[str]
    draws: list[Draw]


def axes_of(runs: Sequence[Finished], by_draw: bool = True) -> Axes:
    """Encoder seeds and label draws of the runs of one setting and budget.

    Seeds of pretrained weights are their paths. Random weights follow from the seed of the run, which is the encoder
    seed where all draws have the same ones; else it is a part of the draw.

    Args:
        runs: that differ in their seeds and splits alone.
        by_draw: name draws without the seed of the run, where each has one.
    """
    random = runs[0].what["weights"] == "random"
    of_draw: dict[int, set[int]] = {}
    for run in runs:
        of_draw.setdefault(run.replicate[1], set()).add(run.replicate[0])
    crossed = by_draw and len({frozenset(seeds) for seeds in of_draw.values()}) == 1
    encoders = [str(run.replicate[0]) if crossed else "" for run in runs] if random else [run.encoder for run in runs]
    cells = {(encoder, run.split, run.replicate[1]) for encoder, run in zip(encoders, runs, strict=True)}
    single = by_draw and len(cells) == len(runs)
    draws: list[Draw] = [(run.replicate[1], None if single else run.replicate[0]) for run in runs]
    of = {run.path: pair for run, pair in zip(runs, zip(encoders, draws, strict=True), strict=True)}
    return Axes(of, sorted(set(encoders)), sorted(set(draws), key=lambda d: (d[0], -1 if d[1] is None else d[1])))


class Comparison:
    """Runs of one test set (or of the same several), by setting and number of labels.

    Args:
        runs: as :func:`read_run` gives them.
        level: of the intervals.
        resamples: of the bootstrap.
        families: for paths of encoders that are seeds of one, the name of that one.

    Raises:
        UserError: runs of two kinds or test sets, two runs that differ in nothing, or replicates that others lack.
    """

    def __init__(
        self,
        runs: Sequence[Finished],
        level: float = 0.95,
        resamples: int = RESAMPLES,
        families: Mapping[str, str] | None = None,
    ) -> None:
        self._runs, self._level, self._count, self._families = runs, level, resamples, families or {}
        self._check()
        self.kind = runs[0].kind
        settings = sorted({run.setting(self._families) for run in runs}, key=_order)
        several = len({encoder for encoder, *_ in settings}) > 1
        self.names = {setting: name_of(setting, several) for setting in settings}
        self.metrics = [*runs[0].values]
        self._curves: dict[tuple[Setting, Budget], list[Finished]] = {}
        for setting in settings:
            for budget in sorted({run.budget for run in runs}, key=lambda b: (b == "all", b)):
                mine = [run for run in runs if (run.setting(self._families), run.budget) == (setting, budget)]
                if mine:
                    self._curves[setting, budget] = mine
        self._splits = sorted({run.split for run in runs})
        every = [unit for run in runs for unit in run.units]
        self._groups = {name: i for i, name in enumerate(sorted({unit.group for unit in every}))}
        labels = {unit.label for unit in every} | {name for run in runs for name, _ in run.said}
        self._labels = {name: i for i, name in enumerate(sorted(labels))}

    def _check(self) -> None:
        kinds = {run.kind for run in self._runs}
        if len(kinds) > 1:
            raise UserError("classifications and segmentations are not compared: give runs of one kind")
        known: dict[tuple[Any, ...], Path] = {}
        units: dict[int, tuple[Path, tuple[Unit, ...]]] = {}
        for run in self._runs:
            first = units.setdefault(run.split, (run.path, run.units))
            if first[1] != run.units:
                raise UserError(
                    f"{first[0]} and {run.path} were tested on different samples, which are not compared: give both "
                    "one data.test_store"
                )
            setting = run.setting(self._families)
            # Of random weights the path only says which trunk it is.
            start = "" if setting[1] == "random" else run.encoder
            key = (setting, start, run.budget, run.replicate, run.split)
            if key in known:
                raise UserError(
                    f"{known[key]} and {run.path} differ in nothing that is compared: give one of them, or the "
                    "key of the recipe that they differ in (--by)"
                )
            known[key] = run.path

    def rows(self, metric: str, label: str) -> list[Row]:
        """For each setting and number of labels: mean, interval, and what they are made of."""
        found = []
        for (setting, budget), runs in self._curves.items():
            tally = self._tally(runs, axes := axes_of(runs), axes.draws, metric, label)
            said = interval(tally, self._resamples(tally), self.names[setting], self._level)
            row = {**self._said(metric, label, setting, budget), **_bounds(said)}
            found.append({**row, **self._sizes(runs, axes, tally, label)})
        return found

    def run_score_rows(self) -> list[Row]:
        """As :meth:`rows`, of what scores a whole run of a classification: macro F1, accuracy, calibration error."""
        found = []
        for (setting, budget), runs in self._curves.items() if self.kind == "classification" else ():
            tally = self._tally(runs, axes := axes_of(runs), axes.draws, BALANCED_ACCURACY, "")
            answers = [self._answers(run, axes) for run in runs]
            scores = run_intervals(tally, answers, self._resamples(tally), self.names[setting], self._level)
            for metric, said in scores.items():
                row = {**self._said(_SAID[metric], "", setting, budget), **_bounds(said)}
                found.append({**row, **self._sizes(runs, axes, tally, "")})
        return found

    def _answers(self, run: Finished, axes: Axes) -> Answers:
        encoder, draw = axes.of[run.path]
        at = self._splits.index(run.split), axes.encoders.index(encoder), axes.draws.index(draw)
        cells = [
            (self._groups[unit.group], self._labels[unit.label], self._labels[name])
            for unit, (name, _) in zip(run.units, run.said, strict=True)
        ]
        groups, truth, predicted = np.asarray(cells).T
        return Answers(at, groups, truth, predicted, np.asarray([confidence for _, confidence in run.said]))

    def _sizes(self, runs: Sequence[Finished], axes: Axes, tally: Tally, label: str) -> Row:
        tested = tally.totals.max(0)
        counted = zip(self._labels, (tested > 0).sum(0).tolist(), strict=True)
        return {
            "runs": len(runs),
            "encoder_seeds": len(axes.encoders),
            "splits": len(tally.totals),
            "images": int(tested.sum()),
            "n_train": runs[0].what["n_train"],
            "micrographs": int((tested.sum(1) > 0).sum()),
            "micrographs_per_class": {name or label: int(n) for name, n in counted if n},
        }

    def differences(self, metric: str, label: str) -> list[Row]:
        """Each setting with pretrained weights minus each with random ones, over the label draws that both have."""
        found = []
        for (setting, budget), runs in self._curves.items():
            for other, name in self.names.items():
                if setting[1] == "random" or other[1] != "random" or (other, budget) not in self._curves:
                    continue
                base = self._curves[other, budget]
                mine, its = axes_of(runs), axes_of(base)
                if (mine.draws[0][1] is None) != (its.draws[0][1] is None):
                    mine, its = axes_of(runs, by_draw=False), axes_of(base, by_draw=False)
                both = [draw for draw in mine.draws if draw in its.draws]
                if both:
                    one, two = (
                        self._tally(each, axes, both, metric, label) for each, axes in ((runs, mine), (base, its))
                    )
                    # Draws are resampled alike for both, encoder seeds each for itself.
                    said = paired_interval(one, self.names[setting], two, name, self._resamples(one), self._level)
                    row = {**self._said(metric, label, setting, budget), "baseline": name}
                    found.append({**row, **_bounds(said), "runs": one.hits[:, :, :, 0, 0].size})
        return found

    def _said(self, metric: str, label: str, setting: Setting, budget: Budget) -> Row:
        return {"metric": metric, "class": label, "setting": self.names[setting], "labels": budget}

    def _resamples(self, tally: Tally) -> Resamples:
        return Resamples(tally.totals, tally.hits.shape[2], self._count)

    def _tally(self, runs: Sequence[Finished], axes: Axes, draws: Sequence[Draw], metric: str, label: str) -> Tally:
        """Sums and numbers of values by split, encoder seed, draw, micrograph and class."""
        splits = self._splits
        units = {run.split: run.units for run in self._runs}
        totals = np.zeros((len(splits), len(self._groups), len(self._labels)))
        hits = np.zeros((len(splits), len(axes.encoders), len(draws), *totals.shape[1:]))
        for s, split in enumerate(splits):
            counts = self._counts(split, metric, label)
            cells = tuple(np.asarray([[self._groups[u.group], self._labels[u.label]] for u in units[split]]).T)
            np.add.at(totals[s], cells, counts)
            mine = {axes.of[run.path]: run for run in runs if run.split == split}
            for (e, encoder), (d, draw) in itertools.product(enumerate(axes.encoders), enumerate(draws)):
                if (encoder, draw) not in mine:
                    raise UserError(self._lacking(runs[0], encoder, draw, split))
                # What neither mask nor prediction shows is right; see _counts.
                values = np.nan_to_num(mine[encoder, draw].values[metric, label], nan=1.0)
                np.add.at(hits[s, e, d], cells, values * counts)
        return Tally(hits, totals)

    def _lacking(self, run: Finished, encoder: str, draw: Draw, split: int) -> str:
        setting = run.setting(self._families)
        random = setting[1] == "random"
        seed = draw[1] if draw[1] is not None else encoder if random and encoder else None
        which = [] if random or setting[0] == run.encoder else [f"encoder {encoder}"]
        which += [] if seed is None else [f"seed {seed}"]
        return (
            f"{self.names[setting]} with {run.budget} labels lacks {', '.join([*which, f'draw {draw[0]}'])} of split "
            f"{split}: run it, or leave the others of its kind out"
        )

    def _counts(self, split: int, metric: str, label: str) -> F64:
        """(n,) 1 for each unit of a split that has a value in some run, so that all runs are compared on the same."""
        there = [run.values[metric, label] for run in self._runs if run.split == split]
        return np.asarray(np.isfinite(np.stack(there)).any(0), np.float64)


def _order(setting: Setting) -> tuple[bool, bool, Setting]:
    """Pretrained before random, fine-tuned before frozen."""
    return setting[1] == "random", setting[2] == "head", setting


def _bounds(found: Interval) -> Row:
    return {"mean": round(found.mean, 6), "low": round(found.low, 6), "high": round(found.high, 6)}
