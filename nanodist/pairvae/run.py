"""From a recipe to a trained PairVAE: the solo stage, then the pair stage, each a run that goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc import atomic, batch_norm, lineage
from hpc import config as recipes
from hpc.checkpoint.files import latest_checkpoint, read_state, read_tensors
from hpc.collectives import Group
from hpc.engine import running
from hpc.errors import UserError
from hpc.job import Start, agreed, prepare_run_dir, run_task, say
from hpc.preemption import Preemption
from hpc.run_dir import RunDir
from hpc.task import Plan, TrainState
from hpc.topology import Topology, detect
from nanodist._version import __version__
from nanodist.pairvae.data import PairData, Pairs
from nanodist.pairvae.load import load
from nanodist.pairvae.model import PairModel, start_encoder
from nanodist.pairvae.pairs import PairStore
from nanodist.pairvae.recipe import (
    OWN,
    RECIPE_FILE,
    STAGES,
    PairVAERecipe,
    Stage,
    identify,
    micro_batches,
    of_stage,
)
from nanodist.pairvae.reference import write_reference
from nanodist.pairvae.task import PairVAETask
from nanodist.weights import named_by_timm


def open_store(path: str) -> PairStore:
    """The pair store of a recipe.

    Raises:
        UserError: none is given, or there is none.
    """
    if not path:
        raise UserError("data.store is not set; give data.store=FOLDER, a store of nanodist pack --pairs")
    return PairStore.open(Path(path))


def identity(recipe: PairVAERecipe, store: Pairs) -> tuple[str, dict[str, Any]]:
    """Fingerprint of a run, and the *what* that it is made of."""
    source, weights = recipe.model.encoder, ""
    if source != OWN and not named_by_timm(source):
        encoder = start_encoder(recipe.model, recipe.seed)
        weights = encoder.weights_hash() if encoder is not None else ""
    return identify(recipe, store.manifest_hash, weights)


def make_plan(recipe: PairVAERecipe, stage: Stage, data: PairData) -> Plan:
    """What the loop needs of a stage."""
    config, samples = recipe.stage(stage), len(data.train)
    every = config.picture_every_epochs * samples / config.batch_size(samples)
    return Plan(
        steps=config.steps(samples),
        global_batch_size=config.batch_size(samples),
        log_every_steps=config.log_every_steps,
        optimizer=config.optimizer,
        saving=recipe.checkpoint,
        guard=recipe.guard,
        evaluate_every_steps=max(1, round(every)) if every else 0,
        non_finite=config.non_finite,
    )


def train(recipe: PairVAERecipe, preemption: Preemption | None = None, store: Pairs | None = None) -> Path:
    """Train both stages to their ends, from the last checkpoint where there is one; called on every rank.

    Args:
        recipe: what to train.
        preemption: says whether to stop; ``None``: nobody does.
        store: the pairs; ``None`` opens ``data.store``.

    Returns:
        The run directory, with ``recipe.yaml`` and the folders ``solo`` and ``pair``.

    Raises:
        UserError: store, trunk, run directory or the number of ranks do not suit the recipe.
        Preempted: the run was asked to stop, and its checkpoint is written.
    """
    topology = detect()
    if recipe.engine.zero_stage == 3:
        raise UserError("a PairVAE needs whole weights on each rank to draw pictures: set engine.zero_stage below 3")
    store = open_store(recipe.data.store) if store is None else store
    data = PairData(store, recipe.data)
    fingerprint, what = identity(recipe, store)
    for stage in STAGES:
        _passes(recipe, stage, data, topology)
    with running(recipe.engine, topology) as device:
        path = Path(recipe.run_dir or f"runs/{fingerprint}")
        agreed(topology, lambda: _prepare(path, recipe))
        for stage in STAGES:
            _train_stage(recipe, stage, data, topology, device, path, what, preemption)
        if topology.is_main:
            _remember(path, data)
        return path


def _remember(path: Path, data: PairData) -> None:
    """What generating has to know of the training part."""
    write_reference(load(path), data, path)
    say(f"{path} is trained")


def _prepare(path: Path, recipe: PairVAERecipe) -> None:
    """The folder of both stages; what makes it a run of this recipe is checked by each stage."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not (path / RECIPE_FILE).exists():
            atomic.write_text(path / RECIPE_FILE, recipes.to_yaml(recipe))
    except OSError as error:
        raise UserError(f"cannot write the run directory {path}: {error.strerror}") from None


def _passes(recipe: PairVAERecipe, stage: Stage, data: PairData, topology: Topology) -> int:
    coupled = recipe.model.preset == "lu2023"
    return micro_batches(recipe.stage(stage), len(data.train), topology.world_size, coupled)


def _train_stage(
    recipe: PairVAERecipe,
    stage: Stage,
    data: PairData,
    topology: Topology,
    device: torch.device,
    path: Path,
    what: dict[str, Any],
    preemption: Preemption | None,
) -> None:
    world: Group = dist.new_group() if topology.world_size > 1 else None
    task = make_task(recipe, stage, data, topology, device, world, path / stage / "pictures")
    if stage == "pair":
        begin_with(task.model, path / "solo")
    fingerprint, of = of_stage(what, stage)
    run, plan = RunDir(path / stage), make_plan(recipe, stage, data)
    prepare_run_dir(recipe, topology, run, fingerprint, of)

    def inputs() -> list[lineage.Artifact]:
        before = lineage.newest_checkpoint(path / "solo") if stage == "pair" else None
        return [*lineage.of_data(data.store), *([before] if before is not None else [])]

    begun = Start(run, fingerprint, topology, device, world, {"nanodist": __version__}, preemption, "pairvae", inputs)

    def announce(state: TrainState) -> None:
        where = f"continuing after step {state.step}" if state.step else "from the start"
        if state.step >= plan.steps:
            say(f"{run.path} is complete: {plan.steps} steps are done")
            return
        say(
            f"PairVAE {recipe.model.preset}, {stage} stage, on {len(data.train)} items ({len(data.test)} held out): "
            f"{plan.steps} steps of {plan.global_batch_size}, {where}, {topology.world_size} ranks; {run.path}"
        )

    run_task(recipe.view(stage), task, plan, begun, task.micro_batches, announce)


def make_task(
    recipe: PairVAERecipe,
    stage: Stage,
    data: PairData,
    topology: Topology,
    device: torch.device,
    world: Group,
    pictures: Path | None = None,
) -> PairVAETask:
    """The task of a stage on this rank; collective."""
    count = _passes(recipe, stage, data, topology)
    batch = recipe.stage(stage).batch_size(len(data.train))
    group = batch if recipe.model.preset == "lu2023" else 1
    layout = batch_norm.make_layout(batch, group, topology.rank, topology.world_size, count)
    encoder = start_encoder(recipe.model, recipe.seed)
    return PairVAETask(recipe, stage, data, encoder, topology, device, layout, world, count, pictures)


def begin_with(model: PairModel, solo: Path) -> None:
    """Put the weights of a finished solo stage into a model of the pair stage."""
    folder = latest_checkpoint(solo / "checkpoints")
    if read_state(folder)["task"].get("kind") != "pairvae":
        raise UserError(f"{solo} is not the solo stage of a PairVAE")
    model.load_state_dict(read_tensors(folder / "model.safetensors"))
