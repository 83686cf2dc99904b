"""What a sweep or a pipeline cost: hours of cores and GPUs, from Slurm's accounting where there is some."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch.records import SweepFolder

ACCOUNTED, MEASURED = "sacct", "the jobs' own records"
_AT_ONCE = 500  # numbers of jobs on a command line


@dataclass(frozen=True)
class Cost:
    """What a part of it took.

    Attributes:
        part: pretraining, export, or the name of a sweep.
        jobs: allocations in the queue.
        hours: of all of them together.
        cpu_hours, gpu_hours: of cores and of GPUs that were held meanwhile.
        source: where it is from.
    """

    part: str
    jobs: int
    hours: float
    cpu_hours: float
    gpu_hours: float
    source: str

    def row(self) -> dict[str, Any]:
        """As plain values."""
        return {name: round(value, 5) if isinstance(value, float) else value for name, value in asdict(self).items()}


def accounted(part: str, numbers: Sequence[str]) -> Cost | None:
    """The cost of jobs of Slurm, all their starts together, by ``sacct``; ``None`` where there is no accounting."""
    roots = [*dict.fromkeys(number.partition("_")[0] for number in numbers)]
    seconds = cpu = gpu = 0.0
    rows = 0
    for begin in range(0, len(roots), _AT_ONCE):
        line = ["sacct", "--noheader", "--parsable2", "--allocations", "--duplicates"]
        line += ["--format=JobID,ElapsedRaw,AllocTRES", f"--jobs={','.join(roots[begin : begin + _AT_ONCE])}"]
        try:
            said = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return None
        for text in said.splitlines():
            fields = text.split("|")
            if len(fields) < 3 or not fields[1].isdigit():
                continue
            rows, held = rows + 1, tres(fields[2])
            seconds += int(fields[1])
            cpu += int(fields[1]) * held["cpu"]
            gpu += int(fields[1]) * held["gres/gpu"]
    return Cost(part, len(numbers), seconds / 3600, cpu / 3600, gpu / 3600, ACCOUNTED) if rows else None


def tres(text: str) -> dict[str, float]:
    """Cores and GPUs in ``billing=4,cpu=4,gres/gpu:a100=2,gres/gpu=2,mem=8G,node=1``."""
    found = {"cpu": 0.0, "gres/gpu": 0.0}
    kinds = 0.0
    for name, value in re.findall(r"([^=,]+)=([0-9.]+)", text):
        if name in found:
            found[name] = float(value)
        elif name.startswith("gres/gpu:"):
            kinds += float(value)
    found["gres/gpu"] = found["gres/gpu"] or kinds  # a site may count kinds of GPUs only
    return found


def of_sweep(part: str, folder: SweepFolder) -> Cost:
    """The cost of a sweep's allocations; without accounting, what its jobs and helpers took by their records."""
    lines = folder.allocations()
    numbers = [line["id"] for line in lines if line["cluster"] == "slurm"]
    found = accounted(part, numbers) if numbers else None
    if found is not None:
        return found
    shares = {name: line for line in lines for name in line["fingerprints"]}
    hours = cpu = gpu = 0.0
    for name in {**folder.jobs(), **folder.helpers()}:
        took, line = folder.record(name).seconds / 3600, shares.get(name, {})
        at_once = line.get("at_once", 1)
        hours += took
        cpu += took * line.get("cpus", 1) / at_once
        gpu += took * line.get("gpus", 0) / at_once
    return Cost(part, len(lines), hours, cpu, gpu, MEASURED)


def of_steps(part: str, lines: Sequence[Mapping[str, Any]], seconds: float | None) -> Cost | None:
    """The cost of steps of a pipeline; ``seconds`` that they took where there is no accounting, if that is known."""
    numbers = [line["id"] for line in lines if line["cluster"] == "slurm"]
    found = accounted(part, numbers) if numbers else None
    if found is not None or seconds is None or not lines:
        return found
    hours, last = seconds / 3600, lines[-1]
    return Cost(part, len(lines), hours, hours * last["cpus"], hours * last["gpus"], MEASURED)
