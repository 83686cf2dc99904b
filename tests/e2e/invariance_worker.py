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
from hpc.loop import train_step
from hpc.optimizers import build_optimizer
from hpc.topology import detect
from nanodist.pretrain.recipe import PretrainRecipe
from nanodist.pretrain.run import _plan
from nanodist.pretrain.task import PretrainTask
from nanodist.shards import Batch, Store
from tests.e2e.invariance import SABOTAGES, STATES


class Bench:
    """A task and its engine, as a pretraining makes them."""

    def __init__(self, folder: Path, objective: str, stage: int, sabotage: str) -> None:
        values = json.loads((folder / "recipe.json").read_text())
        values["objective"] = {"name": objective}
        values["engine"]["zero_stage"] = stage
        if objective == "barlow_twins":
            values["optimizer"]["lr"] = 0.05
        recipe = recipes.build(PretrainRecipe, values)
        topology = detect()
        store = Store.open(folder / "store")
        self.device = start(recipe.engine, topology)
        world = dist.new_group() if topology.world_size > 1 else None
        batch = recipe.train.global_batch_size
        if sabotage == "norm_per_rank":
            layout = Layout(batch // topology.world_size, batch // topology.world_size, world)
        else:
            layout = make_layout(batch, recipe.bn_group_size(), topology.rank, topology.world_size)
        self.task = PretrainTask(recipe, store, topology, self.device, layout, world)
        self.plan = _plan(recipe, store)
        optimizer = build_optimizer(self.task.module, recipe.optimizer, self.plan.learning_rate(0))
        self.engine = Engine(self.task.module, optimizer, recipe.engine, topology, self.device, batch)
        self.rank, self.sabotage = topology.rank, sabotage

    def batch(self, step: int) -> Batch:
        stream = self.task.batches(step)
        batch = next(stream)
        stream.close()
        if self.sabotage == "swapped_sample" and self.rank == 1:
            wrong = (int(batch.indices[0]) + 1) % len(self.task.store)
            batch.keys[0] = self.task.store.keys[wrong]
            batch.images[0] = self.task.store.read(wrong)
        return batch

    def recorded_step(self, step: int, folder: Path) -> float:
        """One step whose samples, views, loss, gradient and update are written to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        batch = self.batch(step)
        np.save(folder / f"views-{self.rank}.npy", self.task.views(batch).numpy())
        (folder / f"samples-{self.rank}.json").write_text(json.dumps(batch.keys))
        before = {name: t.clone() for name, t in gather(self.engine)["model"].items()}
        gradients: dict[str, torch.Tensor] = {}
        loss, _ = self._step_and_keep_gradients(batch, self.plan.learning_rate(step), gradients)
        after = gather(self.engine)["model"]
        parameters = {name for name, _ in self.task.module.named_parameters()}
        record = {"loss": torch.tensor(loss, dtype=torch.float64)}
        for name, tensor in after.items():
            if name in parameters:
                record[f"update.{name}"] = tensor - before[name]
            elif tensor.is_floating_point():
                record[f"buffer.{name}"] = tensor.clone()
        record.update({f"gradient.{name}": tensor for name, tensor in gradients.items()})
        if self.rank == 0:
            save_file(record, folder / "step.safetensors")
        return loss

    def _step_and_keep_gradients(self, batch: Batch, lr: float, gradients: dict[str, torch.Tensor]) -> Any:
        from deepspeed.utils import safe_get_full_grad

        real_step = self.engine.step

        def step(lr: float) -> None:
            for name, parameter in self.task.module.named_parameters():
                gradients[name] = safe_get_full_grad(parameter).clone()
            real_step(lr)

        self.engine.step = step  # type: ignore[method-assign]
        try:
            return train_step(self.task, self.engine, batch, lr)
        finally:
            self.engine.step = real_step  # type: ignore[method-assign]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        state = gather(self.engine)
        for stem, tensors in state.items():
            save_file({name: t.clone().contiguous() for name, t in tensors.items()}, folder / f"{stem}.safetensors")
        (folder / "steps.json").write_text(json.dumps(optimizer_steps(self.engine)))

    def load(self, folder: Path) -> None:
        model, optimizer = (load_file(folder / f"{stem}.safetensors") for stem in ("model", "optimizer"))
        scatter(self.engine, model, optimizer, json.loads((folder / "steps.json").read_text()))


def reference(folder: Path, objectives: list[str]) -> None:
    """Train on one rank, keeping states and recording the step that follows each."""
    for objective in objectives:
        bench = Bench(folder, objective, 0, "none")
        losses = []
        for step in range(max(STATES) + 1):
            if step in STATES:
                bench.save(folder / objective / f"state-{step}")
                losses.append(bench.recorded_step(step, folder / objective / f"reference-{step}"))
            else:
                losses.append(
                    train_step(bench.task, bench.engine, bench.batch(step), bench.plan.learning_rate(step))[0]
                )
        (folder / objective / "losses.json").write_text(json.dumps(losses))


def steps(folder: Path, objectives: list[str], stages: list[int]) -> None:
    """From every state of the reference one step, at every ZeRO stage, and with every sabotage."""
    for objective in objectives:
        cases = [(stage, "none", state) for stage in stages for state in STATES]
        cases += [(0, sabotage, STATES[1]) for sabotage in SABOTAGES[1:]]
        benches: dict[tuple[int, str], Bench] = {}
        for stage, sabotage, state in cases:
            if (stage, sabotage) not in benches:
                benches = {(stage, sabotage): Bench(folder, objective, stage, sabotage)}
            bench = benches[stage, sabotage]
            bench.load(folder / objective / f"state-{state}")
            bench.recorded_step(state, folder / objective / f"case-{stage}-{sabotage}-{state}")


if __name__ == "__main__":
    kind, where, names, *rest = sys.argv[1:]
    if kind == "reference":
        reference(Path(where), names.split(","))
    else:
        steps(Path(where), names.split(","), [int(s) for s in rest[0].split(",")])
    dist.destroy_process_group()
