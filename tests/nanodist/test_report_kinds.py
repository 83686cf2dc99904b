"""Reports on fine-tunings, PairVAEs, sweeps and measured masks, and what a browser makes of a page."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpc.errors import UserError
from nanodist.downstream.segment import overlays
from nanodist.downstream.segment.scores import image_scores
from nanodist.downstream.thumbnails import thumbnails
from nanodist.report import maps
from nanodist.report.collect import read_probe, read_run
from nanodist.report.page import render, write_report
from nanodist.report.reproduce import cost
from nanodist.report.results import matrix
from tests.nanodist.test_report import LOADS, Page, make_probe, make_run, only_its_own_script, section
from tests.nanodist.test_sweep_page import classify, result


def finetuned(path: Path, task: str, scores: dict) -> Path:
    make_run(path, steps=3)
    recipe = f"task: {task}\ndata: {{labels_per_class: 4}}\nencoder: {{source: /e/virus}}\ntrain: {{steps: 3}}\n"
    (path / "recipe.yaml").write_text(recipe)
    (path / "scores.json").write_text(json.dumps(scores))
    return path


def test_a_classifier_has_scores_with_intervals_and_a_confusion_matrix(tmp_path):
    row = {"labels_per_class": 4, "balanced_accuracy": 0.75, "low": 0.6, "high": 0.9, "macro_f1": 0.7, "n_test": 8}
    hostile = "<script>alert(1)</script>"
    scores = {"kind": "classification", "classes": ["a", hostile], "confusion": [[3, 1], [0, 4]], "rows": [row]}
    text = write_report([finetuned(tmp_path / "f", "classification", scores)], tmp_path / "r.html").read_text()
    page = Page(text)
    assert only_its_own_script(page, text) and "No probe yet" not in text and "views" not in page.ids
    assert "0.750" in section(text, "results") and "0.60 to 0.90" in section(text, "results")
    shares = re.findall(r"--share:([\d.]+)\"><b>(\d+)</b>", section(text, "confusion"))
    assert shares == [("0.750", "75"), ("0.250", "25"), ("0.000", "0"), ("1.000", "100")]
    assert "nanodist finetune" in section(text, "recipe") and "virus" in section(text, "trained")
    scores["confusion"] = [[3, "x"], [0, 4]]
    (tmp_path / "f" / "scores.json").write_text(json.dumps(scores))
    assert "confusion" not in Page(write_report([tmp_path / "f"], tmp_path / "r.html").read_text()).ids
    assert "too many to draw" in matrix("m", [str(i) for i in range(90)], [[0] * 90] * 90)


def test_masks_come_worst_first(tmp_path):
    truth = np.zeros((40, 60), np.uint8)
    truth[10:30, 10:30] = 1
    image = np.arange(2400, dtype=np.uint8).reshape(40, 60)
    found = []
    for number, shift in enumerate((0, 12, 5)):
        predicted = np.roll(truth, shift, 1)
        found.append(overlays.overlay(image_scores(number, predicted, truth, 2), image, truth, predicted))
    ranked = overlays.worst(found, 2)
    assert [one.number for one in ranked] == [1, 2]
    drawn = np.asarray(Image.open(io.BytesIO(ranked[0].png)))
    assert all((drawn == np.array(colour)).all(-1).any() for colour in (overlays.TRUE, overlays.PREDICTED))
    # The left half is the micrograph itself.
    half = (drawn.shape[1] - 4) // 2
    assert (drawn[:, :half] == drawn[:, :half, :1]).all()
    assert Image.open(io.BytesIO(overlays.sheet([one.png for one in found]))).height == 3 * drawn.shape[0] + 8
    scores = {
        "kind": "segmentation",
        "rows": [{"metric": "iou", "class": "all but background", "mean": 0.4, "n_test": 3}],
    }
    run = finetuned(tmp_path / "s", "segmentation", scores)
    overlays.write(run / "report", ranked, [("bad", "m/1"), ("fair", "m/2")])
    gallery = section(write_report([run], tmp_path / "r.html").read_text(), "gallery")
    assert gallery.index("bad: IoU 0.250") < gallery.index("fair: IoU 0.600")
    (run / "report" / "overlays" / "index.json").write_text('[{"file": "../../run.json", "sample": "x"}]')
    assert "has no overlays" in write_report([run], tmp_path / "r.html").read_text()


def test_a_pairvae_shows_its_stages_scores_and_grids(tmp_path):
    home = tmp_path / "pv"
    for stage in ("solo", "pair"):
        make_run(home / stage, steps=3)
        (home / stage / "recipe.yaml").write_text("model: {preset: modern}\nsolo: {}\npair: {}\n")
        line = {"step": 4, "loss": 1.0, "term_physics": 0.5, "term_kl": 0.1}
        with open(home / stage / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        info = json.loads((home / stage / "run.json").read_text())
        (home / stage / "run.json").write_text(json.dumps({**info, "what": {"stage": stage}}))
    (home / "recipe.yaml").write_text("model: {preset: modern}\nsolo: {}\npair: {}\n")
    assert "is not evaluated yet" in write_report([home], tmp_path / "r.html").read_text()
    (home / "evaluation").mkdir()
    rows = [
        {
            "direction": "SAXS to SEM",
            "method": method,
            "score": "period_error",
            "median": value,
            "low": 0.01,
            "high": 0.2,
        }
        for method, value in (("PairVAE", 0.02), ("nearest neighbour", 0.1), ("solo VAE (SEM to SEM)", 0.01))
    ]
    (home / "evaluation" / "scores.json").write_text(json.dumps({"items": 24, "rows": rows}))
    Image.new("RGB", (80, 40)).save(home / "evaluation" / "saxs-to-sem.png")
    text = write_report([home], tmp_path / "r.html").read_text()
    page = Page(text)
    assert "<h1>pv</h1>" in text and page.tags.count("img") == 1 and "alt=" in section(text, "grids")
    # Rebuilding an image from itself is another task, so that it is not the best at making one of a pattern.
    assert re.findall(r'class="best">([\d.]+)<', section(text, "pairs")) == ["2.0"]  # percent
    training = section(text, "training")
    assert "Loss, solo stage" in training and "Loss, pair stage" in training and "physics" in training
    assert f"nanodist pairvae train {home / 'recipe.yaml'}" in section(text, "recipe")


def test_sweeps_are_read_from_what_launch_left(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({**result(classify(), {"done": 27}), "name": name}))
    text = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "r.html").read_text()
    assert "a, classify" in text and "b, classify" in text and "54 done" in text
    run = make_run(tmp_path / "run", steps=2)
    with pytest.raises(UserError, match="one or the other"):
        write_report([tmp_path / "a", run], tmp_path / "r.html")
    (tmp_path / "a" / "result.json").write_text('{"name": 3}')
    with pytest.raises(UserError, match="does not hold the result of a sweep"):
        write_report([tmp_path / "a"], tmp_path / "r.html")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "jobs.jsonl").write_text("")
    with pytest.raises(UserError, match="was not collected yet"):
        write_report([tmp_path / "c"], tmp_path / "r.html")


def test_what_was_measured_is_shown_with_its_intervals(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    (run / "measured").mkdir()
    row = {"specimen": "A", "quantity": "width_nm", "mean": 4.25, "low": 4.0, "high": 4.5, "n": 6, "images": 2}
    (run / "measured" / "summary.json").write_text(
        json.dumps({"images": 2, "objects": 6, "wires": 6, "specimens": [row]})
    )
    Image.new("RGB", (30, 20)).save(run / "measured" / "histograms_nm.png")
    text = section(write_report([run], tmp_path / "r.html").read_text(), "morphology")
    assert "4.25" in text and "4 to 4.5" in text and text.count("<img") == 1
    with pytest.raises(UserError, match="no readable summary"):
        write_report([run], tmp_path / "r.html", measured=[tmp_path])


def test_a_map_with_pictures(tmp_path):
    made = thumbnails([np.arange(6000, dtype=np.uint16).reshape(60, 100), np.zeros((8, 8), np.uint8)])
    assert made.shape == (2, 40, 40) and made[0, 0, 0] < made[0, -1, -1] and (made[1] == 0).all()
    run = make_run(tmp_path / "run", steps=2)
    probe = make_probe(run / "probe", "run")
    with np.load(probe / "embedding.npz") as arrays:
        kept = dict(arrays)
    rows = np.array([0, 5, 23, 99])
    np.savez(probe / "embedding.npz", **kept, thumbnail_rows=rows, thumbnails=np.full((4, 40, 40), 90, np.uint8))
    assert set(read_probe(probe).thumbnails) == {0, 5, 23}
    text = section(write_report([run], tmp_path / "r.html").read_text(), "map")
    assert text.count("<img") == 2 and "3 of the images themselves" in text
    np.savez(probe / "embedding.npz", **kept, thumbnail_rows=rows, thumbnails=np.zeros((4, 40, 9000), np.uint8))
    assert read_probe(probe).thumbnails is None
    # Of pictures at one place the first is shown.
    _, count = maps.thumbnail_map(np.zeros((3, 2)), ["a", "b", "c"], np.zeros((3, 40, 40), np.uint8))
    assert count == 1


def test_cost_counts_every_start_and_says_what_it_does_not_know(tmp_path):
    run = read_run(make_run(tmp_path / "run", steps=2))
    first = {**run.starts[0], "ended": "2026-03-04T09:11:09+00:00"}
    run.info["starts"] = [first, {**first, "topology": {"world_size": 8}}, {**first, "ended": None}]
    assert (cost(run).hours, cost(run).rank_hours, cost(run).open_starts) == (2.0, 10.0, 1)


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on this machine")
    return found


# Sorts the first sortable table by its second column, zooms the first panel, and puts what came of it into the title;
# then the rules for paper are put in force, and what can be seen is asked again.
PROBING = """
const table = document.querySelector("table.sortable");
const column = (n) => Array.from(table.tBodies[0].rows, (row) => row.children[n].textContent);
table.tHead.querySelectorAll("button")[1].click();
const sorted = column(1);
const svg = document.querySelector("svg[data-zoom]");
const pad = svg.querySelector("rect.zoom"), box = pad.getBoundingClientRect();
const at = (type, x, y) => pad.dispatchEvent(new PointerEvent(type, {pointerId: 1, pointerType: "mouse", bubbles: true,
  clientX: box.left + x * box.width, clientY: box.top + y * box.height}));
