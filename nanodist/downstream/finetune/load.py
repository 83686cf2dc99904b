"""A fine-tuned classifier back from its run directory."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc.checkpoint.files import (
    CheckpointError,
    best_checkpoint,
    candidates,
    latest_checkpoint,
    read_state,
    read_tensors,
)
from hpc.config import build
from hpc.errors import UserError
from nanodist.downstream.finetune.model import Classifier, plain_head
from nanodist.downstream.finetune.reference import Reference, read_reference
from nanodist.encoders import EncoderSpec, create_trunk, pooled_features
from nanodist.fitting import DAMAGED, MOST, fitting, refuse_options


@dataclass(frozen=True)
class Loaded:
    """A classifier in eval mode on the CPU, the names of its classes, and where it came from.

    ``tile_px`` is the (height, width) of the tiles that it was trained on; ``reference`` knows what these looked like.
    """

    model: Classifier
    classes: tuple[str, ...]
    checkpoint: Path
    tile_px: tuple[int, int]
    reference: Reference | None


def chosen_checkpoint(checkpoints: Path) -> Path:
    """The checkpoint that predicts: the best on the validation part, or the newest where there was none.

    Raises:
        CheckpointError: there is no whole one.
    """
    newest = latest_checkpoint(checkpoints)
    if read_state(newest)["task"].get("best") is None:
        return newest
    return best_checkpoint(checkpoints) or newest


def read_run(run_dir: str | Path, kind: str) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """The checkpoint of a run that predicts, what it says of its task, and its weights.

    Args:
        run_dir: of ``nanodist finetune``.
        kind: ``classification`` or ``segmentation``.

    Raises:
        UserError: the folder is none, is of another kind, or holds no whole checkpoint.
    """
    path = Path(run_dir)
    if not (path / "checkpoints").is_dir():
        raise UserError(f"{path} is not the run directory of a fine-tuning: it has no checkpoints/")
    try:
        folder = chosen_checkpoint(path / "checkpoints")
        task = read_state(folder)["task"]
        if task.get("kind") != kind:
            raise UserError(f"{path} is a run of {task.get('kind', 'another kind')}, and not of {kind}")
        return folder, task, read_tensors(folder / "model.safetensors")
    except (CheckpointError, *DAMAGED) as error:
        raise UserError(f"{path}: cannot load the model: {' '.join(str(error).split())[:300]}") from None


def kind_of(run_dir: str | Path) -> str:
    """``classification`` or ``segmentation``; empty where the run is of neither kind, or no checkpoint says.

    Every checkpoint of a run says the same, so none is verified for it; what loads the model tells what is wrong.
    """
    for folder in candidates(Path(run_dir) / "checkpoints"):
        with contextlib.suppress(CheckpointError, *DAMAGED):
            return str(read_state(folder)["task"].get("kind", ""))
    return ""


def load_classifier(run_dir: str | Path) -> Loaded:
    """The classifier of a run directory of ``nanodist finetune``.

    Raises:
        UserError: the folder is none, or holds no whole checkpoint.
    """
    folder, task, weights = read_run(run_dir, "classification")
    try:
        spec = build(EncoderSpec, task["encoder"], str(folder))
        refuse_options(spec.trunk_options, folder)

        def make() -> Classifier:
            trunk = create_trunk(spec.trunk, 0, **spec.trunk_options)
            head = plain_head(*reversed(weights["head.1.weight"].shape))
            return Classifier(trunk, head, spec, True, joined=_joined_looks(task, spec))

        model = fitting(make, weights, folder)
        _check_head(model)
        height, width = (size_of(value, "tile_px") for value in task["tile_px"])
        classes = tuple(str(name) for name in task["classes"])
        if len(classes) != len(weights["head.1.weight"]):
            raise ValueError(f"{len(classes)} classes have names, and the head knows {len(weights['head.1.weight'])}")
    except DAMAGED as error:
        raise UserError(f"{run_dir}: cannot load the classifier: {' '.join(str(error).split())[:300]}") from None
    return Loaded(model.float().eval(), classes, folder, (height, width), read_reference(Path(run_dir)))


def _joined_looks(task: dict[str, Any], spec: EncoderSpec) -> bool:
    """Whether a classifier's head sees all looks at once; one of before there was a choice sees one at a time.

    Raises:
        ValueError: the file says neither, or its looks do not pair.
    """
    joined = task.get("joined", False)
    if not isinstance(joined, bool):
        raise ValueError(f"joined is {str(joined)[:40]}; it must be true or false")
    if len({count for _, _, count in spec.looks}) > 1:
        raise ValueError("the looks of a classifier have as many symmetries each")
    return joined


def _check_head(model: Classifier) -> None:
    """Raise ``ValueError`` where the head wants other features than the looks of the spec give."""
    spec, side = model.spec, model.spec.image_size
    with torch.device("meta"):
        trunk = create_trunk(spec.trunk, 0, **spec.trunk_options).eval()
        try:
            width = pooled_features(trunk, torch.zeros(1, 1, side, side), spec.pooling).shape[1]
        except (RuntimeError, AssertionError, NotImplementedError):
            return  # of some trunks the meta device tells nothing
    looks = len(spec.looks) if model.joined else 1
    if width * looks != model.features:
        raise ValueError(f"the head takes {model.features} features, and its looks give {width * looks}")


def size_of(value: Any, name: str, most: int = MOST) -> int:
    """A whole number from 1 to ``most``, out of a file.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name} is {str(value)[:40]}; it must be a whole number from 1 to {most}")
    return value
