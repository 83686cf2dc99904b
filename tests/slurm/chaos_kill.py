"""SIGKILL at random moments of every phase, of a rank or of a whole node; the run has to go on by itself."""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.slurm.chaos_preempt import Event
from tests.slurm.chaos_run import EVERY_STEPS, Run
from tests.slurm.namespaces import ClusterError, until

# Of ten kills: when, and who.
TEN = (
    ("steps", "rank"),
    ("write", "rank 0"),
    ("steps", "node"),
    ("start-up", "rank"),
    ("write", "node of rank 0"),
    ("after a save", "rank 0"),
    ("steps", "rank"),
    ("write", "rank 0"),
    ("steps", "node of rank 0"),
    ("write", "node"),
)
# Seconds more for each large file, so that steps pass while a checkpoint is written.
DISK_S = 0.8
_READY = ("idle", "mixed", "allocated", "completing")


def plan(count: int, seed: int) -> list[tuple[str, str]]:
    """Phase and target of ``count`` kills; every second one of those at start-up takes the whole node."""
    draw = random.Random(seed)
    kills: list[tuple[str, str]] = []
    while len(kills) < count:
        some = list(TEN)[: count - len(kills)]
        draw.shuffle(some)
        kills += some
    starting = [i for i, (phase, _) in enumerate(kills) if phase == "start-up"]
    for i in starting[1::2]:
        kills[i] = ("start-up", "node")
    return kills


def kill(run: Run, kills: list[tuple[str, str]], size: tuple[str, ...], seed: int) -> list[Event]:
    """Start ``run``, strike it with every one of ``kills``, and let it end."""
    draw, events = random.Random(seed), []
    run.submit(*size, environ={"CHAOS_DISK_S": str(DISK_S)})
    number, futile = 0, False
    for phase, target in kills:
        began = _moment(run, number, phase, draw, futile)
        events.append(_strike(run, number, phase, target, draw))
        run.cluster.wait_restart(run.job, number + 1, timeout_s=240)
        _revive(run)
        number = run.restarts()
        futile = phase == "start-up" or not _moved_on(run, began)
        print(f"{time.strftime('%H:%M:%S')} {run.name}: {events[-1]}", flush=True)
    run.cluster.wait(run.job, timeout_s=1500)
    return events


def _moment(run: Run, number: int, phase: str, draw: random.Random, futile: bool) -> int:
    """Wait for the moment to strike start ``number``; the newest checkpoint at its beginning."""
    run.wait_for(lambda: run.progress()[0] >= number, f"start {number}")
    began = newest(run)
    if phase == "start-up":
        time.sleep(draw.uniform(0.5, 14.0))
        return began
    run.wait_step(number, began + 1)
    if phase == "steps":
        run.wait_step(number, began + (EVERY_STEPS if futile else 0) + draw.randint(2, EVERY_STEPS + 14))
    else:
        saves = began + EVERY_STEPS * (2 if futile else 1)
        run.wait_step(number, saves - 1)
        _wait_write(run, saves, phase, draw)
    return began


def _wait_write(run: Run, step: int, phase: str, draw: random.Random) -> None:
    """Until the checkpoint of ``step`` is being written, and a random part of that time more; or until it is there."""
    checkpoints = run.path / "checkpoints"
    name = f"step-{step:08d}"
    if phase == "write":
        seen = until(lambda: any(checkpoints.glob(f".{name}.*.tmp")) or (checkpoints / name).exists(), 120, 0.003)
        time.sleep(draw.uniform(0.0, 2 * DISK_S + 0.3))
    else:
        seen = until(lambda: _latest(run.path) == name, 120, 0.003)
    if not seen:
        raise ClusterError(f"{run.name}: no checkpoint of step {step} came")


def _strike(run: Run, number: int, phase: str, target: str, draw: random.Random) -> Event:
    start = run.start(number)
    if start is None:
        raise ClusterError(f"{run.name}: start {number} has no ranks")
    rank = 0 if target.endswith("0") else draw.choice(sorted(start.hosts))
    if not target.startswith("node"):
        return Event(number, phase, target, run.kill_rank(start, rank))
    at = time.time()
    run.cluster.kill_node(start.hosts[rank])
    return Event(number, phase, target, at)


def _revive(run: Run) -> None:
    """Boot what is dead, once the job has started again without it."""
    dead = [name for name, machine in run.cluster.machines.items() if not machine.alive()]
    if dead:
        run.cluster.wait(run.job, ["RUNNING"], timeout_s=120)
    for name in dead:
        run.cluster.revive_node(name, wait=False)
    if dead:
        run.cluster.wait_idle(dead, _READY)


def _latest(path: Path) -> str:
    try:
        return (path / "checkpoints" / "latest").read_text().strip()
    except OSError:
        return ""


def newest(run: Run) -> int:
    """Step of the newest checkpoint; 0: none."""
    return max((int(path.name[5:]) for path in (run.path / "checkpoints").glob("step-*")), default=0)


def _moved_on(run: Run, began: int) -> bool:
    return newest(run) > began
