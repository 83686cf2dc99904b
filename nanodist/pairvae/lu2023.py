"""The PairVAE of Lu and Jayaraman (JACS Au 2023, doi 10.1021/jacsau.3c00275), as published.

A frozen trunk gives a 6 x 6 map; Dense 32 with ReLU and a diagonal Gaussian make the latent, 6 x 6 x 32, of a pattern
and of an image alike. What the paper leaves open and is decided here: errors are means over pixels, patterns are
asinh(I / I0) over its largest value in the training part (the paper: 8-bit JPEG), and what no detector saw is left out
of the error and filled from the opposite side, or else by the ring's mean, before the trunk sees it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpc.batch_norm import Layout, convert
from nanodist.encoders import Encoder, normalise
from nanodist.objectives.elbo import bernoulli_nll, gaussian_kl, masked_mean, reparameterised
from nanodist.pairvae.model import Geometry, Inputs, Latent, PairModel, Statistics, map_stage
from nanodist.pairvae.recipe import PairModelConfig, Stage


class _Head(nn.Module):
    """From a trunk's map (n, C, h, h) to a Gaussian of ``width`` channels there."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Conv2d(channels, width, 1)
        self.gaussian = nn.Conv2d(width, 2 * width, 1)

    def forward(self, features: Tensor) -> Latent:
        mean, log_variance = self.gaussian(self.dense(features).relu()).chunk(2, 1)
        return Latent(mean.flatten(1), log_variance.clamp(-12, 6).flatten(1))


