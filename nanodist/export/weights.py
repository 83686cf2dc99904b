"""An encoder as a folder that timm loads by itself, checked against the source before it gets its name."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hpc import atomic
from hpc.errors import UserError
from hpc.seeding import generator
from nanodist.export.card import UNSTATED, render
from nanodist.export.loading import architecture as architecture_of
from nanodist.export.precision import rounded

if TYPE_CHECKING:
    from nanodist.encoders import Encoder, EncoderSpec

# Same weights, same kernels, same process: anything above rounding is a wrong weight or a wrong argument.
TOLERANCE = 1e-6


def export_timm(encoder: Encoder, target: Path, card: dict[str, Any]) -> Path:
    """Write ``encoder`` to the folder ``target`` for ``timm.create_model("local-dir:TARGET", pretrained=True)``.

    The folder holds ``config.json`` (timm's hub format), ``model.safetensors``, ``README.md`` (the model card) and
    ``nanodist.json`` (what :func:`nanodist.encoders.load_encoder` wants); it appears only once timm has loaded it
    and given the features of the source. :func:`nanodist.export.folder.export` writes other formats too, and checks
    them in a process without nanodist.

    Args:
        encoder: what to export; its trunk is a timm model with one input channel and no classifier.
        target: a folder that does not exist yet, or is empty.
        card: facts for the model card, as :func:`nanodist.export.card.facts` collects them.

    Returns:
        ``target``.

    Raises:
        UserError: ``target`` is taken or cannot be written, the weights are not finite, timm does not know the trunk,
            or what timm loads gives other features than the source.
    """
    target = Path(target)
    refuse_taken(target)
    try:
        with atomic.directory(target) as folder:
            write_timm(encoder, folder, card)
            atomic.write_text(folder / "README.md", render(card, encoder.spec, features_of(encoder), target.name))
    except OSError as error:
        raise UserError(f"The export cannot be written to {target}: {error}.") from error
    return target


def refuse_taken(target: Path) -> None:
    """Raise UserError where ``target`` exists and is not an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already and is not empty: give --to a new folder, or remove it first.")


def write_timm(encoder: Encoder, folder: Path, card: dict[str, Any], precision: str = "fp32") -> None:
    """Write ``model.safetensors``, ``config.json`` and ``nanodist.json`` into ``folder``, and load them with timm.

    transformers reads the same files (``TimmWrapperModel``). In fp16 the weights are rounded once; timm computes with
    them in float32.
    """
    trunk = copy.deepcopy(encoder.trunk).to("cpu", torch.float32).eval()
    provenance = {"schema": 1, "spec": asdict(encoder.spec), "seen": encoder.seen, "name": encoder.name}
    tensors = rounded(tensors_of(encoder), precision)
    if precision != "fp32":
        trunk.load_state_dict(tensors)  # what others will have, which is what timm has to give back to the bit
    save(tensors, folder / "model.safetensors")
    atomic.write_json(folder / "config.json", timm_config(trunk, encoder, card))
    atomic.write_json(folder / "nanodist.json", provenance)
    verify(folder, trunk, encoder.spec.image_size)


def timm_config(trunk: torch.nn.Module, encoder: Encoder, card: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` in the format of timm's hub: architecture, arguments to build it, and the input it expects."""
    import timm

    architecture = architecture_of(encoder.spec)
    if not timm.is_model(architecture):
        raise UserError(f"timm {timm.__version__} has no model {architecture!r}, so {encoder.name} cannot be exported.")
    source: dict[str, Any] = getattr(trunk, "pretrained_cfg", None) or {}
    size = int(encoder.spec.image_size)
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": int(getattr(trunk, "num_features", 0)),
        "global_pool": _global_pool(trunk),
        "model_args": model_args(encoder.spec, source),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [1, size, size],
            "fixed_input_size": bool(source.get("fixed_input_size", False)),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [float(encoder.spec.mean)],
            "std": [float(encoder.spec.std)],
            "num_classes": 0,
            "pool_size": None,
            # Kept although there is no classifier: timm needs the names to add one, or another input channel.
            "first_conv": source.get("first_conv"),
            "classifier": source.get("classifier"),
            "license": str(card.get("license") or UNSTATED),
        },
    }


def model_args(spec: EncoderSpec, source: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` that rebuild the trunk of ``spec``; ``source`` is its ``pretrained_cfg``.

    The number of classes is left to ``num_classes`` beside them, since transformers passes its own.

    A trunk with a fixed input size (position embeddings) is rebuilt at the size that it has, or timm would resample
    its weights to the size of the views.
    """
    arguments = {**spec.trunk_options, "in_chans": 1}
    if source.get("fixed_input_size"):
        arguments.setdefault("img_size", list(source["input_size"][-2:]))
    return arguments


def verify(folder: Path, trunk: torch.nn.Module, image_size: int) -> float:
    """Load ``folder`` with timm and return the largest difference of its features from those of ``trunk``.

    Raises:
        UserError: timm cannot load the folder, a weight is not the same to the bit, or a feature differs by more than
            ``TOLERANCE`` relative to the largest one.
    """
    import timm

    try:
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"timm {timm.__version__} cannot load the export, so it was not written: {error}") from error
    # Apart from the features, since those of a trunk whose activations all died agree whatever its weights are.
    wanted, got = trunk.state_dict(), loaded.state_dict()
    wrong = [
        name
        for name in {**wanted, **got}
        if name not in wanted or name not in got or not torch.equal(wanted[name], got[name])
    ]
    if wrong:
        raise UserError(f"timm loads another weight {wrong[0]} than the run has, so the export was not written.")
    draws = generator(0, "export check").standard_normal((2, 1, image_size, image_size))
    images = torch.from_numpy(draws).float()
    with torch.inference_mode():
        expected, found = trunk(images), loaded(images)
    if expected.shape != found.shape:
        shapes = f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
        raise UserError(f"timm builds another model from the export (features {shapes}), so it was not written.")
    difference = float((expected - found).abs().max())
    allowed = TOLERANCE * float(expected.abs().max())
    if not difference <= allowed:  # also catches NaN
        raise UserError(
            f"The features that timm computes from the export differ from the run's by {difference:.2e} "
            f"(allowed: {allowed:.1e}), so it was not written."
        )
    return difference


def tensors_of(encoder: Encoder) -> dict[str, torch.Tensor]:
    """Weights and buffers of the trunk by name, as float32 on the CPU; UserError where one is not finite."""
    tensors = {}
    for key, value in encoder.trunk.state_dict().items():
        value = value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype)
        tensors[key] = value.clone().contiguous()
    require_finite(tensors, encoder.name, "an earlier step")
    return tensors


def require_finite(tensors: dict[str, torch.Tensor], name: str, instead: str = "another run") -> None:
    """Refuse the weights of a training that diverged.

    Raises:
        UserError: one is not finite; names it, and says to export ``instead``.
    """
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"Weight {key} of {name} is not finite (the training diverged): export {instead}.")


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write safetensors that every library reads as PyTorch's."""
    from safetensors.torch import save_file

    save_file(tensors, str(path), metadata={"format": "pt"})


def _global_pool(trunk: torch.nn.Module) -> str:
    pool = getattr(trunk, "global_pool", "avg")
    return pool if isinstance(pool, str) else str(getattr(pool, "pool_type", "avg"))


def features_of(encoder: Encoder) -> int:
    """Length of an embedding, which pooling over several stages makes longer than timm's ``num_features``."""
    blank = np.zeros((encoder.spec.image_size, encoder.spec.image_size), np.uint8)
    return int(encoder.embed([blank]).shape[1])
