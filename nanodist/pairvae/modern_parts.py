"""Networks of the preset ``modern``; none lets samples of a batch meet."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from nanodist.pairvae.model import Latent
from nanodist.pairvae.physics import CropScattering
from nanodist.pairvae.polar import PolarGrid

# No crop knows a period longer than a half of itself, so no filter passes one.
_LONGEST_PERIOD = 0.5


class _PolarConv(nn.Module):
    """A 3 x 3 convolution over polar maps: around the edge along the angle, the edge's value beyond the rows."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(functional.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1), mode="replicate")
        return self.conv(x)  # type: ignore[no-any-return]


def _normed(channels: int) -> nn.Module:
    return nn.GroupNorm(max(1, channels // 8), channels)


class PolarEncoder(nn.Module):
    """From polar maps and what was measured of them to a Gaussian.

    Args:
        grid: of the maps.
        shared: numbers of the Gaussian.
        features: channels of further features beside the map.
    """

    def __init__(self, grid: PolarGrid, shared: int, features: int = 0) -> None:
        super().__init__()
        widths = (2, 16, 32, 48, 64)
        layers: list[nn.Module] = []
        for number, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [_PolarConv(a, b, 1 if number == 0 else 2), _normed(b), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        flat = widths[-1] * (grid.rows // 8) * (grid.columns // 8) + features
        self.head = nn.Sequential(nn.Linear(flat, 128), nn.SiLU(), nn.Linear(128, 2 * shared))

    def forward(self, values: Tensor, share: Tensor, features: Tensor | None = None) -> Latent:
        """The Gaussian of ``values`` and the ``share`` measured, (n, rows, columns), and of features (n, c)."""
        planes = torch.stack([values, share], 1).to(next(self.parameters()).dtype)
        flat = self.body(planes).flatten(1)
        flat = flat if features is None else torch.cat([flat, features], 1)
        mean, log_variance = self.head(flat).chunk(2, 1)
        return Latent(mean, (log_variance - 3.0).clamp(-12, 4))


class PolarDecoder(nn.Module):
    """From shared vectors to polar maps (n, 1, rows, columns); 0 everywhere at the beginning."""

    def __init__(self, grid: PolarGrid, shared: int) -> None:
        super().__init__()
        self.start = (64, grid.rows // 8, grid.columns // 8)
        self.dense = nn.Sequential(
            nn.Linear(shared, 128), nn.SiLU(), nn.Linear(128, self.start[0] * self.start[1] * self.start[2])
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(_PolarConv(a, b), _normed(b), nn.SiLU()) for a, b in ((64, 48), (48, 32), (32, 24))
        )
        self.last = nn.Linear(24, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Maps of shared vectors (n, d)."""
        x = self.dense(z).unflatten(1, self.start)
        for block in self.blocks:
            x = block(_doubled(x))
        # A product of matrices: a convolution with one output is several times slower on a CPU.
        return self.last(x.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]


def _doubled(x: Tensor) -> Tensor:
    """Polar maps with twice as many rows and columns, interpolated, around the edge along the angle."""
    wide = functional.pad(x, (1, 1, 0, 0), mode="circular")
    wide = functional.interpolate(wide, scale_factor=2.0, mode="bilinear", align_corners=False)
    return wide[..., 2:-2]


class Local(nn.Module):
    """An image's own map: a trunk, or three convolutions, down to one cell per 8 x 8 pixels.

    BatchNorm of a trunk keeps the statistics of its pretraining.
    """

    def __init__(self, own: int, width: int, trunk: nn.Module | None, channels: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.channels = channels if trunk is not None else 2 * width
        if trunk is None:
            widths = (1, width // 2, width, 2 * width)
            layers: list[nn.Module] = []
            for a, b in itertools.pairwise(widths):
                layers += [nn.Conv2d(a, b, 3, 2, 1), _normed(b), nn.SiLU()]
            self.body = nn.Sequential(*layers, nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.SiLU())
        self.head = nn.Conv2d(self.channels, 2 * own, 1)

    def train(self, mode: bool = True) -> Local:
        """As for any module, but that the trunk's statistics stay in use."""
        super().train(mode)
        if mode and self.trunk is not None:
            for part in self.trunk.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()
        return self

    def forward(self, images: Tensor, map_number: int) -> tuple[Tensor, Latent]:
        """Pooled features (n, channels), and the map's Gaussian (n, own * cells * cells)."""
        if self.trunk is None:
            x = self.body(images)
        else:
            x = self.trunk.forward_intermediates(  # type: ignore[operator]
                images, indices=[map_number], stop_early=True, intermediates_only=True
            )[0]
        mean, log_variance = self.head(x).chunk(2, 1)
        return x.mean((-2, -1)), Latent(mean.flatten(1), log_variance.clamp(-8, 2).flatten(1))


class _Modulated(nn.Module):
    """A convolution whose channels the shared vector scales and shifts (Perez et al. 2018, FiLM)."""

    def __init__(self, inputs: int, outputs: int, shared: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, 1, 1), _normed(outputs)
        self.film = nn.Linear(shared, 2 * outputs)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        gain, shift = self.film(z)[..., None, None].chunk(2, 1)
        return functional.silu(self.norm(self.conv(x)) * (1 + gain) + shift)


class SemDecoder(nn.Module):
    """From shared vectors and maps to images (n, 1, P, P) in [0, 1].

    The map becomes four fields; the shared vector's filter in q passes what scatters; convolutions make a morphology
    of what passed. Maps drawn from the prior are white, so the fields have all periods from the first step on.
    """

    def __init__(self, grid: PolarGrid, crops: CropScattering, shared: int, own: int, width: int) -> None:
        super().__init__()
        self.grid, self.crops = grid, crops
        self.gate = PolarDecoder(grid, shared)
        self.first = _Modulated(own, 2 * width, shared)
        self.second = _Modulated(2 * width, width + width // 2, shared)
        self.third = _Modulated(width + width // 2, width, shared)
        self.white = nn.Conv2d(own, 64, 1)
        self.fields = nn.Conv2d(width, 4, 3, 1, 1)
        self.context = nn.Conv2d(width, 8, 1)
        self.fourth = _Modulated(12, width // 2, shared)
        self.fifth = _Modulated(width // 2, width // 2, shared)
        self.last = nn.Linear(width // 2, 1)
        self.level = nn.Linear(shared, 2)
        nn.init.zeros_(self.level.weight)
        nn.init.zeros_(self.level.bias)

    def forward(self, z: Tensor, own: Tensor, amplitude: Tensor | None = None) -> Tensor:
        """Images of shared vectors (n, d) and maps (n, own, cells, cells).

        ``amplitude`` (n, 1, rows, columns) is what the filter begins with, as a natural logarithm.
        """
        x = self.second(_twice(self.first(own, z)), z)
        x = self.third(_twice(x), z)
        fields = functional.pixel_shuffle(self.white(own), 4) + self.fields(x)
        gate = self.gate(z) if amplitude is None else self.gate(z) + amplitude
        fields = self._filtered(_twice(fields), gate)
        x = self.fifth(self.fourth(torch.cat([fields, _twice(self.context(x))], 1), z), z)
        gain, shift = self.level(z)[..., None, None].chunk(2, 1)
        rest = self.last(x.movedim(1, -1)).movedim(-1, 1)
        return ((1.5 + gain) * fields[:, :1] + shift + rest).sigmoid()

    def _filtered(self, fields: Tensor, gate: Tensor) -> Tensor:
        """What the filter of each sample, ln ``gate``, passes of its ``fields`` (n, c, P, P), with variance 1."""
        size = fields.shape[-1]
        rows = torch.fft.fftfreq(size, 1.0, device=fields.device, dtype=torch.float64) * size
        columns = torch.arange(size // 2 + 1, device=fields.device, dtype=torch.float64)
        y, x = torch.meshgrid(-rows, columns, indexing="ij")
        vectors = torch.stack([x.flatten(), y.flatten()], 1) * self.crops.step_inv_nm
        passed = self.grid.at(gate, vectors.expand(len(gate), -1, 2)).unflatten(2, (size, size // 2 + 1))
        bins = vectors.norm(dim=1).view(size, size // 2 + 1) / self.crops.step_inv_nm
        passed = (passed - passed.amax((-2, -1), keepdim=True)).clamp_min(-12.0).exp()
        passed = passed * (bins >= 1 / _LONGEST_PERIOD).to(passed.dtype)
        fields = torch.fft.irfft2(torch.fft.rfft2(fields) * passed, s=(size, size))
        return fields / (fields.var((-2, -1), keepdim=True, correction=0) + 1e-6).sqrt()


def _twice(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
