"""submitit on the real cluster: a preempted job requeues itself, once, and goes on where it was."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster
from tests.slurm.test_scripts import NANODIST, TINY

STEPS = 60


def _record(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text()) if (run / "run.json").exists() else {"starts": []}


def _steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def _until_step(run: Path, step: int, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while max(_steps(run), default=0) < step:
        assert time.monotonic() < deadline, f"{run} did not reach step {step}"
        time.sleep(0.1)


def test_a_preempted_job_of_submitit_goes_on_by_itself(cluster: Cluster):
    work = cluster.work
    if not (work / "store").exists():
        for words in (
            ("synth", "wires", "--out=synth", "--micrographs=16", "--size=128", "--seed=0", "--workers=1"),
            ("pack", "synth/images", "--labels=folder", "--tile=128", "--out=store"),
        ):
            done = cluster.run(["srun", "-n1", "-c2", *NANODIST, *words], timeout_s=180)
            assert done.returncode == 0, done.stderr
    overrides = [word for word in TINY if not word.startswith(("run_dir=", "train.steps="))]
    overrides += [f"run_dir={work / 'submitit'}", f"train.steps={STEPS}", f"data.store={work / 'store'}"]
    launch = (sys.executable, "-m", "launch", "submit", "pretrain", "demo", *overrides)
    options = ("--nodes=1", "--tasks-per-node=2", "--cpus-per-task=1", "--time-min=10", f"--folder={work / 'logs'}")
    done = cluster.run([*launch, *options], timeout_s=120)
    assert done.returncode == 0, done.stderr
    queued = cluster.run(["squeue", "--noheader", "--format=%A %j"]).stdout.splitlines()
    (job,) = [int(line.split()[0]) for line in queued if "nanodist-pretrain" in line]

    _until_step(work / "submitit", 3)
    cluster.ask("scancel", "--signal=USR2", str(job))
    cluster.wait_restart(job, 1)
    cluster.wait(job, timeout_s=240)

    first, second = _record(work / "submitit")["starts"]
    assert (first["reason"], second["reason"]) == ("preempted: SIGUSR2", "completed")
    assert second["first_step"] == first["last_step"] + 1 > 3
    assert _steps(work / "submitit") == list(range(1, STEPS + 1))
