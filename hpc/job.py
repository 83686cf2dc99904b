"""What every job does around the loop: its run directory, the record of its starts, its tracker, and how it ended."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from hpc import config as recipes
from hpc.checkpoint.files import clean
from hpc.collectives import Group
from hpc.end_note import former_end
from hpc.engine import Engine, EngineConfig
from hpc.errors import UserError
from hpc.lineage import Artifact
from hpc.loop import Keepers, Preempted, train
from hpc.optimizers import OptimizerConfig, build_optimizer
from hpc.preemption import Preemption, deadline_from_environment
from hpc.run_dir import RunDir, futile_starts
from hpc.saving import restore
from hpc.task import GuardConfig, Plan, Task, TrainState
from hpc.topology import Topology
from hpc.tracking import Tracker, TrackingConfig, parent_run
from hpc.watchdog import Watchdog


def say(text: str) -> None:
    """A line for the user, on standard error."""
    print(text, file=sys.stderr, flush=True)


def say_nothing(text: str) -> None:
    """What ranks other than the first say."""


def agreed(topology: Topology, act: Callable[[], None]) -> None:
    """``act`` on rank 0; its ``UserError`` is one on every rank."""
    box = [""]
    if topology.is_main:
        try:
            act()
        except UserError as error:
            box = [str(error)]
    if topology.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    if box[0]:
        raise UserError(box[0])


def prepare_run_dir(recipe: Any, topology: Topology, run: RunDir, fingerprint: str, what: dict[str, Any]) -> None:
    """Make the run directory, or open that of an earlier start; collective.

    Raises:
        UserError: it holds another run, or cannot be written; on every rank.
    """

    def prepare() -> None:
        RunDir.prepare(run.path, recipes.to_yaml(recipe), fingerprint, what)
        clean(run.checkpoints)

    agreed(topology, prepare)


class JobRecipe(Protocol):
    """What a job's recipe has to say of how it runs."""

    @property
    def engine(self) -> EngineConfig:
        """The section ``engine``."""
        ...

    @property
    def optimizer(self) -> OptimizerConfig:
        """The section ``optimizer``."""
        ...

    @property
    def guard(self) -> GuardConfig:
        """The section ``guard``."""
        ...

    @property
    def tracking(self) -> TrackingConfig:
        """The section ``tracking``."""
        ...


@dataclass(frozen=True)
class Start:
    """One start of a run, on this rank.

    Attributes:
        run: its directory, prepared.
        fingerprint: of the run.
        topology, device: where this rank is.
        world: group of all ranks; ``None`` for one process.
        versions: for ``run.json``, beside those of the installed packages.
        preemption: says whether to stop; ``None``: nobody does.
        kind: of job, such as ``pretrain``.
        inputs: gives the artifacts that the run is made from, for W&B; ``None``: nothing is told.
    """

    run: RunDir
    fingerprint: str
    topology: Topology
    device: torch.device
    world: Group
    versions: Mapping[str, str]
    preemption: Preemption | None
    kind: str = "run"
    inputs: Callable[[], Iterable[Artifact]] | None = None


def run_task(
    recipe: JobRecipe,
    task: Task,
    plan: Plan,
    start: Start,
    micro_batches: int,
    announce: Callable[[TrainState], None],
    scales: Mapping[str, float] | None = None,
) -> None:
    """Train ``task`` from its last checkpoint to the end of ``plan``, with a record of the start and of its end.

    Args:
        recipe: of the job.
        task, plan: what is trained, and for how long.
        start: from where.
        micro_batches: parts that a rank's samples of a step pass in.
        announce: called on rank 0 before the first step, with where the run stands.
        scales: factors of the learning rate, see :func:`hpc.optimizers.parameter_groups`.

    Raises:
        UserError: the checkpoint does not fit, or the starts before this one all failed with no progress.
        Preempted, NonFinite, NotSaved: as :func:`hpc.loop.train` does.
    """
    run, topology = start.run, start.topology
    tell = say if topology.is_main else say_nothing
    optimizer = build_optimizer(task.module, recipe.optimizer, plan.learning_rate(0), scales)
    shape = (plan.global_batch_size, recipe.optimizer.clip_norm, micro_batches)
    engine = Engine(task.module, optimizer, recipe.engine, topology, start.device, *shape)
    state = TrainState()
    restore(task, engine, run, state, tell)
    _refuse_crash_loop(run, topology, recipe.guard.futile_starts, state.step + 1)
    tracker = _tracker_of(recipe, start, state.step)
    number = _record_start(run, topology, state, start.versions)
    if topology.is_main:
        announce(state)
    keepers = _keepers_of(recipe.guard, run, topology, number, start.preemption)
    _train_to_the_end(task, engine, plan, run, tracker, state, start.world, keepers, tell)


