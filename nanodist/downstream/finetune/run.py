"""From a recipe to a fine-tuned classifier and its scores: set up, resume, train, test."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc import batch_norm, lineage
from hpc.checkpoint.files import read_tensors
from hpc.engine import running
from hpc.errors import UserError
from hpc.job import Start, prepare_run_dir, run_task, say
from hpc.preemption import Preemption
from hpc.run_dir import RunDir
from hpc.task import Plan, TrainState
from hpc.topology import Topology, detect
from hpc.wandb_after import tell
from nanodist._version import __version__
from nanodist.downstream.finetune.base import LabelledTask
from nanodist.downstream.finetune.data import Labels
from nanodist.downstream.finetune.load import chosen_checkpoint
from nanodist.downstream.finetune.model import learning_rate_scales, start_encoder
from nanodist.downstream.finetune.recipe import FinetuneRecipe, identify
from nanodist.downstream.finetune.scores import SCORES_FILE
from nanodist.downstream.finetune.task import ClassifyTask


def identity(recipe: FinetuneRecipe, labels: Labels) -> tuple[str, dict[str, Any]]:
    """Fingerprint of a fine-tuning, and the *what* that it is made of."""
    hashes = [part.store.manifest_hash for part in labels.dataset.parts]
    return identify(recipe, hashes, lambda: start_encoder(recipe).weights_hash())


def make_plan(recipe: FinetuneRecipe, labels: Labels) -> Plan:
    """What the loop needs: with a validation part, the checkpoint of the best look at it stays."""
    t, saving = recipe.train, recipe.checkpoint
    looks = len(labels.validation) > 0
    if looks:
        saving = dataclasses.replace(saving, keep_best=max(1, saving.keep_best))
    return Plan(
        steps=t.steps,
        global_batch_size=t.batch_size(len(labels.train)),
        log_every_steps=t.log_every_steps,
        optimizer=recipe.optimizer,
        saving=saving,
        guard=recipe.guard,
        evaluate_every_steps=t.evaluate_every_steps if looks else 0,
        non_finite=t.non_finite,
    )


def finetune(recipe: FinetuneRecipe, preemption: Preemption | None = None) -> Path:
    """Run a recipe to its end and test it, from its last checkpoint where there is one; called on every rank.

    Returns:
        The run directory, with ``scores.json`` and ``predictions.csv``.

    Raises:
        UserError: labels, encoder, run directory or the number of ranks do not suit the recipe.
        Preempted: the run was asked to stop, and its checkpoint is written.
    """
    topology = detect()
    if recipe.engine.zero_stage == 3:
        raise UserError("a fine-tuning needs whole weights on each rank to be tested: set engine.zero_stage below 3")
    labels = labels_of(recipe)
    fingerprint, what = identity(recipe, labels)
    micro_batches = recipe.train.micro_batches(len(labels.train), topology.world_size)
    with running(recipe.engine, topology) as device:
        run = RunDir(Path(recipe.run_dir or f"runs/{fingerprint}"))
        _run(recipe, labels, topology, device, run, (fingerprint, what), micro_batches, preemption)
        return run.path


def _run(
    recipe: FinetuneRecipe,
    labels: Labels,
    topology: Topology,
    device: torch.device,
    run: RunDir,
    identity: tuple[str, dict[str, Any]],
    micro_batches: int,
    preemption: Preemption | None,
) -> None:
    world = dist.new_group() if topology.world_size > 1 else None
    batch, group = recipe.train.batch_size(len(labels.train)), recipe.train.group_size(len(labels.train))
    views = len(recipe.sample_views)
    layout = batch_norm.make_layout(batch, group, topology.rank, topology.world_size, micro_batches, views)
    task = _task_type(recipe)(recipe, labels, topology, device, layout, world, micro_batches)
    task.pictures = run.pictures
    prepare_run_dir(recipe, topology, run, *identity)
    plan = make_plan(recipe, labels)

    def inputs() -> list[lineage.Artifact]:
        before = lineage.of_source(recipe.encoder.source)
        return [*lineage.of_data(*(part.store for part in labels.dataset.parts)), *([before] if before else [])]

    begun = Start(run, identity[0], topology, device, world, {"nanodist": __version__}, preemption, "finetune", inputs)
    scales = learning_rate_scales(recipe, task.module)

    def announce(state: TrainState) -> None:
        _announce(recipe, labels, run.path, state, plan, topology)

    run_task(recipe, task, plan, begun, micro_batches, announce, scales)
    _test(task, run, identity[0])


def labels_of(recipe: FinetuneRecipe) -> Labels:
    """The labels of a recipe, or its masks.

    Raises:
        UserError: there are none, or they cannot be split by micrograph.
    """
    if recipe.task == "classification":
        return Labels(recipe.data)
    from nanodist.downstream.segment.data import Masks

    return Masks(recipe.data, recipe.decoder)


def _task_type(recipe: FinetuneRecipe) -> type[LabelledTask]:
    if recipe.task == "classification":
        return ClassifyTask
    from nanodist.downstream.segment.task import SegmentTask

    return SegmentTask


def _test(task: LabelledTask, run: RunDir, fingerprint: str) -> None:
    """Test with the best checkpoint, or the last one where nothing ranked them; collective."""
    chosen = chosen_checkpoint(run.checkpoints)
    task.module.load_state_dict(read_tensors(chosen / "model.safetensors"))
    said = task.test(run.path, chosen.name, fingerprint)
    if task.topology.is_main:
        say(said)
        _tell(run)


def _tell(run: RunDir) -> None:
    """Test scores and the worst masks, for W&B where it has the run."""
    rows = json.loads((run.path / SCORES_FILE).read_bytes())["rows"]
    figures = {
        f"test/{name}": rows[0][name] for name in ("balanced_accuracy", "macro_f1", "accuracy") if name in rows[0]
    }
    figures |= {f"test/{r['metric']}": r["mean"] for r in rows if r.get("class") == "all but background"}
    worst = sorted((run.report / "overlays").glob("*.png"))[:6]
    pictures = {f"pictures/test-worst-{place + 1}": file.read_bytes() for place, file in enumerate(worst)}
    tell(run.path, figures=figures, pictures=pictures)


def _values(labels: Labels) -> str:
    """Of masks, the values that are classes; many of them are likely numbers of objects."""
    values: tuple[int, ...] = getattr(labels, "values", ())
    if not values:
        return ""
    shown = ", ".join(map(str, values[:8])) + (" ..." if len(values) > 8 else "")
    doubt = " (if these are numbers of objects, set decoder.masks=instances)" if len(values) > 8 else ""
    return f"; {len(values)} classes of pixels: {shown}{doubt}"


def _announce(
    recipe: FinetuneRecipe,
    labels: Labels,
    path: Path,
    state: TrainState,
    plan: Plan,
    topology: Topology,
) -> None:
    if state.step >= plan.steps:
        say(f"{path} is complete: {state.step} of {plan.steps} steps are done; {SCORES_FILE} is written again")
        return
    short = ", ".join(f"{name} ({count})" for name, count in labels.short.items())
    where = f"continuing after step {state.step}" if state.step else "from the start"
    say(
        f"fine-tuning {recipe.encoder.source} for {recipe.task} on {len(labels.train)} samples, "
        f"{len(labels.validation)} more to choose the step, {len(labels.test)} to test; at most {plan.steps} steps of "
        f"{plan.global_batch_size}, {where}, {topology.world_size} ranks; run directory {path}"
        + _values(labels)
        + (f"; these classes have fewer labels than asked for: {short}" if short else "")
    )
