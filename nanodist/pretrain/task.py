"""Self-supervised pretraining as a task of the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hpc.batch_norm import Layout
from hpc.checkpoint.files import CheckpointError
from hpc.collectives import Group, gather_rows
from hpc.topology import Topology
from nanodist.encoders import EncoderSpec
from nanodist.objectives import build_objective
from nanodist.objectives.collapse import collapse_measures
from nanodist.pretrain.model import build_model
from nanodist.pretrain.recipe import PretrainRecipe
from nanodist.shards import Batch, GroupPartners, Loader, Order, Store
from nanodist.views import make_view

VERSION = 1
MOST_GROUPS = 20_000


class PretrainTask:
    """Two views of each sample, projected, under an objective over the global batch.

    Args:
        recipe: what to train.
        store: the data.
        topology: which rank this is.
        device: where views are made and the model runs.
        layout: BatchNorm groups.
        group: process group of all ranks, for the objective; ``None`` for one process.
    """

    def __init__(
        self,
        recipe: PretrainRecipe,
        store: Store,
        topology: Topology,
        device: torch.device,
        layout: Layout,
        group: Group,
    ) -> None:
        self.recipe, self.store, self.topology, self.device = recipe, store, topology, device
        self.layout, self.group = layout, group
        statistics = store.manifest.statistics
        self.spec: EncoderSpec = recipe.encoder_spec(float(statistics["mean"]), float(statistics["std"]))
        self.module: nn.Module = build_model(recipe, self.spec, layout)
        self.partners = GroupPartners(store, recipe.seed) if recipe.data.positives == "group" else None
        self.objective = build_objective(recipe.objective)

    def batches(self, start_step: int) -> Iterator[Batch]:
        """This rank's slices of the global batches from ``start_step`` on."""
        order = Order(len(self.store), self.recipe.seed, self.recipe.train.global_batch_size)
        data, here = self.recipe.data, self.topology
        loader = Loader(
            self.store,
            order,
            here.rank,
            here.world_size,
            data.workers,
            data.read_ahead,
            start_step,
            self.partners,
            data.cache_mb,
        )
        try:
            yield from loader
        finally:
            loader.close()

    def views(self, batch: Batch) -> Tensor:
        """Views (2, n, 1, S, S) in [0, 1] of a batch, on the device."""
        second = batch.images if batch.partners is None else batch.partners
        views = []
        for number, images in enumerate((batch.images, second)):
            tiles = torch.from_numpy(images).to(self.device, non_blocking=True)
            views.append(
                make_view(tiles, self.recipe.views, self.recipe.seed, batch.epochs.tolist(), batch.keys, number)
            )
        return torch.stack(views)

    def forward(self, model: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
        """Projections ``a`` and ``b`` (n, d) of this rank's samples."""
        a, b = model(self.views(batch))
        return {"a": a, "b": b}

    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """The objective over the global batch."""
        kin = None
        if self.partners is not None:
            kin = torch.from_numpy(self.partners.group_of[batch.indices]).to(self.device)
        return self.objective(outputs["a"], outputs["b"], self.group, kin)

    def after_step(self) -> None:
        """Running statistics of BatchNorm move."""
        self.layout.update_running_statistics()

    @torch.no_grad()
    def measures(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Collapse measures of the global batch; on rank 0, nothing elsewhere."""
        a, b = (gather_rows(outputs[name].float(), self.group) for name in ("a", "b"))
        return collapse_measures(a, b) if self.topology.is_main else {}

    def epochs_done(self, step: int) -> float:
        """Passes over the store."""
        return step * self.recipe.train.global_batch_size / len(self.store)

    def state_dict(self) -> dict[str, Any]:
        """What the encoder is, what it saw, and what the data position is counted in."""
        groups = sorted(set(self.store.groups))
        seen: dict[str, Any] = {"manifest_hash": self.store.manifest_hash, "samples": len(self.store)}
        if len(groups) <= MOST_GROUPS:
            seen["groups"] = groups
        return {
            "version": VERSION,
            "encoder": dataclasses.asdict(self.spec),
            "objective": self.recipe.objective.name,
            "seen": seen,
            "order": {"seed": self.recipe.seed, "global_batch_size": self.recipe.train.global_batch_size},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that a checkpoint's position is counted in the same order of the same store.

        Raises:
            CheckpointError: it is not; both values are named.
        """
        own = self.state_dict()
        for name in ("version", "order"):
            if state.get(name) != own[name]:
                raise CheckpointError(f"the checkpoint's {name} is {state.get(name)}, the recipe's {own[name]}")
        saved, here = state["seen"]["manifest_hash"], self.store.manifest_hash
        if saved != here:
            raise CheckpointError(f"the checkpoint was trained on store {saved}, this one is {here}")
