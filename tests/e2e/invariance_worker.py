"""What one rank of :mod:`tests.e2e.invariance` does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from hpc import config as recipes
from hpc.batch_norm import Layout, make_layout
from hpc.checkpoint.elastic import gather, optimizer_steps, scatter
from hpc.engine import Engine, start
from hpc.optimizers import build_optimizer
from hpc.seeding import permutation
from hpc.step import train_step
from hpc.topology import detect
from nanodist.pretrain.recipe import PretrainRecipe
from nanodist.pretrain.run import make_plan
from nanodist.pretrain.task import PretrainTask
from nanodist.shards import Batch, Store
from nanodist.shards.loader import places
from tests.e2e.invariance import GROUPS, MICRO_BATCHES, RATES, SABOTAGES, STATES


class Bench:
    """A task and its engine, as a pretraining makes them."""

    def __init__(
        self,
        folder: Path,
        objective: str,
        stage: int = 0,
        sabotage: str = "none",
        micro_batches: int = 1,
        workers: int = 0,
        precision: str = "fp32",
        group_size: int | None = None,
        device: str | None = None,
    ) -> None:
        values = json.loads((folder / "recipe.json").read_text())
        values["objective"] = {"name": objective}
        values["optimizer"]["lr"] = RATES[objective]
        values["engine"] |= {"zero_stage": stage, "device": device or values["engine"]["device"]}
        values["data"] = {"workers": workers}
        self.group_size = group_size or GROUPS[micro_batches]
        values["train"] |= {"precision": precision, "bn_group_size": self.group_size}
        recipe = recipes.build(PretrainRecipe, values)
        topology = detect()
        store = Store.open(folder / "store")
        self.device = start(recipe.engine, topology)
        self.rank, self.world_size, self.sabotage = topology.rank, topology.world_size, sabotage
        world = dist.new_group() if topology.world_size > 1 else None
        batch = recipe.train.global_batch_size
        if sabotage == "norm_per_rank":
            alone = batch // topology.world_size
            layout = Layout(alone, alone, world)
        else:
            layout = make_layout(batch, recipe.bn_group_size(), self.rank, self.world_size, micro_batches)
        self.task = PretrainTask(recipe, store, topology, self.device, layout, world, micro_batches)
        self.plan = make_plan(recipe, store)
        optimizer = build_optimizer(self.task.module, recipe.optimizer, self.plan.learning_rate(0))
        self.engine = Engine(
            self.task.module, optimizer, recipe.engine, topology, self.device, batch, 0.0, micro_batches
        )
        self.places = places(batch, self.rank, self.world_size, micro_batches)
        self.permuted: int | None = None

    def close(self) -> None:
        """Give up the process groups, each of which has threads of gloo that poll."""
        layout = self.task.layout
        # Two of these may be one.
        for group in {self.task.group, layout.world, layout.span, self.engine._group} - {None}:
            dist.destroy_process_group(group)

    def batch(self, step: int) -> Batch:
        stream = self.task.batches(step)
        batch = next(stream)
        stream.close()
        if self.sabotage == "swapped_sample" and self.rank == 1:
            wrong = (int(batch.indices[0]) + 1) % len(self.task.store)
            batch.keys[0] = self.task.store.keys[wrong]
            batch.images[0] = self.task.store.read(wrong)
        return batch if self.permuted is None else self._permute(batch)

    def _permute(self, batch: Batch) -> Batch:
        size = self.task.layout.bn_group_size
        order = np.concatenate(
            [
                first + permutation(size, self.permuted or 0, "permute", batch.step)
                for first in range(0, len(batch.keys), size)
            ]
        )
        keys = [batch.keys[i] for i in order]
        return Batch(batch.step, batch.epochs[order], batch.indices[order], keys, batch.images[order], None, 0.0)

    def step(self, step: int) -> float:
        return train_step(self.task, self.engine, self.batch(step), self.plan.learning_rate(step)).loss

    def recorded_step(self, step: int, folder: Path) -> float:
        """One step whose samples, views, loss, gradient and update are written to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        batch = self.batch(step)
        np.save(folder / f"views-{self.rank}.npy", self.task.views(batch).cpu().numpy())
        record = {"places": self.places.tolist(), "keys": batch.keys}
        (folder / f"samples-{self.rank}.json").write_text(json.dumps(record))
        before = {name: t.cpu().clone() for name, t in gather(self.engine)["model"].items()}
        gradients: dict[str, torch.Tensor] = {}
        loss = self._step_and_keep_gradients(batch, self.plan.learning_rate(step), gradients)
        after = {name: t.cpu() for name, t in gather(self.engine)["model"].items()}
        if self.rank == 0:
            save_file(self._changes(before, after, gradients, loss), folder / "step.safetensors")
        return loss

    def _changes(
        self,
        before: dict[str, torch.Tensor],
        after: dict[str, torch.Tensor],
        gradients: dict[str, torch.Tensor],
        loss: float,
    ) -> dict[str, torch.Tensor]:
        parameters = {name for name, _ in self.task.module.named_parameters()}
        changes = {"loss": torch.tensor(loss, dtype=torch.float64)}
        for name, tensor in after.items():
            if name in parameters:
                changes[f"update.{name}"] = tensor - before[name]
            elif tensor.is_floating_point():
                changes[f"buffer.{name}"] = tensor.clone()
        return {**changes, **{f"gradient.{name}": tensor.cpu() for name, tensor in gradients.items()}}

    def _step_and_keep_gradients(self, batch: Batch, lr: float, gradients: dict[str, torch.Tensor]) -> Any:
        real_step = self.engine.step

        def step(lr: float) -> None:
            gradients.update(whole_gradients(self.engine))
            real_step(lr)

        self.engine.step = step  # type: ignore[method-assign]
        try:
            return train_step(self.task, self.engine, batch, lr).loss
        finally:
            self.engine.step = real_step  # type: ignore[method-assign]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        state = gather(self.engine)
        for stem, tensors in state.items():
            save_file(
                {name: t.cpu().clone().contiguous() for name, t in tensors.items()}, folder / f"{stem}.safetensors"
            )
        (folder / "steps.json").write_text(json.dumps(optimizer_steps(self.engine)))

    def load(self, folder: Path) -> None:
        model, optimizer = (load_file(folder / f"{stem}.safetensors") for stem in ("model", "optimizer"))
        scatter(self.engine, model, optimizer, json.loads((folder / "steps.json").read_text()))


