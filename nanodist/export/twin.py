"""Weights under torchvision's names, for trunks that torchvision builds too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hpc.errors import UserError
from nanodist.export.loading import architecture
from nanodist.export.precision import rounded
from nanodist.export.weights import save, tensors_of

if TYPE_CHECKING:
    from nanodist.encoders import Encoder

# timm and torchvision call these by one name, build them alike and name their weights alike.
TWINS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
STEM = "conv1.weight"


def require_twin(encoder: Encoder) -> None:
    """Refuse a trunk that torchvision cannot build.

    Raises:
        UserError: torchvision has no such model, or its weights have other names or shapes.
    """
    name, options = architecture(encoder.spec), encoder.spec.trunk_options
    advice = "leave torchvision out of --format (timm, onnx and torch-export take any trunk)."
    if name not in TWINS:
        raise UserError(f"Trunk {name} has no twin in torchvision, which shares {', '.join(TWINS)} with timm; {advice}")
    import torchvision

    if not hasattr(torchvision.models, name):
        raise UserError(f"torchvision {torchvision.__version__} has no {name} yet: install a newer one, or {advice}")
    with torch.device("meta"):
        wanted = getattr(torchvision.models, name)().state_dict()
    shapes = {key: tuple(value.shape) for key, value in wanted.items() if not key.startswith("fc.")}
    shapes[STEM] = (shapes[STEM][0], 1, *shapes[STEM][2:])
    ours = {key: tuple(value.shape) for key, value in encoder.trunk.state_dict().items()}
    for key in {**shapes, **ours}:
        if shapes.get(key) != ours.get(key):
            what = f"{key} is {ours.get(key, 'absent')}, in torchvision {shapes.get(key, 'absent')}"
            raise UserError(
                f"Trunk {name} with {options or 'these weights'} has no twin in torchvision ({what}); {advice}"
            )


def write_torchvision(encoder: Encoder, folder: Path, precision: str = "fp32") -> None:
    """Write ``torchvision/model.safetensors`` (one channel) and ``model_rgb.safetensors`` (three channels), and the
    same as ``.pth`` for systems without safetensors.

    The kernels of the three-channel stem are a third of the grey ones each, so that a grey image in all three channels
    gives the same features.
    """
    require_twin(encoder)
    (folder / "torchvision").mkdir()
    tensors = tensors_of(encoder)
    stem = (tensors[STEM] / 3).repeat(1, 3, 1, 1)
    for name, weights in (("model", tensors), ("model_rgb", {**tensors, STEM: stem})):
        held = rounded(weights, precision)
        save(held, folder / "torchvision" / f"{name}.safetensors")
        # The one kind of file here that is a pickle, of plain tensors alone: torch.load(..., weights_only=True).
        torch.save(held, folder / "torchvision" / f"{name}.pth")
