"""What fine-tunings have in common as tasks of the loop: labelled batches, and an end when training stops paying."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpc.batch_norm import Layout
from hpc.checkpoint.files import CheckpointError
from hpc.collectives import Group
from hpc.topology import Topology
from nanodist.downstream.finetune.data import LabelledBatch, Labels, batches
from nanodist.downstream.finetune.recipe import FinetuneRecipe
from nanodist.views import make_view
from nanodist.views.config import check_pixel_sizes

VERSION = 1


class LabelledTask(ABC):
    """One seeded view of each labelled sample.

    Args:
        recipe: what to train.
        labels: the samples.
        topology: which rank this is.
        device: where views are made and the model runs.
        layout: BatchNorm groups.
        group: process group of all ranks; ``None`` for one process.
        micro_batches: parts that this rank's samples of a step pass in.

    Attributes:
        step: the one that is trained, from 1.
        pictures: folder for pictures of evaluations; ``None``: none are drawn.
    """

    kind = ""

    def __init__(
        self,
        recipe: FinetuneRecipe,
        labels: Labels,
        topology: Topology,
        device: torch.device,
        layout: Layout,
        group: Group,
        micro_batches: int = 1,
    ) -> None:
        self.recipe, self.labels, self.topology, self.device = recipe, labels, topology, device
        self.layout, self.group, self.micro_batches = layout, group, micro_batches
        self.batch_size = recipe.train.batch_size(len(labels.train))
        self.tile_px = labels.check_one_size()
        self._best, self._looks_since = math.inf, 0
        self.step = 0
        self.pictures: Path | None = None
        self.module: nn.Module = self.build()

    def mean_crop_px(self, zoom: float) -> float:
        """Geometric mean of the ends of the crop's range at a zoom, in pixels of a sample of the typical pixel size.

        Raises:
            UserError: crops are in nanometres, and a sample that is trained on has no pixel size.
        """
        views, train = self.recipe.views, self.labels.train
        if views.crop_nm is None:
            return views.mean_crop_px(*self.tile_px, zoom=zoom)
        sizes = self.labels.pixel_sizes(train)

        def name(i: int) -> str:
            store, at = self.labels.place(int(train[i]))
            return f"{store.samples[at].key} of {store.path}"

        check_pixel_sizes(sizes, "labelled samples", name)
        return views.mean_crop_px(*self.tile_px, float(np.median(sizes)), zoom)

    @abstractmethod
    def build(self) -> nn.Module:
        """The module that is trained, on the CPU."""

    def batches(self, start_step: int) -> Iterator[LabelledBatch]:
        """This rank's part of every global batch from ``start_step`` on."""
        here = self.topology
        shape = (self.batch_size, here.rank, here.world_size, self.micro_batches)
        for batch in batches(self.labels, self.recipe.seed, *shape, start_step):
            self.step = batch.step + 1
            yield batch

    def parts(self, batch: LabelledBatch) -> list[Tensor]:
        """The views (m, 1, S, S) in [0, 1] of each micro-batch; (m, zooms, S, S) where zooms are joined.

        Joined views of a sample share their draws, so that they differ in nothing but the zoom, as in a prediction.
        """
        tiles = torch.from_numpy(batch.images).to(self.device)
        recipe, known, epochs = self.recipe, self.labels.pixel_sizes(batch.numbers), batch.epochs.tolist()
        made = [
            make_view(tiles, views, recipe.seed, epochs, batch.keys, 0, known, step=batch.step)
            for views in recipe.sample_views
        ]
        return list(torch.cat(made, 1).chunk(self.micro_batches))

    def forward(self, model: Callable[..., Any], part: Tensor) -> dict[str, Tensor]:
        """``logits`` (m, ...) of one micro-batch."""
        return {"logits": model(part)}

    def replaying(self) -> AbstractContextManager[None]:
        """BatchNorm's running statistics do not see a micro-batch twice."""
        return self.layout.replaying()

    def ahead(self) -> None:  # noqa: B027, nothing by default
        """Nothing is begun before its time."""

    def after_step(self) -> None:
        """Running statistics of BatchNorm move, where they are not frozen."""
        self.layout.update_running_statistics()

    def after_skipped_step(self) -> None:
        """Running statistics stay where they are."""
        self.layout.forget()

    def measures(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Nothing beside the loss."""
        return {}

    def judge(self, validation_loss: float) -> None:
        """Remember how long there was no better look at the validation part."""
        better = validation_loss < self._best
        self._best = validation_loss if better else self._best
        self._looks_since = 0 if better else self._looks_since + 1

    def finished(self) -> bool:
        """Whether the validation part has not become better for ``patience`` looks."""
        patience = self.recipe.train.patience
        return bool(patience) and self._looks_since >= patience

    def epochs_done(self, step: int) -> float:
        """Passes over the training labels."""
        return step * self.batch_size / len(self.labels.train)

    @abstractmethod
    def test(self, folder: Path, checkpoint: str, fingerprint: str) -> str:
        """Predict the test part, and write what it scored to ``folder`` on rank 0; collective.

        Returns:
            The scores as one line, on rank 0.
        """

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Figures on the validation part; :meth:`judge` hears of the loss."""

    @abstractmethod
    def loss(self, outputs: dict[str, Tensor], batch: LabelledBatch) -> Tensor:
        """The loss of the global batch."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What a prediction has to know of the model."""

    def state_dict(self) -> dict[str, Any]:
        """What a prediction has to know, what was trained on, and how the validation part fared."""
        return {
            "version": VERSION,
            "kind": self.kind,
            **self.description(),
            "tile_px": list(self.tile_px),
            "stores": [part.store.manifest_hash for part in self.labels.dataset.parts],
            "train": [self.labels.dataset.keys[i] for i in self.labels.train],
            "best": None if math.isinf(self._best) else self._best,
            "looks_since": self._looks_since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on; the samples and classes must be those of the checkpoint.

        Raises:
            CheckpointError: they are not.
        """
        own = self.state_dict()
        for name in ("version", "kind", "classes", "stores", "train"):
            if state.get(name) != own[name]:
                raise CheckpointError(f"the checkpoint's {name} differs: {state.get(name)!r} and here {own[name]!r}")
        self._best = math.inf if state["best"] is None else float(state["best"])
        self._looks_since = int(state["looks_since"])
