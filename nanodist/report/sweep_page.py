"""One self-contained HTML page about a sweep, or about a pipeline from pretraining to its sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hpc import atomic
from hpc.errors import UserError
from nanodist.report import figures, sections, settings, words
from nanodist.report.collect import Run, read_run
from nanodist.report.figures import Line, Panel
from nanodist.report.markup import Markup, details, escaped, figure, inline_svg, missing, number, section, table
from nanodist.report.page import distinct, shell
from nanodist.report.settings import Score, Table

CONTENTS = (
    ("best", "Best settings"),
    ("curves", "Curves"),
    ("settings", "All settings"),
    ("jobs", "Jobs and failures"),
    ("cost", "Cost"),
    ("trained", "Pretraining"),
    ("training", "Training"),
    ("starts", "Starts"),
    ("reproduce", "Reproduce"),
)
_NOTHING = "No job of it is done yet, so there is no score."
_UNRANKED = (
    "Which of its scores is better, and whether more is, depends on the question: its sweep.parquet has them all."
)
MOST_CURVES = 8
MOST_SETTINGS = 40
MOST_FAILURES = 50
ORDER = ("done", "running", "stopped", "queued", "missing", "lost", "cancelled", "failed")
_NAMES = {
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "dice": "Dice",
    "iou": "IoU",
    "boundary_f1": "Boundary F1",
}
_AXIS = {"labels_per_class": "labels per class", "masks": "labelled images"}


def write_sweep_page(result: Mapping[str, Any], out: Path) -> Path:
    """Write the page of ``result`` (as :mod:`launch.pages` makes it) to ``out``, and return ``out``.

    Raises:
        UserError: ``out`` cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(out, render(result))
    except OSError as error:
        raise UserError(f"the page cannot be written to {out}: {error}") from error
    return out


def render(result: Mapping[str, Any]) -> str:
    """The page as HTML; the same for the same files."""
    found = {sweep["sweep"]: settings.tables(sweep["rows"], sweep["set"]) for sweep in result["sweeps"]}
    runs = _runs(result["pretrainings"])
    body = [_best(found, result), _curves(found), _all_settings(found), _jobs(result), _cost(result["cost"])]
    if result["pretrainings"]:
        body += [_pretrainings(result["pretrainings"], runs)]
    if runs:
        body += [sections.training(runs), sections.starts(runs)]
    body.append(_reproduce(result["reproduce"]))
    contents = [pair for pair in CONTENTS if runs or pair[0] not in ("training", "starts")]
    contents = [pair for pair in contents if result["pretrainings"] or pair[0] != "trained"]
    return shell(str(result["name"]), _lead(result), contents, "".join(body))


def _lead(result: Mapping[str, Any]) -> str:
    states: dict[str, int] = {}
    for sweep in result["sweeps"]:
        for state, count in sweep["states"].items():
            states[state] = states.get(state, 0) + count
    jobs = sum(states.values())
    parts = [f"{len(result['pretrainings'])} pretraining{'s' * (len(result['pretrainings']) != 1)}"]
    parts = parts if result["pretrainings"] else []
    told = ", ".join(f"{states[state]} {state}" for state in ORDER if states.get(state))
    parts.append(f"{jobs} jobs in {len(result['sweeps'])} sweep{'s' * (len(result['sweeps']) != 1)} ({told or 'none'})")
    gpu, cpu = (sum(row[name] for row in result["cost"]) for name in ("gpu_hours", "cpu_hours"))
    parts.append(f"{number(gpu, 3)} GPU hours" if gpu else f"{number(cpu, 3)} core hours")
    return "; ".join(parts) + "."


def _runs(pretrainings: Sequence[Mapping[str, Any]]) -> list[Run]:
    runs = []
    for one in pretrainings:
        path = Path(one["run_dir"])
        if any((path / name).is_file() for name in ("run.json", "metrics.jsonl")):
            run = read_run(path)
            runs.append(replace(run, name=_point(one) or run.name))
    return distinct(runs)


def _point(pretraining: Mapping[str, Any]) -> str:
    """What a pretraining was given, in words; runs have names by it rather than by a fingerprint."""
    point = pretraining["point"].items()
    return ", ".join(words.setting(name.removeprefix("pretrain."), value) for name, value in point)


def _best(found: Mapping[str, Sequence[Table]], result: Mapping[str, Any]) -> str:
    """Big numbers for the main score of each sweep, then the best setting at each budget."""
    parts = []
    for name, several in found.items():
        if not several:
            done = any(sweep["states"].get("done") for sweep in result["sweeps"] if sweep["sweep"] == name)
            parts.append(f"<h3>{escaped(name)}</h3>{missing(_UNRANKED if done else _NOTHING)}")
            continue
        main, rows = several[0], []
        for budget in main.budgets:
            best, score, near = main.best(budget)
            others = f"{len(near)} of {len(main.settings) - 1}" if len(main.settings) > 1 else "–"
            rows.append((_budget(budget), best.name, _cell(score, True), str(score.n), others))
        head = [_AXIS.get(main.axis, "budget"), "best setting", metric(main.metric), "seeds", "others as good"]
        caption = (
            f"The best by {inside(main.metric)}, with 95 % intervals over seeds (Student's t). 'As good' are settings "
            "whose interval reaches that mean. The best of many is flattered by its choice."
        )
        parts.append(f"<h3>{escaped(name)}</h3>{_cards(main)}{table(head, rows, caption)}")
    return section("best", "Best settings", "".join(parts))


