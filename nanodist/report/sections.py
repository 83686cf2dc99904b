"""The sections of a report, each from what was collected to HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpc.config import flatten
from nanodist.report import curves, figures
from nanodist.report.collect import Probe, Run
from nanodist.report.curves import Curve
from nanodist.report.facts import START_COLUMNS, facts, start_row
from nanodist.report.markup import (
    Markup,
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

IMAGE_BYTES = 1_500_000  # what all pictures of a page may take together, before base64
MAX_PICTURES = 6
NO_PROBE = "No probe yet: run 'nanodist probe RUN --store STORE --labels-per-class 1,8,80 --out RUN/probe'."


def what_was_trained(runs: Sequence[Run]) -> str:
    """One column a run: objective, trunk, data, steps, fingerprint, hosts."""
    columns = [facts(run) for run in runs]
    rows = [(label, *[number(column[label]) for column in columns]) for label in columns[0]]
    kept = [row for row in rows if any(cell not in ("–", "") for cell in row[1:])]
    notes = "".join(missing(f"{run.name}: {' '.join(run.notes)}") for run in runs if run.notes)
    head = ["", *[run.name for run in runs]] if len(runs) > 1 else []
    return section("trained", "What was trained", f'<div class="wrap">{table(head, kept)}</div>{notes}')


def scores(probes: Sequence[Probe], found: Sequence[Curve]) -> str:
    """Big numbers at one budget, then every score with its interval."""
    if not probes:
        return section("scores", "Accuracy of the frozen features", missing(NO_PROBE))
    if not found:
        return section("scores", "Accuracy of the frozen features", missing("The probe's scores.json has no summary."))
    gains = "".join(_differences(probe) for probe in probes)
    remarks = "".join(_remarks(probe) for probe in probes)
    return section("scores", "Accuracy of the frozen features", _cards(found) + _score_table(found) + gains + remarks)


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


def training(runs: Sequence[Run]) -> str:
    """Loss, learning rate and the signs of a collapse."""
    parts = []
    panels = curves.training_panels(runs)
    if not panels:
        return section("training", "Training", missing("No step is logged yet: the curves appear once training runs."))
    svg = figures.panels(panels, columns=min(2, len(panels)))
    parts.append(figure(inline_svg(svg, "Loss and learning rate over steps; numbers below", "t"), _loss_caption(runs)))
    health = curves.collapse_panels(runs)
    if health:
        svg = figures.panels(health, columns=2, height=2.4)
        caption = (
            "Signs of a collapse, measured on the projections of a batch. The standard deviation is 1 where the "
            "embeddings fill their sphere and 0 where all images give one vector; an effective rank near 1 means that "
            "they vary along one direction only."
        )
        parts.append(figure(inline_svg(svg, "Collapse indicators over steps; numbers below", "c"), caption))
    else:
        parts.append(missing("No collapse indicators are logged."))
    parts.append(details("The numbers behind these curves", "".join(_metric_table(run) for run in runs[:12])))
    return section("training", "Training", "".join(parts))


def speed(runs: Sequence[Run]) -> str:
    """Throughput, and the share of time spent on waiting for data."""
    panels = curves.speed_panels(runs)
    if not panels:
        return section("speed", "Throughput", missing("No throughput is logged yet."))
    svg = figures.panels(panels, columns=min(2, len(panels)), height=2.4)
    medians = []
    for run in runs:
        rate, wait = run.metrics.series("images_per_s")[1], run.metrics.series("data_wait_share")[1]
        if len(rate):
            share = f"{100 * _median(wait):.0f} %" if len(wait) else "–"
            medians.append((run.name, number(_median(rate), 3), share))
    body = figure(inline_svg(svg, "Images per second and data wait over steps; medians below", "s"), "")
    body += table(["run", "images/s (median)", "waiting for data (median)"], medians)
    return section("speed", "Throughput", body)


def views(runs: Sequence[Run]) -> str:
    """The example grid of view pairs of each run."""
    parts = []
    share = IMAGE_BYTES // 2 // max(1, min(len(runs), MAX_PICTURES))
    for run in runs[:MAX_PICTURES]:
        drawn = None if run.views is None else figures.picture(run.views, share)
        if drawn is None:
            why = "has no view pairs (report/views.png)" if run.views is None else "has a views.png that is no image"
            parts.append(missing(f"{run.name} {why}."))
            continue
        caption = (
            f"{run.name}: each column is one tile of the store, and under it the two views that training makes of it. "
            "What differs between the two views is what the encoder learns to ignore."
        )
        parts.append(figure(image(figures.data_uri(drawn), f"Grid of view pairs of {run.name}"), caption))
    if len(runs) > MAX_PICTURES:
        parts.append(missing(f"View pairs of {len(runs) - MAX_PICTURES} more runs are left out."))
    return section("views", "View pairs", "".join(parts))


def maps(probes: Sequence[Probe]) -> str:
    """A 2D map of the test embeddings of each probe."""
    if not probes:
        return section("map", "Map of the embeddings", missing(NO_PROBE))
    parts = []
    share = IMAGE_BYTES // 2 // min(len(probes), MAX_PICTURES)
    for probe in probes[:MAX_PICTURES]:
        if probe.features is None or probe.labels is None:
            parts.append(missing(f"No map for {probe.name}: {probe.problem}."))
            continue
        png, method = figures.embedding_map(probe.features, [str(label) for label in probe.labels])
        drawn = figures.picture(png, share) or png
        counts = {name: int((probe.labels == name).sum()) for name in sorted(set(probe.labels))}
        caption = (
            f"{probe.encoder}: {len(probe.features)} test images, {len(counts)} classes; {method} of the frozen features. "
            "Neighbours in the map are alike to the encoder; distances between far groups mean little."
        )
        alternative = f"Map of {len(probe.features)} embeddings of {len(counts)} classes; counts below"
        parts.append(figure(image(figures.data_uri(drawn), alternative), caption))
        parts.append(details("Images per class", table(["class", "test images"], counts.items())))
    return section("map", "Map of the embeddings", "".join(parts))


def starts(runs: Sequence[Run]) -> str:
    """Every start of every run: when, where, from which step to which, and why it ended."""
    parts = []
    for run in runs:
        title = f"<h3>{escaped(run.name)}</h3>" if len(runs) > 1 else ""
        if not run.starts:
            parts.append(title + missing("run.json lists no start."))
            continue
        rows = [start_row(start) for start in run.starts]
        used = [c for c in range(len(START_COLUMNS)) if any(row[c] != "–" for row in rows)]
        head = ["start", *[START_COLUMNS[c] for c in used]]
        listed = table(head, [(i + 1, *[row[c] for c in used]) for i, row in enumerate(rows)])
        parts.append(f'{title}<div class="wrap">{listed}</div>')
        versions = run.starts[-1].get("versions")
        if isinstance(versions, dict):
            installed = [(name, number(version)) for name, version in versions.items()]
            parts.append(details("Versions at the last start", table([], installed)))
    return section("starts", "Starts", "".join(parts))


def recipes(runs: Sequence[Run]) -> str:
    """The recipe of each run, folded away."""
    parts = []
    for run in runs:
        if not run.recipe_text:
            parts.append(missing(f"{run.name} has no recipe.yaml."))
            continue
        parts.append(details(f"Recipe of {run.name} (YAML)", f"<pre>{escaped(run.recipe_text)}</pre>"))
    return section("recipe", "Recipe", "".join(parts))


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
    caption = "Gain over the baselines: paired differences with intervals; bold where the interval leaves out zero."
    return table(["difference", "method", *map(str, order)], rows, caption, label_columns=2)


def _gain(row: dict[str, Any] | None) -> Markup:
    if row is None:
        return Markup("–")
    low, high = row.get("low"), row.get("high")
    clear = low is not None and high is not None and (low > 0 or high < 0)
    interval = "" if low is None or high is None else f"{low:+.2f} to {high:+.2f}"
    mark = ' class="best"' if clear else ""
    return Markup(f'<span{mark}>{row["mean"]:+.3f}</span><span class="interval">{interval}</span>')


def _remarks(probe: Probe) -> str:
    """What the probe says of itself, and warnings where pretraining saw the test set or labels ran short."""
    sentences = []
    names = {flag: [] for flag in (True, None)}  # type: dict[Any, list[str]]
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
    rows = [(name.replace("_", " "), _cell(value)) for name, value in flatten(plain).items()][:60]
    notes = probe.data.get("notes")
    said = "".join(f"<p>{escaped(note)}</p>" for note in notes) if isinstance(notes, list) else ""
    if not rows and not said:
        return warnings
    return warnings + details(f"How {probe.name} was measured", f'{said}<div class="wrap">{table([], rows)}</div>')


def _is_plain(value: Any) -> bool:
    """Whether ``value`` fits one line of a table: no list of records."""
    return not isinstance(value, list) or not any(isinstance(item, dict | list) for item in value)


def _metric_table(run: Run, count: int = 12) -> str:
    rows = run.metrics.rows
    if not rows:
        return missing(f"{run.name} has no logged step.")
    chosen = [rows[i] for i in sorted({round(k * (len(rows) - 1) / (count - 1)) for k in range(count)})]
    names = [n for n in ("epoch", "samples_seen", "loss", "lr", *[n for n, _ in curves.COLLAPSE]) if n in rows[-1]]
    names += [n for n in ("images_per_s", "data_wait_share") if n in rows[-1]]
    body = [(number(row["step"]), *[number(row.get(name)) for name in names]) for row in chosen]
    return table(["step", *[name.replace("_", " ") for name in names]], body, caption=run.name)


def _loss_caption(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        x, y = run.metrics.series("loss")
        if len(x):
            parts.append(
                f"{run.name}: {number(float(y[0]))} at step {number(int(x[0]))}, "
                f"{number(float(y[-1]))} at step {number(int(x[-1]))}."
            )
        if run.metrics.dropped:
            again = (
                f"{run.metrics.dropped} logged lines belong to steps that a resume ran again (or were torn by a kill)."
            )
            parts.append(again)
        if len(x) and len(x) < sum("loss" in row for row in run.metrics.rows):
            parts.append("Steps with a loss that is not finite are left out.")
    return "Loss and learning rate. " + " ".join(parts[:12])


def _interval(row: dict[str, Any]) -> str:
    low, high = row.get("low"), row.get("high")
    return "" if low is None or high is None else f"{low:.2f} to {high:.2f}"


def _mean(curve: Curve, budget: Any) -> Any:
    return curve.points.get(budget, {}).get("mean")


def _median(values: Any) -> float:
    ordered = sorted(float(v) for v in values)
    return ordered[len(ordered) // 2]


def _cell(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(number(item) for item in value[:12])
        return shown + (f", … ({len(value)} in all)" if len(value) > 12 else "")
    return number(value)
