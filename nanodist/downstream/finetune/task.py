"""Fine-tuning for classification as a task of the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from hpc.collectives import sum_of_shares
from hpc.errors import UserError
from nanodist.downstream.finetune.base import LabelledTask
from nanodist.downstream.finetune.data import LabelledBatch, Labels
from nanodist.downstream.finetune.model import Classifier, build_classifier
from nanodist.downstream.finetune.recipe import FinetuneRecipe
from nanodist.downstream.finetune.reference import write_reference
from nanodist.downstream.finetune.scores import write_scores
from nanodist.downstream.metrics import balanced_accuracy, confusion_matrix
from nanodist.pixels import to_unit

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
PREDICTED_AT_ONCE = 32


class ClassifyTask(LabelledTask):
    """Cross entropy of one seeded view of each labelled sample."""

    kind = "classification"

    def build(self) -> nn.Module:
        """Trunk and linear head."""
        recipe, classes = self.recipe, len(self.labels.targets.classes)
        crops = [self.mean_crop_px(zoom) for zoom in recipe.views.zooms]
        self.classifier: Classifier = build_classifier(recipe, classes, crops, self.layout)
        self._try_looks()
        self._weights = torch.from_numpy(class_weights(recipe, self.labels)).to(self.device)
        return self.classifier

    def _try_looks(self) -> None:
        """Predict one blank tile, so that a trunk that does not take what it is shown then says so before training."""
        model = self.classifier.eval()
        try:
            model.looked_at(torch.zeros(1, 1, *self.tile_px, dtype=next(model.parameters()).dtype))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"trunk '{model.spec.trunk}' does not take what a prediction shows it of a tile of "
                f"{self.tile_px[0]} x {self.tile_px[1]} px at the scale of the views (looks {model.spec.looks}): "
                f"{' '.join(str(error).split())[:120]}; choose other views"
            ) from None

    def loss(self, outputs: dict[str, Tensor], batch: LabelledBatch) -> Tensor:
        """Weighted cross entropy, averaged over the global batch."""
        logits = outputs["logits"]
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        targets = torch.from_numpy(self.labels.targets.y[batch.numbers]).to(self.device)
        smoothing = self.recipe.train.label_smoothing
        each = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        share = (each * self._weights[targets].to(each.dtype)).sum() / self.batch_size
        return sum_of_shares(share, self.group)

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
        """Loss and balanced accuracy on the validation part."""
        if not len(self.labels.validation):
            return {}
        y, classes = self.labels.targets.y[self.labels.validation], len(self.labels.targets.classes)
        p, _ = self.predict(self.labels.validation)
        loss = float(-np.log(np.clip(p[np.arange(len(y)), y], 1e-12, 1.0)).mean())
        self.judge(loss)
        accuracy = balanced_accuracy(confusion_matrix(y, p.argmax(1), classes))
        return {"validation_loss": loss, "validation_balanced_accuracy": accuracy, "score": loss}

    def test(self, folder: Path, checkpoint: str, fingerprint: str) -> str:
        """Scores, predictions, and what the training samples looked like."""
        probabilities, _ = self.predict(self.labels.test)
        _, known = self.predict(self.labels.learned)
        if not self.topology.is_main:
            return ""
        write_reference(folder, known)
        return write_scores(folder, self.recipe, self.labels, probabilities, checkpoint, fingerprint)

    def description(self) -> dict[str, Any]:
        """Classes, and how images are read."""
        return {
            "classes": list(self.labels.targets.classes),
            "encoder": dataclasses.asdict(self.classifier.spec),
            "joined": self.classifier.joined,
        }


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