def _cards(main: Table) -> str:
    """The best at each budget, in the colour that its setting has in the curves."""
    cards = []
    for budget in main.budgets[:6]:
        best, score, _ = main.best(budget)
        order = main.settings.index(best)
        mark = figures.colour(order) if order < MOST_CURVES else "var(--rule)"
        where = words.counted(budget, _AXIS[main.axis]) if main.axis in _AXIS else inside(main.metric)
        told = f"<span>{escaped(best.name)}</span>" if len(main.settings) > 1 else ""
        cards.append(
            f'<div class="card" style="--colour:{mark}"><span class="name">{escaped(where)}</span>'
            f"<b>{score.mean:.3f}</b><span>{escaped(_range(score) or 'one seed')}</span>{told}</div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _curves(found: Mapping[str, Sequence[Table]]) -> str:
    """Scores over the budget, a curve a setting, a panel a sweep and score."""
    parts = []
    for index, (name, several) in enumerate(found.items()):
        # A setting has one colour in all panels: its rank by the first score.
        orders = {setting.name: order for order, setting in enumerate(several[0].settings)} if several else {}
        panels = [_panel(one, orders) for one in several if one.axis and len(one.budgets) > 1]
        if not panels:
            continue
        svg = figures.panels(panels, columns=min(2, len(panels)), height=3.4)
        left_out = max(0, len(several[0].settings) - MOST_CURVES)
        caption = (
            f"Mean over {_words(several[0].seeds)}; bands are 95 % (Student's t) of that mean; a point with "
            "none has a single seed. Seeds that share test micrographs are not independent of each other."
            + (f" {left_out} settings are left out; the table below has them." if left_out else "")
        )
        drawn = inline_svg(svg, f"Scores of {name} over the budget; the tables have the numbers", f"s{index}")
        parts.append(f"<h3>{escaped(name)}</h3>{figure(drawn, caption)}")
    return section("curves", "Curves", "".join(parts) or missing("No sweep has more than one budget."))


def _panel(one: Table, orders: Mapping[str, int]) -> Panel:
    numbers = [b for b in one.budgets if b != "all"]
    place = {b: float(b) for b in numbers}
    if "all" in one.budgets:
        place["all"] = 2.0 * max(place.values(), default=0.5)
    lines = []
    shown = [setting for setting in one.settings if orders.get(setting.name, MOST_CURVES) < MOST_CURVES]
    for setting in sorted(shown, key=lambda setting: orders[setting.name]):
        known = [(place[b], setting.points[b]) for b in one.budgets if b in setting.points]
        x = np.asarray([p for p, _ in known])
        values = {
            side: np.asarray([np.nan if getattr(score, side) is None else getattr(score, side) for _, score in known])
            for side in ("mean", "low", "high")
        }
        lines.append(Line(setting.name, x, values["mean"], orders[setting.name], values["low"], values["high"]))
    ticks = [(place[b], _budget(b)) for b in one.budgets]
    top = max((float(np.nanmax([line.y, line.high])) for line in lines if line.high is not None), default=1.0)
    axis = _AXIS.get(one.axis, one.axis)
    return Panel(metric(one.metric), lines, axis, ticks=ticks, floor=0.0, ceiling=1.05 * top if top > 0 else 1.0)


def _all_settings(found: Mapping[str, Sequence[Table]]) -> str:
    parts = []
    for name, several in found.items():
        for one in several:
            best = {budget: one.best(budget)[0] for budget in one.budgets}
            rows = [
                (setting.name, *[_cell(setting.points.get(b), best[b] is setting) for b in one.budgets])
                for setting in one.settings[:MOST_SETTINGS]
            ]
            head = ["setting", *[_budget(b) if one.axis else metric(one.metric) for b in one.budgets]]
            left_out = len(one.settings) - len(rows)
            caption = f"{name}: {inside(one.metric)}" + (f" over {_AXIS[one.axis]}" if one.axis else "")
            caption += f"; the best {len(rows)} of {len(one.settings)} settings." if left_out > 0 else "."
            parts.append(table(head, rows, caption))
    return section("settings", "All settings", "".join(parts) or missing("No job is done yet."))


def _jobs(result: Mapping[str, Any]) -> str:
    """How many jobs are in which state, and every one that is not done with its reason and last words."""
    parts, rows = [], []
    for sweep in result["sweeps"]:
        counts = [sweep["states"].get(state, 0) for state in ORDER]
        jobs = {row["fingerprint"]: row for row in sweep["rows"]}
        again = sum(int(row.get("tries") or 0) > 1 for row in jobs.values())
        rows.append((sweep["sweep"], str(sum(counts)), *[str(c) if c else "–" for c in counts], str(again)))
        for encoder in (sweep.get("not_planned") or {}).get("encoders", []):
            jobs_each = sweep["not_planned"]["jobs_each"]
            told = f"{sweep['sweep']}: its {jobs_each} jobs wait for the encoder of pretraining {encoder}."
            parts.append(f'<p class="warning">{escaped(told)}</p>')
    head = ["sweep", "jobs", *ORDER, "started more than once"]
    parts.insert(0, table(head, rows))
    for sweep in result["sweeps"]:
        jobs = {row["fingerprint"]: row for row in sweep["rows"] if row["state"] not in ("done", "running", "queued")}
        parts += [_failure(row, sweep["set"]) for row in [*jobs.values()][:MOST_FAILURES]]
        if len(jobs) > MOST_FAILURES:
            parts.append(missing(f"{len(jobs) - MOST_FAILURES} more of {sweep['sweep']} stand in its sweep.json."))
    return section("jobs", "Jobs and failures", "".join(parts))


def _failure(row: Mapping[str, Any], given: Sequence[str]) -> str:
    point = ", ".join(words.setting(name, row[name]) for name in given if name in row)
    told = f"{row['fingerprint']} {row['state']} ({point}): {row.get('reason') or 'nothing has it'}"
    log = str(row.get("log") or "")
    return details(told, f"<pre>{escaped(log)}</pre>") if log else missing(told)


def _cost(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return section("cost", "Cost", missing("Nothing has run yet."))
    listed = [
        (
            r["part"],
            str(r["jobs"]),
            _hours(r["hours"]),
            number(r["cpu_hours"], 3),
            number(r["gpu_hours"], 3),
            r["source"],
        )
        for r in rows
    ]
    total = {name: sum(row[name] for row in rows) for name in ("jobs", "hours", "cpu_hours", "gpu_hours")}
    head = ["part", "jobs in the queue", "time of all together", "core hours", "GPU hours", "by"]
    caption = "Every start counts, those that were lost as well. By sacct: what Slurm accounted for the allocations."
    return section("cost", "Cost", table(head, [*listed, ("in all", *_sums(total), "")], caption))


def _sums(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return str(row["jobs"]), _hours(row["hours"]), number(row["cpu_hours"], 3), number(row["gpu_hours"], 3)


def _pretrainings(pretrainings: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> str:
    rows = []
    for one in pretrainings:
        exported = "yes" if one["exported"] else "no"
        rows.append((_point(one) or "–", one["fingerprint"], one["state"], one["reason"] or "–", exported))
    listed = table(["pretraining", "fingerprint", "state", "reason", "exported"], rows)
    told = sections.what_was_trained(runs) if runs else ""
    inner = told.partition("</h2>")[2].removesuffix("</section>")
    return section("trained", "Pretraining", f'<div class="wrap">{listed}</div>{inner}')


def _reproduce(told: Mapping[str, Any]) -> str:
    parts = []
    if told.get("command"):
        parts.append(
            f"<p>What is missing is done, and this page made again, by</p><pre>{escaped(told['command'])}</pre>"
        )
    for name, line in (told.get("by_hand") or {}).items():
        parts.append(details(f"One job of {name} by hand", f"<pre>{escaped(line)}</pre>"))
    if told.get("definition"):
        parts.append(details("Definition (YAML)", f'<pre class="recipe">{escaped(told["definition"])}</pre>'))
    if told.get("code"):
        parts.append(f"<p>Snapshots of the code that jobs ran: {escaped(', '.join(told['code']))}.</p>")
    return section("reproduce", "Reproduce", "".join(parts) or missing("Nothing is known of how it was submitted."))


def metric(name: str) -> str:
    """A score's name for people."""
    return _NAMES.get(name, name.replace("_", " ").capitalize())


def inside(name: str) -> str:
    """A score's name inside a sentence: ``macro F1``, ``balanced accuracy``, but ``IoU`` and ``Dice``."""
    told = metric(name)
    return told[:1].lower() + told[1:] if " " in told else told


def _budget(value: Any) -> str:
    return str(value) if value != "" else "–"


def _cell(score: Score | None, best: bool = False) -> Markup:
    if score is None:
        return Markup("–")
    mark = ' class="best"' if best else ""
    return Markup(f'<span{mark}>{score.mean:.3f}</span><span class="interval">{_range(score)}</span>')


def _range(score: Score) -> str:
    return "" if score.low is None or score.high is None else f"{score.low:.2f} to {score.high:.2f}"


def _hours(hours: float) -> Markup:
    return words.timed(3600 * hours)


def _words(seeds: Sequence[str]) -> str:
    return " and ".join(settings.short(name) for name in seeds) or "nothing (one job a point)"
