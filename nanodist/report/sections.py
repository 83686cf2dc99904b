"""The sections on the run itself: what was trained, its curves, views, throughput and starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanodist.report import curves, figures, several
from nanodist.report.collect import Run
from nanodist.report.facts import START_COLUMNS, start_row
from nanodist.report.markup import details, escaped, figure, image, inline_svg, missing, number, section, table
from nanodist.report.reproduce import cost_cells
from nanodist.report.words import plain

IMAGE_BYTES = 750_000  # what all view sheets of a page may take together, before base64
MAX_PICTURES = 6
MOST_LISTED = 12
MOST_NOTES = 20


def what_was_trained(runs: Sequence[Run]) -> str:
    """Objective, trunk, data, steps, fingerprint, hosts of each run."""
    noted = [run for run in runs if run.notes]
    notes = "".join(missing(f"{run.name}: {' '.join(run.notes)}") for run in noted[:MOST_NOTES])
    if len(noted) > MOST_NOTES:
        notes += missing(f"{len(noted) - MOST_NOTES} more runs lack something.")
    return section("trained", "What was trained", several.facts_table(runs) + notes)


def training(runs: Sequence[Run]) -> str:
    """Loss, learning rate and the signs of a collapse."""
    parts = []
    panels = curves.training_panels(runs)
    if not panels:
        return section("training", "Training", missing("No step is logged yet: the curves appear once training runs."))
    svg = figures.panels(panels, columns=min(2, len(panels)))
    parts.append(figure(inline_svg(svg, "Loss and learning rate over steps; numbers below", "t"), _loss_caption(runs)))
    if len(runs) > curves.MOST_LINES + 1:
        drawn = min(len(runs), curves.MOST_LINES + curves.MOST_FAINT)
        told = f"The first {curves.MOST_LINES} runs have colours, {drawn - curves.MOST_LINES} more are grey"
        left = f", and {len(runs) - drawn} are not drawn" if len(runs) > drawn else ""
        parts.append(missing(f"{told}{left}; give fewer runs to see one by one."))
    terms = curves.term_panels(runs)
    if terms:
        svg = figures.panels(terms, columns=min(2, len(terms)))
        parts.append(
            figure(inline_svg(svg, "Terms of the loss over steps", "r"), "The terms that the loss is made of.")
        )
    health = curves.collapse_panels(runs)
    if health:
        svg = figures.panels(health, columns=2, height=2.4)
        caption = (
            "Signs of a collapse, measured on the projections of a batch. The standard deviation is 1 where the "
            "embeddings fill their sphere and 0 where all images give one vector; an effective rank near 1 means that "
            "they vary along one direction only."
        )
        parts.append(figure(inline_svg(svg, "Collapse indicators over steps; numbers below", "c"), caption))
    elif any(run.kind == "pretrain" for run in runs):
        parts.append(missing("No collapse indicators are logged."))
    parts.append(details("The numbers behind these curves", "".join(_metric_table(run) for run in runs[:12])))
    return section("training", "Training", "".join(parts))


def speed(runs: Sequence[Run]) -> str:
    """Throughput, and the share of time spent on waiting for data."""
    panels = curves.speed_panels(runs)
    if not panels:
        return section("speed", "Throughput", missing("No throughput is logged yet."))
    svg = figures.panels(panels, columns=min(2, len(panels)), height=2.4)
    listed = []
    for run in runs:
        rate, wait = run.metrics.series("images_per_s")[1], run.metrics.series("data_wait_share")[1]
        if len(rate):
            share = f"{100 * _median(wait):.0f} %" if len(wait) else "–"
            listed.append((run.name, number(_median(rate), 3), share, *cost_cells(run)))
    body = figure(inline_svg(svg, "Images per second and data wait over steps; medians below", "s"), "")
    head = ["run", "images/s (median)", "waiting for data (median)", "time of all starts", "rank hours", "starts"]
    caption = (
        "Rank hours: the time of all starts, lost ones as well, times their ranks (a GPU or a share of a CPU each)."
    )
    return section("speed", "Throughput and cost", body + table(head, listed, caption))


def views(runs: Sequence[Run]) -> str:
    """The example grid of view pairs of each pretraining."""
    runs = [run for run in runs if run.kind == "pretrain"]
    if not runs:
        return ""
    parts = []
    share = IMAGE_BYTES // max(1, min(len(runs), MAX_PICTURES))
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


def starts(runs: Sequence[Run]) -> str:
    """Every start of every run: when, where, from which step to which, and why it ended."""
    if len(runs) > MOST_LISTED:
        return section("starts", "Starts", several.starts_table(runs))
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
            installed = ", ".join(f"{name} {number(version)}" for name, version in versions.items() if version)
            parts.append(f"<p>Versions at the last start: {escaped(installed)}.</p>")
    return section("starts", "Starts", "".join(parts))


def _metric_table(run: Run, count: int = 12) -> str:
    rows = run.metrics.rows
    if not rows:
        return missing(f"{run.name} has no logged step.")
    chosen = [rows[i] for i in sorted({round(k * (len(rows) - 1) / (count - 1)) for k in range(count)})]
    names = [n for n in ("epoch", "samples_seen", "loss", "lr", *[n for n, _ in curves.COLLAPSE]) if n in rows[-1]]
    names += [n for n in ("images_per_s", "data_wait_share") if n in rows[-1]]
    body = [(number(row["step"]), *[number(row.get(name)) for name in names]) for row in chosen]
    return table(["step", *["learning rate" if name == "lr" else plain(name) for name in names]], body, run.name)


def _loss_caption(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs if len(runs) <= several.MOST_COLUMNS else []:
        x, y = run.metrics.series("loss")
        if len(x):
            parts.append(
                f"{run.name}: loss {number(float(y[0]))} at step {number(int(x[0]))}, "
                f"{number(float(y[-1]))} at step {number(int(x[-1]))}."
            )
        if run.metrics.dropped:
            lines = "1 logged line is" if run.metrics.dropped == 1 else f"{run.metrics.dropped} logged lines are"
            parts.append(f"{lines} left out: of steps that a resume ran again, or torn by a kill.")
        if len(x) and len(x) < sum("loss" in row for row in run.metrics.rows):
            parts.append("Steps with a loss that is not finite are left out.")
    return " ".join(["Loss, learning rate and more over the steps.", *parts[:12]])


def _median(values: Any) -> float:
    ordered = sorted(float(v) for v in values)
    return ordered[len(ordered) // 2]
