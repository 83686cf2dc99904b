"""Encoders: timm trunks with one input channel, and how an image becomes an embedding.

An :class:`EncoderSpec` travels with the weights, so that an image is read the same way in pretraining, in a probe and
on a microscope PC.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import timm
import torch
from torch import Tensor, nn

from hpc.checkpoint.files import CheckpointError, latest_checkpoint, read_state, read_tensors
from hpc.config import build
from hpc.errors import UserError
from nanodist.fitting import MOST, fitting, refuse_options
from nanodist.pixels import Image, to_unit
from nanodist.weight_files import trunk_from_file
from nanodist.weights import FROM_TIMM, digest_of

Pooling = Literal["last", "last_two", "all"]
Look = tuple[float, int, int]
EXPORT_FILE = "nanodist.json"


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """What must be known beside the weights to embed an image.

    Attributes:
        trunk: timm model name.
        trunk_options: more arguments of ``timm.create_model``.
        image_size: side in pixels of the views that the trunk was trained on.
        mean, std: of the pixels, on the scale where black is 0 and full scale (255 or 65535) is 1.
        normalise: ``"store"`` subtracts ``mean`` and divides by ``std``; ``"image"`` uses each image's own mean and
            standard deviation, so that exposure does not matter, and then ``mean`` and ``std`` are not used.
        pooling: which feature stages are averaged over the image and joined: the last, the last two, or all.
        looks: how often, and how, an image is looked at; the features of the looks are joined. Each is ``(scale,
            crop_px, symmetries)``: the factor by which the image is resized, the side in its own pixels of the central
            square that is taken first (0 takes all of it), and over how many of its eight rotations and reflections
            features are averaged.
    """

    trunk: str
    image_size: int
    mean: float
    std: float
    normalise: Literal["store", "image"] = "store"
    pooling: Pooling = "last"
    looks: list[Look] = dataclasses.field(default_factory=lambda: [(1.0, 0, 1)])
    trunk_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        """Raise ``ValueError`` for what no encoder is trained with."""
        if not 1 <= self.image_size <= MOST:
            raise ValueError(f"image_size is {self.image_size}; it must be from 1 to {MOST}")
        if not (abs(self.mean) < 1e6 and abs(self.std) < 1e6):
            raise ValueError("mean and std must be finite")
        if self.normalise == "store" and self.std <= 0:
            raise ValueError(f"std is {self.std}; what images are divided by must be above 0")
        if not 1 <= len(self.looks) <= 64:
            raise ValueError(f"there are {len(self.looks)} looks; from 1 to 64 are possible")
        check_looks(self.looks)


def check_looks(looks: Sequence[Look]) -> None:
    """Raise ``ValueError`` for a look that no encoder has."""
    for scale, crop_px, symmetries in looks:
        if not (1 / 64 <= scale <= 64 and 0 <= crop_px <= MOST and 1 <= symmetries <= 8):
            raise ValueError(
                f"a look of scale {scale}, crop_px {crop_px} and {symmetries} symmetries is impossible; it wants "
                f"scale 1/64 to 64, crop_px 0 to {MOST}, symmetries 1 to 8"
            )


def create_trunk(name: str, seed: int, pretrained: bool = False, **options: Any) -> nn.Module:
    """A timm trunk with one input channel, no classifier, and weights that depend only on ``seed``.

    Args:
        name: timm model name.
        seed: of the random weights.
        pretrained: take the weights that timm has for the name, from its cache or the internet.
        options: more arguments of ``timm.create_model``.

    Raises:
        UserError: timm knows no model of that name, the options do not suit it, or its weights cannot be had.
    """
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0][:6]}*")[:5]) or "timm.list_models() lists them"
        raise UserError(f"timm has no model '{name}'; near: {near}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return timm.create_model(name, pretrained=pretrained, in_chans=1, num_classes=0, **options)
        except (TypeError, ValueError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"timm cannot make '{name}' with {options or 'its defaults'}: {reason}") from None


def output_width(trunk: nn.Module, size_px: int) -> int:
    """Length of what ``trunk`` makes of a view of ``size_px`` pixels: of some of timm's, not their ``num_features``."""
    training, device = trunk.training, next(trunk.parameters()).device
    try:
        with torch.no_grad():
            return int(trunk.eval()(torch.zeros(1, 1, size_px, size_px, device=device)).shape[-1])
    except (AssertionError, RuntimeError, TypeError, ValueError):
        # A size that it does not take is said where the model is counted, and before the first step.
        return int(getattr(trunk, "head_hidden_size", None) or trunk.num_features)  # type: ignore[arg-type]
    finally:
        trunk.train(training)


