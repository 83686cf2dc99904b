"""From the rows of a sweep to settings: what was varied, what each setting scored over its seeds, and how surely."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanodist.report import words

SEEDS = ("seed", "split_seed", "draw_seed", "encoder_seed")
AXES = ("masks", "labels_per_class")
# Measured columns that tell rows of one job apart.
_MEASURED = ("method", "encoder", "kind", "decoder", "weights", "tuned")
_SCORES = ("balanced_accuracy", "macro_f1")
LEVEL = 0.95


@dataclass(frozen=True)
class Score:
    """A score of one setting at one budget.

    Attributes:
        mean: over seeds; ``low`` and ``high`` bound it (Student's t, 95 %), or are ``None`` for a single one.
        n: number of seeds.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Setting:
    """One combination of what was varied beside seeds and budgets.

    Attributes:
        values: name -> value.
        points: budget (a number, ``"all"`` or ``""`` where there is none) -> its score.
    """

    values: dict[str, Any]
    points: dict[Any, Score]

    @property
    def name(self) -> str:
        """For legends and tables."""
        return ", ".join(words.setting(key, value) for key, value in self.values.items()) or "all jobs"

    @property
    def mean(self) -> float:
        """Over the budgets, as a rank among settings with equal budgets."""
        return float(np.mean([score.mean for score in self.points.values()]))


@dataclass(frozen=True)
class Table:
    """The settings of a sweep by one score.

    Attributes:
        metric: name of the score.
        axis: what the budgets are, or empty.
        budgets: in order.
        settings: the best first.
        seeds: the columns that are averaged over.
    """

    metric: str
    axis: str
    budgets: list[Any]
    settings: list[Setting]
    seeds: list[str]

    def best(self, budget: Any) -> tuple[Setting, Score, list[Setting]]:
        """The best setting at a budget, its score, and the others whose interval reaches its mean."""
        ranked = sorted((one for one in self.settings if budget in one.points), key=lambda s: -s.points[budget].mean)
        top = ranked[0].points[budget]
        near = [one for one in ranked[1:] if (high := one.points[budget].high) is not None and high >= top.mean]
        return ranked[0], top, near


def short(name: str) -> str:
    """``train.tuned_layers`` as ``tuned layers``; what belongs to the pretraining says so."""
    parts = name.split(".")
    last = parts[-2 if parts[-1] == "name" and len(parts) > 1 else -1].replace("_", " ")
    return f"pretraining's {last}" if name.startswith("pretrain.") else last


def tables(rows: Sequence[Mapping[str, Any]], given: Sequence[str]) -> list[Table]:
    """The settings of a sweep, one table a score.

    Args:
        rows: of ``sweep.json``; those without a score are left out.
        given: the columns that the sweep set.
    """
    scored = [_flat(row) for row in rows if row.get("state") == "done"]
    metrics = dict.fromkeys(name for row in scored for name in row["scores"])
    return [table for name in metrics if (table := _table(name, scored, given)) is not None]


def interval(values: Sequence[float]) -> Score:
    """Mean of values of several seeds with its 95 % interval by Student's t, inside [0, 1] where all values are."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Score(mean, None, None, n)
    from scipy.stats import t

    half = float(t.ppf(0.5 + LEVEL / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    share = all(0.0 <= value <= 1.0 for value in values)
    low, high = mean - half, mean + half
    return Score(mean, max(0.0, low) if share else low, min(1.0, high) if share else high, n)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its scores under ``scores``: those of a classifier, or the one that a row on masks has."""
    if "metric" in row and row.get("class") == "all but background":
        found = {str(row["metric"]): row.get("mean")}
    else:
        found = {name: row.get(name) for name in _SCORES if name in row and "metric" not in row}
        if not found and "loss" in row and "metric" not in row:
            found = {"loss": row["loss"]}
    return {**row, "scores": {name: float(v) for name, v in found.items() if isinstance(v, int | float)}}


def _table(metric: str, scored: Sequence[Mapping[str, Any]], given: Sequence[str]) -> Table | None:
    rows = [row for row in scored if metric in row["scores"]]
    axis = next((name for name in AXES if any(name in row or _given(name, given) for row in rows)), "")
    # With masks, labels_per_class counts images.
    column = _given("labels_per_class", given) or axis
    varied = [name for name in (*given, *_MEASURED) if len({repr(row.get(name)) for row in rows}) > 1]
    seeds = [name for name in varied if name.rpartition(".")[2] in SEEDS]
    seeds += [name for name in SEEDS if name not in seeds and len({repr(row.get(name)) for row in rows}) > 1]
    names = [name for name in varied if name not in (*seeds, column, *AXES) and not _follows(name, varied, rows)]
    found: dict[tuple[str, ...], tuple[dict[str, Any], dict[Any, list[float]]]] = {}
    for row in rows:
        values = {name: row.get(name) for name in names}
        _, points = found.setdefault(tuple(map(repr, values.values())), (values, {}))
        points.setdefault(_budget(row.get(column)) if axis else "", []).append(row["scores"][metric])
    settings = [Setting(values, {b: interval(v) for b, v in points.items()}) for values, points in found.values()]
    every = {budget for setting in settings for budget in setting.points}
    order = sorted((b for b in every if isinstance(b, int | float)), key=float)
    budgets = order + [b for b in every if not isinstance(b, int | float)]
    # Settings with more budgets first: their means are over other things.
    settings.sort(key=lambda one: (-len(one.points), -one.mean if metric != "loss" else one.mean))
    return Table(metric, axis, budgets, settings, seeds) if settings else None


def _given(name: str, given: Sequence[str]) -> str:
    """The column in which a sweep set ``name``, by whatever part of its key."""
    return next((one for one in given if name and one.rpartition(".")[2] == name), "")


def _budget(value: Any) -> Any:
    return "all" if value in (0, None, "all") else value


def _follows(name: str, varied: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a column says nothing that another, more telling one does not: fingerprints, paths, and echoes."""
    if name not in ("pretraining", "encoder", *_MEASURED):
        return False
    others = [one for one in varied if one not in ("pretraining", "encoder", *_MEASURED, *SEEDS)]
    others += ["pretraining"] if name == "encoder" else []
    pairs = {(repr(row.get(name)), *(repr(row.get(one)) for one in others)) for row in rows}
    return bool(others) and len(pairs) == len({pair[1:] for pair in pairs})
