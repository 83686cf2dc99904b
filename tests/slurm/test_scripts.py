"""The batch scripts with nanodist itself in them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
NANODIST = (sys.executable, "-m", "nanodist")
# Small enough for shared cores: importing torch takes most of the time.
TINY = (
    "data.store=store",
    "run_dir=run",
    "train.steps=4",
    "train.global_batch_size=8",
    "train.bn_group_size=4",
    "train.precision=fp32",
    "train.log_every_steps=1",
    "optimizer.warmup_steps=1",
    "views.size_px=32",
    "encoder.trunk_options={channels: [8, 8, 8, 8]}",
    "projector.widths=[32, 16]",
    "tracking.mode=disabled",
)


def test_the_scripts_are_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted([*ROOT.glob("slurm/*.sbatch"), *ROOT.glob("slurm/*.sh")])
    assert len(scripts) >= 5
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_no_script_signals_its_own_shell():
    for script in ROOT.glob("slurm/*.sbatch"):
        options = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
        assert not any("--signal=B:" in line for line in options), script
        assert any("--requeue" in line for line in options) == any("--signal=" in line for line in options), script


def test_pretraining_over_two_nodes_ends_with_an_encoder(cluster: Cluster, tmp_path: Path):
    env = cluster.work / "real.sh"
    env.write_text(f"NANODIST=({sys.executable} -m nanodist)\nexport NANODIST_MAX_RESTARTS=0\n")
    work = cluster.work

    def nanodist(*arguments: str) -> None:
        done = cluster.run(["srun", "-n1", "-c2", *NANODIST, *arguments], timeout_s=180)
        assert done.returncode == 0, done.stderr

    nanodist("synth", "wires", "--out=synth", "--micrographs=16", "--size=128", "--seed=0", "--workers=1")
    nanodist("pack", "synth/images", "--labels=folder", "--tile=128", "--out=store")
    size = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=3450", "--time=20")
    job = cluster.sbatch(*size, "slurm/pretrain.sbatch", "demo", *TINY, environ={"NANODIST_ENV": str(env)})
    log = cluster.log(cluster.wait(job, timeout_s=240))
    record = json.loads((work / "run" / "run.json").read_text())
    (start,) = record["starts"]
    assert start["reason"] == "completed" and start["last_step"] == 4, log
    assert start["hosts"] == ["node1", "node2"] and start["topology"]["launcher"] == "srun"
    # The port follows from the job, and the meeting point is the job's first node.
    assert start["topology"]["master_addr"] == "node1"
    assert start["topology"]["master_port"] == 10000 + job % 20000
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    nanodist("export", "run", "--to", "encoder")
    assert (work / "encoder").is_dir() and any((work / "encoder").glob("*.safetensors"))
