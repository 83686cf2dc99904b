"""From a recipe to a finished run: set up, resume, train, clean up."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc import config as recipes
from hpc.batch_norm import make_layout
from hpc.engine import Engine, start
from hpc.errors import UserError
from hpc.loop import Plan, TrainState, restore, train
from hpc.optimizers import build_optimizer
from hpc.run_dir import RunDir
from hpc.topology import Topology, detect
from hpc.tracking import Tracker
from nanodist._version import __version__
from nanodist.encoders import load_encoder
from nanodist.pretrain.recipe import PretrainRecipe
from nanodist.pretrain.task import PretrainTask
from nanodist.shards import Store
from nanodist.views.sheet import write_view_sheet


def identity(recipe: PretrainRecipe, store: Store) -> tuple[str, dict[str, Any]]:
    """Fingerprint of a run, and the *what* that it is made of: recipe, store, and weights of a warm start."""
    inputs = {"store": store.manifest_hash}
    if recipe.init_from and not recipe.init_from.startswith("timm:"):
        inputs["init_from"] = load_encoder(recipe.init_from).weights_hash()
    what = recipes.to_dict(recipe, what_only=True)
    return recipes.fingerprint(recipe, **inputs), {**what, "inputs": inputs}


def pretrain(recipe: PretrainRecipe) -> Path:
    """Run a recipe to its end, from its last checkpoint where there is one; to be called on every rank.

    Returns:
        The run directory.

    Raises:
        UserError: the store, the run directory or the number of ranks does not suit the recipe.
    """
    topology = detect()
    _check_installed()
    store = _open_store(recipe)
    fingerprint, what = identity(recipe, store)
    path = Path(recipe.run_dir or f"runs/{fingerprint}")
    device = start(recipe.engine, topology)
    try:
        return _run(recipe, store, topology, device, path, fingerprint, what)
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
    path: Path,
    fingerprint: str,
    what: dict[str, Any],
) -> Path:
    world = dist.new_group() if topology.world_size > 1 else None
    layout = make_layout(recipe.train.global_batch_size, recipe.bn_group_size(), topology.rank, topology.world_size)
    task = PretrainTask(recipe, store, topology, device, layout, world)
    # Only now, so that a recipe whose model cannot be built leaves no run directory.
    run = _prepare_run_dir(recipe, topology, path, fingerprint, what)
    plan = _plan(recipe, store)
    optimizer = build_optimizer(task.module, recipe.optimizer, plan.learning_rate(0))
    engine = Engine(
        task.module, optimizer, recipe.engine, topology, device, plan.global_batch_size, recipe.optimizer.clip_norm
    )
    state = TrainState()
    restore(task, engine, run, state, warn=_say if topology.is_main else lambda _: None)
    tracker = _tracker(recipe, run, topology, fingerprint)
    hosts = _hosts(topology)
    if topology.is_main:
        run.begin_start(topology.as_dict(), state.step + 1, hosts, {"nanodist": __version__})
        _announce(recipe, store, topology, device, path, state, plan)
        write_view_sheet(store, recipe.views, recipe.seed, run.report / "views.png")
    reason = "failed"
    try:
        train(task, engine, plan, run, tracker, state, world)
        reason = "completed"
    except KeyboardInterrupt:
        reason = "interrupted"
        raise
    except BaseException as error:
        reason = f"failed: {error}"
        raise
    finally:
        if topology.is_main:
            run.end_start(state.step, reason)
        tracker.finish(0 if reason == "completed" else 1)
    return path


def _hosts(topology: Topology) -> list[str]:
    """Host names of all ranks."""
    if topology.world_size == 1:
        return [topology.host]
    names: list[str] = [""] * topology.world_size
    dist.all_gather_object(names, topology.host)
    return names


def _plan(recipe: PretrainRecipe, store: Store) -> Plan:
    return Plan(
        steps=recipe.train.total_steps(len(store)),
        global_batch_size=recipe.train.global_batch_size,
        log_every_steps=recipe.train.log_every_steps,
        optimizer=recipe.optimizer,
        saving=recipe.checkpoint,
    )


def _prepare_run_dir(
    recipe: PretrainRecipe, topology: Topology, path: Path, fingerprint: str, what: dict[str, Any]
) -> RunDir:
    """Made by rank 0; what is wrong with it is an error on every rank."""
    problem = ""
    if topology.is_main:
        try:
            RunDir.prepare(path, recipes.to_yaml(recipe), fingerprint, what)
        except UserError as error:
            problem = str(error)
    if topology.world_size > 1:
        box = [problem]
        dist.broadcast_object_list(box, src=0)
        problem = box[0]
    if problem:
        raise UserError(problem)
    return RunDir(path)


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