def _decoder(width: int, filters: int, kernel: int, doublings: int) -> nn.Sequential:
    """Upsampling blocks (transposed convolution, BatchNorm, ReLU), and a last transposed convolution."""
    layers: list[nn.Module] = []
    for number in range(doublings):
        shape = (width if number == 0 else filters, filters, kernel, 2, kernel // 2, 1)
        layers.append(nn.ConvTranspose2d(*shape))
        if number < doublings - 1:
            layers += [nn.BatchNorm2d(filters), nn.ReLU()]
    return nn.Sequential(*layers)


class Lu2023(PairModel):
    """See the module; arguments as :func:`nanodist.pairvae.model.build_model` has them."""

    coupled = True

    def __init__(
        self,
        config: PairModelConfig,
        geometry: Geometry,
        stage: Stage,
        encoder: Encoder,
        statistics: Statistics | None,
        layout: Layout | None,
    ) -> None:
        super().__init__()
        self.config, self.geometry, self.stage, self.spec = config, geometry, stage, encoder.spec
        self.trunk = encoder.trunk
        self.trunk.requires_grad_(False)
        side, width = config.latent_side, config.latent_width
        self.map_number, channels = map_stage(self.trunk, geometry.size_px, side)
        self.saxs_head, self.sem_head = _Head(channels, width), _Head(channels, width)
        doublings = round(math.log2(geometry.size_px / side))
        self.saxs_decoder = _decoder(width, config.saxs_filters, config.saxs_kernel, doublings)
        self.sem_decoder = _decoder(width, config.sem_filters, config.sem_kernel, doublings)
        self.register_buffer("scale", torch.ones(()))
        if statistics is not None:
            self.scale = statistics.values[statistics.mask].max().float()
        self.noise = 2 * self.latent_dim
        if layout is not None:
            for part in (self.saxs_decoder, self.sem_decoder):
                convert(part, layout)

    def train(self, mode: bool = True) -> Lu2023:
        """As for any module; the trunk stays as it was pretrained."""
        super().train(mode)
        self.trunk.eval()
        return self

    @property
    def latent_dim(self) -> int:
        """Numbers of the latent map."""
        return self.config.latent_width * self.config.latent_side**2

    @property
    def image_noise(self) -> int:
        """An image is a function of its latent; draws differ by the latent."""
        return 0

    @torch.no_grad()
    def pair_features(self, inputs: Inputs) -> Tensor | None:
        """Maps (n, 2, C, h, h) of the frozen trunk of patterns and of images."""
        dtype = next(self.trunk.parameters()).dtype
        both = torch.cat([filled(*self._target(inputs)), inputs.images]).to(dtype)
        stages = self.trunk.forward_intermediates(  # type: ignore[operator]
            normalise(both, self.spec), indices=[self.map_number], intermediates_only=True
        )
        return torch.stack(list(stages[0].chunk(2)), 1)

    def _target(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Patterns (n, 1, P, P) between about 0 and 1, and masks."""
        size, weight = self.geometry.size_px, inputs.mask.to(inputs.images.dtype)
        values = torch.asinh(inputs.intensity / self.geometry.reference).to(weight.dtype) * weight
        planes = torch.stack([values, weight], 1)
        if planes.shape[-1] != size:
            planes = functional.interpolate(planes, (size, size), mode="bilinear", antialias=True, align_corners=False)
        share = planes[:, 1:]
        return planes[:, :1] / share.clamp_min(1e-3) / self.scale.to(planes.dtype) * (share > 0.5), share > 0.5

    def _features(self, inputs: Inputs, which: int) -> Tensor:
        features = inputs.features if inputs.features is not None else self.pair_features(inputs)
        assert features is not None
        return features[:, which].to(self.saxs_head.dense.weight.dtype)

    def encode_saxs(self, inputs: Inputs) -> Latent:
        """The latent of patterns."""
        return self.saxs_head(self._features(inputs, 0))  # type: ignore[no-any-return]

    def encode_sem(self, inputs: Inputs) -> Latent:
        """The latent of images."""
        return self.sem_head(self._features(inputs, 1))  # type: ignore[no-any-return]

    def _map(self, z: Tensor) -> Tensor:
        side = self.config.latent_side
        return z.unflatten(1, (self.config.latent_width, side, side))

    def _saxs(self, z: Tensor) -> Tensor:
        return self.saxs_decoder(self._map(z)).mean(1, keepdim=True).sigmoid()  # type: ignore[no-any-return]

    def _sem(self, z: Tensor) -> Tensor:
        return self.sem_decoder(self._map(z)).mean(1, keepdim=True)  # type: ignore[no-any-return]

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """Errors of the stage's reconstructions; in the pair stage the latents of both as well."""
        saxs, sem = self.encode_saxs(inputs), self.encode_sem(inputs)
        first, second = inputs.noise.to(saxs.mean.dtype).chunk(2, 1)
        z = torch.cat([reparameterised(*saxs, first), reparameterised(*sem, second)])
        target, mask = self._target(inputs)
        images = inputs.images.to(z.dtype)
        if self.stage == "solo":
            za, zb = z.chunk(2)
            return {
                "saxs_saxs": masked_mean((self._saxs(za) - target).square(), mask),
                "sem_sem": bernoulli_nll(self._sem(zb), images),
                "kl": gaussian_kl(*saxs) + gaussian_kl(*sem),
            }
        # One pass for both, each of them with BatchNorm groups of its own.
        pattern_of, image_of = self._saxs(z).chunk(2), self._sem(z).chunk(2)
        za, zb = z.chunk(2)
        return {
            "saxs_saxs": masked_mean((pattern_of[0] - target).square(), mask),
            "sem_saxs": masked_mean((pattern_of[1] - target).square(), mask),
            "saxs_sem": bernoulli_nll(image_of[0], images),
            "sem_sem": bernoulli_nll(image_of[1], images),
            "latent_saxs": za,
            "latent_sem": zb,
        }

    def decode_saxs(self, z: Tensor) -> Tensor:
        """Expected intensity on the q grid."""
        side = self.geometry.grid.size
        values = functional.interpolate(
            self._saxs(z), (side, side), mode="bilinear", antialias=True, align_corners=False
        )
        return torch.sinh(values[:, 0] * self.scale) * self.geometry.reference

    def decode_sem(self, z: Tensor, noise: Tensor) -> Tensor:
        """Probability of material."""
        return self._sem(z).sigmoid()

    def reconstruct_sem(self, inputs: Inputs) -> Tensor:
        """Of the mean of the latent."""
        return self._sem(self.encode_sem(inputs).mean).sigmoid()


def filled(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` (n, 1, P, P) with what was not measured taken from the opposite side, or else the mean of the ring."""
    opposite, there = values.flip(-1, -2), mask.flip(-1, -2)
    values = torch.where(mask, values, torch.where(there, opposite, values))
    known = mask | there
    side = values.shape[-1]
    axis = torch.arange(side, device=values.device) - (side - 1) / 2
    ring = torch.hypot(axis[:, None], axis[None, :]).round().long().flatten()
    n, rings = len(values), int(ring.max()) + 1
    sums = values.new_zeros(n, rings).index_add_(1, ring, (values * known).flatten(1))
    counts = values.new_zeros(n, rings).index_add_(1, ring, known.flatten(1).to(values.dtype))
    means = sums / counts.clamp_min(1.0)
    # A ring that nothing is known of (under a beam stop) takes the nearest that something is known of.
    order = torch.where(counts > 0, torch.arange(rings, device=values.device), rings * 10)
    distance = (torch.arange(rings, device=values.device)[None, :, None] - order[:, None, :]).abs()
    means = means.gather(1, distance.argmin(2))
    return torch.where(known, values, means[:, ring].view_as(values))
