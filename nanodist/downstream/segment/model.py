"""A pretrained trunk with the decoder of a U-Net or a feature pyramid (segmentation-models-pytorch)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpc.batch_norm import Layout, convert
from hpc.errors import UserError
from hpc.seeding import key
from nanodist.downstream.finetune.model import OnTrunk, freeze, start_encoder
from nanodist.downstream.finetune.recipe import DecoderConfig, FinetuneRecipe
from nanodist.encoders import EncoderSpec
from nanodist.pretrain.model import refuse_unkeyed_randomness

# Statistics of one sample, so that a prediction does not depend on what else is in the batch.
NORM = "instancenorm"
STRIDES = (2, 4, 8, 16, 32)


class Segmenter(OnTrunk):
    """Logits of every pixel.

    Args:
        trunk: timm model with feature maps at strides 2 (or 4) to 32.
        classes: number of classes.
        decoder: the recipe's section.
        spec, frozen_statistics, precision: as :class:`OnTrunk` has them.

    Raises:
        UserError: the trunk has no feature maps at these strides, or the decoder's package is missing.
    """

    def __init__(
        self,
        trunk: nn.Module,
        classes: int,
        spec: EncoderSpec,
        decoder: DecoderConfig,
        frozen_statistics: bool,
        precision: str = "fp32",
    ) -> None:
        super().__init__(trunk, spec, frozen_statistics, precision)
        self.classes = classes
        self.decoder, self.head = _decoder(pyramid(trunk, spec.trunk), classes, decoder)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes, S, S) of ``images`` (n, 1, S, S) in [0, 1]; S is a multiple of 32."""
        with self.autocast(images):
            return self._logits(self.normalised(images))

    def predict(self, images: Tensor) -> Tensor:
        """Probabilities (n, classes, S, S), in float32 whatever the training ran in."""
        return self._logits(self.normalised(images)).float().softmax(1)

    def features(self, images: Tensor) -> Tensor:
        """Features (n, d) of the deepest stage, averaged over ``images`` (n, 1, S, S), in float32."""
        return self._stages(self.normalised(images))[-1].float().mean((-2, -1))

    def _stages(self, pixels: Tensor) -> list[Tensor]:
        return self.trunk.forward_intermediates(pixels, intermediates_only=True)  # type: ignore[operator,no-any-return]

    def _logits(self, pixels: Tensor) -> Tensor:
        made = self.head(self.decoder([pixels, *self._stages(pixels)[-5:]]))
        if made.shape[-2:] != pixels.shape[-2:]:
            made = functional.interpolate(made, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
        return made


def pyramid(trunk: nn.Module, name: str) -> list[int]:
    """Channels of the trunk's feature maps at strides 2 or 4 to 32.

    Raises:
        UserError: it has none, as a plain vision transformer.
    """
    with torch.inference_mode():
        training = trunk.training
        trunk.eval()
        try:
            stages = trunk.forward_intermediates(torch.zeros(1, 1, 64, 64), intermediates_only=True)  # type: ignore[operator]
            strides = [64 // stage.shape[-1] for stage in stages][-5:]
        except (AttributeError, AssertionError, TypeError, RuntimeError):
            strides, stages = [], []
        trunk.train(training)
    if tuple(strides) not in (STRIDES, STRIDES[1:]):
        raise UserError(
            f"trunk '{name}' has no feature maps at strides 4 to 32, from which a mask could be decoded; "
            "take a convolutional one, such as a ResNet"
        )
    return [int(stage.shape[1]) for stage in stages[-5:]]


def _decoder(channels: list[int], classes: int, config: DecoderConfig) -> tuple[nn.Module, nn.Module]:
    try:
        from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
        from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
    except ImportError:
        raise UserError("segmentation needs segmentation-models-pytorch: pip install 'nanodist[segment]'") from None
    widths = [max(config.width // 2**i, 8) for i in range(len(channels))]
    made: Any
    if config.name == "fpn":
        made = FPNDecoder([1, *channels], len(channels), config.width, config.width // 2, dropout=0.0)
        last = made.out_channels
    else:
        made = UnetDecoder([1, *channels], widths, len(channels), use_norm=NORM)
        last = widths[-1]
    return made, nn.Conv2d(last, classes, kernel_size=3, padding=1)


def build_segmenter(recipe: FinetuneRecipe, classes: int, layout: Layout) -> Segmenter:
    """The module of a recipe, on the CPU; what is not trained wants no gradient.

    Raises:
        UserError: the encoder cannot be had, draws random numbers of its own, or gives no feature pyramid.
    """
    if recipe.views.size_px % 32:
        raise UserError(f"views.size_px is {recipe.views.size_px}; a segmentation wants a multiple of 32")
    encoder = start_encoder(recipe)
    refuse_unkeyed_randomness(encoder.trunk, encoder.spec.trunk)
    frozen = recipe.train.batch_norm == "frozen"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(recipe.seed, "head") % 2**63)
        model = Segmenter(encoder.trunk, classes, encoder.spec, recipe.decoder, frozen, recipe.train.precision)
    freeze(recipe, model.trunk)
    if not frozen:
        convert(model, layout)
    return model.double() if recipe.train.precision == "fp64" else model
