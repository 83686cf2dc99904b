"""The main job on real micrographs: pack, pretrain on two ranks with each objective, probe, export, report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.run_dir import read_metrics
from nanodist.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
SHORT = [
    "train.steps=6",
    "train.global_batch_size=32",
    "train.bn_group_size=16",
    "train.log_every_steps=2",
    "tracking.mode=offline",
    "encoder.looks=[[0.25, 224, 1]]",
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("virus")
    source = data / "tem_virus"
    if not source.is_dir():
        pytest.skip("no tem_virus in the folder of real micrographs")
    table = source / "meta.csv"
    for part in ("train", "test"):
        arguments = ["pack", str(source), "--out", str(folder / part), "--part", part]
        assert main([*arguments, "--labels", f"{table}:label", "--groups", f"{table}:micrograph"]) == 0
    return folder


def pretrained(stores, recipe):
    """The run folder of a short pretraining of ``recipe`` on two ranks, whose records are looked at."""
    run = stores / recipe
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "nanodist", "pretrain", recipe, f"data.store={stores / 'train'}", f"run_dir={run}", *SHORT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=stores, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = read_metrics(run / "metrics.jsonl")
    named = {"step", "epoch", "samples_seen", "loss", "lr", "images_per_s", "data_wait_share", "embedding_std"}
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    assert all(named <= set(line) for line in lines) and lines[-1]["samples_seen"] == 192
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    start = json.loads((run / "run.json").read_text())["starts"][0]
    assert start["reason"] == "completed" and start["topology"]["world_size"] == 2
    return run


def test_two_ranks_of_barlow_twins_on_real_micrographs(stores):
    assert (pretrained(stores, "virus-barlow") / "checkpoints" / "step-00000006" / "model.safetensors").is_file()


def test_two_ranks_of_simclr_on_real_micrographs_to_the_report(stores):
    run = pretrained(stores, "virus-simclr")
    probe = ["probe", str(run), "--store", str(stores / "train"), "--test-store", str(stores / "test")]
    options = ["--labels-per-class", "1,8", "--seeds", "1", "--baselines", "none", "--out", str(run / "probe")]
    assert main([*probe, *options]) == 0
    scores = json.loads((run / "probe" / "scores.json").read_text())
    assert scores["transductive"] is False and len(scores["classes"]) == 14
    groups = json.loads((run / "checkpoints" / "step-00000006" / "state.json").read_text())["task"]["seen"]["groups"]
    assert len(groups) == 103

    assert main(["export", str(run), "--to", str(run / "timm")]) == 0
    assert main(["report", str(run), "--out", str(run / "report.html")]) == 0
    assert "<svg" in (run / "report.html").read_text()
