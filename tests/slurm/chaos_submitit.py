"""A training that ``python -m launch submit`` hands to Slurm through submitit, preempted and killed."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time

from hpc.run_dir import metric_lines
from tests.slurm import chaos_checks as checks
from tests.slurm.chaos_checks import Row
from tests.slurm.chaos_preempt import Event, stepping
from tests.slurm.chaos_run import Run
from tests.slurm.namespaces import ClusterError

SIZE = ("--nodes", "2", "--tasks-per-node", "1", "--cpus-per-task", "1")
KINDS = ("signal", "kill", "priority", "node", "time limit")
# The whole of what the others see of a start, and of its end.
_SUBMITIT = r"^\S*python\S* -u -m submitit\.core\._submit"


class Submitted(Run):
    """As :class:`Run`, but by submitit; what its ranks do is told by the run directory alone."""

    @property
    def folder(self) -> str:
        return f"{self.name}-jobs"

    def submit(self, *size: str, environ: dict[str, str] | None = None) -> int:
        """Submit it; ``size`` are options of ``launch submit``."""
        (self.out / "site.yaml").write_text(json.dumps({"partition": "normal", "mem_gb": 3.3}))
        line = [sys.executable, "-m", "launch", "submit", "pretrain", "recipe.yaml", "data.store=store"]
        line += [f"run_dir={self.name}", *self.overrides, "--site", "site.yaml", "--folder", self.folder, *size]
        done = self.cluster.run(line, folder=self.out, environ=environ)
        found = re.search(r"^job (\d+);", done.stderr, flags=re.MULTILINE)
        if done.returncode or not found:
            raise ClusterError(f"launch submit ended with {done.returncode}: {done.stderr}")
        self.job = int(found[1])
        return self.job

    def progress(self) -> tuple[int, int]:
        """Number of the newest start, and its last step."""
        try:
            starts = self.record()["starts"]
        except OSError:
            return -1, 0
        logged = [line["step"] for line in metric_lines(self.path / "metrics.jsonl")]
        return len(starts) - 1, logged[-1] if logged and logged[-1] >= starts[-1]["first_step"] else 0

    def said(self) -> str:
        """What all processes and the batch script wrote."""
        return "\n".join(path.read_text(errors="replace") for path in sorted((self.out / self.folder).glob("*_log.*")))

    def strike(self, kind: str, number: int) -> float:
        """Preempt or kill start ``number``; when."""
        at, nodes = time.time(), sorted(self.record()["starts"][-1]["hosts"])
        if kind == "signal":
            self.cluster.ask("scancel", "--signal=USR2", str(self.job))
        elif kind == "kill":
            for pid in self.cluster.pids(nodes[-1], _SUBMITIT):
                os.kill(pid, signal.SIGKILL)
        elif kind == "node":
            self.cluster.kill_node(nodes[-1])
        elif kind == "priority":
            line = ("-p", "urgent", "-w", nodes[0], "--exclusive", "--mem=100", "-o", "urgent.out", "--wrap", "sleep 1")
            self.cluster.sbatch(*line, folder=self.out)
        else:
            # The clock is put forward: less than the signal's delay is left.
            passed = max(1, int((time.time() - _seconds(self.cluster.job(self.job)["StartTime"])) / 60) + 1)
            self.cluster.ask("scontrol", "update", f"JobId={self.job}", f"TimeLimit={passed}")
        return at


def _seconds(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))


def submitit(run: Submitted, reference: Run, kinds: tuple[str, ...] = KINDS, every: int = 9) -> list[Row]:
    """Train ``run``, struck once by each of ``kinds`` after some steps, and compare it with ``reference``."""
    run.submit(*SIZE, "--time-min", "60")
    events, dead = [], ""
    for number, kind in enumerate(kinds):
        run.wait_for(stepping(run, number), "the first step")
        run.wait_step(number, run.progress()[1] + every)
        if kind == "node":
            dead = sorted(run.record()["starts"][-1]["hosts"])[-1]
        events.append(Event(number, kind, kind, run.strike(kind, number)))
        run.cluster.wait_restart(run.job, number + 1, timeout_s=240)
        if kind == "time limit":
            run.cluster.ask("scontrol", "update", f"JobId={run.job}", "TimeLimit=60")
    run.cluster.wait(run.job, timeout_s=600)
    if dead:
        run.cluster.revive_node(dead)
    reasons = [start["reason"] for start in run.record()["starts"]]
    lost = len(run.logged_steps()) - len(set(run.logged_steps()))
    kept_alive = all(kind in ("signal", "priority", "time limit") for kind in kinds)
    results = sorted(path.name for path in (run.out / run.folder).glob("*_result.pkl"))
    tracked = [path.name.rpartition("-")[2] for path in run.path.glob("wandb/offline-run-*")]
    one_run = [Row("one W&B run over all starts", f"{len(tracked)} starts, ids {set(tracked)}", len(set(tracked)) == 1)]
    return [
        *(one_run if tracked else []),
        checks.resumed_by_itself(run, events),
        checks.same_curve(run, reference),
        checks.whole_checkpoints(run),
        Row("run.json says why", "; ".join(reasons), all(map(_names, kinds, reasons))),
        Row("steps lost", f"{lost} in all", lost == 0 if kept_alive else True),
        Row("submitit has a result of each rank", ", ".join(results), len(results) == 2),
    ]


def _names(kind: str, reason: str) -> bool:
    """Whether the reason of a start's end is of the kind of what ended it."""
    said = {"kill": "killed by signal 9", "node": "requeued by Slurm", "time limit": "preempted: "}
    return said.get(kind, "preempted: SIG") in reason
