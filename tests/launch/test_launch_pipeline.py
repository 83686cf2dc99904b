"""Pipelines with stand-ins for what the jobs do: what waits for what, what is done again, and what the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from hpc.errors import UserError
from launch import worker
from launch.__main__ import main
from launch.pipeline import Pipeline
from launch.records import SweepFolder
from tests.nanodist.test_report import Page

pytest.importorskip("pandas")
pytest.importorskip("submitit")

FILE = """
pretrain: {{recipe: simclr, overrides: {{store: {store}, train.steps: 1}}, grid: {{seed: {seeds}}}}}
sweeps:
  classify:
    job: finetune
    recipe: mine.yaml
    overrides: {{store: {store}}}
    grid: {{labels_per_class: [1, 2], draw_seed: [0, 1]}}
    pack: 2
  probe: {{job: probe, overrides: {{store: {store}, labels_per_class: "1"}}, grid: {{seed: [0, 1, 2]}}}}
"""


@pytest.fixture
def command(store, tmp_path, monkeypatch):
    """Writes the pipeline ``p.yaml``, and gives what stand-ins were asked for."""
    from nanodist import cli
    from nanodist.encoders import EncoderSpec, random_encoder
    from nanodist.export.weights import export_timm

    asked: list[list[str]] = []

    def stand_in(arguments):
        asked.append(arguments)
        values = dict(text.lstrip("-").split("=", 1) for text in arguments if "=" in text)
        if arguments[0] == "export":
            seed = json.loads((Path(arguments[1]) / "seed.json").read_text())
            export_timm(random_encoder(EncoderSpec("test_resnet", 32, 0.5, 0.2), seed), Path(arguments[3]), {})
            return 0
        out = Path(json.loads(values["run_dir"]) if "run_dir" in values else values["out"])
        out.mkdir(parents=True, exist_ok=True)
        if arguments[0] == "pretrain":
            if values["seed"] == "13":
                raise ValueError("the specimen drifted")
            (out / "seed.json").write_text(values["seed"])
            (out / "run.json").write_text(json.dumps({"starts": [{"reason": "completed"}]}))
            return 0
        score = {"balanced_accuracy": 0.5 + 0.01 * len(asked), "labels_per_class": 1}
        (out / "scores.json").write_text(json.dumps({"rows": [score]}))
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker, "_EAGER", ())
    monkeypatch.setattr(cli, "main", stand_in)
    (tmp_path / "mine.yaml").write_text("symmetries: 1\n")

    def write(seeds="[0]", **more):
        (tmp_path / "p.yaml").write_text(FILE.format(store=store, seeds=seeds) + "".join(more.values()))
        return asked

    return write


def test_a_pipeline_here_ends_in_a_page_and_does_only_what_is_missing(command, tmp_path, capsys):
    asked = command()
    assert main(["pipeline", "p.yaml", "--dry-run"]) == 0
    assert "classify" in capsys.readouterr().out and asked == []
    assert main(["pipeline", "p.yaml", "--cluster", "debug"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[:4]] == ["pretrain", "export", "classify", "probe"]
    kinds = [line[0] for line in asked]
    # The features of the encoder are made once, before the three probes.
    assert kinds == ["pretrain", "export", *["finetune"] * 4, *["probe"] * 4]
    assert ["--embed-only" in line for line in asked if line[0] == "probe"] == [True, False, False, False]
    home = tmp_path / "pipelines" / "p"
    result = json.loads((home / "result.json").read_text())
    assert [sweep["states"] for sweep in result["sweeps"]] == [{"done": 4}, {"done": 3}]
    assert result["sweeps"][0]["set"] == ["pretraining", "pretrain.seed", "labels_per_class", "draw_seed"]
    page = (home / "report.html").read_text()
    Page(page)
    assert "Balanced accuracy" in page and "core hours" in page and "python -m launch pipeline" in page

    (tmp_path / "mine.yaml").write_text("symmetries: 2\n")  # another recipe: other jobs, the encoder stays
    assert main(["pipeline", "p.yaml", "--cluster", "debug"]) == 0
    assert [line[0] for line in asked[len(kinds) :]] == ["finetune"] * 4
    count = len(asked)
    command("[0, 1]")
    assert main(["pipeline", "p.yaml", "--cluster", "debug"]) == 0
    assert [line[0] for line in asked[count:]] == kinds
    count = len(asked)
    assert main(["pipeline", str(home / "pipeline.json"), "--cluster", "debug"]) == 0
    assert len(asked) == count


def test_a_pretraining_that_fails_does_not_hide_the_others(command, tmp_path, capsys):
    command("[13, 1]")
    assert main(["pipeline", "p.yaml", "--cluster", "debug"]) == 1
    said = capsys.readouterr()
    assert "the specimen drifted" in said.out and "export" in said.err
    page = (tmp_path / "pipelines/p/report.html").read_text()
    assert "its 4 jobs wait for the encoder of pretraining" in page and "(7 done)" in page


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("reprot: {}", "key 'reprot' does not exist"),
        ("export: {fromat: timm}", "key 'export.fromat' does not exist; allowed: format"),
        ("report: {resources: {partiton: x}}", "report: resources: key 'partiton' does not exist"),
    ],
)
def test_a_wrong_pipeline_is_one_sentence(command, capsys, more, message):
    command(more=more)
    assert main(["pipeline", "p.yaml", "--cluster", "debug"]) == 2
    assert message in capsys.readouterr().err


def test_a_misspelled_key_of_a_fan_out_is_found_before_the_pretraining(command, store, tmp_path, capsys):
    asked = command()
    text = (tmp_path / "p.yaml").read_text().replace("labels_per_class: [1, 2]", "labels_per_clas: [1, 2]")
    (tmp_path / "p.yaml").write_text(text)
    assert main(["pipeline", "p.yaml", "--cluster", "debug"]) == 2
    assert "'labels_per_clas' does not exist" in capsys.readouterr().err and asked == []


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """Programs of Slurm: ``sbatch`` keeps scripts and counts up from 1; ``squeue`` says that all of them wait."""
    programs, scripts = tmp_path / "programs", tmp_path / "scripts"
    programs.mkdir()
    scripts.mkdir()
    bodies = {
        "sbatch": f'n=$(($(ls "{scripts}" | wc -l) + 1)); cp "$1" "{scripts}/$n"; echo Submitted batch job $n',
        "squeue": f'for n in $(ls "{scripts}"); do for k in 0 1 2 3; do echo "${{n}}_$k $n"; done; done',
        "srun": "",
        "sacct": "exit 1",
        "scontrol": "echo MaxArraySize = 4",
    }
    for name, body in bodies.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    from launch import queue

    queue.forget()
    yield scripts
    queue.forget()


def _option(script, name):
    found = re.search(rf"^#SBATCH --{name}=(.*)$", script, flags=re.MULTILINE)
    return found[1] if found else None


def test_in_slurm_all_is_submitted_at_once_and_each_step_waits_for_the_one_before(
    command, fake_slurm, tmp_path, capsys
):
    asked = command()
    (tmp_path / "site.yaml").write_text('{gpus_per_node: 2, nodes: 3, environment: {GREETING: "it\'s $(touch owned)"}}')
    assert main(["pipeline", "p.yaml", "--site", "site.yaml"]) == 0
    scripts = [path.read_text() for path in sorted(fake_slurm.iterdir())]
    waits = [(_option(text, "job-name"), _option(text, "dependency"), _option(text, "array")) for text in scripts]
    assert waits == [
        ("p-pretrain", None, None),
        ("p-export", "afterok:1", None),
        ("sweep-classify", "afterok:2", "0-1%2"),
        ("sweep-probe", "afterok:2", None),  # the features
        ("sweep-probe", "afterok:4,afterok:2", "0-2%3"),
        ("p-page", "afterany:1,afterany:2,afterany:3,afterany:4,afterany:5", None),
    ]
    assert all(_option(text, "kill-on-invalid-dep") == "yes" for text in scripts)
    assert [_option(text, "nodes") for text in scripts] == ["3", "1", "1", "1", "1", "1"]
    for path in fake_slurm.iterdir():
        environ = {**os.environ, "SLURM_JOB_ID": "1"}
        done = subprocess.run(["bash", path], cwd=tmp_path, capture_output=True, text=True, env=environ)
        assert done.returncode == 0, done.stderr
    assert not [*tmp_path.rglob("owned")] and asked == []
    # Nothing is submitted a second time while it waits.
    capsys.readouterr()
    assert main(["pipeline", "p.yaml", "--site", "site.yaml"]) == 0
    assert "all is in the queue" in capsys.readouterr().out and len(list(fake_slurm.iterdir())) == 6
    assert main(["status", "pipelines/p"]) == 0
    assert "page: in the queue (6)" in capsys.readouterr().out


def test_what_the_export_writes_is_what_waiting_allocations_run(command, fake_slurm, tmp_path):
    command()
    pipeline = Pipeline.from_yaml("p.yaml")
    pipeline.submit("slurm")
    (job,) = pipeline.pretrainings.jobs()
    run_dir = pipeline.pretrainings.folder.run_dir(job.fingerprint)
    run_dir.mkdir()
    (run_dir / "seed.json").write_text("0")
    pipeline.export_encoder(job.fingerprint)
    folder = SweepFolder(pipeline.home / "sweeps" / "classify")
    planned = [*pipeline.sweep("classify", job.fingerprint).jobs()]
    assert [line["fingerprints"] for line in folder.allocations()] == [
        [job.fingerprint for job in planned[:2]],
        [job.fingerprint for job in planned[2:]],
    ]
    chunk = worker.Chunk(str(folder.path), (), part=job.fingerprint, slice=(2, 4))
    assert chunk() == {job.fingerprint: "done" for job in planned[2:]}


def test_names_that_cannot_be_folders_are_refused():
    with pytest.raises(UserError, match="name is '\\$\\(x\\)'"):
        Pipeline("$(x)", {"recipe": "simclr"}, {})
