"""From a recipe to a finished run: set up, resume, train, clean up."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc import batch_norm
from hpc import config as recipes
from hpc.checkpoint.files import clean
from hpc.checkpoint.foreign import model_states
from hpc.checkpoint.layout import file_facts
from hpc.collectives import Group
from hpc.end_note import former_end
from hpc.engine import Engine, start
from hpc.errors import UserError
from hpc.loop import Keepers, Preempted, train
from hpc.optimizers import build_optimizer
from hpc.preemption import Preemption, deadline_from_environment
from hpc.preflight import errors
from hpc.run_dir import RunDir, futile_starts
from hpc.saving import restore
from hpc.task import Plan, TrainState
from hpc.topology import Topology, detect
from hpc.tracking import Tracker
from hpc.watchdog import Watchdog
from nanodist._version import __version__
from nanodist.encoders import load_encoder
from nanodist.pretrain.model import DEEPSPEED
from nanodist.pretrain.preflight import preflight
from nanodist.pretrain.recipe import PretrainRecipe
from nanodist.pretrain.seats import take_seat
from nanodist.pretrain.task import PretrainTask
from nanodist.shards import Store
from nanodist.views.sheet import write_view_sheet


def identity(recipe: PretrainRecipe, store: Store) -> tuple[str, dict[str, Any]]:
    """Fingerprint of a run, and the *what* that it is made of: recipe, store, and weights of a warm start."""
    inputs = {"store": store.manifest_hash}
    if recipe.init_from and recipe.init_from.startswith(DEEPSPEED):
        source = model_states(Path(recipe.init_from.removeprefix(DEEPSPEED)))
        inputs["init_from"] = file_facts(source).xxh3_128
    elif recipe.init_from and not recipe.init_from.startswith("timm:"):
        inputs["init_from"] = load_encoder(recipe.init_from).weights_hash()
    what = recipes.to_dict(recipe, what_only=True)
    return recipes.fingerprint(recipe, **inputs), {**what, "inputs": inputs}


Evaluator = Callable[[PretrainTask], dict[str, float]]


def pretrain(
    recipe: PretrainRecipe,
    make_evaluator: Callable[[PretrainRecipe, Topology], Evaluator | None] | None = None,
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
    store = _open_store(recipe)
    fingerprint, what = identity(recipe, store)
    path = Path(recipe.run_dir or f"runs/{fingerprint}")
    seat = take_seat(recipe, topology, _say)
    if seat is None:
        return path
    device = start(recipe.engine, seat)
    try:
        return _run(recipe, store, seat, device, RunDir(path), fingerprint, what, make_evaluator, preemption)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _check_installed() -> None:
    # Before anything is written, so that nothing is left behind.
    missing = [name for name in ("deepspeed", "kornia") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"training needs {' and '.join(missing)}: pip install 'nanodist[train]'")


def _open_store(recipe: PretrainRecipe) -> Store:
    if not recipe.data.store:
        raise UserError("data.store is not set; give data.store=FOLDER, a store that nanodist pack wrote")
    store = Store.open(recipe.data.store)
    batch = recipe.train.global_batch_size
    if len(store) < batch:
        raise UserError(
            f"{recipe.data.store} holds {len(store)} samples, fewer than train.global_batch_size={batch}; "
            "lower it, as no sample may come twice in one batch"
        )
    return store


def _run(
    recipe: PretrainRecipe,
    store: Store,
    topology: Topology,
    device: torch.device,
    run: RunDir,
    fingerprint: str,
    what: dict[str, Any],
    make_evaluator: Callable[[PretrainRecipe, Topology], Evaluator | None] | None,
    preemption: Preemption | None,
) -> Path:
    world = dist.new_group() if topology.world_size > 1 else None
    task = _task(recipe, store, topology, device, world)
    task.evaluator = make_evaluator(recipe, topology) if make_evaluator is not None else None
    # Only now, so that a recipe whose model cannot be built leaves no run directory.
    _prepare_run_dir(recipe, topology, run, fingerprint, what)
    say = _say if topology.is_main else _say_nothing
    _check_before_start(recipe, store, topology, run, world, device, say)
    plan = make_plan(recipe, store)
    optimizer = build_optimizer(task.module, recipe.optimizer, plan.learning_rate(0))
    engine = Engine(
        task.module,
        optimizer,
        recipe.engine,
        topology,
        device,
        plan.global_batch_size,
        recipe.optimizer.clip_norm,
        task.micro_batches,
    )
    state = TrainState()
    restore(task, engine, run, state, say)
    _agreed(topology, lambda: _refuse_crash_loop(run, recipe.guard.futile_starts, state.step + 1))
    tracker = _tracker(recipe, run, topology, fingerprint)
    number = _record_start(run, topology, state)
    if topology.is_main:
        _announce(recipe, store, topology, device, run.path, state, plan)
        write_view_sheet(store, recipe.views, recipe.seed, run.report / "views.png")
    if preemption is not None:
        preemption.deadline, preemption.margin_s = deadline_from_environment(), recipe.guard.margin_s
    hang_s, stacks = recipe.guard.hang_s, run.path / "stacks" / f"start-{number}"
    keepers = Keepers(preemption, Watchdog(hang_s, stacks, topology.rank) if hang_s else None)
    _train(task, engine, plan, run, tracker, state, world, keepers, say)
    return run.path


def _train(
    task: PretrainTask,
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


def _task(recipe: PretrainRecipe, store: Store, topology: Topology, device: torch.device, world: Group) -> PretrainTask:
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


def _record_start(run: RunDir, topology: Topology, state: TrainState) -> int:
    """Write this start into ``run.json``; returns its number, on all ranks."""
    hosts, box = _hosts(topology), [0]
    if topology.is_main:
        box = [run.begin_start(topology.as_dict(), state.step + 1, hosts, {"nanodist": __version__}, former_end())]
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


def make_plan(recipe: PretrainRecipe, store: Store) -> Plan:
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


def _prepare_run_dir(
    recipe: PretrainRecipe, topology: Topology, run: RunDir, fingerprint: str, what: dict[str, Any]
) -> None:
    def prepare() -> None:
        RunDir.prepare(run.path, recipes.to_yaml(recipe), fingerprint, what)
        clean(run.checkpoints)

    _agreed(topology, prepare)


def _agreed(topology: Topology, act: Callable[[], None]) -> None:
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


def _refuse_crash_loop(run: RunDir, most: int, first_step: int) -> None:
    record = run.record()
    futile = futile_starts(record, first_step)
    if most and futile >= most:
        last = record["starts"][-1]["reason"]
        raise UserError(
            f"{run.path}: the last {futile} starts ended without progress (the last: {last}); "
            "see their logs, and start again with guard.futile_starts=0 once the cause is gone"
        )


def _check_before_start(
    recipe: PretrainRecipe,
    store: Store,
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
        raise UserError("; ".join(wrong))
    for finding in findings:
        if finding.level == "warning":
            say(f"warning: {finding.what}")


def _tracker(recipe: PretrainRecipe, run: RunDir, topology: Topology, fingerprint: str) -> Tracker:
    t = recipe.tracking
    return Tracker(
        run,
        is_main=topology.is_main,
        mode=t.mode,
        project=t.project,
        name=t.name,
        group=t.group,
        config={**recipes.flatten(recipes.to_dict(recipe)), "fingerprint": fingerprint},
    )


def _announce(
    recipe: PretrainRecipe,
    store: Store,
    topology: Topology,
    device: torch.device,
    path: Path,
    state: TrainState,
    plan: Plan,
) -> None:
    how = f"{topology.world_size} {'rank' if topology.world_size == 1 else 'ranks'} on {device.type}"
    if state.step >= plan.steps:
        _say(f"{path} is complete: {state.step} of {plan.steps} steps are done")
        return
    where = f"continuing after step {state.step}" if state.step else "from the start"
    _say(
        f"{recipe.objective.name} with {recipe.encoder.trunk} on {len(store)} samples, {plan.steps} steps of "
        f"{plan.global_batch_size}, {where}, {how}; run directory {path}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_nothing(text: str) -> None:
    pass
