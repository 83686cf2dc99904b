"""How long the dry run and the status of a large sweep take, and how much memory.

``python -m tests.benchmarks.bench_sweep [--jobs 5000]``: a sweep of fine-tunings over a small store; each figure is
that of a process of its own, from its start to its end, on the clock and in processor time, which a busy machine does
not change much. Beside them in the same rounds: ``import torch``, which neither may need, and the floor of both:
reading all records as JSON. ``--work FOLDER`` keeps what is measured on. Last line: one JSON object.
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
READ = "import json, pathlib; [json.loads(p.read_text()) for p in pathlib.Path('sweeps/large/records').glob('*.json')]"


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


def measured(out: Path, *arguments: str) -> tuple[float, float, float]:
    """Seconds on the clock and of the processor, and the most memory in MB, of a process."""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=out, env=environ, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, arguments
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=5000, help="Jobs of the sweep.")
    parser.add_argument("--work", type=Path, help="Folder for the sweep, taken as it is where it is there.")
    options = parser.parse_args()
    ways = {
        "import_torch": ("-c", "import torch"),
        "read_records": ("-c", READ),
        "dry_run": ("-m", "launch", "sweep", "large.yaml", "--dry-run", "--cluster", "local"),
        "status": ("-m", "launch", "status", "sweeps/large"),
    }
    rounds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        out = (options.work or Path(folder)).resolve()
        if not (out / "large.yaml").is_file():
            out.mkdir(parents=True, exist_ok=True)
            prepare(out, options.jobs)
        for _ in range(ROUNDS):
            for name, arguments in ways.items():
                rounds[name].append(measured(out, *arguments))
    table = {
        name: {
            "seconds": round(statistics.median(figure[0] for figure in figures), 2),
            "processor_s": round(statistics.median(figure[1] for figure in figures), 2),
            "memory_mb": round(max(figure[2] for figure in figures)),
        }
        for name, figures in rounds.items()
    }
    for name, row in table.items():
        print(f"{name:14} {row['seconds']:7.2f} s {row['processor_s']:7.2f} s CPU {row['memory_mb']:6.0f} MB")
    ratio = round(table["status"]["processor_s"] / table["read_records"]["processor_s"], 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        json.dumps(
            {
                "benchmark": "sweep",
                "jobs": options.jobs,
                "own_memory_mb": peak,
                "status_over_reading": ratio,
                "ways": table,
            }
        )
    )


if __name__ == "__main__":
    main()
