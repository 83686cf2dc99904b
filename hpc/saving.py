"""Saving and restoring of a run: what is collective about it, and what follows when a write fails."""

from __future__ import annotations

from collections.abc import Callable

from hpc.checkpoint.elastic import gather_on_main, optimizer_steps, scatter
from hpc.checkpoint.files import CheckpointError, candidates, newest_whole, read_state, read_tensors
from hpc.checkpoint.retention import Retention
from hpc.checkpoint.writer import CheckpointWriter
from hpc.collectives import Group, any_rank
from hpc.engine import Engine
from hpc.errors import UserError
from hpc.run_dir import RunDir
from hpc.task import SavingConfig, Task, TrainState


class NotSaved(Exception):
    """The last checkpoint of a start could not be written; the text says why, and is empty on ranks other than 0."""


class Saver:
    """Writes the checkpoints of one start of a run.

    A write that fails is said and does not end the run, since the disk may have room again by the next one; only the
    last save of a start has to succeed.

    Args:
        task, engine: what is saved.
        config: when, and what stays.
        run: where.
        world: group of all ranks; ``None`` for one process.
        warn: called on rank 0 with a sentence about a write that failed.
    """

    def __init__(
        self, task: Task, engine: Engine, config: SavingConfig, run: RunDir, world: Group, warn: Callable[[str], None]
    ) -> None:
        self._task, self._engine, self._config, self._run, self._world = task, engine, config, run, world
        self._warn = warn
        self._writer: CheckpointWriter | None = None
        if engine.topology.is_main:
            retention = Retention(config.keep, config.keep_every_steps, config.keep_best)
            self._writer = CheckpointWriter(run.checkpoints, retention, config.background)

    def save(self, state: TrainState, score: float | None = None) -> None:
        """Save the state after ``state.step`` steps; collective. ``score`` ranks it, lower being better."""
        room = None
        if self._writer is not None:
            self._say(self._writer.wait())
            room = self._writer.memory.room
        tensors = gather_on_main(self._engine, room)
        if self._writer is not None:
            rest = {"optimizer_steps": optimizer_steps(self._engine), "task": self._task.state_dict()}
            self._writer.save(state.step, tensors, rest, score)

    @property
    def written(self) -> int | None:
        """Steps of the newest checkpoint that this start has written; ``None``: none, or not rank 0."""
        return self._writer.written if self._writer is not None else None

    def report(self) -> None:
        """Say what failed in the background since the last call; to be called before a save, not after the last."""
        if self._writer is not None:
            self._say(self._writer.problem())

    def _say(self, problem: str | None) -> None:
        if problem:
            self._warn(f"{problem}; training goes on, and the next checkpoint is tried in its turn")

    def finish(self) -> None:
        """Wait for the last write; collective.

        Raises:
            NotSaved: it failed; on every rank.
        """
        problem = self._writer.wait() if self._writer is not None else None
        if any_rank(problem is not None, self._world, self._engine.device):
            raise NotSaved(problem or "")


def restore(task: Task, engine: Engine, run: RunDir, state: TrainState, warn: Callable[[str], None]) -> None:
    """Continue from the newest whole checkpoint of the run, where there is one; every rank reads it.

    Args:
        task, engine, state: take what the checkpoint holds.
        run: the run directory.
        warn: called with a sentence where the newest checkpoint is broken and an older one is taken.

    Raises:
        UserError: there are checkpoints, and none of them is whole, or it does not fit the model.
    """
    if not candidates(run.checkpoints):
        return
    try:
        folder, faults = newest_whole(run.checkpoints)
        if faults:
            warn(f"{'; '.join(faults)}; continuing from {folder.name}")
        saved = read_state(folder)
        model = read_tensors(folder / "model.safetensors")
        scatter(engine, model, read_tensors(folder / "optimizer.safetensors"), saved["optimizer_steps"])
        task.load_state_dict(saved["task"])
    except CheckpointError as error:
        raise UserError(f"cannot resume {run.path}: {error}") from None
    state.step = int(saved["step"])
