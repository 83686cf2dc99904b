"""Self-supervised pretraining as a task of the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hpc.batch_norm import Layout
from hpc.checkpoint.files import CheckpointError
from hpc.collectives import Group, gather_rows
from hpc.errors import UserError
from hpc.topology import Topology
from nanodist.encoders import EncoderSpec
from nanodist.objectives import build_objective
from nanodist.objectives.collapse import collapse_measures
from nanodist.pretrain.data import pinned_for, tell_replaced
from nanodist.pretrain.model import build_model
from nanodist.pretrain.recipe import PretrainRecipe
from nanodist.shards import Batch, GroupPartners, Loader, make_order
from nanodist.shards.windows import Tiles
from nanodist.views import make_views
from nanodist.views.config import check_pixel_sizes

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
        micro_batches: parts that this rank's samples of a step pass in, one after the other.

    Attributes:
        evaluator: measures the encoder while it trains; ``None``: nothing does.
        pictures: folder for what it draws; ``None``: it draws nothing.
        step: the one that is trained, from 1.
        hurries: whether views are made a step ahead.
    """

    def __init__(
        self,
        recipe: PretrainRecipe,
        store: Tiles,
        topology: Topology,
        device: torch.device,
        layout: Layout,
        group: Group,
        micro_batches: int = 1,
    ) -> None:
        self.recipe, self.store, self.topology, self.device = recipe, store, topology, device
        self.layout, self.group, self.micro_batches = layout, group, micro_batches
        self.pixel_size_nm = _pixel_sizes(store, recipe)
        self.spec: EncoderSpec = _spec(store, recipe, self.pixel_size_nm)
        self.module: nn.Module = build_model(recipe, self.spec, layout)
        self.partners = GroupPartners(store, recipe.seed) if recipe.data.positives == "group" else None
        self.objective = build_objective(recipe.objective)
        self.evaluator: Callable[[PretrainTask], dict[str, float]] | None = None
        self.pictures: Path | None = None
        self.step = 0
        self.hurries = device.type == "cuda"
        self._steps_total = recipe.train.total_steps(len(store))
        self._source: Iterator[Batch] | None = None
        self._made: tuple[Batch, Tensor] | None = None
        self._replaced: list[tuple[str, str, str]] = []
        self._told = 0

    def batches(self, start_step: int) -> Iterator[Batch]:
        """This rank's slices of the global batches from ``start_step`` on."""
        recipe = self.recipe
        order = make_order(self.store, recipe.seed, recipe.train.global_batch_size, recipe.data.window_mb)
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
            self.micro_batches,
            data.corrupt,
            here.local_world_size,
            pinned_for(self.device),
        )
        self._replaced, self._told = loader.replaced, 0
        self._source, self._made = iter(loader), None
        try:
            while (batch := self._next()) is not None:
                self.step = batch.step + 1
                yield batch
        finally:
            self._source, self._made = None, None
            loader.close()

    def _next(self) -> Batch | None:
        """The batch that was made ahead and not yet given, or that of the loader."""
        if self._made is not None and self._made[0].step >= self.step:
            return self._made[0]
        return next(self._source, None) if self._source is not None else None

    def ahead(self) -> None:
        """The next batch and its views, so that making them hides behind a GPU's backward pass."""
        self._made = None
        if not self.hurries or self._source is None or self.step >= self._steps_total:
            return
        batch = next(self._source, None)
        if batch is not None:
            self._made = batch, self.views(batch)

    def views(self, batch: Batch) -> Tensor:
        """Views (2, n, 1, S, S) in [0, 1] of a batch, on the device."""
        tiles = (batch.images, batch.images if batch.partners is None else batch.partners)
        first, second = (torch.from_numpy(x).to(self.device, non_blocking=True) for x in tiles)
        known = self.pixel_size_nm[batch.indices]
        recipe = self.recipe
        epochs = batch.epochs.tolist()
        return make_views(first, second, recipe.views, recipe.seed, epochs, batch.keys, known, batch.step)

    def parts(self, batch: Batch) -> list[Tensor]:
        """The views (2, m, 1, S, S) of each micro-batch. They are kept for a step, also where it caches gradients."""
        views = self._made[1] if self._made and self._made[0] is batch else self.views(batch)
        return list(views.chunk(self.micro_batches, 1))

    def forward(self, model: Callable[..., Any], part: Tensor) -> dict[str, Tensor]:
        """Projections ``a`` and ``b`` (m, d) of the views of one micro-batch."""
        a, b = model(part)
        return {"a": a, "b": b}

    def replaying(self) -> AbstractContextManager[None]:
        """BatchNorm's running statistics do not see a micro-batch twice."""
        return self.layout.replaying()

    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """The objective over the global batch."""
        kin = None
        if self.partners is not None:
            kin = torch.from_numpy(self.partners.group_of[batch.indices]).to(self.device)
        return self.objective(outputs["a"], outputs["b"], self.group, kin)

    def after_step(self) -> None:
        """Running statistics of BatchNorm move."""
        self.layout.update_running_statistics()

    def after_skipped_step(self) -> None:
        """Running statistics stay where they are."""
        self.layout.forget()

    def evaluate(self) -> dict[str, float]:
        """What :attr:`evaluator` measures; nothing where the recipe asks for no evaluation."""
        return self.evaluator(self) if self.evaluator is not None else {}

    @torch.no_grad()
    def measures(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Collapse measures of the global batch; on rank 0, nothing elsewhere."""
        a, b = (gather_rows(outputs[name].float(), self.group) for name in ("a", "b"))
        replaced = self._samples_replaced()
        return {**collapse_measures(a, b), **replaced} if self.topology.is_main else {}

    def _samples_replaced(self) -> dict[str, float]:
        """How many samples of all ranks others stood in for since the last time; collective."""
        if self.recipe.data.corrupt == "error":
            return {}
        tell_replaced(self._replaced, self._told)
        count = torch.tensor([float(len(self._replaced) - self._told)], device=self.device)
        self._told = len(self._replaced)
        if self.topology.world_size > 1:
            torch.distributed.all_reduce(count, group=self.group)
        return {"samples_replaced": count.item()}

    def finished(self) -> bool:
        """A pretraining takes all its steps."""
        return False

    def epochs_done(self, step: int) -> float:
        """Passes over the store."""
        return step * self.recipe.train.global_batch_size / len(self.store)

    def state_dict(self) -> dict[str, Any]:
        """What the encoder is, what it saw, and what the data position is counted in."""
        groups = sorted(self.store.group_names)
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


def _pixel_sizes(store: Tiles, recipe: PretrainRecipe) -> npt.NDArray[np.float64]:
    """(samples, 2) nanometres a pixel as (y, x), NaN where unknown.

    Raises:
        UserError: the views are cut in nanometres, and a tile has no pixel size.
    """
    sizes = store.pixel_size_nm
    if recipe.views.crop_nm is not None:
        check_pixel_sizes(sizes, f"tiles of {store.path}", lambda i: str(store.keys[i]))
        if recipe.data.positives == "group":
            _check_partners(store, sizes)
    return sizes


def _check_partners(store: Tiles, sizes: npt.NDArray[np.float64]) -> None:
    """Raise ``UserError`` where a group has tiles of two scales: both views are cut by the first tile's pixel size."""
    order = np.argsort(store.group_codes, kind="stable")
    starts = np.flatnonzero(np.diff(store.group_codes[order], prepend=-1))
    least, most = (each.reduceat(sizes[order], starts) for each in (np.minimum, np.maximum))
    apart = np.flatnonzero((most > 1.01 * least).any(1))
    if len(apart):
        at = int(apart[0])
        key = store.keys[int(order[starts[at]])]
        raise UserError(
            f"views.crop_nm with data.positives=group: tiles of one group, such as that of {key}, have "
            f"{least[at].min():g} to {most[at].max():g} nm a pixel; pack them at one size (--pixel-size-nm), or set "
            "data.positives=image"
        )


def _spec(store: Tiles, recipe: PretrainRecipe, sizes: npt.NDArray[np.float64]) -> EncoderSpec:
    statistics, tile = store.statistics, store.tile_sizes[0]
    typical = 1.0 if np.isnan(sizes).all() else float(np.nanmedian(sizes))
    return recipe.encoder_spec(float(statistics["mean"]), float(statistics["std"]), tile, typical)
