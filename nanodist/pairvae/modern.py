"""The PairVAE with the physics kept.

A vector is shared: what a pattern can know of a sample, such as period, orientation, order and area fraction. An image
has a map of its own besides, with a standard normal prior: where the crop lay, which no pattern knows. So a pattern has
many images, drawn from the prior of that map, and an image has one pattern.

Patterns are encoded and decoded in polar coordinates (:mod:`nanodist.pairvae.polar`), with a mask channel. A common
rotation, reflection or magnification turns the decoder's map and not the data: raw counts stay raw counts under their
Poisson likelihood. Images are decoded from their map through a filter in q that the shared vector sets, and a few
convolutions after it, so that the period is a number of the model and no pattern of its kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanodist.encoders import Encoder, normalise
from nanodist.objectives.elbo import (
    gaussian_kl,
    gaussian_nll,
    masked_mean,
    pixel_nll,
    poisson_nll,
    reparameterised,
)
from nanodist.pairvae.model import Geometry, Inputs, Latent, PairModel, Statistics, map_stage
from nanodist.pairvae.modern_parts import Local, PolarDecoder, PolarEncoder, SemDecoder
from nanodist.pairvae.physics import CropScattering, mismatch, smoothed
from nanodist.pairvae.polar import folded, grid_vectors, polar_grid, sampled, turned, turned_back
from nanodist.pairvae.recipe import PairModelConfig, Stage

# Weight of the error of asinh(I / I0) beside the likelihood, which by itself hardly sees dim rings.
_DIM_RINGS = 0.3


class Modern(PairModel):
    """See the module; arguments as :func:`nanodist.pairvae.model.build_model` has them."""

    coupled = False

    def __init__(
        self,
        config: PairModelConfig,
        geometry: Geometry,
        stage: Stage,
        encoder: Encoder | None,
        statistics: Statistics | None,
        draws: int = 2,
    ) -> None:
        super().__init__()
        self.config, self.geometry, self.stage, self.draws = config, geometry, stage, draws
        self.polar, self.crops = polar_grid(geometry.grid), CropScattering(geometry.size_px, geometry.pixel_size_nm)
        self.cells = geometry.size_px // 8
        shared, own, width = config.latent_width, config.local_width, config.width
        self.spec = None if encoder is None else encoder.spec
        self.map_number, channels = 0, 0
        if encoder is not None:
            self.map_number, channels = map_stage(encoder.trunk, geometry.size_px, self.cells)
            encoder.trunk.requires_grad_(True)
        self.local = Local(own, width, None if encoder is None else encoder.trunk, channels)
        self.saxs_encoder = PolarEncoder(self.polar, shared, 1)
        self.sem_encoder = PolarEncoder(self.polar, shared, self.local.channels)
        self.saxs_decoder = PolarDecoder(self.polar, shared)
        self.sem_decoder = SemDecoder(self.polar, self.crops, shared, own, width)
        self.saxs_level = nn.Linear(shared, 1)
        self.log_sigma = nn.Parameter(torch.full((1,), -1.4))
        self.register_buffer("ring_mean", torch.zeros(self.polar.rows))
        self.register_buffer("ring_log", torch.zeros(self.polar.rows))
        if statistics is not None:
            self._take(statistics)
        # Shared of a pattern, shared and own of an image, own of each draw.
        self.noise = 2 * shared + (1 + draws) * self.image_noise

    @torch.no_grad()
    def _take(self, statistics: Statistics) -> None:
        """Mean of asinh(I / I0), and of ln(I + I0), over the angle and the training part, for each row of the grid."""
        values, share = self._folded(statistics.values, statistics.mask, None)
        weight = share.sum((0, 2)).clamp_min(1e-3)
        self.ring_mean = ((values * share).sum((0, 2)) / weight).float()
        intensity = self.geometry.reference * torch.sinh(values.clamp_min(0.0)) + self.geometry.reference
        self.ring_log = ((intensity.log() * share).sum((0, 2)) / weight).float()

    def _folded(self, values: Tensor, mask: Tensor, turns: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cartesian ``values`` (n, S, S) and their share measured at the polar nodes, (n, rows, columns) each."""
        nodes, grid = self.polar.vectors().to(values.device), self.geometry.grid
        at = nodes.expand(len(values), -1, 2) if turns is None else turned(nodes, turns.double())
        both = folded(values, mask, (grid.size - 1) / 2, grid.q_step_inv_nm, at)
        shape = (self.polar.rows, self.polar.columns)
        return both[0].unflatten(1, shape), both[1].unflatten(1, shape)

    @property
    def latent_dim(self) -> int:
        """Numbers of the shared vector."""
        return self.config.latent_width

    @property
    def image_noise(self) -> int:
        """Numbers of an image's own map."""
        return self.config.local_width * self.cells**2

    def encode_saxs(self, inputs: Inputs) -> Latent:
        """The shared vector of patterns, turned as their images are."""
        values = torch.asinh(inputs.intensity / self.geometry.reference)
        values, share = self._folded(values, inputs.mask, inputs.turns)
        centred, known = values - self.ring_mean[:, None], share > 0.01
        # How long a pattern was exposed is one number beside it, so that its rings look alike at any exposure.
        level = masked_mean(centred, known)
        flat = (centred - level[:, None, None]) * known
        return self.saxs_encoder(flat, share, level[:, None].to(self.log_sigma.dtype))  # type: ignore[no-any-return]

    def _image_spectra(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """asinh of ten times |FFT|^2 over its mean, at the polar nodes, and where a crop of that size knows it."""
        spectra = smoothed(self.crops.spectrum(images))
        nodes = self.polar.vectors().to(images.device)
        low, high = self.crops.range_inv_nm
        q = nodes.norm(dim=1)
        known = ((q >= low) & (q <= 2 * high)).to(images.dtype)
        at = sampled(spectra[:, None], self.crops.middle, self.crops.step_inv_nm, nodes.expand(len(images), -1, 2))
        mean = (at[:, 0] * known).sum(1, keepdim=True) / known.sum().clamp_min(1.0)
        values = torch.asinh(10 * at[:, 0] / mean.clamp_min(1e-12)) * known
        shape = (self.polar.rows, self.polar.columns)
        return values.unflatten(1, shape), known.expand_as(values).unflatten(1, shape)

    def _encode_sem(self, inputs: Inputs) -> tuple[Latent, Latent]:
        """The shared vector and the own map of images."""
        images = inputs.images.to(self.log_sigma.dtype)
        seen = images - 0.5 if self.spec is None else normalise(images, self.spec)
        features, own = self.local(seen, self.map_number)
        return self.sem_encoder(*self._image_spectra(images), features), own

    def encode_sem(self, inputs: Inputs) -> Latent:
        """The shared vector of images."""
        return self._encode_sem(inputs)[0]

    def encode_own(self, inputs: Inputs) -> Latent:
        """The own map of images."""
        return self._encode_sem(inputs)[1]

    def _log_polar(self, z: Tensor) -> Tensor:
        """Natural logarithm of the expected intensity at the polar nodes, (n, 1, rows, columns)."""
        return self.saxs_decoder(z) + self.ring_log[:, None] + self.saxs_level(z)[..., None, None]

    def _log_intensity(self, z: Tensor, turns: Tensor | None) -> Tensor:
        """The same in the pixels of patterns as they were measured, (n, S, S)."""
        pixels, side = grid_vectors(self.geometry.grid).to(z.device), self.geometry.grid.size
        at = pixels.expand(len(z), -1, 2) if turns is None else turned_back(pixels, turns.double())
        return self.polar.at(self._log_polar(z), at)[:, 0].unflatten(1, (side, side))

    def decode_saxs(self, z: Tensor) -> Tensor:
        """Expected intensity."""
        return self._log_intensity(z, None).exp()

    def decode_sem(self, z: Tensor, noise: Tensor) -> Tensor:
        """Images of a shared vector and a draw of their own map."""
        own = noise.unflatten(1, (-1, self.cells, self.cells))
        # The amplitude of a structure is the root of what it scatters; what of it is no structure, the filter learns.
        # In the solo stage no image knows a pattern.
        amplitude = 0.5 * self._log_polar(z) if self.stage == "pair" else None
        return self.sem_decoder(z, own, amplitude)  # type: ignore[no-any-return]

    def reconstruct_sem(self, inputs: Inputs) -> Tensor:
        """Of the means of the shared vector and of the own map."""
        shared, own = self._encode_sem(inputs)
        return self.decode_sem(shared.mean, own.mean)

    def _saxs_error(self, z: Tensor, inputs: Inputs, of_image: bool = False) -> Tensor:
        """Negative log likelihood (n,) of patterns under a shared vector.

        Args:
            of_image: the vector is that of an image, which cannot know the exposure: it is fitted.
        """
        log_rate = self._log_intensity(z, inputs.turns)
        data, mask = inputs.intensity.to(log_rate.dtype), inputs.mask
        if of_image:
            floor = 1e-3 * self.geometry.reference
            wanted, found = (masked_mean(x, mask).clamp_min(floor) for x in (data, log_rate.exp()))
            log_rate = log_rate + (wanted / found).log()[:, None, None]
        counts = poisson_nll(log_rate, data.clamp_min(0.0), mask)
        reduced = gaussian_nll(log_rate.exp(), data, inputs.sigma.to(log_rate.dtype), mask)
        raw = (inputs.sigma == 0).flatten(1).all(1)
        dim = torch.asinh(log_rate.exp() / self.geometry.reference) - torch.asinh(data / self.geometry.reference)
        return torch.where(raw, counts, reduced) + _DIM_RINGS * masked_mean(dim.square(), mask)

    def _physics(self, z: Tensor, noise: Tensor, inputs: Inputs) -> Tensor:
        """How far (n,) the scattering of drawn images is from the patterns; of images alone, from their own."""
        n, draws = len(z), noise.shape[1] // self.image_noise
        images = self.decode_sem(z.repeat_interleave(draws, 0), noise.reshape(n * draws, -1))
        found = self.crops.compared(self.crops.spectrum(images).unflatten(0, (n, draws)).mean(1))
        target, mask = self.crops.target(inputs.intensity.to(z.dtype), inputs.mask, self.geometry.grid, inputs.turns)
        own = self.crops.compared(self.crops.spectrum(inputs.images.to(z.dtype)))
        alone = (inputs.has[:, :1] == 0) | (self.stage == "solo")
        return mismatch(found, torch.where(alone, own, target.to(own.dtype)), mask | alone)

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """The terms of the stage."""
        has_saxs, has_sem = inputs.has.to(self.log_sigma.dtype).unbind(1)
        both = has_saxs * has_sem
        shared, own = self.latent_dim, self.image_noise
        noise = inputs.noise.to(self.log_sigma.dtype).split([shared, shared, own, self.draws * own], 1)
        saxs, (sem, local) = self.encode_saxs(inputs), self._encode_sem(inputs)
        za, zb = reparameterised(*saxs, noise[0]), reparameterised(*sem, noise[1])
        u = reparameterised(*local, noise[2])
        images = inputs.images.to(za.dtype)
        pattern_px, image_px = self.geometry.grid.size**2, self.geometry.size_px**2
        terms = {
            "saxs_saxs": has_saxs * self._saxs_error(za, inputs),
            "sem_sem": has_sem * pixel_nll(self.decode_sem(zb, u), images, self._sigma()),
            "kl_saxs": has_saxs * gaussian_kl(*saxs) / pattern_px,
            "kl_sem": has_sem * (gaussian_kl(*sem) + gaussian_kl(*local)) / image_px,
        }
        if self.stage == "solo":
            return {**terms, "physics": has_sem * self._physics(zb, noise[3], inputs)}
        # A pattern alone has its own latent to be drawn from, an image alone its own as well.
        from_given = torch.where(has_saxs[:, None] > 0, za, zb)
        return {
            **terms,
            "sem_saxs": both * self._saxs_error(zb, inputs, True),
            "saxs_sem": both * pixel_nll(self.decode_sem(za, u), images, self._sigma()),
            "coupling": both * (saxs.mean - sem.mean).square().mean(1),
            "physics": self._physics(from_given, noise[3], inputs),
        }

    def _sigma(self) -> Tensor:
        return self.log_sigma.clamp(-3.0, 1.0)
