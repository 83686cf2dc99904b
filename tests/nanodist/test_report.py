"""The report page, from run and probe folders as they are left by real runs, half-finished ones among them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanodist import cli
from nanodist.report import figures, maps
from nanodist.report.collect import read_run
from nanodist.report.page import render, write_report

CLASSES = ("adenovirus", "ebola", "rotavirus")
LOADS = re.compile(
    r"""(?:src|href|data|poster|srcset|action)\s*=\s*["']?(?!#|data:image/)[^"'\s>]+|url\((?!#)|@import"""
)


class Page(HTMLParser):
    """Checks that every element is closed in order, and collects ids, tags and addresses."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "data"):
                self.addresses.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# The browser's name for what it draws; nothing is fetched from it.
NAMESPACE = "http://www.w3.org/2000/svg"


def only_its_own_script(page: Page, text: str) -> bool:
    """One script, that of the package, which is also the only one that the page's policy lets run."""
    script = resources.files("nanodist.report").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page.tags.count("script") == 1 and f"<script>{script}</script>" in text and f"'sha256-{digest}'" in text


def make_run(path: Path, objective: str = "simclr", offset: float = 0.0, steps: int = 40) -> Path:
    (path / "report").mkdir(parents=True)
    (path / "recipe.yaml").write_text(
        f"seed: 3\nobjective: {{name: {objective}}}\nencoder: {{trunk: resnet18}}\nviews: {{size_px: 96}}\n"
        f"data: {{store: /stores/virus_dev}}\ntrain: {{steps: {steps}, global_batch_size: 64}}\n"
    )
    start = {
        "began": "2026-03-04T08:11:09+00:00",
        "ended": None,
        "first_step": 0,
        "last_step": 20,
        "reason": "killed or crashed (no end was recorded)",
        "launcher": "srun",
        "hosts": ["node011"],
        "slurm_job_id": "48211",
        "topology": {"world_size": 2},
        "versions": {"nanodist": "0.1.0", "torch": "2.8.0"},
        "git_commit": "0f3c9ab8aa21ee",
    }
    info = {"schema": 1, "fingerprint": "9c01d2aa77be", "created": "2026-03-04T08:11:02+00:00", "starts": [start]}
    (path / "run.json").write_text(json.dumps(info))
    lines = [metric(step, 5.0 - step / 20 + offset) for step in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.fromarray(np.arange(96 * 200, dtype=np.uint32).astype(np.uint8).reshape(96, 200)).save(
        path / "report" / "views.png"
    )
    return path


def metric(step: int, loss: float) -> dict[str, float]:
    return {
        "step": step,
        "epoch": step / 10,
        "samples_seen": 64 * step,
        "loss": loss,
        "lr": 0.1 / step,
        "images_per_s": 200.0 + step,
        "data_wait_share": 0.05,
        "embedding_std": 0.8,
        "effective_rank": 30.0 + step,
        "alignment": 0.4,
        "uniformity": -3.0,
    }


def make_probe(path: Path, encoder: str, bonus: float = 0.0, points: int = 24) -> Path:
    path.mkdir(parents=True)
    summary = []
    for name, score in ((encoder, 0.5 + bonus), ("random", 0.35), ("texture", 0.45)):
        for method in ("linear", "knn"):
            for rank, budget in enumerate((1, 8, "all")):
                mean = score + 0.05 * rank
                if name == "texture" and budget == 8:
                    mean = None
                low, high = (None, None) if mean is None else (mean - 0.04, mean + 0.04)
                kind = name if name in ("random", "texture") else "pretrained"
                row = {"encoder": name, "kind": kind, "method": method, "labels_per_class": budget, "mean": mean}
                summary.append({**row, "low": low, "high": high, "n": 5})
    data = {"schema": 1, "rows": [], "summary": summary, "classes": list(CLASSES), "chance": 1 / 3}
    gain = {"encoder": encoder, "baseline": "texture", "method": "linear", "labels_per_class": 8}
    data["differences"] = [{**gain, "mean": 0.1, "low": 0.02, "high": 0.18}]
    (path / "scores.json").write_text(json.dumps(data))
    rng = np.random.default_rng(0)
    labels = np.array([CLASSES[i % 3] for i in range(points)])
    np.savez(path / "embedding.npz", features=rng.normal(size=(points, 8)).astype(np.float32), labels=labels)
    return path


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The page of two runs with a probe each."""
    root = tmp_path_factory.mktemp("report")
    runs = [make_run(root / "a-simclr"), make_run(root / "b-simclr", offset=0.5)]
    make_probe(runs[0] / "probe", "a-simclr")
    make_probe(runs[1] / "probe", "b-simclr", bonus=0.1)
    return runs, write_report(runs, root / "out" / "report.html").read_text()


def test_page_is_well_formed_and_loads_nothing(compared):
    _, text = compared
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert only_its_own_script(page, text)
    assert page.addresses and all(a.startswith(("#", "data:image/")) for a in page.addresses)
    assert not LOADS.search(text)
    assert "://" not in text.replace(NAMESPACE, "")
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert len(text.encode()) < 3_000_000


def test_the_load_check_finds_loads():
    for bad in ('<img src="http://x/y.png">', "<a href=https://x>", "p{background:url(x.png)}", "@import 'x.css'"):
        assert LOADS.search(bad)


def test_two_runs_are_drawn_over_one_another(compared):
    _, text = compared
    training = section(text, "training")
    assert training.count("a-simclr") >= 2 and training.count("b-simclr") >= 2
    loss = training[: training.index("Learning rate")]
    for order in (0, 1):
        assert f"stroke: {figures.colour(order).lower()}" in loss.lower()
    for part in ("Effective rank", "Uniformity", "Alignment", "Embedding standard deviation"):
        assert part in training


def test_scores_are_in_cards_and_table(compared):
    _, text = compared
    scores = section(text, "scores")
    assert "8 labels per class" in scores
    assert scores.index("b-simclr") < scores.index("a-simclr") < scores.index("random")  # best first in the cards
    assert "<b>0.650</b>" in scores and "0.61 to 0.69" in scores
    row = re.search(r"<tr><th scope=\"row\">texture</th>.*?</tr>", scores).group()
    assert "<td>–</td>" in row  # a budget that a class cannot fill stays blank
    assert scores.count(">texture</th>") == 2  # the baseline that both probes share stands there once a method
    assert "+0.100" in scores and "+0.02 to +0.18" in scores and "b-simclr over texture" in scores
    assert "chance" in section(text, "labels")


def test_same_input_gives_the_same_page(compared, tmp_path):
    runs, text = compared
    assert write_report(runs, tmp_path / "again.html").read_text() == text


def test_baselines_that_differ_between_probes_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    make_probe(runs[0] / "probe", "a")
    data = json.loads((make_probe(runs[1] / "probe", "b") / "scores.json").read_text())
    for row in data["summary"]:
        if row["encoder"] == "random":
            row["mean"] += 0.01
            row |= {"macro_f1": 0.611, "macro_f1_low": 0.55, "macro_f1_high": 0.67}
    (runs[1] / "probe" / "scores.json").write_text(json.dumps(data))
    text = write_report(runs, tmp_path / "r.html").read_text()
    assert "random (a)" in text and "random (b)" in text and "texture (a)" not in text
    rest = section(text, "scores").partition("Macro F1, accuracy and calibration error")[2]
    assert "0.611" in rest and "0.55 to 0.67" in rest and "random (b)" in rest and "random (a)" not in rest


def test_losses_of_different_objectives_get_axes_of_their_own(tmp_path):
    runs = [make_run(tmp_path / "a", "simclr"), make_run(tmp_path / "b", "barlow_twins", offset=900.0)]
    text = section(write_report(runs, tmp_path / "r.html").read_text(), "training")
    assert "Loss, SimCLR" in text and "Loss, Barlow Twins" in text


def test_transductive_is_shouted(tmp_path):
    run, probe = make_run(tmp_path / "run"), make_probe(tmp_path / "p", "run")
    data = json.loads((probe / "scores.json").read_text())
    (probe / "scores.json").write_text(json.dumps({**data, "transductive": True}))
    text = write_report([run], tmp_path / "r.html", [probe]).read_text()
    assert 'class="warning"' in text and "transductive" in text


def test_large_pictures_are_shrunk_to_the_budget():
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    drawn = figures.picture(buffer.getvalue(), 200_000)
    assert drawn is not None and len(drawn) <= 200_000
    assert Image.open(io.BytesIO(drawn)).size[0] > 200
    assert figures.data_uri(drawn).startswith("data:image/jpeg;base64,")


def test_runs_of_one_name_get_numbers(tmp_path):
    runs = [make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")]
    text = write_report(runs, tmp_path / "r.html").read_text()
    assert "run (2)" in text


@pytest.mark.parametrize(("count", "method"), [(2, "raw axes"), (12, "PCA"), (60, "PCA, then t-SNE")])
def test_projection(count, method):
    features = np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32)
    features[: count // 2, 0] += 50.0
    points, found = maps.project(features)
    assert found == method and points.shape == (count, 2) and np.isfinite(points).all()
    if count > 2:  # the two groups stay apart
        a, b = points[: count // 2], points[count // 2 :]
        gap = np.linalg.norm(a.mean(0) - b.mean(0))
        assert gap > max(np.linalg.norm(a - a.mean(0), axis=1).mean(), np.linalg.norm(b - b.mean(0), axis=1).mean())
        assert np.array_equal(points, maps.project(features)[0])


def test_ticks_are_short():
    shown = [figures.tick(v) for v in (0.0, 0.25, 1200.0, 0.00005, -0.000125, -3.5)]
    assert shown == ["0", "0.25", "1200", "5e\u22125", "\u22121.25e\u22124", "\u22123.5"]


def test_thin_keeps_the_mean():
    x = np.arange(1003.0)
    fewer, means = figures.thin(x, x**2, 100)
    assert len(fewer) == 100 and fewer[0] == x[:10].mean() and means[-1] == (x[-11:] ** 2).mean()


def test_command_line(tmp_path, capsys):
    run, probe = make_run(tmp_path / "run"), make_probe(tmp_path / "p", "run")
    out = tmp_path / "r.html"
    assert cli.main(["report", str(run), "--probe", str(probe), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out) and out.stat().st_size > 10_000
    assert cli.main(["report", str(tmp_path / "nowhere"), "--out", str(tmp_path / "no.html")]) == 2
    assert cli.main(["report", str(run), "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p", "r.html", "run"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")
def test_a_browser_draws_the_page_without_complaint(compared, tmp_path):
    runs, _ = compared
    page = write_report(runs, tmp_path / "report.html")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1000,3000"]
    command = ["chromium", *options, f"--screenshot={tmp_path / 's.png'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert "CONSOLE" not in done.stderr
    pixels = np.asarray(Image.open(tmp_path / "s.png").convert("L"))
    assert (pixels < 100).mean() > 0.005  # text and curves are there


def section(text: str, name: str) -> str:
    start = text.index(f'<section id="{name}"')
    return text[start : text.index("</section>", start)]


def test_render_of_many_runs_is_small(tmp_path):
    one = read_run(make_run(tmp_path / "run"))
    from dataclasses import replace

    many = [replace(one, name=f"run {i}") for i in range(40)]
    text = render(many, [])
    assert len(text.encode()) < 3_000_000 and "more runs are left out" in text
