"""The section ``views`` of a recipe: what a view may look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpc.config import option


@dataclass(frozen=True)
class ViewsConfig:
    """Two views of each sample are drawn from these ranges, each by a key of its own.

    Lengths are pixels of the store's tiles, but for the blur and the erased square, which are pixels and shares of the
    view. The order is: crop with rotation, reflection and resize; exposure; inversion; contrast and brightness; gamma;
    background gradient; blur; noise; erased square; clip to [0, 1].
    """

    size_px: int = option(96, "Side of a view after the resize.", low=8)
    crop_px: tuple[float, float] = option((96.0, 96.0), "Side of the square crop, drawn log-uniformly.", low=4)
    zooms: list[float] = option(
        [1.0], "crop_px is divided by one of these; one draw for a sample, as size is no nuisance.", low=1e-3
    )
    rotation: Literal["none", "right_angles", "free"] = option(
        "free", "What lies outside the tile is shown as its mirror image."
    )
    centre_jitter_px: float | None = option(
        None, "Where tiles are centred on an object: how far the crop's centre may lie from the tile's.", low=0.0
    )
    exposure: Literal["keep", "image"] = option(
        "keep", "image sets each view's mean to 1/2 and its standard deviation to 1/6, so that dark tiles lose nothing."
    )
    flip: bool = option(True, "Reflect with probability 1/2.")
    invert_probability: float = option(
        0.0, "How often black and white change places, as between bright field and dark field.", low=0.0, high=1.0
    )
    contrast: float = option(0.4, "Contrast factor from 1 - c to 1 + c.", low=0.0, high=0.95)
    brightness: float = option(0.2, "Offset from -b to +b, full scale being 1.", low=0.0, high=1.0)
    gamma: float = option(0.3, "Exponent from 1 / (1 + g) to 1 + g, log-uniform.", low=0.0)
    intensity_probability: float = option(0.8, "How often contrast, brightness and gamma change.", low=0.0, high=1.0)
    background_gradient: float = option(
        0.0, "Largest rise from the middle to the edge of an added plane, full scale being 1.", low=0.0, high=1.0
    )
    blur_sigma_px: tuple[float, float] = option((0.3, 1.5), "Standard deviation of a Gaussian blur.", low=0.01)
    blur_probability: float = option(0.5, "How often a view is blurred.", low=0.0, high=1.0)
    noise_std: tuple[float, float] = option((0.0, 0.08), "Standard deviation of the noise at full scale.", low=0.0)
    noise_signal_share: float = option(0.5, "Share of the noise variance that grows with intensity.", low=0, high=1)
    noise_probability: float = option(0.5, "How often noise is added.", low=0.0, high=1.0)
    erase_probability: float = option(0.0, "How often a square is set to the view's mean.", low=0.0, high=1.0)
    erase_share: tuple[float, float] = option((0.2, 0.45), "Side of that square over the view's.", low=0.0, high=0.9)

    def check(self) -> None:
        """Raise ``ValueError`` for an empty range."""
        for name in ("crop_px", "blur_sigma_px", "noise_std", "erase_share"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} runs from {low} to {high}, the wrong way")
