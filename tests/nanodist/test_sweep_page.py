"""The page of a sweep: what it averages over, what it calls best, and that it holds for any names."""

from __future__ import annotations

import pytest

from nanodist.report.settings import interval, tables
from nanodist.report.sweep_page import _panel, render
from tests.nanodist.test_report import LOADS, Page, only_its_own_script


def test_an_interval_over_seeds_is_students():
    score = interval([0.5, 0.6, 0.7])
    # 4.3027 standard errors of 0.1 / sqrt(3), from the table of t with two degrees of freedom.
    assert (score.mean, score.n) == (pytest.approx(0.6), 3)
    assert score.low == pytest.approx(0.6 - 0.24841, abs=1e-4) and score.high == pytest.approx(0.6 + 0.24841, abs=1e-4)
    assert interval([0.9]).low is None
    assert interval([0.01, 0.99]).low == 0.0 and interval([3.0, 9.0]).low < 0.0


def row(state="done", **values):
    return {"fingerprint": str(sorted(values.items())), "state": state, "reason": "", "log": "", "tries": 1, **values}


def classify():
    rows = []
    for k in (1, 8, 0):
        for depth, gain in ((0, 0.0), (None, 0.2), (2, 0.19)):
            for seed in (0, 1, 2):
                score = 0.3 + 0.02 * (k or 40) / 8 + gain + 0.01 * seed
                point = {"labels_per_class": k, "train.tuned_layers": depth, "draw_seed": seed}
                rows.append(row(**point, balanced_accuracy=score, encoder="x", n_train=k))
    return rows


def test_settings_are_averaged_over_seeds_and_ranked():
    rows = [*classify(), row("failed", labels_per_class=1, draw_seed=9, **{"train.tuned_layers": 0})]
    (table,) = tables(rows, ["labels_per_class", "train.tuned_layers", "draw_seed"])
    assert (table.metric, table.budgets, table.seeds) == ("balanced_accuracy", [1, 8, "all"], ["draw_seed"])
    assert [setting.name for setting in table.settings] == [
        "all layers tuned",
        "last 2 blocks tuned",
        "trunk frozen",
    ]
    best, score, near = table.best(8)
    assert best.values == {"train.tuned_layers": None} and score.n == 3 and score.mean == pytest.approx(0.53)
    assert [one.name for one in near] == ["last 2 blocks tuned"]


def test_masks_and_several_pretrainings_have_their_own_columns():
    rows = [
        row(
            **{"pretraining": name, "pretrain.objective.name": name, "labels_per_class": 4, "seed": seed},
            metric=metric,
            mean=0.5 + 0.1 * (name == "simclr") + seed / 100,
            masks=4,
            encoder=f"/e/{name}",
            **{"class": part},
        )
        for name in ("simclr", "vicreg")
        for seed in (0, 1)
        for metric in ("dice", "iou")
        for part in ("1", "all but background")
    ]
    dice, iou = tables(rows, ["pretraining", "pretrain.objective.name", "labels_per_class", "seed"])
    assert (dice.metric, iou.metric, dice.axis) == ("dice", "iou", "masks")
    assert [setting.name for setting in dice.settings] == ["pretrained by SimCLR", "pretrained by VICReg"]
    assert dice.settings[0].points[4].n == 2


def result(rows, states, **more):
    sweep = {
        "sweep": "classify",
        "job": "finetune",
        "states": states,
        "set": ["labels_per_class", "train.tuned_layers", "draw_seed"],
    }
    cost = {"part": "classify", "jobs": 3, "hours": 1.5, "cpu_hours": 6.0, "gpu_hours": 1.5, "source": "sacct"}
    return {"name": "virus", "pretrainings": [], "sweeps": [{**sweep, "rows": rows}], "cost": [cost], "reproduce": more}


def test_a_page_shows_curves_failures_and_cost_and_loads_nothing():
    hostile = "<script>alert('x')</script>"
    failed = row("failed", labels_per_class=1, draw_seed=hostile) | {"reason": hostile, "log": f"{hostile}\nTraceback"}
    text = render(result([*classify(), failed], {"done": 27, "failed": 1}, command=f"launch {hostile}"))
    page = Page(text)
    assert page.tags.count("svg") == 1 and only_its_own_script(page, text) and not LOADS.search(text)
    assert "&lt;script&gt;" in text and "1.5 GPU hours" in text and "27 done, 1 failed" in text
    assert len(page.ids) == len(set(page.ids))


def test_a_sweep_without_any_score_has_a_page():
    text = render(result([row("missing", labels_per_class=1)], {"missing": 1}))
    Page(text)
    assert "No job of it is done yet" in text


def test_a_setting_has_one_colour_whatever_its_rank_by_another_score():
    rows = [
        row(labels_per_class=k, depth=depth, draw_seed=0, balanced_accuracy=0.5 + gain, macro_f1=0.5 - gain)
        for k in (1, 2)
        for depth, gain in ((1, 0.1), (2, 0.2))
    ]
    several = tables(rows, ["labels_per_class", "depth", "draw_seed"])
    assert [[one.name for one in table.settings] for table in several] == [
        ["depth 2", "depth 1"],
        ["depth 1", "depth 2"],
    ]
    orders = {"depth 2": 0, "depth 1": 1}
    assert [{line.name: line.order for line in _panel(table, orders).lines} for table in several] == [orders] * 2
