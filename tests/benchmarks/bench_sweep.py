"""How long the dry run and the status of a large sweep take, and how much memory.

``python -m tests.benchmarks.bench_sweep [--jobs 5000]``: a sweep of fine-tunings over a small store; each figure is
that of a process of its own, from its start to its end. The floor beside it is ``import torch``, which reading a recipe
needs, in the same rounds. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launch.records import Record, SweepFolder
from launch.sweep import Sweep

ROUNDS = 5


def prepare(out: Path, jobs: int) -> None:
    """A store, the sweep's file, and records as if all jobs had run."""
    line = [sys.executable, "-m", "nanodist"]
    run = ["synth", "wires", "--out=synth", "--micrographs=8", "--size=128", "--seed=0", "--workers=1"]
    pack = ["pack", "synth/images", "--labels=folder", "--tile=128", "--out=store", "--workers=1"]
    for arguments in (run, pack):
        subprocess.run([*line, *arguments], cwd=out, check=True, capture_output=True)
    grid = {"labels_per_class": [1, 2, 4, 8, 16], "draw_seed": list(range(jobs // 5))}
    shared = {"store": str(out / "store"), "encoder": "timm:resnet10t"}
    document = {
        "job": "finetune",
        "recipe": "general",
        "overrides": shared,
        "grid": grid,
        "folder": str(out / "sweeps"),
    }
    (out / "large.yaml").write_text(json.dumps(document))
    sweep = Sweep.from_yaml(out / "large.yaml")
    sweep.folder.make()
    sweep.folder.add_jobs(sweep.jobs())
    for number, job in enumerate(sweep.jobs()):
        states = ("done", "failed", "queued")
        sweep.folder.write(job.fingerprint, Record(state=states[number % 3], failures=["exit code 1: drift"]))
    assert len(SweepFolder(out / "sweeps" / "large").jobs()) == jobs


def measured(out: Path, *arguments: str) -> tuple[float, float]:
    """Seconds, and the most memory in MB, of a process."""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=out, env=environ, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, arguments
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=5000, help="Jobs of the sweep.")
    options = parser.parse_args()
    ways = {
        "import_torch": ("-c", "import torch"),
        "dry_run": ("-m", "launch", "sweep", "large.yaml", "--dry-run", "--cluster", "local"),
        "status": ("-m", "launch", "status", "sweeps/large"),
    }
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        prepare(out, options.jobs)
        for _ in range(ROUNDS):
            for name, arguments in ways.items():
                rounds[name].append(measured(out, *arguments))
    table = {
        name: {
            "seconds": round(statistics.median(seconds for seconds, _ in figures), 2),
            "memory_mb": round(max(memory for _, memory in figures)),
        }
        for name, figures in rounds.items()
    }
    for name, row in table.items():
        print(f"{name:14} {row['seconds']:7.2f} s {row['memory_mb']:6.0f} MB")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"benchmark": "sweep", "jobs": options.jobs, "own_memory_mb": peak, "ways": table}))


if __name__ == "__main__":
    main()
