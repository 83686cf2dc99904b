"""What every PairVAE is to those who train and use it, and the choice among the presets."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hpc.batch_norm import Layout
from hpc.errors import UserError
from hpc.seeding import key
from nanodist.encoders import Encoder, create_trunk, load_encoder, timm_encoder
from nanodist.pairvae.recipe import OWN, PairModelConfig, Stage
from nanodist.scattering.pattern import QGrid
from nanodist.weights import FROM_TIMM

# Of a side of patterns and crops; a file that says more would fill the memory.
MOST_PX = 4096


class Inputs(NamedTuple):
    """Samples on the device, see :class:`nanodist.pairvae.data.PairBatch`.

    ``features`` are those of a frozen trunk of patterns and of images, (n, 2, C, h, w), where a preset has one.
    """

    intensity: Tensor
    sigma: Tensor
    mask: Tensor
    images: Tensor
    turns: Tensor
    has: Tensor
    noise: Tensor
    features: Tensor | None = None

    def chunk(self, count: int) -> list[Inputs]:
        """Equal parts, in order."""
        parts = [[None] * count if tensor is None else tensor.chunk(count) for tensor in self]
        return [Inputs(*fields) for fields in zip(*parts, strict=True)]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What travels with the weights: how patterns and images are scaled.

    Attributes:
        grid: q grid of patterns.
        reference: I0 of asinh(I / I0).
        size_px, pixel_size_nm: of crops.
        kind: ``counts`` or ``reduced``.
    """

    grid: QGrid
    reference: float
    size_px: int
    pixel_size_nm: float
    kind: str

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**dataclasses.asdict(self), "grid": self.grid.as_dict()}

    @staticmethod
    def of_dict(values: dict[str, Any]) -> Geometry:
        """What :meth:`as_dict` gave.

        Raises:
            ValueError: sizes or scales that nothing is trained with.
        """
        made = Geometry(**{**values, "grid": QGrid(**values["grid"])})
        sizes, scales = (made.grid.size, made.size_px), (made.reference, made.pixel_size_nm, made.grid.q_max_inv_nm)
        if not all(isinstance(size, int) and 2 <= size <= MOST_PX for size in sizes):
            raise ValueError(f"patterns of {sizes[0]} and crops of {sizes[1]} pixels; from 2 to {MOST_PX} are possible")
        if not all(isinstance(x, int | float) and math.isfinite(x) and x > 0 for x in scales):
            raise ValueError(f"reference, pixel_size_nm and q_max_inv_nm are {scales}; they must be positive numbers")
        return made


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a model takes from the training part before it learns: compressed patterns (all samples, S, S) and masks."""

    values: Tensor
    mask: Tensor


class Latent(NamedTuple):
    """A diagonal Gaussian; (n, d) each."""

    mean: Tensor
    log_variance: Tensor


class PairModel(nn.Module, ABC):
    """Two variational autoencoders that share a latent.

    Attributes:
        geometry: what a pattern and a crop are.
        noise: standard normal numbers that :meth:`forward` wants of each sample.
        stage: which losses :meth:`forward` gives.
        coupled: whether samples of a batch meet, in BatchNorm or in the loss.
    """

    geometry: Geometry
    noise: int
    stage: Stage
    coupled: bool

    @abstractmethod
    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """Terms of the loss, (n,) each, 0 for a missing member; other outputs have more dimensions."""

    @abstractmethod
    def encode_saxs(self, inputs: Inputs) -> Latent:
        """The shared latent of patterns."""

    @abstractmethod
    def encode_sem(self, inputs: Inputs) -> Latent:
        """The shared latent of images."""

    @abstractmethod
    def decode_saxs(self, z: Tensor) -> Tensor:
        """Expected intensity (n, S, S), in the unit of the patterns, of shared latents (n, d)."""

    @abstractmethod
    def decode_sem(self, z: Tensor, noise: Tensor) -> Tensor:
        """Images (n, 1, P, P) in [0, 1] of shared latents; ``noise`` (n, m) is what the pattern does not know."""

    @property
    @abstractmethod
    def image_noise(self) -> int:
        """Numbers of noise that :meth:`decode_sem` wants of each image; 0: an image is a function of its latent."""

    @abstractmethod
    def reconstruct_sem(self, inputs: Inputs) -> Tensor:
        """Images (n, 1, P, P) from the images' own latents."""

    def encode_own(self, inputs: Inputs) -> Latent:
        """What images know beside the shared latent, (n, :attr:`image_noise`), where a preset has it."""
        raise NotImplementedError(f"{type(self).__name__} has no map of an image's own")

    @property
    @abstractmethod
    def latent_dim(self) -> int:
        """Numbers of the shared latent."""

    def pair_features(self, inputs: Inputs) -> Tensor | None:
        """:attr:`Inputs.features` of samples, where the model has a frozen trunk."""
        return None


def start_encoder(config: PairModelConfig, seed: int) -> Encoder | None:
    """The trunk that a recipe begins with; ``None`` where the preset brings its own.

    Raises:
        UserError: no such run, export or timm model.
    """
    if config.encoder == OWN:
        return None
    word = key(seed, "pairvae-trunk") % 2**63
    if config.encoder.startswith(FROM_TIMM):
        return timm_encoder(config.encoder, word, config.encoder_weights == "given", config.trunk_options)
    encoder = load_encoder(config.encoder)
    if config.encoder_weights == "random":
        spec = encoder.spec
        return Encoder(spec, create_trunk(spec.trunk, word, **spec.trunk_options), encoder.name)
    return encoder


def map_stage(trunk: nn.Module, size_px: int, side: int) -> tuple[int, int]:
    """Number and channels of the stage of ``trunk`` whose map of an image of ``size_px`` is ``side`` wide.

    Raises:
        UserError: it has no maps, or none of that size; the sizes are named.
    """
    if not hasattr(trunk, "forward_intermediates"):
        raise UserError("model.encoder gives no feature maps (timm: forward_intermediates); choose another trunk")
    with torch.inference_mode():
        stages = trunk.forward_intermediates(torch.zeros(1, 1, size_px, size_px), intermediates_only=True)  # type: ignore[operator]
    for number in range(len(stages) - 1, -1, -1):
        if stages[number].shape[-2:] == (side, side):
            return number, int(stages[number].shape[1])
    sides = ", ".join(str(stage.shape[-1]) for stage in stages)
    raise UserError(
        f"model.encoder makes maps of {sides} px of a crop of {size_px} px, and none of {side}; change data.size_px"
    )


def build_model(
    config: PairModelConfig,
    geometry: Geometry,
    seed: int,
    stage: Stage,
    encoder: Encoder | None,
    statistics: Statistics | None,
    layout: Layout | None,
    draws: int = 1,
) -> PairModel:
    """The module of a recipe, on the CPU; weights depend only on ``seed``.

    Args:
        config: the recipe's section.
        geometry: what patterns and crops are.
        seed: of the weights.
        stage: which losses the forward gives.
        encoder: see :func:`start_encoder`.
        statistics: of the training part; ``None`` where weights are loaded afterwards.
        layout: BatchNorm groups; ``None`` for a model that is only used.
        draws: images that preset modern draws of each sample a step.
    """
    from nanodist.pairvae.lu2023 import Lu2023
    from nanodist.pairvae.modern import Modern

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "pairvae-weights") % 2**63)
        if config.preset == "lu2023":
            if encoder is None:
                raise UserError("model.encoder is not set; give a run, an export folder or timm:NAME")
            return Lu2023(config, geometry, stage, encoder, statistics, layout)
        return Modern(config, geometry, stage, encoder, statistics, draws)