def _refuse_crash_loop(run: RunDir, topology: Topology, most: int, first_step: int) -> None:
    """Raise a ``UserError``, on every rank, after ``most`` starts in a row that failed with no progress; 0: never."""

    def look() -> None:
        record = run.record()
        futile = futile_starts(record, first_step)
        if most and futile >= most:
            last = record["starts"][-1]["reason"]
            raise UserError(
                f"{run.path}: the last {futile} starts ended without progress (the last: {last}); "
                "see their logs, and start again with guard.futile_starts=0 once the cause is gone"
            )

    agreed(topology, look)


def _record_start(run: RunDir, topology: Topology, state: TrainState, versions: Mapping[str, str]) -> int:
    """Write this start into ``run.json``; returns its number, on all ranks."""
    hosts, box = _hosts(topology), [0]
    if topology.is_main:
        box = [run.begin_start(topology.as_dict(), state.step + 1, hosts, versions, former_end())]
    if topology.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _hosts(topology: Topology) -> list[str]:
    """Host names of all ranks."""
    if topology.world_size == 1:
        return [topology.host]
    names: list[str] = [""] * topology.world_size
    dist.all_gather_object(names, topology.host)
    return names


def _tracker_of(recipe: JobRecipe, start: Start, first_step: int) -> Tracker:
    """What writes the metrics of a run, and shows ``recipe`` as its configuration in W&B."""
    tracking = recipe.tracking
    return Tracker(
        start.run,
        is_main=start.topology.is_main,
        mode=tracking.mode,
        project=tracking.project,
        name=tracking.name,
        group=tracking.group,
        job_type=tracking.job_type or start.kind,
        first_step=first_step,
        config={
            **recipes.flatten(recipes.to_dict(recipe)),
            "fingerprint": start.fingerprint,
            **parent_run(tracking),
        },
        inputs=start.inputs,
        upload=tracking.upload_checkpoints,
    )


def _keepers_of(
    guard: GuardConfig, run: RunDir, topology: Topology, number: int, preemption: Preemption | None
) -> Keepers:
    """Who stands by start ``number`` of a run; the watchdog begins to watch."""
    if preemption is not None:
        preemption.deadline, preemption.margin_s = deadline_from_environment(), guard.margin_s
    stacks = run.path / "stacks" / f"start-{number}"
    return Keepers(preemption, Watchdog(guard.hang_s, stacks, topology.rank) if guard.hang_s else None)


def _train_to_the_end(
    task: Task,
    engine: Engine,
    plan: Plan,
    run: RunDir,
    tracker: Tracker,
    state: TrainState,
    world: Group,
    keepers: Keepers,
    say: Callable[[str], None],
) -> None:
    """The loop, and a record of how it ended."""
    reason = "failed"
    try:
        train(task, engine, plan, run, tracker, state, world, keepers, say)
        reason = "completed"
    except Preempted as stopped:
        reason = f"preempted: {stopped.reason}"
        say(f"stopped by {stopped.reason}; step {state.step} is saved, and the same command goes on from there")
        raise
    except KeyboardInterrupt:
        reason = "interrupted"
        raise
    except BaseException as error:
        reason = f"failed: {error}"
        raise
    finally:
        if keepers.watchdog is not None:
            keepers.watchdog.close()
        if engine.topology.is_main:
            run.end_start(state.step, reason)
        tracker.finish(0 if reason == "completed" else 1)
