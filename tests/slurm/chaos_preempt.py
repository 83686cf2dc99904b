"""Preempted again and again in one run: by signal, by a partition of higher priority, by the time limit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.slurm.chaos_run import Run

SIZE = ("--nodes=2", "--ntasks-per-node=1")
KINDS = ("signal", "priority", "time limit")


@dataclass
class Event:
    """One end of a start that was asked for, and when; times in seconds since 1970."""

    number: int
    phase: str
    target: str
    at: float


def plan(count: int, seed: int) -> list[str]:
    """Kinds of ``count`` preemptions: time limits first, since a job has one from its beginning or not."""
    limits = count // 5
    rest = [KINDS[i % 2] for i in range(count - limits)]
    random.Random(seed).shuffle(rest)
    return ["time limit"] * limits + rest


def preempt(run: Run, kinds: list[str], seed: int) -> list[Event]:
    """Start ``run`` and preempt it as often as there are ``kinds``; it has ended well afterwards."""
    draw, limits = random.Random(seed), kinds.count("time limit")
    # The shortest time that Slurm has, and a warning that reaches the ranks well before it.
    run.submit(*SIZE, *(("--time=2", "--signal=USR2@40") if limits else ("--time=300",)))
    events = []
    for number, kind in enumerate(kinds):
        if kind != "time limit":
            run.wait_for(stepping(run, number), "the first step")
            run.wait_step(number, run.progress()[1] + draw.randint(0, 14))
        at = _strike(run, kind, number)
        events.append(Event(number, kind, "all ranks", at))
        print(f"{time.strftime('%H:%M:%S')} {run.name}: {events[-1]}", flush=True)
        if number + 1 == limits:
            _unlimited(run, number + 1)
        run.cluster.wait_restart(run.job, number + 1, timeout_s=240)
    run.cluster.wait(run.job, timeout_s=900)
    return events


def stepping(run: Run, number: int) -> Callable[[], bool]:
    return lambda: run.progress()[0] >= number and run.progress()[1] > 0


def _strike(run: Run, kind: str, number: int) -> float:
    at = time.time()
    if kind == "signal":
        run.cluster.ask("scancel", "--signal=USR2", str(run.job))
    elif kind == "priority":
        start = run.start(number)
        assert start is not None
        node = sorted(start.hosts.values())[number % len(start.hosts)]
        line = ("-p", "urgent", "-w", node, "--exclusive", "--mem=100", "-o", "urgent.out", "--wrap", "sleep 1")
        run.cluster.sbatch(*line, folder=run.out)
    else:
        # Nothing to do but wait for Slurm's clock.
        run.wait_for(lambda: run.restarts() > number, "the time limit", timeout_s=240, every_s=0.5)
        at = time.time()
    return at


def _unlimited(run: Run, restarts: int) -> None:
    """The job waits to be started again: it gets the time that the other preemptions need."""
    run.wait_for(lambda: run.cluster.job(run.job)["JobState"] == "PENDING", "the requeue", every_s=0.2)
    run.cluster.ask("scontrol", "update", f"JobId={run.job}", "TimeLimit=300")
