"""From a recipe to a finished run: set up, resume, train, clean up."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc import batch_norm, lineage
from hpc.collectives import Group
from hpc.engine import running
from hpc.errors import UserError
from hpc.job import Start, prepare_run_dir, run_task, say, say_nothing
from hpc.preemption import Preemption
from hpc.preflight import errors
from hpc.run_dir import RunDir
from hpc.task import Plan, TrainState
from hpc.topology import Topology, detect
from nanodist._version import __version__
from nanodist.pretrain.data import identity, on_all_ranks, open_data, staged
from nanodist.pretrain.preflight import preflight
from nanodist.pretrain.recipe import PretrainRecipe
from nanodist.pretrain.seats import take_seat
from nanodist.pretrain.task import PretrainTask
from nanodist.shards.windows import Tiles
from nanodist.views.sheet import write_view_sheet

Evaluator = Callable[[PretrainTask], dict[str, float]]


def pretrain(
    recipe: PretrainRecipe,
    make_evaluator: Callable[[PretrainTask], Evaluator | None] | None = None,
    preemption: Preemption | None = None,
) -> Path:
    """Run a recipe to its end, from its last checkpoint where there is one; to be called on every rank.

    Args:
        recipe: what to train, and how.
        make_evaluator: gives what measures the encoder while it trains.
        preemption: says whether to stop, with its handlers installed by the caller; ``None``: nobody does.

    Returns:
        The run directory.

    Raises:
        UserError: the store, the run directory or the number of ranks does not suit the recipe.
        Preempted: the run was asked to stop, and its checkpoint is written.
    """
    topology = detect()
    _check_installed()
    store = open_data(recipe)
    seat = take_seat(recipe, topology, say)
    if seat is None:
        return Path(recipe.run_dir or f"runs/{identity(recipe, store)[0]}")
    with running(recipe.engine, seat) as device:
        store = on_all_ranks(recipe, store, seat)
        fingerprint, what = identity(recipe, store)
        path = Path(recipe.run_dir or f"runs/{fingerprint}")
        store = staged(recipe, store, seat, say)
        return _run(recipe, store, seat, device, RunDir(path), fingerprint, what, make_evaluator, preemption)


def _check_installed() -> None:
    # Before anything is written, so that nothing is left behind.
    missing = [name for name in ("deepspeed", "kornia", "numba") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"training needs {' and '.join(missing)}: pip install 'nanodist[train]'")


def _run(
    recipe: PretrainRecipe,
    store: Tiles,
    topology: Topology,
    device: torch.device,
    run: RunDir,
    fingerprint: str,
    what: dict[str, Any],
    make_evaluator: Callable[[PretrainTask], Evaluator | None] | None,
    preemption: Preemption | None,
) -> Path:
    world = dist.new_group() if topology.world_size > 1 else None
    task = _task(recipe, store, topology, device, world)
    task.evaluator = make_evaluator(task) if make_evaluator is not None else None
    task.pictures = run.pictures
    # Only now, so that a recipe whose model cannot be built leaves no run directory.
    prepare_run_dir(recipe, topology, run, fingerprint, what)
    tell = say if topology.is_main else say_nothing
    _check_before_start(recipe, store, topology, run, world, device, tell)
    plan = make_plan(recipe, store)

    def announce(state: TrainState) -> None:
        _announce(recipe, store, topology, device, run.path, state, plan)
        write_view_sheet(store, recipe.views, recipe.seed, run.report / "views.png")

    def inputs() -> list[lineage.Artifact]:
        before = lineage.of_source(recipe.init_from) if recipe.init_from else None
        return [*lineage.of_data(store), *([before] if before is not None else [])]

    begun = Start(run, fingerprint, topology, device, world, {"nanodist": __version__}, preemption, "pretrain", inputs)
    run_task(recipe, task, plan, begun, task.micro_batches, announce)
    return run.path


def _task(recipe: PretrainRecipe, store: Tiles, topology: Topology, device: torch.device, world: Group) -> PretrainTask:
    micro_batches = recipe.train.micro_batches(topology.world_size)
    layout = batch_norm.make_layout(
        recipe.train.global_batch_size,
        recipe.bn_group_size(),
        topology.rank,
        topology.world_size,
        micro_batches,
        views=2 if recipe.train.bn_views == "both" else 1,
    )
    return PretrainTask(recipe, store, topology, device, layout, world, micro_batches)


def make_plan(recipe: PretrainRecipe, store: Tiles) -> Plan:
    """What the loop needs of ``recipe`` on ``store``."""
    steps_an_epoch = len(store) / recipe.train.global_batch_size
    every = recipe.evaluation.every_epochs if recipe.evaluation.store else 0.0
    return Plan(
        steps=recipe.train.total_steps(len(store)),
        global_batch_size=recipe.train.global_batch_size,
        log_every_steps=recipe.train.log_every_steps,
        optimizer=recipe.optimizer,
        saving=recipe.checkpoint,
        guard=recipe.guard,
        evaluate_every_steps=max(1, round(every * steps_an_epoch)) if every else 0,
        non_finite=recipe.train.non_finite,
    )


def _check_before_start(
    recipe: PretrainRecipe,
    store: Tiles,
    topology: Topology,
    run: RunDir,
    world: Group,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """What would stop the run later is said now."""
    findings = preflight(recipe, store, topology, run.path, world, device)
    wrong = errors(findings)
    if wrong:
        if topology.is_main:
            run.withdraw()  # what is to be changed may be a part of what the directory is known by
        raise UserError("; ".join(wrong))
    for finding in findings:
        if finding.level == "warning":
            say(f"warning: {finding.what}")


def _announce(
    recipe: PretrainRecipe,
    store: Tiles,
    topology: Topology,
    device: torch.device,
    path: Path,
    state: TrainState,
    plan: Plan,
) -> None:
    how = f"{topology.world_size} {'rank' if topology.world_size == 1 else 'ranks'} on {device.type}"
    if state.step >= plan.steps:
        say(f"{path} is complete: {state.step} of {plan.steps} steps are done")
        return
    where = f"continuing after step {state.step}" if state.step else "from the start"
    say(
        f"{recipe.objective.name} with {recipe.encoder.trunk} on {len(store)} samples, {plan.steps} steps of "
        f"{plan.global_batch_size}, {where}, {how}; run directory {path}"
    )
