"""The sections on what the frozen features are worth: scores, label efficiency, map of the embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpc.config import flatten
from nanodist.report import curves, figures
from nanodist.report import maps as maps_of
from nanodist.report.collect import Probe
from nanodist.report.curves import Curve
from nanodist.report.markup import (
    Markup,
    cell,
    details,
    escaped,
    figure,
    image,
    inline_svg,
    missing,
    number,
    section,
    table,
)

IMAGE_BYTES = 750_000  # what all maps of a page may take together, before base64
MAX_PICTURES = 6
NO_PROBE = "No probe yet: run 'nanodist probe RUN --store STORE --labels-per-class 1,8,80 --out RUN/probe'."


def scores(probes: Sequence[Probe], found: Sequence[Curve]) -> str:
    """Big numbers at one budget, then every score with its interval."""
    if not probes:
        return section("scores", "Accuracy of the frozen features", missing(NO_PROBE))
    if not found:
        return section("scores", "Accuracy of the frozen features", missing("The probe's scores.json has no summary."))
    gains = "".join(_differences(probe) + _folds(probe) for probe in probes)
    remarks = "".join(_remarks(probe) for probe in probes)
    tables = _score_table(found) + _other_scores(found)
    return section("scores", "Accuracy of the frozen features", _cards(found) + tables + gains + remarks)


def efficiency(probes: Sequence[Probe], found: Sequence[Curve]) -> str:
    """The label-efficiency curve."""
    panels = curves.accuracy_panels(found, chance(probes))
    if not panels:
        return section("labels", "Label efficiency", missing(NO_PROBE))
    svg = figures.panels(panels, columns=min(2, len(panels)), height=3.6)
    caption = (
        "Balanced accuracy on test micrographs over labels per class (logarithmic; 'all' uses every label of the "
        "training side). Bands are the intervals of the table above; dashed curves are baselines."
    )
    drawn = figure(inline_svg(svg, "Balanced accuracy over labels per class; the table above has the numbers", "e"), "")
    return section("labels", "Label efficiency", drawn.replace("<figcaption>", f"<figcaption>{escaped(caption)}"))


def maps(probes: Sequence[Probe]) -> str:
    """A 2D map of the test embeddings of each probe."""
    if not probes:
        return section("map", "Map of the embeddings", missing(NO_PROBE))
    parts = []
    share = IMAGE_BYTES // min(len(probes), MAX_PICTURES)
    for probe in probes[:MAX_PICTURES]:
        if probe.features is None or probe.labels is None:
            parts.append(missing(f"No map for {probe.name}: {probe.problem}."))
            continue
        chosen, points, method = maps_of.lay_out(probe.features)
        labels = [str(probe.labels[i]) for i in chosen]
        png = maps_of.embedding_map(points, labels)
        drawn = figures.picture(png, share // 2) or png
        counts = {name: int((probe.labels == name).sum()) for name in sorted(set(probe.labels))}
        caption = (
            f"{probe.encoder}: {len(probe.features)} test images of {len(counts)} classes; {method} of the features. "
            "Neighbours in the map are alike to the encoder; distances between far groups mean little."
        )
        alternative = f"Map of {len(probe.features)} embeddings of {len(counts)} classes; counts below"
        parts.append(figure(image(figures.data_uri(drawn), alternative), caption))
        parts.append(_with_pictures(probe, points, labels, chosen.tolist(), share // 2))
        parts.append(details("Images per class", table(["class", "test images"], counts.items())))
    return section("map", "Map of the embeddings", "".join(parts))


def _with_pictures(probe: Probe, points: Any, labels: Sequence[str], chosen: Sequence[int], share: int) -> str:
    """The same map with small pictures, where the probe kept some."""
    if probe.thumbnails is None:
        return ""
    place = {row: k for k, row in enumerate(chosen)}
    known = [(place[row], picture) for row, picture in probe.thumbnails.items() if row in place]
    if not known:
        return ""
    # In an order of no meaning, as the first at a place hides the others.
    known = [known[i] for i in np.random.default_rng(0).permutation(len(known))]
    rows, pictures = [k for k, _ in known], np.stack([picture for _, picture in known])
    png, count = maps_of.thumbnail_map(points[rows], [labels[k] for k in rows], pictures)
    drawn = figures.picture(png, share) or png
    caption = f"The same map with {count} of the images themselves; a frame has the colour of the class."
    return figure(image(figures.data_uri(drawn), f"Map of embeddings with {count} images at their places"), caption)


def chance(probes: Sequence[Probe]) -> float | None:
    """Balanced accuracy of guessing, where all probes have the same."""
    stated = {probe.data.get("chance") for probe in probes}
    value = stated.pop() if len(stated) == 1 else None
    return float(value) if isinstance(value, int | float) and 0 < value < 1 else None


def _cards(found: Sequence[Curve]) -> str:
    """The scores at the budget that the project quotes (8 labels a class), else the middle one."""
    method = "linear" if any(c.method == "linear" for c in found) else found[0].method
    chosen = [c for c in found if c.method == method]
    order = [b for b in curves.budgets(chosen) if any(_mean(c, b) is not None for c in chosen)]
    if not order:
        return ""
    budget = 8 if 8 in order else order[len(order) // 2]
    ranked = sorted((c for c in chosen if _mean(c, budget) is not None), key=lambda c: -_mean(c, budget))
    cards = []
    for curve in ranked[:12]:
        row = curve.points[budget]
        cards.append(
            f'<div class="card" style="--colour:{figures.colour(curve.order)}"><span class="name">{escaped(curve.name)}'
            f"</span><b>{row['mean']:.3f}</b><span>{escaped(_interval(row))}</span></div>"
        )
    amount = "all labels" if budget == "all" else f"{number(budget)} labels per class"
    words = f"Balanced accuracy with {amount}, {curves.method_name(method).lower()}, test micrographs:"
    lead = f'<p class="lead">{escaped(words)}</p>'
    return f'{lead}<div class="cards">{"".join(cards)}</div>'


def _score_table(found: Sequence[Curve]) -> str:
    order = curves.budgets(found)
    best = {
        (method, b): max((_mean(c, b) or 0.0) for c in found if c.method == method)
        for method in {c.method for c in found}
        for b in order
    }
    rows = []
    for curve in sorted(found, key=lambda c: (*curves.method_order(c.method), c.baseline, c.order)):
        cells = []
        for budget in order:
            row, mean = curve.points.get(budget, {}), _mean(curve, budget)
            if mean is None:
                cells.append(Markup("–"))
                continue
            mark = ' class="best"' if mean >= best[curve.method, budget] else ""
            interval = f'<span class="interval">{escaped(_interval(row))}</span>'
            cells.append(Markup(f"<span{mark}>{mean:.3f}</span>{interval}"))
        rows.append((curve.name, curves.method_name(curve.method), *cells))
    caption = (
        "Balanced accuracy and its interval by labels per class; bold is the best of a method. "
        "A dash: a class has fewer labels than the budget."
    )
    return table(["encoder", "method", *map(str, order)], rows, caption, label_columns=2)


def _other_scores(found: Sequence[Curve]) -> str:
    """Macro F1, accuracy and calibration error with intervals, folded; empty for probes of before they had any."""
    rows = []
    for curve in sorted(found, key=lambda c: (*curves.method_order(c.method), c.baseline, c.order)):
        for budget in curves.ordered(set(curve.points)):
            row = curve.points[budget]
            cells = [_with_interval(row, name) for name in ("macro_f1", "accuracy", "calibration_error")]
            if any(cells):
                rows.append(
                    (curve.name, curves.method_name(curve.method), str(budget), *(c or "\u2013" for c in cells))
                )
    if not rows:
        return ""
    head = ["encoder", "method", "labels per class", "macro F1", "accuracy", "calibration error"]
    return details("Macro F1, accuracy and calibration error", table(head, rows, label_columns=3))


def _with_interval(row: dict[str, Any], name: str) -> Markup | None:
    value, low, high = (row.get(name + end) for end in ("", "_low", "_high"))
    if value is None:
        return None
    bounds = _interval({"low": low, "high": high})
    return Markup(f'{value:.3f}<span class="interval">{escaped(bounds)}</span>')


def _differences(probe: Probe) -> str:
    """What pretraining gained over each baseline, on the same test micrographs and labels."""
    grouped: dict[tuple[str, str, str], dict[Any, dict[str, Any]]] = {}
    for row in probe.records("differences"):
        if row.get("mean") is not None:
            key = (str(row.get("encoder")), str(row.get("baseline")), str(row.get("method")))
            grouped.setdefault(key, {})[row.get("labels_per_class")] = row
    every = {budget for points in grouped.values() for budget in points}
    order = curves.ordered(every)
    if not order:
        return ""
    rows = []
    for key in sorted(grouped, key=lambda k: (*curves.method_order(k[2]), k[0], k[1])):
        cells = [_gain(grouped[key].get(budget)) for budget in order]
        rows.append((f"{key[0]} over {key[1]}", curves.method_name(key[2]), *cells))
    what = "Gain over the baselines and over the encoder named first"
    caption = f"{what}: paired differences with intervals; bold where the interval leaves out zero."
    return table(["difference", "method", *map(str, order)], rows, caption, label_columns=2)


def _gain(row: dict[str, Any] | None) -> Markup:
    if row is None:
        return Markup("–")
    low, high = row.get("low"), row.get("high")
    clear = low is not None and high is not None and (low > 0 or high < 0)
    interval = "" if low is None or high is None else f"{low:+.2f} to {high:+.2f}"
    mark = ' class="best"' if clear else ""
    return Markup(
        f'<span{mark}>{row["mean"]:+.3f}</span><span class="interval">{interval}</span>'.replace("-0.", "\u22120.")
    )


def _folds(probe: Probe) -> str:
    """What each fold left out, and how much of it was right, where each group was the test in turn."""
    shares: dict[tuple[str, str], dict[str, float]] = {}
    for row in probe.records("folds"):
        if row.get("method") == "linear" and row.get("labels_per_class") == "all":
            what = f"{', '.join(row['groups'])} ({row['test_samples']})", ", ".join(row["classes"])
            shares.setdefault(what, {})[str(row["encoder"])] = float(row["right"])
    if not shares:
        return ""
    names = list(dict.fromkeys(name for each in shares.values() for name in each))
    rows = [
        (*what, *(f"{each[name]:.2f}" if name in each else "\u2013" for name in names)) for what, each in shares.items()
    ]
    caption = "Share that a linear probe on all labels has right in each group that was left out (samples in brackets)."
    return table(["left out", "class", *names], rows, caption, label_columns=2)


def _remarks(probe: Probe) -> str:
    """What the probe says of itself, and warnings where pretraining saw the test set or labels ran short."""
    sentences = []
    names: dict[Any, list[str]] = {True: [], None: []}
    for row in probe.summary:
        flag, name = row.get("transductive", False), str(row.get("encoder"))
        if flag in names and name not in names[flag]:
            names[flag].append(name)
    if names[True] or probe.data.get("transductive"):
        who = ", ".join(names[True]) or probe.name
        sentences.append(f"{who}: pretraining saw the test micrographs, without their labels (transductive).")
    if names[None]:
        sentences.append(f"{', '.join(names[None])}: it is not known whether pretraining saw the test micrographs.")
    for budget, reason in {
        str(r.get("labels_per_class")): r["reason"] for r in probe.summary if r.get("reason")
    }.items():
        sentences.append(f"{budget} labels per class, {reason}.")
    warnings = "".join(f'<p class="warning">{escaped(sentence)}</p>' for sentence in sentences)
    plain = {name: value for name, value in probe.data.items() if name not in ("schema", "notes") and _is_plain(value)}
    rows = [(name.replace("_", " "), cell(value)) for name, value in flatten(plain).items()][:60]
    notes = probe.data.get("notes")
    said = "".join(f"<p>{escaped(note)}</p>" for note in notes) if isinstance(notes, list) else ""
    if not rows and not said:
        return warnings
    return warnings + details(
        f"How {probe.name} was measured", f'{said}<div class="wrap facts">{table([], rows)}</div>'
    )


def _is_plain(value: Any) -> bool:
    """Whether ``value`` fits one line of a table: no list of records."""
    return not isinstance(value, list) or not any(isinstance(item, dict | list) for item in value)


def _interval(row: dict[str, Any]) -> str:
    low, high = row.get("low"), row.get("high")
    return "" if low is None or high is None else f"{low:.2f} to {high:.2f}"


def _mean(curve: Curve, budget: Any) -> Any:
    return curve.points.get(budget, {}).get("mean")
