"""One training loop for every task.

A task says what is trained; the loop steps, logs, saves and resumes. Order at each step boundary: step, metrics,
checkpoint. Everything a step does is a function of (recipe, step), so that a run which was killed goes on as if it
had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from hpc.checkpoint.elastic import gather, optimizer_steps, scatter
from hpc.checkpoint.files import CheckpointError, candidates, latest_checkpoint, read_state, read_tensors, write
from hpc.collectives import Group, any_rank
from hpc.config import option
from hpc.engine import Engine
from hpc.errors import UserError
from hpc.optimizers import OptimizerConfig
from hpc.optimizers.schedule import factor
from hpc.progress import Progress
from hpc.run_dir import RunDir
from hpc.tracking import Tracker


@dataclass(frozen=True)
class SavingConfig:
    """The section ``checkpoint`` of a recipe; a *how*."""

    every_steps: int = option(100, "Steps between checkpoints; the last step is always saved.", low=1)
    keep: int = option(2, "How many checkpoints stay.", low=1)


class StepBatch(Protocol):
    """What the loop needs to know of a batch."""

    step: int
    keys: list[str]
    wait_seconds: float


class Task(Protocol):
    """What a job kind gives the loop. ``forward`` and ``loss`` are apart, since some losses couple the batch."""

    module: nn.Module

    def batches(self, start_step: int) -> Iterator[Any]:
        """This rank's part of every global batch from ``start_step`` on, without end."""
        ...

    def forward(self, model: Callable[..., Any], batch: Any) -> dict[str, Tensor]:
        """Named outputs of ``model`` (the engine's forward) for this rank's samples."""
        ...

    def loss(self, outputs: dict[str, Tensor], batch: Any) -> Tensor:
        """The loss of the global batch, the same on every rank; gradients as :mod:`hpc.collectives` says."""
        ...

    def after_step(self) -> None:
        """What moves once an optimizer step, such as running statistics."""
        ...

    def measures(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Figures for the log; every rank calls it on the same steps."""
        ...

    def epochs_done(self, step: int) -> float:
        """Passes over the data after ``step`` steps."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state beside the module's tensors, with a ``version``."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave; a mismatch raises ``CheckpointError`` with both values."""
        ...


class NonFiniteLoss(Exception):
    """The loss was NaN or infinite; names the step and the samples."""


@dataclass
class TrainState:
    """Where a run stands: optimizer steps done."""

    step: int = 0


@dataclass(frozen=True)
class Plan:
    """What the loop needs of a recipe.

    Attributes:
        steps: optimizer steps of the whole run.
        global_batch_size: samples a step.
        log_every_steps: steps between lines of ``metrics.jsonl``; the first and the last step are always logged.
    """

    steps: int
    global_batch_size: int
    log_every_steps: int
    optimizer: OptimizerConfig
    saving: SavingConfig

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step after ``step`` are done."""
        o = self.optimizer
        # A run that is cut short by an override should still reach its peak.
        warmup = min(o.warmup_steps, self.steps // 10)
        share = factor(step, self.steps, warmup, o.schedule, o.final_lr_factor)
        return o.peak_lr(self.global_batch_size) * share


def train(
    task: Task, engine: Engine, plan: Plan, run: RunDir, tracker: Tracker, state: TrainState, world: Group
) -> None:
    """Train from ``state`` to the end of ``plan``, on every rank; ``state`` says afterwards how far it came."""
    clock = _Clock(plan, state.step, engine.topology.is_main)
    if state.step >= plan.steps:
        return
    for batch in task.batches(state.step):
        lr = plan.learning_rate(state.step)
        loss, outputs = train_step(task, engine, batch, lr)
        state.step += 1
        clock.stepped(batch.wait_seconds, loss)
        if state.step == 1 or state.step % plan.log_every_steps == 0 or state.step == plan.steps:
            measures = task.measures(outputs)
            epoch = task.epochs_done(state.step)
            tracker.log({**clock.line(state.step), "epoch": epoch, "loss": loss, "lr": lr, **measures})
        if state.step % plan.saving.every_steps == 0 or state.step == plan.steps:
            save(task, engine, plan, run, state, world)
            clock.restart()
        if state.step == plan.steps:
            break
    clock.close()


def train_step(task: Task, engine: Engine, batch: StepBatch, lr: float) -> tuple[float, dict[str, Tensor]]:
    """One step on one global batch; returns its loss and the detached outputs of this rank.

    Raises:
        NonFiniteLoss: before anything is changed. The loss is one value on all ranks, so all raise together.
    """
    engine.module.train()
    outputs = task.forward(engine.forward, batch)
    loss = task.loss(outputs, batch)
    value = float(loss.detach())
    if not math.isfinite(value):
        few = ", ".join(batch.keys[:8])
        raise NonFiniteLoss(f"the loss is {value} at step {batch.step + 1}; first samples of this rank: {few}")
    engine.backward(loss)
    engine.step(lr)
    task.after_step()
    return value, {name: tensor.detach() for name, tensor in outputs.items()}


def save(task: Task, engine: Engine, plan: Plan, run: RunDir, state: TrainState, world: Group) -> None:
    """Save a checkpoint; collective. A failure of rank 0 to write ends the run on every rank, with its reason there.

    Raises:
        UserError: the checkpoint could not be written; the one before it stays.
    """
    tensors = gather(engine)
    problem = None
    if engine.topology.is_main:
        rest = {"optimizer_steps": optimizer_steps(engine), "task": task.state_dict()}
        try:
            write(run.checkpoints, state.step, tensors, rest, plan.saving.keep)
        except OSError as error:
            problem = f"checkpoint of step {state.step} in {run.checkpoints} cannot be written: {error.strerror}"
    if any_rank(problem is not None, world, engine.device):
        raise UserError(problem or "rank 0 could not write a checkpoint")


def restore(task: Task, engine: Engine, run: RunDir, state: TrainState, warn: Callable[[str], None]) -> None:
    """Continue from the newest whole checkpoint of the run, where there is one; every rank reads it.

    Args:
        task, engine, state: take what the checkpoint holds.
        run: the run directory.
        warn: called with a sentence where the newest checkpoint is broken and an older one is taken.

    Raises:
        UserError: there are checkpoints, and none of them is whole, or it does not fit the model.
    """
    found: Sequence[Any] = candidates(run.checkpoints)
    if not found:
        return
    try:
        folder = latest_checkpoint(run.checkpoints)
        if folder != found[0]:
            warn(f"{found[0]} is broken; continuing from {folder.name}")
        saved = read_state(folder)
        model = read_tensors(folder / "model.safetensors")
        scatter(engine, model, read_tensors(folder / "optimizer.safetensors"), saved["optimizer_steps"])
        task.load_state_dict(saved["task"])
    except CheckpointError as error:
        raise UserError(f"cannot resume {run.path}: {error}") from None
    state.step = int(saved["step"])


class _Clock:
    """Rate, share of waiting for data, and the progress line. Saves are not counted as training time."""

    def __init__(self, plan: Plan, step: int, is_main: bool) -> None:
        self._batch = plan.global_batch_size
        self._bar = Progress(plan.steps, "training", "steps", enabled=is_main)
        self._bar.done = self._bar.first = step
        self._steps, self._waited, self._elapsed = 0, 0.0, 0.0
        self._began = time.monotonic()

    def restart(self) -> None:
        self._began = time.monotonic()

    def stepped(self, waited: float, loss: float) -> None:
        now = time.monotonic()
        self._steps, self._waited = self._steps + 1, self._waited + waited
        self._elapsed, self._began = self._elapsed + now - self._began, now
        self._bar.update(note=f"loss {loss:.4f}")

    def line(self, step: int) -> dict[str, float]:
        elapsed = max(self._elapsed, 1e-9)
        values = {
            "step": step,
            "samples_seen": step * self._batch,
            "images_per_s": self._steps * self._batch / elapsed,
            "data_wait_share": self._waited / elapsed,
        }
        self._steps, self._waited, self._elapsed = 0, 0.0, 0.0
        return values

    def close(self) -> None:
        self._bar.close()
