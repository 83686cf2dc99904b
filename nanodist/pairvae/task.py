"""One stage of a PairVAE as a task of the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc.batch_norm import Layout
from hpc.checkpoint.files import CheckpointError
from hpc.collectives import Group, sum_of_shares
from hpc.topology import Topology
from nanodist.encoders import Encoder
from nanodist.objectives.barlow_twins import barlow_twins
from nanodist.pairvae.data import PairBatch, PairData, Sampler
from nanodist.pairvae.model import Geometry, Inputs, PairModel, Statistics, build_model
from nanodist.pairvae.recipe import PairVAERecipe, Stage

VERSION = 1
PICTURED = 6


def geometry_of(data: PairData) -> Geometry:
    """What patterns and crops of ``data`` are."""
    kinds = {pattern.kind for i in data.train.tolist() if (pattern := data.pattern(i)) is not None}
    kind = kinds.pop() if len(kinds) == 1 else "mixed"
    store = data.store
    return Geometry(store.grid, store.reference, data.config.size_px, data.pixel_size_nm, kind)


def statistics_of(data: PairData) -> Statistics:
    """Compressed patterns of the training part, and their masks."""
    patterns = [pattern for i in data.train.tolist() if (pattern := data.pattern(i)) is not None]
    values = np.stack([np.arcsinh(pattern.intensity.astype(np.float64) / data.store.reference) for pattern in patterns])
    return Statistics(torch.from_numpy(values), torch.from_numpy(np.stack([pattern.mask for pattern in patterns])))


def to_inputs(batch: PairBatch, device: torch.device) -> Inputs:
    """A batch on the device."""
    names = ("intensity", "sigma", "mask", "images", "turns", "has", "noise")
    return Inputs(*(torch.from_numpy(getattr(batch, name)).to(device) for name in names))


class PairVAETask:
    """The losses of one stage over seeded crops of pairs.

    Args:
        recipe: what to train.
        stage: which part of it.
        data: the pairs.
        encoder: trunk to begin with; ``None`` where the preset brings its own.
        topology, device: where this rank is.
        layout: BatchNorm groups.
        group: process group of all ranks; ``None`` for one process.
        micro_batches: parts that this rank's samples of a step pass in.
        pictures: folder for grids of reconstructions; ``None``: none are drawn.
    """

    kind = "pairvae"

    def __init__(
        self,
        recipe: PairVAERecipe,
        stage: Stage,
        data: PairData,
        encoder: Encoder | None,
        topology: Topology,
        device: torch.device,
        layout: Layout,
        group: Group,
        micro_batches: int = 1,
        pictures: Path | None = None,
    ) -> None:
        self.recipe, self.stage, self.data, self.config = recipe, stage, data, recipe.stage(stage)
        self.topology, self.device, self.layout, self.group = topology, device, layout, group
        self.micro_batches, self.pictures = micro_batches, pictures
        if recipe.model.preset == "lu2023":
            data.refuse_missing()
        self.geometry = geometry_of(data)
        self.model: PairModel = build_model(
            recipe.model, self.geometry, recipe.seed, stage, encoder, statistics_of(data), layout, self.config.draws
        )
        self.module: torch.nn.Module = self.model
        self.batch_size = self.config.batch_size(len(data.train))
        self.sampler = Sampler(data, recipe.model, recipe.seed, stage, self.model.noise)
        self._features: dict[tuple[int, int], Tensor] = {}
        self._step = 0

    def batches(self, start_step: int) -> Iterator[PairBatch]:
        """This rank's part of every global batch from ``start_step`` on."""
        here = self.topology
        for batch in self.sampler.batches(self.batch_size, here.rank, here.world_size, self.micro_batches, start_step):
            self._step = batch.step
            yield batch

    def parts(self, batch: PairBatch) -> list[Inputs]:
        """Each micro-batch, with the features of a frozen trunk."""
        inputs = to_inputs(batch, self.device)
        return inputs._replace(features=self._frozen(batch, inputs)).chunk(self.micro_batches)

    def _frozen(self, batch: PairBatch, inputs: Inputs) -> Tensor | None:
        """Features of the frozen trunk; those of a crop that comes again are worked out once."""
        fixed = self.recipe.model.fixed_crop_from_epoch
        if self.stage == "pair" and fixed is not None and (batch.epochs >= fixed).all():
            new = [row for row, number in enumerate(batch.numbers.tolist()) if (number, fixed) not in self._features]
            if new:
                made = self.model.pair_features(Inputs(*(None if t is None else t[new] for t in inputs)))  # type: ignore[arg-type]
                if made is None:
                    return None
                self._features.update({(int(batch.numbers[row]), fixed): made[i] for i, row in enumerate(new)})
            return torch.stack([self._features[number, fixed] for number in batch.numbers.tolist()])
        return self.model.pair_features(inputs)

    def forward(self, model: Callable[..., Any], part: Inputs) -> dict[str, Tensor]:
        """Terms (m,) of the loss, and latents where they meet in it."""
        return model(part)  # type: ignore[no-any-return]

    def replaying(self) -> AbstractContextManager[None]:
        """BatchNorm's running statistics do not see a micro-batch twice."""
        return self.layout.replaying()

    def weights(self, step: int) -> dict[str, float]:
        """Weight of each term at a step."""
        weights, rest = dict(self.config.weights), self.config.saxs_epochs
        if self.stage == "solo" and rest is not None and self.epochs_done(step) >= rest:
            weights["saxs_saxs"] = 0.0
        return weights

    def loss(self, outputs: dict[str, Tensor], batch: PairBatch) -> Tensor:
        """Weighted terms, averaged over the global batch; Barlow Twins over all of it."""
        weights = self.weights(batch.step)
        shares = [
            weight * outputs[name].sum() / self.batch_size
            for name, weight in weights.items()
            if weight and name in outputs and outputs[name].ndim == 1
        ]
        loss = sum_of_shares(torch.stack(shares).sum(), self.group)
        if weights.get("barlow") and "latent_saxs" in outputs:
            both = (outputs["latent_saxs"], outputs["latent_sem"])
            coupled = barlow_twins(*both, self.config.redundancy_weight, self.group)
            loss = loss + weights["barlow"] * coupled.to(loss.dtype)
        return loss

    def ahead(self) -> None:
        """Nothing is begun before its time."""

    def after_step(self) -> None:
        """Running statistics of BatchNorm move."""
        self.layout.update_running_statistics()

    def after_skipped_step(self) -> None:
        """Running statistics stay where they are."""
        self.layout.forget()

    @torch.no_grad()
    def measures(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Each term, averaged over the global batch."""
        names = sorted(name for name, value in outputs.items() if value.ndim == 1)
        means = torch.stack([outputs[name].double().sum() for name in names]) / self.batch_size
        if self.topology.world_size > 1:
            torch.distributed.all_reduce(means, group=self.group)
        return {f"term_{name}": float(value) for name, value in zip(names, means, strict=True)}

    def evaluate(self) -> dict[str, float]:
        """A grid of reconstructions of unseen items, drawn on rank 0; no figure of it chooses anything."""
        if self.pictures is not None and self.topology.is_main:
            from nanodist.pairvae.figures import write_reconstructions

            numbers = (self.data.test if len(self.data.test) else self.data.train)[:PICTURED]
            epochs = np.zeros(len(numbers), np.int64)
            batch = still(self.sampler).batch(0, epochs, numbers)
            self.model.eval()
            write_reconstructions(
                self.model, to_inputs(batch, self.device), self.pictures / f"reconstructions-{self._step + 1:08d}.png"
            )
            self.model.train()
        return {}

    def finished(self) -> bool:
        """A stage takes all its steps."""
        return False

    def epochs_done(self, step: int) -> float:
        """Passes over the training part."""
        return step * self.batch_size / len(self.data.train)

    def state_dict(self) -> dict[str, Any]:
        """What using the model needs to know, and what was trained on."""
        spec = getattr(self.model, "spec", None)
        return {
            "version": VERSION,
            "kind": self.kind,
            "stage": self.stage,
            "preset": self.recipe.model.preset,
            "geometry": self.geometry.as_dict(),
            "encoder": None if spec is None else vars(spec),
            "store": self.data.store.manifest_hash,
            "train": [self.data.store.keys[i] for i in self.data.train.tolist()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on; store, split and geometry must be those of the checkpoint.

        Raises:
            CheckpointError: they are not.
        """
        own = self.state_dict()
        for name in ("version", "kind", "stage", "preset", "geometry", "store", "train"):
            if state.get(name) != own[name]:
                raise CheckpointError(f"the checkpoint's {name} differs: {state.get(name)!r} and here {own[name]!r}")


def still(sampler: Sampler) -> Sampler:
    """The same items, unturned."""
    model = dataclasses.replace(sampler.model, max_rotation_deg=0.0, flip=False, zoom=1.0)
    return Sampler(sampler.data, model, sampler.seed, "still", sampler.noise)