def whole_gradients(engine: Engine) -> dict[str, torch.Tensor]:
    """The summed gradients by name, put together from the partitions of all ranks."""
    named = dict(engine.module.named_parameters())
    if not engine.zero_stage:
        return {name: parameter.grad.clone() for name, parameter in named.items()}
    whole = {name: torch.zeros(parameter.numel(), device=parameter.device) for name, parameter in named.items()}
    names = {parameter: name for name, parameter in named.items()}
    for members, flat in zip(engine.optimizer.bit16_groups, engine._gradients.tensors(), strict=True):
        for parameter in members:
            if parameter._hp_mapping is not None:
                here = parameter._hp_mapping.get_hp_fragment_address()
                there = parameter._hp_mapping.lp_fragment_address
                part = flat[here.start : here.start + here.numel]
                whole[names[parameter]][there.start : there.start + there.numel] = part
    for tensor in whole.values():
        if dist.get_world_size() > 1:
            dist.all_reduce(tensor)
    return {name: tensor.view(named[name].shape) for name, tensor in whole.items()}


def reference(folder: Path, objectives: list[str], groups: list[int]) -> None:
    """Train on one rank on the CPU, keeping states and recording the step that follows each."""
    for objective in objectives:
        for size in groups:
            bench, base = Bench(folder, objective, group_size=size, device="cpu"), folder / objective / f"groups-{size}"
            losses = []
            for step in range(max(STATES) + 1):
                if step in STATES:
                    bench.save(base / f"state-{step}")
                    losses.append(bench.recorded_step(step, base / f"reference-{step}"))
                else:
                    losses.append(bench.step(step))
            (base / "losses.json").write_text(json.dumps(losses))


def steps(folder: Path, objectives: list[str], stages: list[int], micro_batches: list[int]) -> None:
    """From every state of the reference one step, in every way, and with every sabotage on two ranks."""
    for text in objectives:
        objective, _, only = text.partition(":")  # the one ZeRO stage that it is checked at
        ways = [(stage, "none", micro) for stage in ([int(only)] if only else stages) for micro in micro_batches]
        if detect().world_size == 2:
            ways += [(0, sabotage, 1) for sabotage in SABOTAGES[1:]]
        for number, (stage, sabotage, micro) in enumerate(ways):
            # Both numbers of loader workers come with every stage and every number of micro-batches in turn.
            workers = 2 * ((number // 2 + number) % 2)
            bench = Bench(folder, objective, stage, sabotage, micro, workers)
            for state in STATES if sabotage == "none" else STATES[1:2]:
                bench.load(folder / objective / f"groups-{bench.group_size}" / f"state-{state}")
                name = f"case-{bench.world_size}-{micro}-{stage}-{workers}-{sabotage}-{state}"
                bench.recorded_step(state, folder / objective / name)
            bench.close()


def curves(folder: Path, objectives: list[str]) -> None:
    """The losses of 20 steps in fp64 and in fp32; on one rank also with samples permuted inside the groups."""
    alone = detect().world_size == 1
    for objective in objectives:
        for micro in MICRO_BATCHES:
            size = GROUPS[micro]
            for precision in ("fp64", "fp32"):
                _curve(Bench(folder, objective, micro_batches=micro, precision=precision), folder, precision, micro)
                if alone and micro > 1:
                    _curve(Bench(folder, objective, precision=precision, group_size=size), folder, precision, 1)
            for number in range(3) if alone else ():
                bench = Bench(folder, objective, group_size=size)
                bench.permuted = number
                _curve(bench, folder, f"permuted{number}", 1)


def _curve(bench: Bench, folder: Path, kind: str, micro: int) -> None:
    losses = [bench.step(step) for step in range(20)]
    if bench.rank == 0:
        base = folder / bench.task.recipe.objective.name / f"groups-{bench.group_size}"
        base.mkdir(parents=True, exist_ok=True)
        (base / f"curve-{kind}-{bench.world_size}-{micro}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    kind, where, names, *rest = sys.argv[1:]
    if kind == "reference":
        reference(Path(where), names.split(","), [int(n) for n in rest[0].split(",")])
    elif kind == "curves":
        curves(Path(where), names.split(","))
    else:
        steps(Path(where), names.split(","), *([int(n) for n in text.split(",")] for text in rest))
    dist.destroy_process_group()
