"""Which curves a report draws, from what was collected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanodist.report.collect import Probe, Run
from nanodist.report.facts import objective
from nanodist.report.figures import Line, Panel
from nanodist.report.words import term

COLLAPSE = (
    ("embedding_std", "Embedding standard deviation"),
    ("effective_rank", "Effective rank"),
    ("alignment", "Alignment (lower: views agree)"),
    ("uniformity", "Uniformity (lower: spread out)"),
)
EVALUATION = (
    ("eval_knn", "Balanced accuracy, kNN"),
    ("eval_linear", "Balanced accuracy, linear probe"),
)
VALIDATION = (
    ("validation_loss", "Validation loss"),
    ("validation_balanced_accuracy", "Validation balanced accuracy"),
    ("validation_iou", "Validation IoU"),
)
RATIOS = (("trust_ratio_median", "Trust ratio, median over parameters"),)
MOST_TERMS = 4
# Of many runs so many have a colour and a name, and so many more are drawn faintly.
MOST_LINES, MOST_FAINT = 8, 100
BASELINE_KINDS = ("random", "texture", "scratch")


@dataclass(frozen=True)
class Curve:
    """Balanced accuracy of one encoder by one method over labels per class.

    Attributes:
        points: budget (a number or ``"all"``) -> the ``summary`` row.
        baseline: whether it is a baseline (random weights, texture features), not a trained encoder.
    """

    name: str
    method: str
    points: dict[Any, dict[str, Any]]
    order: int
    baseline: bool


def training_panels(runs: Sequence[Run]) -> list[Panel]:
    """Loss (one panel an objective, as losses of two share no scale), evaluations, learning rate, gradient, ratios."""
    groups = [group(run) for run in runs]
    panels = []
    for name in dict.fromkeys(groups):
        chosen = [i for i, o in enumerate(groups) if o == name]
        lines = [line for line in _lines(runs, "loss") if line.order in chosen]
        panels += [Panel(f"Loss, {name}" if name else "Loss", lines)] if lines else []
    drawn = [(title, _lines(runs, name)) for name, title in EVALUATION]
    panels += [Panel(title, lines, floor=0.0) for title, lines in drawn if lines]
    panels += [Panel(title, lines) for name, title in VALIDATION if (lines := _lines(runs, name))]
    rest = [("Learning rate", _lines(runs, "lr")), ("Gradient norm", _lines(runs, "gradient_norm"))]
    panels += [Panel(title, lines, floor=0.0) for title, lines in rest if lines]
    return panels + [Panel(title, lines, log_y=True) for name, title in RATIOS if (lines := _lines(runs, name))]


def term_panels(runs: Sequence[Run]) -> list[Panel]:
    """The terms of a loss of several, where there are few runs: a panel a run, a curve a term."""
    panels = []
    for run in runs[:MOST_TERMS]:
        names = sorted({name for row in run.metrics.rows for name in row if name.startswith("term_")})
        lines = []
        for order, name in enumerate(names):
            x, y = run.metrics.series(name)
            # Beyond the colours of the runs, so that no term looks like a run.
            lines += [Line(term(name.removeprefix("term_")), x, y, len(runs) + order)] if len(x) else []
        if lines:
            panels.append(Panel(f"Terms, {run.name}"[:60], lines))
    return panels


def group(run: Run) -> str:
    """Whose losses can be compared: runs of one objective, stages of one model."""
    if run.kind == "pairvae":
        return f"{run.value('what.stage') or ''} stage"
    return objective(run) or ("" if run.kind == "pretrain" else run.kind)


def collapse_panels(runs: Sequence[Run]) -> list[Panel]:
    """Embedding spread, effective rank, alignment and uniformity over the steps."""
    floors = {"embedding_std": 0.0, "effective_rank": 0.0}
    drawn = [(name, title, _lines(runs, name)) for name, title in COLLAPSE]
    return [Panel(title, lines, floor=floors.get(name)) for name, title, lines in drawn if lines]


def speed_panels(runs: Sequence[Run]) -> list[Panel]:
    """Images a second, and the share of the time that the step waited for data."""
    speed, wait = _lines(runs, "images_per_s"), _lines(runs, "data_wait_share", 100.0)
    panels = [Panel("Images per second", speed, floor=0.0)] if speed else []
    return panels + ([Panel("Time spent waiting for data (%)", wait, floor=0.0)] if wait else [])


def accuracy_curves(probes: Sequence[Probe], runs: Sequence[Run]) -> list[Curve]:
    """One curve per encoder and method; equal curves of several probes (a shared baseline) are drawn once.

    An encoder that bears the name of a run has that run's colour everywhere in the report.
    """
    found: dict[tuple[str, str], list[tuple[str, dict[Any, dict[str, Any]]]]] = {}
    for probe in probes:
        grouped: dict[tuple[str, str], dict[Any, dict[str, Any]]] = {}
        for row in probe.summary:
            key = (str(row.get("encoder")), str(row.get("method")))
            grouped.setdefault(key, {})[row.get("labels_per_class")] = row
        for key, points in grouped.items():
            variants = found.setdefault(key, [])
            if all(points != known for _, known in variants):
                variants.append((probe.name, points))
    runs_order = {run.name: index for index, run in enumerate(runs)}
    orders: dict[str, int] = {}
    curves = []
    for (encoder, method), variants in found.items():
        for probe_name, points in variants:
            name = encoder if len(variants) == 1 else f"{encoder} ({probe_name})"
            order = runs_order.get(name, orders.setdefault(name, len(runs) + len(orders)))
            baseline = any(row.get("kind") in BASELINE_KINDS for row in points.values())
            curves.append(Curve(name, method, points, order, baseline))
    return sorted(curves, key=lambda c: (c.baseline, c.order, c.method))


def budgets(curves: Sequence[Curve]) -> list[Any]:
    """All budgets of ``curves`` in order, numbers first and ``"all"`` last."""
    return ordered({budget for curve in curves for budget in curve.points})


def ordered(budgets: set[Any]) -> list[Any]:
    """Budgets in order, numbers first and ``"all"`` last; what is neither is left out."""
    numbers = sorted(b for b in budgets if isinstance(b, int | float) and b > 0)
    return numbers + (["all"] if "all" in budgets else [])


def accuracy_panels(curves: Sequence[Curve], chance: float | None) -> list[Panel]:
    """Balanced accuracy over labels per class, one panel a method, on one scale."""
    order = budgets(curves)
    numbers = [b for b in order if b != "all"]
    place = {b: float(b) for b in numbers}
    if "all" in order:
        place["all"] = 2.0 * max(place.values(), default=0.5)
    ticks = [(place[b], str(b)) for b in order]
    drawn: dict[str, list[Line]] = {}
    for curve in sorted(curves, key=lambda c: method_order(c.method)):
        line = _accuracy_line(curve, place)
        if line is not None:
            drawn.setdefault(curve.method, []).append(line)
    # One scale for all methods, so that the panels can be compared by eye.
    highest = [
        float(np.nanmax([line.y, line.y if line.high is None else line.high])) for ls in drawn.values() for line in ls
    ]
    top = 1.05 * max(highest, default=1.0)
    reference = None if chance is None else (chance, "chance")
    return [
        Panel(method_name(m), lines, "labels per class", ticks=ticks, floor=0.0, ceiling=top, reference=reference)
        for m, lines in drawn.items()
    ]


def method_order(method: str) -> tuple[bool, str]:
    """A key that sorts methods by name, but the linear probe first."""
    return method != "linear", method


def method_name(method: str) -> str:
    """``linear`` -> ``Linear probe``; a method that is not known keeps its name."""
    names = {"linear": "Linear probe", "knn": "k nearest neighbours", "finetune": "Fine-tuning"}
    return names.get(method, method)


def _accuracy_line(curve: Curve, place: dict[Any, float]) -> Line | None:
    known = [(place[b], row) for b, row in curve.points.items() if b in place and row.get("mean") is not None]
    if not known:
        return None
    known.sort(key=lambda pair: pair[0])
    x = np.asarray([p for p, _ in known])
    values = {
        name: np.asarray([np.nan if row.get(name) is None else float(row[name]) for _, row in known])
        for name in ("mean", "low", "high")
    }
    return Line(curve.name, x, values["mean"], curve.order, values["low"], values["high"], dashed=curve.baseline)


def _lines(runs: Sequence[Run], name: str, scale: float = 1.0) -> list[Line]:
    """A curve a run; of more than :data:`MOST_LINES` runs the others are faint."""
    lines = []
    many = len(runs) > MOST_LINES + 1
    for order, run in enumerate(runs[: MOST_LINES + MOST_FAINT]):
        x, y = run.metrics.series(name)
        if len(x):
            lines.append(Line(run.name, x, scale * y, order, faint=many and order >= MOST_LINES))
    return lines
