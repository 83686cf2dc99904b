"""From predictions to tidy rows, intervals, differences and a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpc.tables import csv_of
from nanodist.downstream.bootstrap import Interval, Resamples, Tally, interval, paired_interval
from nanodist.downstream.features import FeatureSet
from nanodist.downstream.labels import Budget, Targets
from nanodist.downstream.metrics import (
    accuracy,
    balanced_accuracy,
    calibration_gaps,
    confusion_matrix,
    error_of,
    macro_f1,
)
from nanodist.downstream.probe import Outcome, Plan, Protocol
from nanodist.downstream.run_scores import RUN_SCORES, Answers, run_intervals

Row = dict[str, Any]
FINETUNED = "finetune"  # the method of rows that a fine-tuning answered
# Of the balanced accuracy: names in the summary, and in a table by themselves.
_BALANCED = {"mean": "balanced_accuracy", "low": "balanced_accuracy_low", "high": "balanced_accuracy_high"}
Curve = tuple[str, str, Budget]  # encoder, method, labels per class


@dataclass(frozen=True)
class Scored:
    """One outcome of one feature set on one split."""

    source: FeatureSet
    plan: Plan
    outcome: Outcome
    transductive: bool | None


def tidy_row(scored: Scored, targets: Targets) -> Row:
    """One line of the tidy table; scores are ``None`` where a budget was left blank, with the reason."""
    outcome, draw, plan = scored.outcome, scored.outcome.draw, scored.plan
    row: Row = {
        "encoder": scored.source.name,
        "kind": scored.source.kind,
        "method": outcome.method,
        "labels_per_class": draw.budget,
        "seed": draw.seed,
        "encoder_seed": scored.source.seed,
        "split_seed": plan.split.seed,
        "balanced_accuracy": None,
        "macro_f1": None,
        "accuracy": None,
        "calibration_error": None,
        "transductive": scored.transductive,
        "transform": None,
        "parameter": None,
        "validation_balanced_accuracy": outcome.validation_score,
        "micrographs_min": min(_micrographs(targets, draw.samples).values()),
        "reason": blank_reason(draw.short) if draw.short else "",
    }
    if outcome.predicted is not None and outcome.setting is not None:
        truth = targets.y[plan.split.test]
        confusion = confusion_matrix(truth, outcome.predicted, len(targets.classes))
        # A fold of one class says nothing of precision; the F1 of all folds stands beside their confusion matrix.
        f1 = macro_f1(confusion) if len(np.unique(truth)) > 1 else None
        row.update(balanced_accuracy=balanced_accuracy(confusion), macro_f1=f1)
        if outcome.confidence is not None:
            gaps = calibration_gaps(outcome.confidence, outcome.predicted == truth)
            row.update(calibration_error=error_of(gaps))
        row.update(accuracy=accuracy(confusion), transform=outcome.setting[0], parameter=outcome.setting[1])
    return row


def blank_reason(short: dict[str, int]) -> str:
    """Which classes lack labels, in words."""
    return "too few training labels: " + ", ".join(f"{name} has {n}" for name, n in short.items())


def draw_rows(plans: Iterable[Plan], targets: Targets) -> Iterator[Row]:
    """Per split, budget and seed: labels and micrographs that each class gave."""
    for plan in plans:
        for draw in plan.draws:
            counts = np.bincount(targets.y[draw.samples], minlength=len(targets.classes)).tolist()
            yield {
                "split_seed": plan.split.seed,
                "labels_per_class": draw.budget,
                "seed": draw.seed,
                "labels": dict(zip(targets.classes, counts, strict=True)),
                "micrographs": _micrographs(targets, draw.samples),
                "short": draw.short,
            }


def split_rows(plans: Iterable[Plan], targets: Targets) -> Iterator[Row]:
    """Per split: samples and micrographs of each class on both sides, and what the choice of settings used."""
    for plan in plans:
        rounds = [_micrographs(targets, r.validation) for r in plan.rounds]
        train, test = _micrographs(targets, plan.split.train), _micrographs(targets, plan.split.test)
        yield {
            "split_seed": plan.split.seed,
            "train_samples": len(plan.split.train),
            "test_samples": len(plan.split.test),
            "validation_samples": plan.validation_samples,
            "validation_samples_per_round": [len(r.validation) for r in plan.rounds],
            "micrographs": {
                name: {"train": train[name], "validation": [r[name] for r in rounds], "test": test[name]}
                for name in targets.classes
            },
            "test_groups": [targets.group_names[g] for g in np.unique(targets.groups[plan.split.test])],
        }


def _micrographs(targets: Targets, samples: np.ndarray) -> dict[str, int]:
    return {name: len(targets.groups_of(c, samples)) for c, name in enumerate(targets.classes)}


def tallies(scored: Sequence[Scored], targets: Targets) -> dict[Curve, Tally]:
    """Right answers by split, encoder seed, label draw, micrograph and class, for each curve's every budget.

    A split in which the budget was left blank is left out; a budget blank everywhere has no tally.
    """
    grouped: dict[Curve, list[Scored]] = {}
    for one in scored:
        if one.outcome.predicted is not None:
            grouped.setdefault(_curve_of(one), []).append(one)
    return {key: _tally(rows, targets) for key, rows in grouped.items()}


def _curve_of(one: Scored) -> Curve:
    return one.source.name, one.outcome.method, one.outcome.draw.budget


def _places(rows: Sequence[Scored]) -> list[tuple[int, int, int]]:
    """Of each row the places of its split, encoder seed and label draw among those of all rows."""
    found = [(r.plan.split.seed, r.source.seed, r.outcome.draw.seed) for r in rows]
    axes = [sorted(set(axis)) for axis in zip(*found, strict=True)]
    return [(axes[0].index(split), axes[1].index(seed), axes[2].index(draw)) for split, seed, draw in found]


def _tally(rows: Sequence[Scored], targets: Targets) -> Tally:
    places = _places(rows)
    sizes = [1 + max(axis) for axis in zip(*places, strict=True)]
    shape = (len(targets.group_names), len(targets.classes))
    hits = np.zeros((*sizes, *shape))
    totals = np.zeros((sizes[0], *shape))
    for r, at in zip(rows, places, strict=True):
        test = r.plan.split.test
        cells = (targets.groups[test], targets.y[test])
        np.add.at(hits[at], cells, r.outcome.predicted == targets.y[test])
        totals[at[0]] = 0
        np.add.at(totals[at[0]], cells, 1)
    return Tally(hits, totals)


def _answers(rows: Sequence[Scored], targets: Targets) -> list[Answers]:
    """What the rows say, which all have predictions."""
    found = []
    for r, at in zip(rows, _places(rows), strict=True):
        predicted, confidence, test = r.outcome.predicted, r.outcome.confidence, r.plan.split.test
        assert predicted is not None and confidence is not None
        found.append(Answers(at, targets.groups[test], targets.y[test], predicted, confidence))
    return found


class Comparison:
    """Intervals of all curves and of their differences, on shared resamples."""

    def __init__(
        self, scored: Sequence[Scored], targets: Targets, protocol: Protocol, resamples: int, level: float
    ) -> None:
        self._scored, self._level, self._targets = scored, level, targets
        self._tallies, self._classes = tallies(scored, targets), targets.classes
        self._resamples: dict[bytes, Resamples] = {}
        self._count, self._seed = resamples, protocol.seed

    def _shared(self, tally: Tally) -> Resamples:
        """Resamples for the splits of this tally; curves with the same splits and draws share them."""
        key = tally.totals.tobytes() + bytes([tally.hits.shape[2] % 256])
        if key not in self._resamples:
            self._resamples[key] = Resamples(tally.totals, tally.hits.shape[2], self._count, self._seed)
        return self._resamples[key]

    def summary(self) -> list[Row]:
        """One row per encoder, method and budget: scores, intervals, and what they are made of.

        ``mean``, ``low`` and ``high`` are of the balanced accuracy; ``macro_f1``, ``macro_f1_low`` and so on of others.
        """
        grouped: dict[Curve, list[Scored]] = {}
        for one in self._scored:
            grouped.setdefault(_curve_of(one), []).append(one)
        return [self._summary_row(key, rows) for key, rows in grouped.items()]

    def _summary_row(self, key: Curve, rows: Sequence[Scored]) -> Row:
        tally = self._tallies.get(key)
        flags = {r.transductive for r in rows}
        row: Row = {
            **dict(zip(("encoder", "method", "labels_per_class"), key, strict=True)),
            "kind": rows[0].source.kind,
            **_bounds(None),
            **{name + end: None for name in RUN_SCORES for end in ("", "_low", "_high")},
            "n": sum(r.outcome.predicted is not None for r in rows),
            "encoder_seeds": len({r.source.seed for r in rows}),
            "transductive": True if True in flags else None if None in flags else False,
            "reason": next((blank_reason(r.outcome.draw.short) for r in rows if r.outcome.draw.short), ""),
        }
        if tally is not None:
            per_class = (tally.totals.max(axis=0) > 0).sum(axis=0)
            row["test_micrographs"] = int((tally.totals.max(axis=0).sum(axis=1) > 0).sum())
            row["test_micrographs_per_class_min"] = int(per_class[per_class > 0].min())
            names = zip(self._classes, per_class.tolist(), strict=True)
            row["test_micrographs_per_class"] = {name: count for name, count in names if count}
            row.update(_bounds(interval(tally, self._shared(tally), key[0], self._level)))
            answered = _answers([r for r in rows if r.outcome.predicted is not None], self._targets)
            found = run_intervals(tally, answered, self._shared(tally), key[0], self._level)
            row.update(item for name, one in found.items() for item in _bounds(one, name, f"{name}_").items())
        return row

    def differences(self) -> list[Row]:
        """Every pretrained encoder minus each baseline, by method and budget.

        Baselines are its own random trunk, texture and the pretrained encoder that was named first, by the same
        method, and what was trained from scratch by fine-tuning, on the splits and label draws that both have.
        """
        sources = {one.source.name: one.source for one in self._scored}
        first = next((one.name for one in sources.values() if one.kind == "pretrained"), None)
        rows = []
        for (name, method, budget), whole in self._tallies.items():
            if sources[name].kind not in ("pretrained", "finetuned"):
                continue
            for base in sources.values():
                scratch = base.kind == "scratch"
                baseline = (base.name, FINETUNED if scratch else method, budget)
                mine = base.kind == "texture" or (base.kind == "random" and base.trunk == sources[name].trunk)
                mine = mine or (base.name == first and name != first)
                if (mine or scratch) and baseline in self._tallies:
                    tally, other = whole, self._tallies[baseline]
                    if scratch:
                        both = self._of_both((name, method, budget), baseline)
                        if both is None:
                            continue
                        tally, other = both
                    found = paired_interval(tally, name, other, base.name, self._shared(tally), self._level)
                    row = {"encoder": name, "baseline": base.name, "method": method, "labels_per_class": budget}
                    rows.append({**row, **_bounds(found)})
        return rows

    def _of_both(self, *keys: Curve) -> list[Tally] | None:
        """Tallies of the splits and label draws that all curves have; ``None`` where there are none."""
        curves = [[s for s in self._scored if s.outcome.predicted is not None and _curve_of(s) == key] for key in keys]
        cells = set.intersection(*({(s.plan.split.seed, s.outcome.draw.seed) for s in rows} for rows in curves))
        kept = [[s for s in rows if (s.plan.split.seed, s.outcome.draw.seed) in cells] for rows in curves]
        return [_tally(rows, self._targets) for rows in kept] if cells else None


def sizes(summary: Sequence[Row]) -> list[str]:
    """What the intervals rest on, as lines: test micrographs of each class, and seeds of each encoder."""
    tested: list[dict[str, int]] = [row.get("test_micrographs_per_class", {}) for row in summary]
    groups = max(tested, key=lambda found: sum(found.values()), default={})
    each = ", ".join(f"{name} {count}" for name, count in groups.items())
    seeds = {row["encoder"]: row["encoder_seeds"] for row in summary if row["kind"] != "texture"}
    lines = [f"test micrographs of each class: {each}"] if each else []
    if seeds:
        lines.append(f"encoder seeds: {', '.join(f'{name} {count}' for name, count in seeds.items())}")
    if 1 in seeds.values():
        lines[-1] += " (of one seed the interval holds no spread over pretrainings)"
    return lines


def _bounds(found: Interval | None, mean: str = "mean", prefix: str = "") -> Row:
    names = (mean, f"{prefix}low", f"{prefix}high")
    values = (None,) * 3 if found is None else (found.mean, found.low, found.high)
    return {name: None if value is None else round(value, 6) for name, value in zip(names, values, strict=True)}


def confusions(scored: Sequence[Scored], targets: Targets) -> list[Row]:
    """Confusion counts (true class by row) and their macro F1 of each encoder, method and budget, summed over splits
    and seeds."""
    sums: dict[Curve, np.ndarray] = {}
    for one in scored:
        if one.outcome.predicted is not None:
            key = _curve_of(one)
            truth = targets.y[one.plan.split.test]
            sums[key] = sums.get(key, 0) + confusion_matrix(truth, one.outcome.predicted, len(targets.classes))
    names = ("encoder", "method", "labels_per_class")
    return [
        {**dict(zip(names, key, strict=True)), "macro_f1": macro_f1(m), "counts": m.tolist()} for key, m in sums.items()
    ]


def fold_rows(scored: Sequence[Scored], targets: Targets) -> list[Row]:
    """Of each fold: its test groups and classes, and the share that each encoder, method and budget has right in them.

    The share is a mean over encoder seeds and label draws.
    """
    shares: dict[tuple[int, str, str, Budget], list[float]] = {}
    for one in scored:
        if one.outcome.predicted is not None:
            key = (one.plan.split.seed, one.source.name, one.outcome.method, one.outcome.draw.budget)
            right = one.outcome.predicted == targets.y[one.plan.split.test]
            shares.setdefault(key, []).append(float(right.mean()))
    tests = {one.plan.split.seed: one.plan.split.test for one in scored}
    return [
        {
            "fold": fold,
            "groups": [targets.group_names[g] for g in np.unique(targets.groups[tests[fold]])],
            "classes": [targets.classes[c] for c in np.unique(targets.y[tests[fold]])],
            "test_samples": len(tests[fold]),
            **dict(zip(("encoder", "method", "labels_per_class"), key, strict=True)),
            "right": float(np.mean(values)),
        }
        for (fold, *key), values in sorted(shares.items(), key=lambda item: item[0][0])
    ]


def to_json(scores: dict[str, Any]) -> str:
    """JSON with one line an entry of the lists, so that the file can be read and compared by eye."""
    parts = []
    for name, value in scores.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines = ",\n  ".join(json.dumps(item, allow_nan=False) for item in value)
            parts.append(f" {json.dumps(name)}: [\n  {lines}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def to_csv(rows: Sequence[Row]) -> str:
    """The tidy rows as CSV; blank cells for ``None``."""
    return csv_of(rows, list(rows[0]))


def summary_csv(summary: Sequence[Row]) -> str:
    """Every score of the summary with its interval as CSV, a row an encoder, method and budget."""
    rows = [
        {
            **{name: value for name, value in row.items() if name not in _BALANCED and not isinstance(value, dict)},
            **{title: row[name] for name, title in _BALANCED.items()},
        }
        for row in summary
    ]
    columns = dict.fromkeys(name for row in rows for name in row)
    return csv_of([{name: row.get(name) for name in columns} for row in rows], list(columns))


def table(summary: Sequence[Row]) -> str:
    """Encoders and methods down, labels per class across: ``0.52 [0.47, 0.56]``; ``*`` marks transductive rows."""
    budgets = list(dict.fromkeys(row["labels_per_class"] for row in summary))
    cells: dict[tuple[str, str], dict[Budget, str]] = {}
    for row in summary:
        mark = "*" if row["transductive"] else "?" if row["transductive"] is None else ""
        line = cells.setdefault((row["encoder"] + mark, row["method"]), {})
        blank = row["mean"] is None
        line[row["labels_per_class"]] = "-" if blank else f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    grid = [["encoder", "method", *map(str, budgets)]]
    grid += [[*name, *(line.get(b, "-") for b in budgets)] for name, line in cells.items()]
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in grid)