def normalise(images: Tensor, spec: EncoderSpec) -> Tensor:
    """``images`` (n, 1, H, W) in [0, 1] on the scale that the trunk expects."""
    if spec.normalise == "store":
        return (images - spec.mean) / spec.std
    mean = images.mean(dim=(-2, -1), keepdim=True)
    std = images.std(dim=(-2, -1), keepdim=True, correction=0)
    return (images - mean) / (std + 1e-3)


def pooled_features(trunk: nn.Module, images: Tensor, pooling: Pooling) -> Tensor:
    """Features (n, d) of normalised ``images`` (n, 1, H, W), averaged over the image."""
    if pooling == "last":
        return trunk(images)
    stages: list[Tensor] = trunk.forward_intermediates(images, norm=True, intermediates_only=True)  # type: ignore[operator]
    chosen = stages[-2:] if pooling == "last_two" else stages
    return torch.cat([stage.mean(dim=(-2, -1)) for stage in chosen], dim=1)


def resized(images: Tensor, scale: float) -> Tensor:
    """``images`` (n, 1, H, W) by ``scale``: averaged two by two as often as that fits, the rest bilinear."""
    while scale <= 0.5:
        images, scale = nn.functional.avg_pool2d(images, 2), 2 * scale
    if abs(scale - 1) < 1e-6:
        return images
    return nn.functional.interpolate(
        images, scale_factor=scale, mode="bilinear", antialias=True, align_corners=False, recompute_scale_factor=True
    )


