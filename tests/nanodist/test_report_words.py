"""The words of a report for what files hold under short names."""

from __future__ import annotations

import pytest

from nanodist.report import words
from nanodist.report.page import lead
from nanodist.report.sweep_page import inside
from tests.nanodist.test_report import make_run


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("pretrain.objective.name", "vicreg", "pretrained by VICReg"),
        ("objective.name", "barlow_twins", "Barlow Twins"),
        ("train.tuned_layers", 0, "trunk frozen"),
        ("train.tuned_layers", 3, "last 3 blocks tuned"),
        ("method", "knn", "k nearest neighbours"),
        ("pretrain.optimizer.lr", 0.1, "pretraining's lr 0.1"),
        ("decoder", None, "decoder null"),
    ],
)
def test_settings(key, value, told):
    assert words.setting(key, value) == told


def test_quantities_have_their_units():
    names = ("contour_length_number_mean_nm", "branch_point_density_per_nm2", "gap_chord_mean_nm", "percolates")
    assert [words.quantity(name) for name in names] == [
        "contour length, number mean (nm)",
        "branch point density (nm⁻²)",
        "gap chord, mean (nm)",
        "percolates",
    ]


def test_spans_of_time_and_counts():
    assert [words.spent(s) for s in (59.6, 218, 7500, 200_000)] == ["1 min 0 s", "3 min 38 s", "2 h 5 min", "2 d 7 h"]
    assert [words.counted(n, "labelled images") for n in (1, 4, "all")] == [
        "1 labelled image",
        "4 labelled images",
        "all labelled images",
    ]
    assert [words.term(name) for name in ("sem_saxs", "kl_sem", "variance")] == ["SEM to SAXS", "KL of SEM", "variance"]
    assert [inside(name) for name in ("macro_f1", "iou", "balanced_accuracy")] == [
        "macro F1",
        "IoU",
        "balanced accuracy",
    ]


def test_a_fine_tuning_says_what_it_began_with_and_on_how_much(tmp_path):
    from nanodist.report.collect import read_run

    run = make_run(tmp_path / "run", steps=2)
    (run / "recipe.yaml").write_text(
        "task: segmentation\nencoder: {source: runs/em, weights: given}\n"
        "data: {store: s/membranes, labels_per_class: 1}\ntrain: {steps: 2}\n"
    )
    assert lead([read_run(run)]) == "Segmentation with em fine-tuned, 1 labelled image, 2 of 2 steps, on membranes."
