"""A run killed with SIGKILL and started again with the same command goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc.run_dir import read_metrics
from tests.e2e.invariance import make_store

RECIPE = {
    "views": {"size_px": 32, "crop_px": [72, 96], "exposure": "image"},
    "encoder": {"trunk": "resnet10t", "normalise": "image"},
    "projector": {"widths": [64, 32]},
    "train": {"steps": 14, "global_batch_size": 32, "bn_group_size": 16, "log_every_steps": 1},
    "optimizer": {"warmup_steps": 3},
    "engine": {"device": "cpu", "threads": 1},
    "checkpoint": {"every_steps": 4},
    "tracking": {"mode": "disabled"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    make_store(folder)
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    return folder


def _start(folder: Path, run: str, ranks: int, *overrides: str) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "nanodist", "pretrain", str(folder / "recipe.yaml")]
    command += [f"data.store={folder / 'store'}", f"run_dir={folder / run}", *overrides]
    root = Path(__file__).resolve().parent.parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    with open(folder / f"{run}.log", "a") as log:
        return subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True)


def _finish(process: subprocess.Popen, folder: Path, run: str) -> None:
    assert process.wait(timeout=300) == 0, (folder / f"{run}.log").read_text()[-4000:]


def _kill_after(process: subprocess.Popen, folder: Path, run: str, step: int) -> None:
    metrics = folder / run / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and any(line["step"] >= step for line in read_metrics(metrics))):
        assert process.poll() is None and time.monotonic() < deadline, (folder / f"{run}.log").read_text()[-4000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # torchrun's workers have sessions of their own.
    subprocess.run(["pkill", "-9", "-f", f"run_dir={folder / run}"], check=False)
    time.sleep(0.3)


def _curve(folder: Path, run: str) -> list[tuple]:
    measured = ("step", "loss", "lr", "epoch", "embedding_std", "effective_rank", "alignment", "uniformity")
    return [tuple(line[name] for name in measured) for line in read_metrics(folder / run / "metrics.jsonl")]


@pytest.mark.parametrize(("ranks", "kills"), [(1, (6,)), (2, (6, 11))])
def test_killed_and_started_again_is_bit_for_bit_the_same(folder, ranks, kills):
    whole, broken = f"whole-{ranks}", f"broken-{ranks}"
    _finish(_start(folder, whole, ranks), folder, whole)
    for step in kills:
        _kill_after(_start(folder, broken, ranks), folder, broken, step)
    _finish(_start(folder, broken, ranks), folder, broken)
    curve = _curve(folder, whole)
    assert len(curve) == 14 and _curve(folder, broken) == curve
    for name in ("model", "optimizer"):
        files = [folder / run / "checkpoints" / "step-00000014" / f"{name}.safetensors" for run in (whole, broken)]
        assert files[0].read_bytes() == files[1].read_bytes()
    starts = json.loads((folder / broken / "run.json").read_text())["starts"]
    assert [s["reason"][:6] for s in starts] == ["killed"] * len(kills) + ["comple"]
    assert [s["first_step"] for s in starts[1:]] == [5, 9][: len(kills)]


def test_a_resume_with_other_ranks_and_zero_stage_stays_close(folder):
    """One optimizer step after the hand-over agrees to rounding; the samples agree for ever."""
    run = "elastic"
    _finish(_start(folder, run, 2, "engine.zero_stage=2", "train.steps=14"), folder, run)
    reference = _curve(folder, run)
    checkpoints = folder / run / "checkpoints"
    (checkpoints / "latest").write_text("step-00000012\n")
    for file in (checkpoints / "step-00000014").iterdir():
        file.unlink()
    (checkpoints / "step-00000014").rmdir()
    _finish(_start(folder, run, 1), folder, run)
    again = _curve(folder, run)
    assert again[12][1] == pytest.approx(reference[12][1], rel=2e-6)
    assert again[12][0] == 13 and len(again) == 14


def test_a_changed_recipe_is_refused_with_the_keys_named(folder):
    run = "changed"
    _finish(_start(folder, run, 1, "train.steps=2"), folder, run)
    process = _start(folder, run, 1, "train.steps=2", "optimizer.lr=0.5", "data.workers=0")
    assert process.wait(timeout=120) == 2
    said = (folder / f"{run}.log").read_text().strip().splitlines()[-1]
    assert "optimizer.lr: 0.001 -> 0.5" in said and "workers" not in said
    process = _start(folder, run, 1, "train.steps=2", "data.workers=0")
    assert process.wait(timeout=120) == 0
    assert "is complete" in (folder / f"{run}.log").read_text()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("encoder.trunk=resnet81", "timm has no model 'resnet81'"),
        ("train.bn_group_size=12", "bn_group_size 12 does not divide 32"),
        ("encoder.trunk_options={drop_path_rate: 0.1}", "drops at random"),
    ],
)
def test_a_recipe_that_cannot_run_leaves_no_run_directory(folder, override, said):
    run = "impossible-" + override.split("=")[0]
    assert _start(folder, run, 1, override).wait(timeout=120) == 2
    lines = (folder / f"{run}.log").read_text().strip().splitlines()
    assert said in lines[-1] and not any("Traceback" in line for line in lines)
    assert not (folder / run).exists()


def test_in_fp64_the_curve_of_two_ranks_is_that_of_one(folder):
    """In fp32, training amplifies rounding; in fp64, twenty steps at full rate still agree."""
    overrides = ["train.precision=fp64", "train.steps=20", "train.bn_group_size=32", "optimizer.warmup_steps=0"]
    overrides += ["optimizer.name=sgd", "optimizer.lr=0.2", "views.crop_px=[90, 96]", "views.noise_probability=0.2"]
    curves = []
    for ranks in (1, 2):
        _finish(_start(folder, f"wide-{ranks}", ranks, *overrides), folder, f"wide-{ranks}")
        curves.append([point[1] for point in _curve(folder, f"wide-{ranks}")])
    one, two = curves
    assert len(one) == 20 and min(one) < 0.8 * one[0]
    assert max(abs(a - b) / a for a, b in zip(one, two, strict=True)) < 1e-9