def looked_at(images: Tensor, scale: float, crop_px: int) -> Tensor:
    """``images`` (n, 1, H, W) as a look sees them: the central square of ``crop_px`` (0: all), resized by ``scale``."""
    if crop_px:
        top, left = (max(0, (extent - crop_px) // 2) for extent in images.shape[-2:])
        images = images[..., top : top + crop_px, left : left + crop_px]
    return resized(images, scale)


def symmetries(images: Tensor, count: int) -> Iterator[Tensor]:
    """The first ``count`` of the eight rotations and reflections of ``images`` (n, 1, H, W)."""
    for i in range(count):
        flipped = images.flip(-1) if i >= 4 else images
        yield torch.rot90(flipped, i % 4, dims=(-2, -1))


# Options of timm.create_model that load a file or a download; a file of somebody else must not choose them.
# Of nanodist.json, whose largest part is 20000 names of micrographs.
_MOST_BYTES = 2**26


class Encoder:
    """A trunk and its spec.

    Attributes:
        spec: how images are read.
        trunk: float32 timm model in eval mode.
        name: short name for tables.
        head: what pooled features go through before they are averaged over symmetries; nothing, but in a classifier.
        seen: what the weights were trained on: ``manifest_hash``, ``run``, ``step`` and, up to 20000, ``groups``
            (names of the micrographs); ``None`` where that is not known or nothing was seen.
        output: what :meth:`embed` gives.
    """

    output = "features"

    def __init__(self, spec: EncoderSpec, trunk: nn.Module, name: str, seen: dict[str, Any] | None = None) -> None:
        self.spec, self.name, self.seen = spec, name, seen
        self.trunk = trunk.float().eval().requires_grad_(False)
        self.head: nn.Module = nn.Identity()

    def to(self, device: torch.device) -> Encoder:
        """This encoder, moved there."""
        self.trunk.to(device)
        self.head.to(device)
        return self

    @torch.inference_mode()
    def embed_batch(self, images: Tensor) -> Tensor:
        """Embeddings (n, d) of ``images`` (n, 1, H, W) in [0, 1], on the trunk's device."""
        return torch.cat([self._look(images, *look) for look in self.spec.looks], dim=1)

    def _look(self, images: Tensor, scale: float, crop_px: int, count: int) -> Tensor:
        images = normalise(looked_at(images, scale, crop_px), self.spec)
        images = images.contiguous(memory_format=torch.channels_last)
        pooled = (pooled_features(self.trunk, x, self.spec.pooling) for x in symmetries(images, count))
        return torch.stack([self.head(x) for x in pooled]).mean(0)

    def embed(
        self, images: Iterable[Image], batch_size: int = 64, progress: Callable[[int], None] | None = None
    ) -> npt.NDArray[np.float32]:
        """Embeddings (n, d) of grey images (H, W), uint8 or uint16, of any sizes.

        Args:
            images: read one by one; images of one size that follow each other share a batch.
            batch_size: images a batch.
            progress: called with the number of images of each finished batch.

        Raises:
            UserError: an image is not uint8 or uint16, or there is none.
        """
        device = next(self.trunk.parameters()).device
        done: list[Tensor] = []
        for batch in _batches(images, batch_size):
            stacked = torch.from_numpy(np.stack([to_unit(image) for image in batch]))
            done.append(self.embed_batch(stacked[:, None].to(device)).float().cpu())
            if progress is not None:
                progress(len(batch))
        if not done:
            raise UserError("there are no images to embed")
        return torch.cat(done).numpy()

    def weights_hash(self) -> str:
        """Sixteen hex digits over the spec and all weights: the identity of the features."""
        tensors = sorted(self.trunk.state_dict().items())
        contents = ((name, tensor.detach().cpu().contiguous().numpy().tobytes()) for name, tensor in tensors)
        return digest_of(dataclasses.asdict(self.spec), contents)


def _batches(images: Iterable[Image], batch_size: int) -> Iterator[list[Image]]:
    batch: list[Image] = []
    for image in images:
        if batch and (image.shape != batch[0].shape or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch


def random_encoder(spec: EncoderSpec, seed: int) -> Encoder:
    """The encoder of ``spec`` with random weights: the baseline of every probe.

    The running statistics of BatchNorm are those of a new model (mean 0, variance 1).
    """
    return Encoder(spec, create_trunk(spec.trunk, seed, **spec.trunk_options), name="random")


def timm_encoder(
    source: str, seed: int, given: bool, options: dict[str, Any], normalise: Literal["store", "image"] = "image"
) -> Encoder:
    """The encoder of ``timm:NAME`` or ``timm:NAME@FILE``.

    Args:
        source: a timm model; with ``@FILE`` its weights (or torchvision's of the same name) lie in that file.
        seed: of random weights.
        given: take the file's weights, else those that timm has for the name; ``False``: random ones.
        options: more arguments of ``timm.create_model``.
        normalise: as :class:`EncoderSpec` has it.

    Raises:
        UserError: no such model or file, or they do not fit together.
    """
    name, _, file = source.removeprefix(FROM_TIMM).partition("@")
    if given and file:
        trunk = trunk_from_file(name, Path(file), lambda: create_trunk(name, seed, **options))
    else:
        trunk = create_trunk(name, seed, pretrained=given, **options)
    return Encoder(EncoderSpec(name, 224, 0.5, 0.25, normalise, trunk_options=options), trunk, name)


def load_encoder(path: str | Path) -> Encoder:
    """The encoder of a run directory (its newest whole checkpoint), of one checkpoint, of an export, or of a file.

    A file of weights is ``timm:NAME@FILE``, see :func:`timm_encoder`.

    Raises:
        UserError: the path is none of these, or its files do not fit together.
    """
    if str(path).startswith(FROM_TIMM):
        return timm_encoder(str(path), 0, True, {})
    path = Path(path)
    if path.is_file():
        raise UserError(f"{path} is a file; of a file of weights say the timm model too: timm:resnet50@{path}")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run directory, an export folder or timm:NAME@FILE")
    try:
        if (path / EXPORT_FILE).is_file():
            return _load_export(path)
        if (path / "checkpoints").is_dir():
            return _load_checkpoint(latest_checkpoint(path / "checkpoints"), run=path.resolve().name)
        if (path / "state.json").is_file():
            return _load_checkpoint(path, run=path.resolve().parent.parent.name)
    except (CheckpointError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot load the encoder: {error}") from None
    raise UserError(f"{path}: neither a run directory (no checkpoints/) nor an export folder (no {EXPORT_FILE})")


def _load_export(path: Path) -> Encoder:
    if (path / EXPORT_FILE).stat().st_size > _MOST_BYTES:
        raise ValueError(f"{EXPORT_FILE} is larger than the {_MOST_BYTES >> 20} MiB that it may have")
    card = json.loads((path / EXPORT_FILE).read_text())
    spec = build(EncoderSpec, card["spec"], str(path / EXPORT_FILE))
    return _with_weights(spec, read_tensors(path / "model.safetensors"), card["name"], card.get("seen"), path)


def _load_checkpoint(path: Path, run: str) -> Encoder:
    state = read_state(path)
    task = state["task"]
    if "encoder" not in task:
        raise ValueError("the checkpoint holds no encoder")
    spec = build(EncoderSpec, task["encoder"], str(path))
    weights = {
        name.removeprefix("trunk."): tensor
        for name, tensor in read_tensors(path / "model.safetensors").items()
        if name.startswith("trunk.")
    }
    seen = {**task.get("seen", {}), "run": run, "step": state["step"]}
    return _with_weights(spec, weights, run, seen, path)


def _with_weights(
    spec: EncoderSpec, weights: dict[str, Tensor], name: str, seen: dict[str, Any] | None, path: Path
) -> Encoder:
    refuse_options(spec.trunk_options, path)
    trunk = fitting(
        lambda: create_trunk(spec.trunk, seed=0, **spec.trunk_options), weights, path, f"trunk '{spec.trunk}'"
    )
    return Encoder(spec, trunk, name, seen)
