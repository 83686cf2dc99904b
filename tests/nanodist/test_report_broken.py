"""Reports of what is missing, torn or hostile: it is said on the page, or in one sentence, and does no harm."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hpc.errors import UserError
from nanodist.report.collect import read_metrics, read_probe, read_run
from nanodist.report.page import write_report
from tests.nanodist.test_report import Page, make_probe, make_run, metric, only_its_own_script


@pytest.mark.parametrize("bad", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & $b_{c}$ %s {x}"])
def test_outside_text_is_harmless(tmp_path, bad):
    run = make_run(tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    info.update(name=bad, fingerprint=bad)
    info["starts"][0].update(reason=bad, hosts=[bad], launcher=bad, began=bad)
    (run / "run.json").write_text(json.dumps(info))
    (run / "recipe.yaml").write_text(json.dumps({"objective": {"name": bad}, "encoder": {"trunk": bad}, bad: bad}))
    make_probe(run / "probe", bad)
    data = json.loads((run / "probe" / "scores.json").read_text())
    data[bad] = bad
    (run / "probe" / "scores.json").write_text(json.dumps(data))
    features = np.zeros((4, 2), np.float32)
    np.savez(run / "probe" / "embedding.npz", features=features, labels=np.array([bad] * 4))
    text = write_report([run], tmp_path / "r.html").read_text()
    page = Page(text)
    assert only_its_own_script(page, text)
    assert page.tags.count("img") == 2  # view pairs and map, none from the name
    assert all(a.startswith(("#", "data:image/")) for a in page.addresses)


def test_name_with_markup_in_the_folder(tmp_path):
    run = make_run(tmp_path / "<script>x<")
    text = write_report([run], tmp_path / "r.html").read_text()
    assert only_its_own_script(Page(text), text) and "&lt;script&gt;x&lt;" in text


def test_replayed_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = [metric(step, 100.0 + step) for step in range(1, 9)]
    second = [metric(step, 1.0 * step) for step in range(6, 13)]
    text = "".join(json.dumps(line) + "\n" for line in first + second)
    path.write_text(text + '{"step": 13, "loss": 0.')
    found = read_metrics(path)
    steps, loss = found.series("loss")
    assert steps.tolist() == list(range(1, 13))
    assert loss.tolist() == [101, 102, 103, 104, 105, *range(6, 13)]
    assert found.dropped == 4  # steps 6 to 8 of the first start, and the torn line


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [metric(1, 2.0), {**metric(2, 0.0), "loss": None}, {"step": 3}, metric(4, 1.0)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "loss": NaN}\n[1]\n"text"\n')
    steps, loss = read_metrics(path).series("loss")
    assert (steps.tolist(), loss.tolist()) == ([1, 4], [2.0, 1.0])


def test_missing_parts_are_said_plainly(tmp_path):
    run = tmp_path / "young"
    run.mkdir()
    (run / "recipe.yaml").write_text("seed: 0\n")
    text = write_report([run], tmp_path / "r.html").read_text()
    Page(text)
    for sentence in (
        "No probe yet: run &#x27;nanodist probe",
        "No step is logged yet",
        "has no view pairs",
        "run.json is missing",
        "run.json lists no start",
    ):
        assert sentence in text


def test_a_probe_without_embedding_or_summary(tmp_path):
    run = make_run(tmp_path / "run")
    probe = make_probe(tmp_path / "p", "run")
    (probe / "embedding.npz").write_bytes(b"PK\x03\x04 torn")
    text = write_report([run], tmp_path / "r.html", [probe]).read_text()
    assert "embedding.npz cannot be read" in text and "0.550" in text
    (probe / "scores.json").write_text('{"schema": 1, "rows": []}')
    text = write_report([run], tmp_path / "r.html", [probe]).read_text()
    assert "has no summary" in text


def test_pickles_in_an_embedding_are_not_loaded(tmp_path):
    probe = make_probe(tmp_path / "p", "run")
    np.savez(probe / "embedding.npz", features=np.array([{}], object), labels=np.array(["a"]))
    assert read_probe(probe).features is None


def test_broken_views_png_is_said(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "report" / "views.png").write_bytes(b"\x89PNG not really")
    assert "is no image" in write_report([run], tmp_path / "r.html").read_text()


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_no_run_directory_is_an_error_that_names_it(tmp_path, make):
    path = tmp_path / "nothing"
    make(path)
    with pytest.raises(UserError, match="nothing"):
        read_run(path)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_bad_scores_are_an_error_that_names_them(tmp_path, content):
    if content is not None:
        (tmp_path / "scores.json").write_text(content)
    with pytest.raises(UserError, match=r"scores\.json"):
        read_probe(tmp_path)
