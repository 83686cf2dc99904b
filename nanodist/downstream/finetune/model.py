"""A pretrained trunk with a linear head, of which the last blocks or all are trained."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from hpc.batch_norm import Layout, convert
from hpc.errors import UserError
from hpc.seeding import key
from nanodist.downstream.finetune.recipe import FinetuneRecipe
from nanodist.encoders import (
    Encoder,
    EncoderSpec,
    create_trunk,
    load_encoder,
    looked_at,
    normalise,
    pooled_features,
    symmetries,
    timm_encoder,
)
from nanodist.pretrain.model import refuse_unkeyed_randomness
from nanodist.weights import FROM_TIMM

# Pixels that go through a trunk at once in a prediction: 32 of 256 x 256.
AT_ONCE_PX = 2**21


class OnTrunk(nn.Module):
    """What stands on a pretrained trunk.

    Args:
        trunk: timm model.
        spec: how pixels are normalised and features pooled.
        frozen_statistics: BatchNorm of the trunk keeps its running statistics, and normalises by them, while it trains.
        precision: ``"bf16"`` runs the forward under autocast; weights and their gradients stay float32.
    """

    def __init__(self, trunk: nn.Module, spec: EncoderSpec, frozen_statistics: bool, precision: str) -> None:
        super().__init__()
        self.trunk, self.spec = trunk, spec
        self.frozen_statistics, self.precision = frozen_statistics, precision

    def train(self, mode: bool = True) -> OnTrunk:
        """As for any module, but that frozen statistics stay in use."""
        super().train(mode)
        if mode and self.frozen_statistics:
            for part in self.trunk.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()
        return self

    def normalised(self, images: Tensor) -> Tensor:
        """``images`` in [0, 1] on the scale that the trunk expects, in the precision of the weights."""
        return normalise(images.to(next(self.parameters()).dtype), self.spec)

    def autocast(self, images: Tensor) -> contextlib.AbstractContextManager[object]:
        """The context of a forward that trains."""
        bf16 = torch.autocast(images.device.type, torch.bfloat16)
        return bf16 if self.precision == "bf16" else contextlib.nullcontext()


class Classifier(OnTrunk):
    """Logits of images.

    Args:
        trunk: timm model that gives features.
        head: from features to logits.
        spec, frozen_statistics, precision: as :class:`OnTrunk` has them; all looks have as many symmetries.
        joined: the head sees the features of all looks at once, and not of one at a time.
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        spec: EncoderSpec,
        frozen_statistics: bool,
        precision: str = "fp32",
        joined: bool = False,
    ) -> None:
        super().__init__(trunk, spec, frozen_statistics, precision)
        self.head, self.joined = head, joined
        self.features = int(head.get_submodule("1").get_parameter("weight").shape[1])

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of ``images`` in [0, 1], (n, 1, H, W), or (n, looks, H, W) where these are joined."""
        with self.autocast(images):
            features = self._pooled(images.flatten(0, 1)[:, None])
            return self.head(features.unflatten(0, images.shape[:2]).flatten(1))  # type: ignore[no-any-return]

    def _pooled(self, images: Tensor) -> Tensor:
        return pooled_features(self.trunk, self.normalised(images), self.spec.pooling)

    @torch.inference_mode()
    def looked_at(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (n, classes) and features (n, d) of whole ``images`` (n, 1, H, W) in [0, 1].

        Both are means over the symmetries of :attr:`spec`, and over its looks unless they are joined. In float32
        whatever the training ran in, so that a prediction does not depend on the machine's bf16. A few images at a
        time where looks enlarge them.
        """
        sides = [(min(crop or side, side) * scale for side in images.shape[-2:]) for scale, crop, _ in self.spec.looks]
        at_once = max(1, int(AT_ONCE_PX // max(math.prod(look) for look in sides)))
        parts = [self._looked_at(part) for part in images.split(at_once)]
        return torch.cat([likely for likely, _ in parts]), torch.cat([features for _, features in parts])

    def _looked_at(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen = [
            [self._pooled(view) for view in symmetries(looked_at(images, scale, crop_px), count)]
            for scale, crop_px, count in self.spec.looks
        ]
        if self.joined:
            pooled = [torch.cat(looks, 1) for looks in zip(*seen, strict=True)]
        else:
            pooled = [one for look in seen for one in look]
        likely = [self.head(one).float().softmax(1) for one in pooled]
        return torch.stack(likely).mean(0), torch.stack([one.float() for one in pooled]).mean(0)


def start_encoder(recipe: FinetuneRecipe) -> Encoder:
    """The encoder that the recipe begins with; its weights are random where the recipe says so.

    Raises:
        UserError: no such run, export or timm model.
    """
    start = recipe.encoder
    if not start.source:
        raise UserError("encoder.source is not set; give a run, an export folder, timm:NAME or timm:NAME@FILE")
    seed = key(recipe.seed, "trunk") % 2**63
    if start.source.startswith(FROM_TIMM):
        return timm_encoder(start.source, seed, start.weights == "given", start.trunk_options, start.normalise)
    encoder = load_encoder(start.source)
    if start.weights == "random":
        spec = encoder.spec
        return Encoder(spec, create_trunk(spec.trunk, seed, **spec.trunk_options), encoder.name)
    return encoder


def build_classifier(recipe: FinetuneRecipe, classes: int, crops_px: Sequence[float], layout: Layout) -> Classifier:
    """The module of a recipe, on the CPU; what is not trained wants no gradient.

    Args:
        recipe: of the fine-tuning.
        classes: width of the logits.
        crops_px: mean side in pixels of a tile of the views at each of the recipe's zooms.
        layout: BatchNorm groups, where statistics are not frozen.

    Raises:
        UserError: the encoder cannot be had, or draws random numbers of its own.
    """
    encoder = start_encoder(recipe)
    refuse_unkeyed_randomness(encoder.trunk, encoder.spec.trunk)
    looks = [_look(recipe, crop) for crop in crops_px]
    spec = dataclasses.replace(encoder.spec, image_size=recipe.views.size_px, looks=looks)
    try:
        spec.check()
    except ValueError as error:
        raise UserError(f"views.size_px, crop and zooms cannot be predicted with: {error}") from None
    trunk = encoder.trunk.requires_grad_(True)
    with torch.inference_mode():
        pixels = torch.zeros(1, 1, recipe.views.size_px, recipe.views.size_px)
        width = pooled_features(trunk, pixels, spec.pooling).shape[1]
    frozen, joined = recipe.train.batch_norm == "frozen", recipe.train.zooms == "joined"
    head = _head(width * len(recipe.sample_views), classes, recipe.seed)
    model = Classifier(trunk, head, spec, frozen, recipe.train.precision, joined)
    freeze(recipe, trunk)
    if not frozen:
        convert(model, layout)
    return model.double() if recipe.train.precision == "fp64" else model


def _look(recipe: FinetuneRecipe, crop: float) -> tuple[float, int, int]:
    """How a tile is predicted: at the mean scale of the views; its middle only, where views keep to the middle.

    A middle is halved as often as that fits and then resized, to a size that is rounded down: it is chosen so that the
    trunk is shown exactly the side of a view, as some take no other.
    """
    views = recipe.views
    if views.centre_jitter_px is None:
        return round(views.size_px / crop, 4), 0, recipe.symmetries
    step = 2 ** max(0, math.floor(math.log2(max(crop / views.size_px, 1.0))))
    crop_px = max(1, round(crop / step)) * step
    return math.ceil(views.size_px / crop_px * 1e4) / 1e4, crop_px, recipe.symmetries


def plain_head(features: int, classes: int) -> nn.Sequential:
    """Features at mean 0 and variance 1, so that one learning rate suits all trunks, and a linear layer."""
    return nn.Sequential(nn.LayerNorm(features, elementwise_affine=False), nn.Linear(features, classes))


def _head(features: int, classes: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "head") % 2**63)
        head = plain_head(features, classes)
        linear = head.get_submodule("1")
        nn.init.normal_(linear.get_parameter("weight"), std=0.01)
        nn.init.zeros_(linear.get_parameter("bias"))
    return head


def _depth(trunk: nn.Module) -> dict[str, int]:
    """For each parameter of the trunk how many blocks lie between it and the head."""
    numbers: dict[str, int] = group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    last = max(numbers.values())
    return {name: last - number for name, number in numbers.items()}


def freeze(recipe: FinetuneRecipe, trunk: nn.Module) -> None:
    """Let those blocks of the trunk learn that the recipe wants to."""
    wanted, depth = recipe.train.tuned_layers, _depth(trunk)
    for name, parameter in trunk.named_parameters():
        parameter.requires_grad_(wanted is None or depth[name] < wanted)


def learning_rate_scales(recipe: FinetuneRecipe, model: nn.Module) -> dict[str, float]:
    """For each parameter of the model the factor of its learning rate (Clark et al. 2020, layer-wise decay)."""
    decay = recipe.train.layer_decay
    scales = {f"trunk.{name}": decay ** (depth + 1) for name, depth in _depth(model.get_submodule("trunk")).items()}
    return {name: scales.get(name, 1.0) for name, _ in model.named_parameters()}
