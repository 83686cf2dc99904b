"""Segmentation as a task of the loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc import atomic
from hpc.collectives import every, sum_of_shares
from nanodist.downstream.finetune.base import LabelledTask
from nanodist.downstream.finetune.data import LabelledBatch
from nanodist.downstream.finetune.reference import write_reference
from nanodist.downstream.segment import overlays
from nanodist.downstream.segment.data import Masks
from nanodist.downstream.segment.loss import dice_and_cross_entropy, mean_iou
from nanodist.downstream.segment.maps import class_maps
from nanodist.downstream.segment.model import Segmenter, build_segmenter
from nanodist.downstream.segment.scores import ImageScores, image_scores, write_scores
from nanodist.downstream.segment.windows import mean_features, strips

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
KNOWN = 2000  # images that the run keeps the features of


class SegmentTask(LabelledTask):
    """Cross entropy and Dice of one seeded view of each image and its mask."""

    kind = "segmentation"

    def build(self) -> nn.Module:
        """Trunk and decoder."""
        assert isinstance(self.labels, Masks)
        self.masks: Masks = self.labels
        # Windows are cut at one scale, the middle of those that were seen.
        self.crop_px = round(self.mean_crop_px(geometric_mean(self.recipe.views.zooms)))
        self.segmenter: Segmenter = build_segmenter(self.recipe, len(self.masks.values), self.layout)
        return self.segmenter

    def loss(self, outputs: dict[str, Tensor], batch: LabelledBatch) -> Tensor:
        """Cross entropy and Dice, averaged over the images of the global batch."""
        logits = outputs["logits"]
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        each = dice_and_cross_entropy(logits, self._maps(batch), self.recipe.decoder.dice_weight)
        return sum_of_shares(each.sum() / self.batch_size, self.group)

    def _maps(self, batch: LabelledBatch) -> Tensor:
        masks = torch.from_numpy(np.stack([self.masks.mask(int(i)) for i in batch.numbers])).to(self.device)
        known = self.labels.pixel_sizes(batch.numbers)
        shape = (len(self.masks.values), self.recipe.views, self.recipe.seed)
        return class_maps(masks, *shape, batch.epochs.tolist(), batch.keys, known, batch.step)

    def predict(self, number: int) -> npt.NDArray[np.float32]:
        """Probabilities (classes, H, W) of a sample of the dataset, without augmentation."""
        self.module.eval()
        size = self.recipe.views.size_px
        made = strips(self.segmenter, self.labels.image(number), self.crop_px, size, self.recipe.symmetries)
        return np.concatenate([rows for _, rows in made], axis=1)

    def evaluate(self) -> dict[str, float]:
        """Loss and mean IoU on the validation part; collective: the ranks share the images."""
        numbers = self.labels.validation
        if not len(numbers):
            return {}
        found = torch.zeros(2, len(numbers), dtype=torch.float64, device=self.device)
        shown: list[bytes] = []
        for i in range(self.topology.rank, len(numbers), self.topology.world_size):
            likely = torch.from_numpy(self.predict(int(numbers[i])))
            if self.pictures is not None and self.topology.is_main and len(shown) < overlays.SHOWN:
                shown.append(self._drawn(int(numbers[i]), likely.argmax(0).numpy().astype(np.uint8)))
            classes = torch.from_numpy(self.masks.mask(int(numbers[i])).astype(np.int64))
            logits = likely.clamp_min(1e-6).log()[None]
            found[0, i] = dice_and_cross_entropy(logits, classes[None], self.recipe.decoder.dice_weight)[0]
            found[1, i] = mean_iou(likely.argmax(0), classes, len(likely))
        if self.group is not None:
            # Every image has one rank that gives its figures, so the sum is exact.
            dist.all_reduce(found, group=self.group)
        self._show(shown)
        loss, iou = (float(value) for value in found.mean(1))
        self.judge(loss)
        return {"validation_loss": loss, "validation_iou": iou, "score": loss}

    def _drawn(self, number: int, predicted: npt.NDArray[np.uint8]) -> bytes:
        return overlays.draw(self.labels.image(number), self.masks.mask(number), predicted)

    def _show(self, pngs: list[bytes]) -> None:
        """A sheet of validation images in ``pictures``; the one before it goes."""
        if self.pictures is None or not pngs:
            return
        for old in self.pictures.glob("overlays-*.png"):
            old.unlink(missing_ok=True)
        atomic.write_bytes(self.pictures / f"overlays-{self.step:08d}.png", overlays.sheet(pngs))

    def test(self, folder: Path, checkpoint: str, fingerprint: str) -> str:
        """Scores of every image of the test part, and pictures of the worst; the ranks share them."""
        numbers = self.labels.test
        mine: list[tuple[ImageScores, overlays.Overlay]] = []
        for i in range(self.topology.rank, len(numbers), self.topology.world_size):
            predicted, truth = (
                self.predict(int(numbers[i])).argmax(0).astype(np.uint8),
                self.masks.mask(int(numbers[i])),
            )
            score = image_scores(i, predicted, truth, len(self.masks.values))
            mine.append((score, overlays.overlay(score, self.labels.image(int(numbers[i])), truth, predicted)))
        sent = ([score for score, _ in mine], overlays.worst([one for _, one in mine]))
        gathered, known = every(sent, self.group), self._known()
        if not self.topology.is_main:
            return ""
        write_reference(folder, known)
        scores = sorted((one for part, _ in gathered for one in part), key=lambda one: one.number)
        self._keep_worst(folder / "report", overlays.worst([one for _, part in gathered for one in part]))
        return write_scores(folder, self.recipe, self.masks, scores, checkpoint, fingerprint)

    def _known(self) -> F64:
        """Features (n, d) of images that were trained on, of very many evenly taken; collective."""
        numbers = self.labels.learned
        numbers = numbers[np.unique(np.linspace(0, len(numbers) - 1, min(len(numbers), KNOWN)).round().astype(int))]
        mine = range(self.topology.rank, len(numbers), self.topology.world_size)
        self.module.eval()
        shape = (self.crop_px, self.recipe.views.size_px)
        rows = {i: mean_features(self.segmenter, self.labels.image(int(numbers[i])), *shape) for i in mine}
        found = {i: row for part in every(rows, self.group) for i, row in part.items()}
        return np.stack([found[i] for i in range(len(numbers))])

    def _keep_worst(self, folder: Path, found: list[overlays.Overlay]) -> None:
        targets, names = self.masks.targets, []
        for one in found:
            number = int(self.masks.test[one.number])
            names.append((self.masks.dataset.keys[number], targets.group_names[targets.groups[number]]))
        overlays.write(folder, found, names)

    def description(self) -> dict[str, Any]:
        """Classes, and how images are read and decoded."""
        return {
            "classes": [str(value) for value in self.masks.values],
            "encoder": dataclasses.asdict(self.segmenter.spec),
            "decoder": dataclasses.asdict(self.recipe.decoder),
            "crop_px": self.crop_px,
            "size_px": self.recipe.views.size_px,
            "symmetries": self.recipe.symmetries,
        }
