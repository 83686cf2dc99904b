"""One training loop for every task.

A task says what is trained; the loop steps, logs, saves, evaluates and stops. Order at each step boundary: step,
metrics, evaluation, checkpoint, preemption. Everything a step does is a function of (recipe, step), so that a run
which was killed goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from hpc.clock import Clock
from hpc.collectives import Group
from hpc.engine import Engine
from hpc.preemption import Preemption, agree
from hpc.run_dir import RunDir
from hpc.saving import Saver
from hpc.slow import SlowHosts
from hpc.step import StepResult, train_step
from hpc.task import Plan, Task, TrainState
from hpc.tracking import Tracker
from hpc.watchdog import Watchdog

MOST_SKIPPED_IN_A_ROW = 10


class NonFinite(Exception):
    """Loss or gradient were NaN or infinite; names the step and the samples."""


class Preempted(Exception):
    """The run was asked to stop, and everything is saved."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class Keepers:
    """Who stands by while a run trains; ``None`` where nobody does.

    Attributes:
        preemption: knows whether the run has to stop.
        watchdog: ends the process when no step is done for too long.
    """

    preemption: Preemption | None = None
    watchdog: Watchdog | None = None

    def beat(self) -> None:
        """A step is done."""
        if self.watchdog is not None:
            self.watchdog.beat()

    def away(self) -> AbstractContextManager[Any]:
        """While it is open, no step is expected."""
        return nullcontext() if self.watchdog is None else self.watchdog.paused()

    def reason_to_stop(self, engine: Engine, world: Group) -> str | None:
        """Why the run has to stop now, the same on all ranks."""
        return None if self.preemption is None else agree(self.preemption.reason, world, engine.device)


def train(
    task: Task,
    engine: Engine,
    plan: Plan,
    run: RunDir,
    tracker: Tracker,
    state: TrainState,
    world: Group,
    keepers: Keepers | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> None:
    """Train from ``state`` to the end of ``plan``, on every rank; ``state`` says afterwards how far it came.

    Raises:
        Preempted: asked to stop; a checkpoint of the last step is written.
        NonFinite: as ``plan.non_finite`` says.
        NotSaved: the last checkpoint cannot be written.
    """
    if state.step >= plan.steps or task.finished():
        return
    keepers = keepers or Keepers()
    boundary = _Boundary(task, engine, plan, run, tracker, world, keepers, warn)
    skipped = _Skipped(run, plan, engine, world, warn)
    clock = Clock(plan, state.step, engine.topology.is_main)
    slow = SlowHosts(engine.topology, world, engine.device)
    for batch in task.batches(state.step):
        lr = plan.learning_rate(state.step)
        result = train_step(task, engine, batch, lr, slow.own_work())
        skipped.note(result, batch)
        state.step += 1
        clock.stepped(batch.wait_seconds, result.loss)
        slow.stepped(batch.wait_seconds)
        keepers.beat()
        if boundary.cross(state, result, clock, slow, lr):
            break
    clock.close()


class _Boundary:
    """What is done between two steps."""

    def __init__(
        self,
        task: Task,
        engine: Engine,
        plan: Plan,
        run: RunDir,
        tracker: Tracker,
        world: Group,
        keepers: Keepers,
        warn: Callable[[str], None],
    ) -> None:
        self._task, self._engine, self._plan, self._world = task, engine, plan, world
        self._tracker, self._keepers, self._warn = tracker, keepers, warn
        self._saver = Saver(task, engine, plan.saving, run, world, warn)

    def cross(self, state: TrainState, result: StepResult, clock: Clock, slow: SlowHosts, lr: float) -> bool:
        """Log, evaluate, save and stop, each where its turn has come; whether this was the last step."""
        plan, step = self._plan, state.step
        last = step == plan.steps
        if step == 1 or step % plan.log_every_steps == 0 or last:
            self._log(step, result, clock, slow, lr)
        score: float | None = result.loss
        evaluated = False
        if plan.evaluate_every_steps:
            evaluated = step % plan.evaluate_every_steps == 0 or last
            score = None
        if evaluated:
            with self._keepers.away():
                score = self._evaluate(step)
            last = last or self._task.finished()
            clock.restart()
        reason = None if last else self._keepers.reason_to_stop(self._engine, self._world)
        # What evaluations rank is what they saw, so with keep_best each is followed by a checkpoint.
        ranked = evaluated and plan.saving.keep_best > 0
        if step % plan.saving.every_steps == 0 or last or reason or ranked:
            with self._keepers.away():
                self._saver.save(state, score)
                if last or reason:
                    self._saver.finish()
                    self._cover()
            clock.restart()
        if reason:
            clock.close()
            raise Preempted(reason)
        return last

    def _log(self, step: int, result: StepResult, clock: Clock, slow: SlowHosts, lr: float) -> None:
        self._saver.report()
        measures = self._task.measures(result.outputs) if result.taken else {}
        line: dict[str, Any] = {
            **clock.line(step),
            "epoch": self._task.epochs_done(step),
            "loss": result.loss,
            "lr": lr,
        }
        if math.isfinite(result.gradient_norm):
            line["gradient_norm"] = result.gradient_norm
        if result.taken:
            line |= self._engine.trust_ratios()
        self._tracker.log({**line, **measures, **slow.line(self._warn)})
        self._cover()

    def _cover(self) -> None:
        """Tell the tracker which steps will not be trained again."""
        if self._saver.written is not None:
            self._tracker.cover(self._saver.written)

    def _evaluate(self, step: int) -> float | None:
        """Log an evaluation; what it ranks a checkpoint by."""
        figures = self._task.evaluate()
        score = figures.pop("score", None)
        if figures:
            self._tracker.log({"step": step, **figures})
        return score


class _Skipped:
    """Steps that were not taken: written down with their samples, and bounded."""

    def __init__(self, run: RunDir, plan: Plan, engine: Engine, world: Group, warn: Callable[[str], None]) -> None:
        self._path, self._plan, self._warn = run.path / "nonfinite", plan, warn
        self._rank, self._in_a_row = engine.topology.rank, 0

    def note(self, result: StepResult, batch: Any) -> None:
        """Write the samples of a step that was not taken down, one file a rank; go on, or stop as the plan says."""
        if result.taken:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        step, what = batch.step + 1, result.what_is_not_finite()
        self._path.mkdir(exist_ok=True)
        record = {"step": step, "what": what, "loss": str(result.loss), "samples": list(batch.keys)}
        with open(self._path / f"rank-{self._rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        few = ", ".join(batch.keys[:4])
        said = f"{what} is not finite at step {step}; this rank's samples ({few}, ...) are listed in {self._path}"
        if self._plan.non_finite == "stop":
            raise NonFinite(f"{said}; nothing was changed by the step. train.non_finite=skip would leave it out")
        if self._in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise NonFinite(f"{said}; {self._in_a_row} steps in a row were skipped, which no longer is chance")
        self._warn(f"{said}; the step is skipped")
