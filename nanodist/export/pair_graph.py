"""A PairVAE as two graphs: from a pattern to an image, and from an image to a pattern.

The modules here compute what :class:`nanodist.pairvae.modern.Modern` and :class:`nanodist.pairvae.lu2023.Lu2023` do,
with every place of a grid as a constant and Fourier transforms as products of matrices, which every runtime has.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from nanodist.encoders import normalise
from nanodist.objectives.elbo import masked_mean
from nanodist.pairvae.lu2023 import Lu2023
from nanodist.pairvae.model import PairModel
from nanodist.pairvae.modern import Modern
from nanodist.pairvae.modern_parts import _LONGEST_PERIOD, _twice
from nanodist.pairvae.physics import detrended, smoothed
from nanodist.pairvae.polar import PolarGrid, grid_vectors


class Parts(nn.Module):
    """One PairVAE, as its two graphs need it."""

    @abstractmethod
    def encode_saxs(self, intensity: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (n, d) of patterns (n, S, S), of which ``mask`` says what was measured (1 or 0)."""

    @abstractmethod
    def encode_sem(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (n, d) of images (n, 1, P, P) in [0, 1]."""

    @abstractmethod
    def decode_saxs(self, z: Tensor) -> Tensor:
        """Expected intensity (n, S, S)."""

    @abstractmethod
    def decode_sem(self, z: Tensor, own: Tensor) -> Tensor:
        """Images (n, 1, P, P) in [0, 1]."""


class FromSaxs(nn.Module):
    """Pattern -> latent -> image."""

    def __init__(self, parts: Parts, latent: int) -> None:
        super().__init__()
        self.parts, self.latent = parts, latent

    def forward(self, intensity: Tensor, mask: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, log variance and images of ``intensity``, ``mask`` (n, S, S) and ``noise`` (n, d + m)."""
        mean, log_variance = self.parts.encode_saxs(intensity, mask)
        z = mean + torch.exp(0.5 * log_variance) * noise[:, : self.latent]
        return mean, log_variance, self.parts.decode_sem(z, noise[:, self.latent :])


class FromSem(nn.Module):
    """Image -> latent -> pattern."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, log variance and expected intensity of ``images`` (n, 1, P, P) and ``noise`` (n, d)."""
        mean, log_variance = self.parts.encode_sem(images)
        return mean, log_variance, self.parts.decode_saxs(mean + torch.exp(0.5 * log_variance) * noise)


def parts_of(model: PairModel) -> Parts:
    """The graph's part of a model, which stays as it is."""
    if isinstance(model, Modern):
        return ModernParts(copy.deepcopy(model)).eval()
    assert isinstance(model, Lu2023)
    return Lu2023Parts(copy.deepcopy(model)).eval()


class _At(nn.Module):
    """Values (n, c, m) of planes (n, c, H, W) at places that never change, interpolated linearly.

    Args:
        places: (m, 2) as ``grid_sample`` has them, x before y, from -1 to 1.
        beyond: what lies outside: ``border`` or ``zeros``.
    """

    def __init__(self, places: Tensor, beyond: str) -> None:
        super().__init__()
        self.register_buffer("places", places.float()[None, None])
        self.beyond = beyond

    def forward(self, planes: Tensor) -> Tensor:
        at = self.places.expand(planes.shape[0], -1, -1, -1)  # type: ignore[operator]
        return functional.grid_sample(planes, at, "bilinear", self.beyond, align_corners=True)[:, :, 0]


def _polar_places(grid: PolarGrid, vectors: Tensor) -> Tensor:
    """Places of ``vectors`` (m, 2) on polar maps that were closed along the angle: :meth:`PolarGrid.at`."""
    modulus = vectors.norm(dim=1).clamp_min(1e-12)
    row = torch.log(modulus / grid.q_low_inv_nm) / math.log(grid.q_high_inv_nm / grid.q_low_inv_nm)
    turn = torch.remainder(torch.atan2(vectors[:, 1], vectors[:, 0]) / math.pi, 1.0)
    return torch.stack([2 * turn - 1, 2 * row - 1], 1)


def _plane_places(vectors: Tensor, middle_px: float, step_inv_nm: float, side: int) -> Tensor:
    """Places of ``vectors`` on Cartesian planes: :func:`nanodist.pairvae.polar.sampled`."""
    x, y = middle_px + vectors[:, 0] / step_inv_nm, middle_px - vectors[:, 1] / step_inv_nm
    return torch.stack([x, y], 1) * (2.0 / (side - 1)) - 1.0


def _closed(maps: Tensor) -> Tensor:
    return torch.cat([maps, maps[..., :1]], 3)


class ModernParts(Parts):
    """Preset ``modern``."""

    def __init__(self, model: Modern) -> None:
        super().__init__()
        self.model, self.reference = model, model.geometry.reference
        grid, nodes = model.geometry.grid, model.polar.vectors()
        self.rows, self.columns, self.side = model.polar.rows, model.polar.columns, grid.size
        middle, step = (grid.size - 1) / 2, grid.q_step_inv_nm
        self.measured = _At(_plane_places(nodes, middle, step, grid.size), "zeros")
        self.opposite = _At(_plane_places(-nodes, middle, step, grid.size), "zeros")
        self.pixels = _At(_polar_places(model.polar, grid_vectors(grid)), "border")
        crops, size = model.crops, model.geometry.size_px
        self.spectrum = _At(_plane_places(nodes, crops.middle, crops.step_inv_nm, size), "zeros")
        low, high = crops.range_inv_nm
        q = nodes.norm(dim=1)
        self.register_buffer("known", ((q >= low) & (q <= 2 * high)).float())
        line = torch.hann_window(size, periodic=True)
        self.register_buffer("window", line[:, None] * line[None, :])
        self.filter = _Filter(model)

    def _maps(self, flat: Tensor) -> Tensor:
        return flat.unflatten(1, (self.rows, self.columns))

    def encode_saxs(self, intensity: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`Parts.encode_saxs` says."""
        values = torch.asinh(intensity / self.reference)
        planes = torch.stack([values * mask, mask], 1)
        both = self.measured(planes) + self.opposite(planes)
        share = both[:, 1] / 2
        values = both[:, 0] / both[:, 1].clamp_min(1e-3) * (share > 1e-3).float()
        folded, share = self._maps(values), self._maps(share)
        centred, known = folded - self.model.ring_mean[:, None], (share > 0.01).float()
        level = masked_mean(centred, known)
        flat = (centred - level[:, None, None]) * known
        mean, log_variance = self.model.saxs_encoder(flat, share, level[:, None])
        return mean, log_variance

    def encode_sem(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`Parts.encode_sem` says."""
        spec = self.model.spec
        seen = images - 0.5 if spec is None else normalise(images, spec)
        features, _ = self.model.local(seen, self.model.map_number)
        at = self.spectrum(smoothed(self._power(images))[:, None])[:, 0]
        known: Tensor = self.known  # type: ignore[assignment]
        mean = (at * known).sum(1, keepdim=True) / known.sum().clamp_min(1.0)
        values = torch.asinh(10 * at / mean.clamp_min(1e-12)) * known
        share = torch.ones_like(values) * known
        found = self.model.sem_encoder(self._maps(values), self._maps(share), features)
        return found[0], found[1]

    def _power(self, images: Tensor) -> Tensor:
        """:meth:`nanodist.pairvae.physics.CropScattering.spectrum`."""
        real, imaginary = self.filter.forth(detrended(images[:, 0]) * self.window)  # type: ignore[operator]
        power = (real.square() + imaginary.square()) / self.window.square().sum()  # type: ignore[operator]
        half = power.shape[-1] // 2  # even: a crop is a multiple of 8 px
        power = torch.cat([power[..., half:, :], power[..., :half, :]], -2)
        return torch.cat([power[..., half:], power[..., :half]], -1)

    def _log_polar(self, z: Tensor) -> Tensor:
        model = self.model
        return model.saxs_decoder(z) + model.ring_log[:, None] + model.saxs_level(z)[..., None, None]  # type: ignore[no-any-return]

    def decode_saxs(self, z: Tensor) -> Tensor:
        """As :meth:`Parts.decode_saxs` says."""
        return self.pixels(_closed(self._log_polar(z)))[:, 0].unflatten(1, (self.side, self.side)).exp()

    def decode_sem(self, z: Tensor, own: Tensor) -> Tensor:
        """As :meth:`Parts.decode_sem` says."""
        own = own.unflatten(1, (-1, self.model.cells, self.model.cells))
        part = self.model.sem_decoder
        gate = part.gate(z)
        if self.model.stage == "pair":
            gate = gate + 0.5 * self._log_polar(z)
        x = part.third(_twice(part.second(_twice(part.first(own, z)), z)), z)
        fields = functional.pixel_shuffle(part.white(own), 4) + part.fields(x)
        fields = self.filter(_twice(fields), gate)
        x = part.fifth(part.fourth(torch.cat([fields, _twice(part.context(x))], 1), z), z)
        gain, shift = part.level(z)[..., None, None].chunk(2, 1)
        rest = part.last(x.movedim(1, -1)).movedim(-1, 1)
        return ((1.5 + gain) * fields[:, :1] + shift + rest).sigmoid()  # type: ignore[no-any-return]


class _Filter(nn.Module):
    """What a polar filter passes of fields: ``SemDecoder._filtered`` with transforms as products of matrices."""

    def __init__(self, model: Modern) -> None:
        super().__init__()
        size, step = model.geometry.size_px, model.crops.step_inv_nm
        self.size = size
        numbers = torch.arange(size, dtype=torch.float64)
        angle = 2 * math.pi * torch.remainder(numbers[:, None] * numbers[None, :], size) / size
        self.register_buffer("cosine", angle.cos().float())
        self.register_buffer("sine", angle.sin().float())
        # Frequencies of both signs: a filter that is the same at q and -q, so that a real field stays real.
        signed = torch.fft.fftfreq(size, 1.0, dtype=torch.float64) * size
        y, x = torch.meshgrid(-signed, signed, indexing="ij")
        vectors = torch.stack([x.flatten(), y.flatten()], 1)
        # The last column of the other half is filled from the first, as irfft2 does.
        behind = (vectors[:, 0] < 0) & (vectors[:, 0] > -size / 2)
        vectors = torch.where(behind[:, None], -vectors, vectors)
        vectors[:, 0] = vectors[:, 0].abs()
        lowest = vectors[:, 1] == -size / 2
        vectors[:, 1] = torch.where(behind & lowest, size / 2, vectors[:, 1])
        self.at = _At(_polar_places(model.polar, vectors * step), "border")
        bins = vectors.norm(dim=1).view(size, size)
        self.register_buffer("passes", (bins >= 1 / _LONGEST_PERIOD).float())

    def forth(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """Real and imaginary part of the Fourier transform of real ``planes`` (..., P, P)."""
        c, s = self.cosine, self.sine
        real, imaginary = planes @ c, -(planes @ s)  # type: ignore[operator]
        return c @ real + s @ imaginary, c @ imaginary - s @ real  # type: ignore[operator]

    def forward(self, fields: Tensor, gate: Tensor) -> Tensor:
        """Fields (n, c, P, P) of variance 1."""
        passed = self.at(_closed(gate)).unflatten(2, (self.size, self.size))
        passed = (passed - passed.amax((-2, -1), keepdim=True)).clamp_min(-12.0).exp() * self.passes
        real, imaginary = (part * passed for part in self.forth(fields))
        c, s = self.cosine, self.sine
        real, imaginary = real @ c - imaginary @ s, real @ s + imaginary @ c  # type: ignore[operator]
        fields = (c @ real - s @ imaginary) / self.size**2  # type: ignore[operator]
        return fields / (fields.var((-2, -1), keepdim=True, correction=0) + 1e-6).sqrt()


class Lu2023Parts(Parts):
    """Preset ``lu2023``."""

    def __init__(self, model: Lu2023) -> None:
        super().__init__()
        self.model, self.reference, size = model, model.geometry.reference, model.geometry.size_px
        axis = torch.arange(size) - (size - 1) / 2
        ring = torch.hypot(axis[:, None], axis[None, :]).round().long().flatten()
        self.rings = int(ring.max()) + 1
        self.register_buffer("ring", ring[None])
        apart = torch.arange(self.rings)
        self.register_buffer("apart", (apart[:, None] - apart[None, :]).abs().float())

    def _map(self, images: Tensor) -> Tensor:
        stages = self.model.trunk.forward_intermediates(  # type: ignore[operator]
            normalise(images, self.model.spec), indices=[self.model.map_number], intermediates_only=True
        )
        return stages[0]  # type: ignore[no-any-return]

    def encode_saxs(self, intensity: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`Parts.encode_saxs` says."""
        size = self.model.geometry.size_px
        planes = torch.stack([torch.asinh(intensity / self.reference) * mask, mask], 1)
        if planes.shape[-1] != size:
            planes = functional.interpolate(planes, (size, size), mode="bilinear", antialias=True, align_corners=False)
        share = planes[:, 1:]
        known = (share > 0.5).float()
        target = planes[:, :1] / share.clamp_min(1e-3) / self.model.scale * known
        found = self.model.saxs_head(self._map(self._filled(target, known)))
        return found[0], found[1]

    def _filled(self, values: Tensor, mask: Tensor) -> Tensor:
        """:func:`nanodist.pairvae.lu2023.filled`; masks are 1 and 0."""
        there = mask.flip(-1, -2)
        values = values * mask + values.flip(-1, -2) * there * (1 - mask)
        known = torch.maximum(mask, there)
        ring = self.ring.expand(values.shape[0], -1)  # type: ignore[operator]
        zeros = torch.zeros_like(values.flatten(1)[:, : self.rings])
        sums = zeros.scatter_add(1, ring, (values * known).flatten(1))
        counts = zeros.scatter_add(1, ring, known.flatten(1))
        means = sums / counts.clamp_min(1.0)
        far = self.apart + (counts == 0).float()[:, None, :] * (20.0 * self.rings)  # type: ignore[operator]
        means = means.gather(1, far.argmin(2))
        return values * known + means.gather(1, ring).view_as(values) * (1 - known)

    def encode_sem(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`Parts.encode_sem` says."""
        found = self.model.sem_head(self._map(images))
        return found[0], found[1]

    def decode_saxs(self, z: Tensor) -> Tensor:
        """As :meth:`Parts.decode_saxs` says."""
        return self.model.decode_saxs(z)

    def decode_sem(self, z: Tensor, own: Tensor) -> Tensor:
        """As :meth:`Parts.decode_sem` says."""
        return self.model.decode_sem(z, own)