const shown = () => ({moved: svg.querySelectorAll("g[transform^=matrix]").length,
  ticks: Array.from(svg.querySelectorAll(".zoomtick"), (one) => one.textContent)});
at("pointerdown", 0.5, 0.5); at("pointermove", 0.75, 0.51); at("pointerup", 0.75, 0.51);
const near = shown();
pad.dispatchEvent(new MouseEvent("dblclick", {bubbles: true}));
const far = shown(), wide = document.documentElement.scrollWidth;
const seen = () => ["nav", ".hint", "rect.zoom", "details:not([open]) > :not(summary)"].map(
  (name) => document.querySelector(name).checkVisibility());
const screen = seen();
const print = Array.from(document.styleSheets[0].cssRules).filter((rule) => rule.media?.mediaText === "print");
const style = document.createElement("style");
style.textContent = print.flatMap((rule) => Array.from(rule.cssRules, (one) => one.cssText)).join(" ");
document.head.append(style);
const arrow = getComputedStyle(table.tHead.querySelector("button"), "::after").display;
document.title = JSON.stringify({sorted, near, far, wide, screen, paper: seen(), arrow});
"""


def test_tables_sort_curves_zoom_a_phone_shows_the_page_and_paper_all_of_it(tmp_path, browser):
    row = {"labels_per_class": 4, "low": 0.6, "high": 0.9}
    runs = []
    for name, n in (("a", 20), ("b", 3), ("c", None)):
        scores = {"kind": "classification", "rows": [{**row, "labels_per_class": n, "balanced_accuracy": 0.5}]}
        runs.append(finetuned(tmp_path / name, "classification", scores))
        lines = [json.dumps({"step": step, "loss": 100.0 - step}) for step in range(101)]
        (runs[-1] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = write_report(runs, tmp_path / "r.html")
    # The policy lets nobody else's script run, so that the test has to take it out of its copy.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    copy = tmp_path / "copy.html"
    copy.write_text(text.replace("</body>", f"<script>{PROBING}</script></body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<iframe id="f" src="copy.html" style="width:375px;height:3000px;border:0"></iframe>'
        "<script>f.onload = () => { document.title = f.contentDocument.title; };</script>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command = [browser, *options, "--enable-logging=stderr", "--virtual-time-budget=4000", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert "CONSOLE" not in done.stderr
    found = json.loads(re.search("<title>(.*?)</title>", done.stdout).group(1))
    assert found["sorted"] == ["3", "20", "–"]
    # 3 curves; the axis goes from about 50 to 77 of what went from -5 to 105.
    assert found["near"]["moved"] == 3 and found["near"]["ticks"][:2] == ["60", "70"]
    assert found["far"] == {"moved": 0, "ticks": []}
    assert found["wide"] <= 375  # the page itself does not scroll sideways
    # On paper there is nothing to click on or to drag over, and all that is folded away is there.
    assert (found["screen"], found["paper"]) == ([True, True, True, False], [False, False, False, True])
    assert found["arrow"] == "none"


def test_five_hundred_runs_make_a_page_of_a_megabyte(tmp_path):
    from dataclasses import replace

    run = make_run(tmp_path / "run")
    lines = [json.dumps({"step": step, "loss": 1 / step, "images_per_s": 9.0}) for step in range(1, 200)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    one = read_run(run)
    many = [replace(one, name=f"run {i}", recipe={**one.recipe, "seed": i}) for i in range(500)]
    text = render(many, [])
    assert len(text.encode()) < 1_000_000 and not LOADS.search(text)
    assert text.count('<tr><th scope="row">run 499</th>') >= 3  # a row in every table, also where no curve is drawn
