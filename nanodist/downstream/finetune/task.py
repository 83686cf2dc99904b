"""Fine-tuning for classification as a task of the loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from hpc.batch_norm import Layout
from hpc.checkpoint.files import CheckpointError
from hpc.collectives import Group, sum_of_shares
from hpc.topology import Topology
from nanodist.downstream.finetune.data import LabelledBatch, Labels, batches
from nanodist.downstream.finetune.model import Classifier, build_classifier
from nanodist.downstream.finetune.recipe import FinetuneRecipe
from nanodist.downstream.metrics import balanced_accuracy, confusion_matrix
from nanodist.pixels import to_unit
from nanodist.views import make_view

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
VERSION = 1
PREDICTED_AT_ONCE = 32


class FinetuneTask:
    """Cross entropy of one seeded view of each labelled sample.

    Args:
        recipe: what to train.
        labels: the samples.
        topology: which rank this is.
        device: where views are made and the model runs.
        layout: BatchNorm groups.
        group: process group of all ranks; ``None`` for one process.
        micro_batches: parts that this rank's samples of a step pass in.
    """

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
        self.classifier: Classifier = build_classifier(recipe, len(labels.targets.classes), self.tile_px, layout)
        self.module: nn.Module = self.classifier
        self._weights = torch.from_numpy(class_weights(recipe, labels)).to(device)
        self._best, self._looks_since = math.inf, 0

    def batches(self, start_step: int) -> Iterator[LabelledBatch]:
        """This rank's part of every global batch from ``start_step`` on."""
        here = self.topology
        shape = (self.batch_size, here.rank, here.world_size, self.micro_batches)
        return batches(self.labels, self.recipe.seed, *shape, start_step)

    def parts(self, batch: LabelledBatch) -> list[Tensor]:
        """The views (m, 1, S, S) in [0, 1] of each micro-batch."""
        tiles = torch.from_numpy(batch.images).to(self.device)
        recipe, known = self.recipe, self.labels.pixel_sizes(batch.numbers)
        views = make_view(tiles, recipe.views, recipe.seed, batch.epochs.tolist(), batch.keys, 0, known)
        return list(views.chunk(self.micro_batches))

    def forward(self, model: Callable[..., Any], part: Tensor) -> dict[str, Tensor]:
        """``logits`` (m, classes) of one micro-batch."""
        return {"logits": model(part)}

    def replaying(self) -> AbstractContextManager[None]:
        """BatchNorm's running statistics do not see a micro-batch twice."""
        return self.layout.replaying()

    def loss(self, outputs: dict[str, Tensor], batch: LabelledBatch) -> Tensor:
        """Weighted cross entropy, averaged over the global batch."""
        logits = outputs["logits"]
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        targets = torch.from_numpy(batch.targets).to(self.device)
        smoothing = self.recipe.train.label_smoothing
        each = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        share = (each * self._weights[targets].to(each.dtype)).sum() / self.batch_size
        return sum_of_shares(share, self.group)

    def after_step(self) -> None:
        """Running statistics of BatchNorm move, where they are not frozen."""
        self.layout.update_running_statistics()

    def after_skipped_step(self) -> None:
        """Running statistics stay where they are."""
        self.layout.forget()

    def measures(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Nothing beside the loss."""
        return {}

    def predict(self, numbers: I64) -> tuple[F64, F64]:
        """Probabilities (n, classes) and features (n, d) of samples of the dataset, without augmentation.

        Collective: the ranks share the work.
        """
        mine = np.arange(self.topology.rank, len(numbers), self.topology.world_size)
        classes = len(self.labels.targets.classes)
        made = torch.zeros(len(numbers), classes + self.classifier.features, dtype=torch.float64, device=self.device)
        self.module.eval()
        for places in _same_size_runs(self.labels, numbers, mine):
            stacked = np.stack([to_unit(self.labels.image(int(numbers[i]))) for i in places])
            seen = self.classifier.looked_at(torch.from_numpy(stacked)[:, None].to(self.device))
            made[torch.as_tensor(places, device=self.device)] = torch.cat(seen, 1).double()
        if self.group is not None:
            # Every row has one rank that gives it, so the sum is exact.
            dist.all_reduce(made, group=self.group)
        likely, features = made.cpu().numpy()[:, :classes], made.cpu().numpy()[:, classes:]
        return likely, features

    def evaluate(self) -> dict[str, float]:
        """Loss and balanced accuracy on the validation part; remembers how long there was no better one."""
        if not len(self.labels.validation):
            return {}
        y, classes = self.labels.targets.y[self.labels.validation], len(self.labels.targets.classes)
        p, _ = self.predict(self.labels.validation)
        loss = float(-np.log(np.clip(p[np.arange(len(y)), y], 1e-12, 1.0)).mean())
        better = loss < self._best
        self._best, self._looks_since = (loss, 0) if better else (self._best, self._looks_since + 1)
        accuracy = balanced_accuracy(confusion_matrix(y, p.argmax(1), classes))
        return {"validation_loss": loss, "validation_balanced_accuracy": accuracy, "score": loss}

    def finished(self) -> bool:
        """Whether the validation part has not become better for ``patience`` looks."""
        patience = self.recipe.train.patience
        return bool(patience) and self._looks_since >= patience

    def epochs_done(self, step: int) -> float:
        """Passes over the training labels."""
        return step * self.batch_size / len(self.labels.train)

    def state_dict(self) -> dict[str, Any]:
        """What a prediction has to know, what was trained on, and how the validation part fared."""
        targets = self.labels.targets
        return {
            "version": VERSION,
            "kind": "classification",
            "classes": list(targets.classes),
            "tile_px": list(self.tile_px),
            "encoder": dataclasses.asdict(self.classifier.spec),
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


def class_weights(recipe: FinetuneRecipe, labels: Labels) -> F64:
    """(classes,) factors of the loss with a mean of 1 over the training samples."""
    counts = np.bincount(labels.targets.y[labels.train], minlength=len(labels.targets.classes))
    if recipe.train.class_weights == "none":
        return np.ones(len(counts))
    there = counts > 0
    weights = np.where(there, len(labels.train) / (np.maximum(counts, 1) * there.sum()), 0.0)
    return np.asarray(weights, np.float64)


def _same_size_runs(labels: Labels, numbers: I64, mine: I64) -> Iterator[list[int]]:
    """Places that can be stacked: a few at a time, of one size."""
    run: list[int] = []
    for i in mine.tolist():
        same = not run or labels.image(int(numbers[run[0]])).shape == labels.image(int(numbers[i])).shape
        if run and (len(run) == PREDICTED_AT_ONCE or not same):
            yield run
            run = []
        run.append(i)
    if run:
        yield run
