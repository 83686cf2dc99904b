"""A sweep of small real fine-tunings on the test cluster: a node is killed, a job cancelled, and one cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.records import SweepFolder
from tests.slurm.chaos_checks import Row
from tests.slurm.chaos_run import ROOT, nanodist
from tests.slurm.cluster import Cluster
from tests.slurm.namespaces import ClusterError, until

JOBS, PACK = 60, 10
RECIPE = {
    "views": {"size_px": 32, "crop_px": [64, 112], "exposure": "image"},
    "symmetries": 1,
    "train": {"steps": 6, "global_batch_size": 16, "tuned_layers": 0, "log_every_steps": 2},
    "optimizer": {"warmup_steps": 1},
    "engine": {"device": "cpu", "threads": 1},
    "tracking": {"mode": "disabled"},
}
# Where it ran, how long, and how often it had to start: what may differ between two places.
_PLACE = ("run_dir", "seconds", "overhead_s", "tries", "log", "encoder")


def write(out: Path, jobs: int) -> None:
    """The sweep's file, its recipe, and an encoder (of a few steps) in ``out``, where a store is."""
    if not (out / "encoder-run" / "checkpoints" / "latest").exists():
        nanodist(out, "pretrain", "recipe.yaml", "data.store=store", "run_dir=encoder-run", "train.steps=4")
    points = [{"labels_per_class": 2 * (1 + i % 3), "draw_seed": i // 3, "batch_norm": "frozen"} for i in range(jobs)]
    points = [{**point, "bn_group_size": None} for point in points]
    points[-1] |= {"batch_norm": "batch", "bn_group_size": 7}  # divides no batch
    shared = {"store": str(out / "store"), "encoder": str(out / "encoder-run")}
    (out / "finetune.yaml").write_text(json.dumps(RECIPE))
    for name in ("there", "here"):
        sweep = {"job": "finetune", "recipe": "finetune.yaml", "name": name, "overrides": shared, "list": points}
        (out / f"{name}.yaml").write_text(json.dumps(sweep))
    (out / "sweep-site.yaml").write_text(json.dumps({"partition": "normal", "mem_gb": 3.3, "time_min": 60}))


class Sweeps:
    """``python -m launch`` on the head of the cluster."""

    def __init__(self, cluster: Cluster, out: Path) -> None:
        self.cluster, self.out = cluster, out
        self.folder = SweepFolder(out / "sweeps" / "there")

    def launch(self, *arguments: str) -> str:
        """What it printed.

        Raises:
            ClusterError: it failed.
        """
        line = [sys.executable, "-m", "launch", *arguments]
        done = self.cluster.run(line, folder=self.out, environ={"PYTHONPATH": str(ROOT)}, timeout_s=300)
        if done.returncode:
            raise ClusterError(f"launch {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def submit(self) -> str:
        """Submit what is missing, ten jobs an allocation."""
        size = ("--site", "sweep-site.yaml", "--pack", str(PACK), "--max-parallel", "3")
        return self.launch("sweep", "there.yaml", *size)

    def counts(self) -> dict[str, int]:
        """Jobs by the state of their records."""
        states = [self.folder.record(name).state for name in self.folder.jobs()]
        return {state: states.count(state) for state in set(states)}

    def running(self) -> dict[str, str]:
        """Hosts of running jobs by fingerprint."""
        records = {name: self.folder.record(name) for name in self.folder.jobs()}
        return {name: record.host for name, record in records.items() if record.state == "running"}

    def wait(self, condition: Callable[[], object], what: str, timeout_s: float) -> None:
        """Wait, or say how far it came."""
        if not until(condition, timeout_s, every_s=0.5):
            logs = "\n".join(p.read_text()[-800:] for p in sorted((self.folder.path / "submitit").glob("*_log.err")))
            raise ClusterError(f"{what} did not come in {timeout_s} s: {self.counts()}\n{logs[-4000:]}")

    def over(self) -> bool:
        """Whether every job's record is final."""
        return all(self.folder.record(name).final for name in self.folder.jobs())

    def table(self, name: str = "there") -> list[dict[str, Any]]:
        """The rows that ``collect`` writes."""
        self.launch("collect", f"{name}.yaml")
        rows: list[dict[str, Any]] = json.loads((self.out / "sweeps" / name / "sweep.json").read_text())["rows"]
        return rows


def sweep(cluster: Cluster, out: Path, jobs: int = JOBS, compare: bool = True) -> list[Row]:
    """Submit, strike, collect, submit again; with ``compare``, also run all of it on this machine without Slurm."""
    write(out, jobs)
    sweeps = Sweeps(cluster, out)
    began = time.monotonic()
    sweeps.submit()
    sweeps.wait(lambda: sweeps.counts().get("done", 0) >= 3 and len(sweeps.running()) >= 2, "the third job", 300)
    cancelled, host = next(iter(sweeps.running().items()))
    sweeps.launch("cancel", cancelled)
    dead = next((name for name in sorted(set(sweeps.running().values())) if name != host), host)
    cluster.kill_node(dead)
    time.sleep(3)
    cluster.revive_node(dead, wait=False)
    sweeps.wait(sweeps.over, "the end of all jobs", 1500)
    minutes = (time.monotonic() - began) / 60
    first = sweeps.table()
    odd = {row["fingerprint"]: f"{row['state']}: {row['reason']}" for row in first if row["state"] != "done"}
    again = sweeps.submit()
    sweeps.wait(sweeps.over, "the end of the second submission", 300)
    second = sweeps.table()
    left = [row["state"] for row in second if row["state"] != "done"]
    overheads = sorted(row["overhead_s"] for row in first if row["state"] == "done" and row["tries"] == 1)
    restarted = sum(row["tries"] > 1 for row in first)
    rows = [
        Row(
            f"{jobs} jobs, a node killed, one cancelled, one that cannot run: a row for each",
            f"{len(first)} rows, {len(first) - len(odd)} done, {restarted} started again, in {minutes:.1f} min",
            len(first) == jobs and len(odd) == 2 and restarted >= 1,
        ),
        Row("the others have their reasons", "; ".join(odd.values()), {v.split(":")[0] for v in odd.values()} == _TWO),
        Row("submitting again runs those two", again.split(";")[0], again.startswith(f"2 of {jobs} jobs")),
        Row("the cancelled one is done then", f"left: {left}", left == ["failed"]),
        Row(
            "overhead of a packed job, seconds",
            f"median {overheads[len(overheads) // 2]:.2f}, most {overheads[-1]:.2f}",
            bool(overheads),
        ),
    ]
    return [*rows, _same_here(sweeps, second)] if compare else rows


_TWO = {"cancelled", "failed"}


def _same_here(sweeps: Sweeps, there: list[dict[str, Any]]) -> Row:
    """The same sweep by ``--cluster local``, side by side in one allocation."""
    line = [sys.executable, "-m", "launch", "sweep", "here.yaml", "--cluster", "local", "--max-parallel", "1"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    size = ["--pack", str(len(there)), "--side-by-side", "2"]
    subprocess.run([*line, *size], cwd=sweeps.out, env=environ, check=True, capture_output=True, timeout=1500)
    here = sweeps.table("here")
    tables = [{row["fingerprint"]: _measured(row) for row in rows} for rows in (there, here)]
    apart = sum(tables[0].get(name) != tables[1].get(name) for name in tables[0].keys() | tables[1].keys())
    return Row("the same by --cluster local", f"{len(here)} rows, {apart} differ in what they measured", not apart)


def _measured(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _PLACE and name != "reason"}
