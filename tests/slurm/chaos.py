"""Breaks trainings on a real Slurm cluster in every way that clusters do, and checks what is promised about it.

    python -m tests.slurm.chaos [SCENARIO|all] [--count N] [--seed S] [--out DIR]

Prints markdown tables; the exit code is not 0 where a promise is broken. Wants what ``python -m tests.slurm.cluster``
wants, and real micrographs (NANODIST_DATA). Runs and logs stay in DIR, if one is given, and nothing else does.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.slurm import chaos_checks as checks
from tests.slurm import chaos_disk, chaos_kill, chaos_local, chaos_pipeline, chaos_preempt, chaos_submitit, chaos_sweep
from tests.slurm.chaos_checks import Row
from tests.slurm.chaos_run import Run, nanodist, prepare, undisturbed
from tests.slurm.cluster import SWITCH, Cluster, ClusterError

SCENARIOS = ("train", "preempt", "kill", "memory", "disk", "bits", "elastic", "submitit", "sweep", "pipeline")
Table = list[tuple[str, ...]]
TWO_NODES = chaos_preempt.SIZE
# Slurm takes at most MIN x --ntasks-per-node nodes, so none is given: one task a node.
ANY_NODES = ("--nodes=1-3",)


@contextmanager
def cluster_for(out: Path) -> Iterator[Cluster]:
    """Three nodes with short delays; gone afterwards."""
    folder = Path(tempfile.gettempdir()) / f"nanodist-chaos-{os.getpid()}"
    timing = {"slurmd_timeout_s": 10, "kill_wait_s": 3, "grace_s": 30, "requeue_delay_s": 10}
    with Cluster(nodes=3, cpus=2, memory_mb=7000, folder=folder, **timing) as cluster:
        yield cluster


def train(out: Path, count: int, seed: int) -> tuple[list[Row], list[Table]]:
    """Over 2 and over 3 nodes, to an exported encoder."""
    rows = []
    with cluster_for(out) as cluster:
        for nodes in (2, 3):
            run = Run(cluster, out, f"train-{nodes}", "train.steps=30")
            run.train(f"--nodes={nodes}", "--ntasks-per-node=1")
            (start,) = run.record()["starts"]
            nanodist(out, "export", run.name, "--to", f"encoder-{nodes}")
            weights = sum(path.stat().st_size for path in (out / f"encoder-{nodes}").glob("*.safetensors"))
            text = f"{start['last_step']} steps on {', '.join(start['hosts'])}; encoder of {weights / 1e6:.1f} MB"
            good = start["reason"] == "completed" and len(start["hosts"]) == nodes and weights > 0
            rows.append(Row(f"trains on {nodes} nodes and exports an encoder", text, good))
    return rows, []


def preempt(out: Path, count: int, seed: int) -> tuple[list[Row], list[Table]]:
    """``count`` preemptions in one run."""
    # Slurm's own signal is to be what says that the time is over, rather than nanodist's look at the clock.
    steps, margin = f"train.steps={16 * count + 20}", "guard.margin_s=1"
    with cluster_for(out) as cluster, undisturbed(cluster, out, "undisturbed", steps) as (reference, finish):
        run = Run(cluster, out, "preempted", steps, margin)
        events = chaos_preempt.preempt(run, chaos_preempt.plan(count, seed), seed)
        finish()
        found = checks.strikes(run, events)
        reasons = [start["reason"] for start in run.record()["starts"][:-1]]
        rows = [
            checks.resumed_by_itself(run, events),
            checks.nothing_twice(run),
            checks.same_curve(run, reference),
            checks.same_samples(run, reference),
            checks.whole_checkpoints(run),
            Row("run.json says why", ", ".join(reasons), all(r.startswith("preempted: SIG") for r in reasons)),
        ]
    return rows, [checks.recovery(found)]


def kill(out: Path, count: int, seed: int) -> tuple[list[Row], list[Table]]:
    """``count`` kills: most on as many nodes as before, and about a quarter on as many nodes as there are."""
    fewer = max(1, count // 4)
    plans = (
        chaos_kill.plan(count - fewer, seed),
        [("steps", ("node", "rank", "node of rank 0")[i % 3]) for i in range(fewer)],
    )
    rows: list[Row] = []
    found: list[checks.Strike] = []
    with cluster_for(out) as cluster:
        for name, size, kills in (("killed", TWO_NODES, plans[0]), ("elastic", ANY_NODES, plans[1])):
            steps = f"train.steps={18 * len(kills) + 60}"
            run = Run(cluster, out, name, steps)
            with undisturbed(cluster, out, f"{name}-not", steps) as (reference, finish):
                events = chaos_kill.kill(run, kills, size, seed)
                finish()
            found += checks.strikes(run, events)
            part = [checks.resumed_by_itself(run, events), *checks.common_states(run.starts())]
            part.append(checks.same_curve(run, reference) if name == "killed" else checks.near_curve(run, reference))
            part += [checks.same_samples(run, reference), checks.whole_checkpoints(run)]
            if name == "elastic":
                worlds = [start.world for start in run.starts()]
                part.append(Row("goes on with the nodes that are left", f"ranks: {worlds}", len(set(worlds)) > 1))
            rows += [Row(f"{name}: {row.promise}", row.measured, row.kept) for row in part]
    return [*rows, checks.bounded_loss(found)], [checks.recovery(found)]


def memory(out: Path, count: int, seed: int) -> tuple[list[Row], list[Table]]:
    """A rank takes more memory than the job has."""
    with cluster_for(out) as cluster:
        run = Run(cluster, out, "memory", "train.steps=30")
        run.submit(*TWO_NODES, "--mem=2300", environ={"CHAOS_HOG_STEP": "24"})
        at = time.time()
        cluster.wait_restart(run.job, 1, timeout_s=180)
        cluster.wait(run.job, timeout_s=300)
        reason = run.record()["starts"][0]["reason"]
        found = checks.strikes(run, [chaos_preempt.Event(0, "steps", "rank for memory", at)])
        rows = [
            Row("run.json says that a rank was killed for memory", reason, reason.startswith("killed for memory")),
            checks.resumed_by_itself(run, [found[0].event]),
            checks.bounded_loss(found),
        ]
    return rows, []


def disk(out: Path, count: int, seed: int) -> tuple[list[Row], list[Table]]:
    """The run directory lies on a tmpfs that fills up."""
    with cluster_for(out) as cluster:
        return chaos_disk.disk(cluster, out), []


def bits(out: Path, count: int, seed: int) -> tuple[list[Row], list[Table]]:
    """A flipped byte in each file of a checkpoint."""
    return chaos_local.bits(out, seed), []


def elastic(out: Path, count: int, seed: int) -> tuple[list[Row], list[Table]]:
    """Saved on 4 ranks with ZeRO 2, continued on others."""
    return chaos_local.elastic(out), []


def submitit(out: Path, count: int, seed: int) -> tuple[list[Row], list[Table]]:
    """A training by ``launch submit``, ended in every way."""
    steps = "train.steps=80"
    with cluster_for(out) as cluster, undisturbed(cluster, out, "by-hand", steps) as (reference, finish):
        finish()
        run = chaos_submitit.Submitted(cluster, out, "submitted", steps, "tracking.mode=offline")
        return chaos_submitit.submitit(run, reference), []


def sweep(out: Path, count: int, seed: int) -> tuple[list[Row], list[Table]]:
    """A sweep of 60 small fine-tunings."""
    with cluster_for(out) as cluster:
        return chaos_sweep.sweep(cluster, out), []


def pipeline(out: Path, count: int, seed: int) -> tuple[list[Row], list[Table]]:
    """A pipeline whose pretraining is preempted, and the same without Slurm."""
    with cluster_for(out) as cluster:
        return chaos_pipeline.pipeline(cluster, out), []


def show(name: str, rows: Sequence[Row], tables: Sequence[Table]) -> bool:
    """Print the tables of a scenario; whether all promises were kept."""
    lines: Table = [
        ("promise", "measured", "kept"),
        *((r.promise, r.measured, "yes" if r.kept else "**no**") for r in rows),
    ]
    print(f"\n### {name}\n")
    for table in (lines, *tables):
        print("\n".join(["| " + " | ".join(line) + " |" for line in table[:1]] + ["|" + "---|" * len(table[0])]))
        print("\n".join("| " + " | ".join(line) + " |" for line in table[1:]) + "\n")
    sys.stdout.flush()
    return all(row.kept for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.chaos", description=__doc__.split("\n")[0])
    parser.add_argument(
        "scenario", nargs="?", default="all", choices=[*SCENARIOS, "all"], help="What to do; all of it."
    )
    parser.add_argument("--count", type=int, default=2, help="How many preemptions and how many kills.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments and of who is hit.")
    parser.add_argument("--out", type=Path, help="Keep runs and logs in this new folder.")
    options = parser.parse_args(arguments)
    os.environ.setdefault(SWITCH, "1")  # who types the command has opted in
    names = SCENARIOS if options.scenario == "all" else (options.scenario,)
    kept = True
    with tempfile.TemporaryDirectory(prefix="nanodist-chaos-") as temporary:
        out = (options.out or Path(temporary)).resolve()
        try:
            prepare(out)
            for name in names:
                began = time.monotonic()
                rows, tables = globals()[name](out, options.count, options.seed)
                kept = show(f"{name} ({(time.monotonic() - began) / 60:.0f} min)", rows, tables) and kept
        except ClusterError as error:
            print(error, file=sys.stderr)
            return 1
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
