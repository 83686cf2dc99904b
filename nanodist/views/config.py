"""The section ``views`` of a recipe: what a view may look like."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpc.config import option
from hpc.errors import UserError
from nanodist.views.presets import PRESETS

_CROPS = ("crop_px", "crop_nm", "crop_share")


@dataclass(frozen=True)
class ViewsConfig:
    """Two views of each sample are drawn from these ranges, each by a key of its own.

    Lengths are pixels of the store's tiles, but for the blur and the erased square, which are pixels and shares of the
    view. The order is: crop with rotation, reflection and resize; exposure; inversion; brightness and contrast, clip
    to [0, 1]; gamma; background gradient; blur; solarizing; noise; erased square; clip to [0, 1]. With ``noise_stage``
    linear, blur and noise come after the inversion, when nothing has bent the grey scale yet.

    In a recipe, ``preset: NAME`` stands for the values of that preset; other keys of the section win over them.
    """

    size_px: int = option(96, "Side of a view after the resize.", low=8)
    drawn_for: Literal["sample", "batch"] = option(
        "sample", "batch: one draw for all samples of a step, but for zoom and noise; a flaw of Lu et al. 2022."
    )
    crop_px: tuple[float, float] | None = option(
        (96.0, 96.0), "Side of the crop in pixels of the tile; a crop never exceeds the tile.", low=4
    )
    crop_nm: tuple[float, float] | None = option(
        None, "Side in nanometres instead; every sample must have its pixel_size_nm.", low=1e-6
    )
    crop_share: tuple[float, float] | None = option(
        None, "Side as a share of the tile's shorter side instead.", low=0.01, high=1.0
    )
    crop_law: Literal["log", "side", "area"] = option(
        "log", "What is uniform: the side's logarithm, the side, its square."
    )
    aspect: tuple[float, float] | None = option(
        None, "Width over height of the crop, log-uniform; null: square. Other values make spheres into rods.", low=0.05
    )
    zooms: list[float] = option(
        [1.0], "The side is divided by one of these; one draw for a sample, as size is no nuisance.", low=1e-3
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
    brightness_factor: float = option(0.0, "Grey values times 1 - f to 1 + f.", low=0.0, high=1.0)
    contrast: float = option(0.4, "Contrast factor from 1 - c to 1 + c.", low=0.0, high=0.95)
    brightness: float = option(0.2, "Offset from -b to +b, full scale being 1.", low=0.0, high=1.0)
    gamma: float = option(0.3, "Exponent from 1 / (1 + g) to 1 + g, log-uniform.", low=0.0)
    intensity_probability: float = option(0.8, "How often contrast, brightness and gamma change.", low=0.0, high=1.0)
    background_gradient: float = option(
        0.0, "Largest rise from the middle to the edge of an added plane, full scale being 1.", low=0.0, high=1.0
    )
    blur_sigma_px: tuple[float, float] = option((0.3, 1.5), "Standard deviation of a Gaussian blur.", low=0.01)
    blur_probability: float = option(0.5, "How often a view is blurred.", low=0.0, high=1.0)
    blur_probability_second: float | None = option(
        None, "How often the second view is blurred, where that differs from the first.", low=0.0, high=1.0
    )
    solarize_probability: float = option(
        0.0, "How often what is brighter than 1/2 becomes its negative.", low=0.0, high=1.0
    )
    solarize_probability_second: float | None = option(
        None, "How often the second view is solarized, where that differs from the first.", low=0.0, high=1.0
    )
    noise_stage: Literal["last", "linear"] = option(
        "last", "linear: blur and noise come before contrast, brightness and gamma, as in the microscope."
    )
    noise_std: tuple[float, float] = option((0.0, 0.08), "Standard deviation of the noise at full scale.", low=0.0)
    noise_signal_share: float = option(0.5, "Share of the noise variance that grows with intensity.", low=0, high=1)
    noise_probability: float = option(0.5, "How often noise is added.", low=0.0, high=1.0)
    erase_probability: float = option(0.0, "How often a square is set to the view's mean.", low=0.0, high=1.0)
    erase_share: tuple[float, float] = option((0.2, 0.45), "Side of that square over the view's.", low=0.0, high=0.9)

    @classmethod
    def expand(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """``values`` of a recipe with the preset's put in, so that nothing but plain values is kept and hashed.

        Raises:
            ValueError: no such preset.
        """
        given = dict(values)
        name = given.pop("preset", None)
        if name is not None:
            if name not in PRESETS:
                raise ValueError(f"preset is {name!r}; allowed: {', '.join(PRESETS)}")
            preset = dict(PRESETS[name])
            if any(given.get(crop) is not None for crop in _CROPS):
                preset = {key: value for key, value in preset.items() if key not in _CROPS}
            given = {**preset, **given}
        if given.get("crop_nm") is not None or given.get("crop_share") is not None:
            given.setdefault("crop_px", None)
        return given

    def check(self) -> None:
        """Raise ``ValueError`` for an empty range, or where it is not said once how large a crop is."""
        for name in (*_CROPS, "aspect", "blur_sigma_px", "noise_std", "erase_share"):
            bounds = getattr(self, name)
            if bounds is not None and bounds[0] > bounds[1]:
                raise ValueError(f"{name} runs from {bounds[0]} to {bounds[1]}, the wrong way")
        crops = [name for name in _CROPS if getattr(self, name) is not None]
        if len(crops) != 1:
            said = " and ".join(crops) or "none of them"
            raise ValueError(f"one of crop_px, crop_nm and crop_share says how large a crop is, not {said}")
        if not self.zooms:
            raise ValueError("zooms is empty; [1.0] leaves the crop as it is")

    def mean_crop_px(self, height: int, width: int, pixel_size_nm: float | None = None, zoom: float = 1.0) -> float:
        """Geometric mean of the ends of the crop's range, in pixels of a tile of ``height`` x ``width`` pixels.

        Args:
            height: of the tile in pixels.
            width: of the tile in pixels.
            pixel_size_nm: of the tile, for ``crop_nm``.
            zoom: that the side is divided by.

        Raises:
            ValueError: ``crop_nm`` is set and ``pixel_size_nm`` is not.
        """
        low, high = self.crop_bounds()
        middle = (low * high) ** 0.5
        if self.crop_share is not None:
            middle *= min(height, width)
        elif self.crop_nm is not None:
            if pixel_size_nm is None:
                raise ValueError("crop_nm needs the pixel size of the tiles")
            middle /= pixel_size_nm
        # A crop is never larger than its tile.
        return min(middle / zoom, height, width)

    def crop_bounds(self) -> tuple[float, float]:
        """The range of the crop's side, in the unit that it is given in."""
        bounds = self.crop_px or self.crop_nm or self.crop_share
        if bounds is None:
            raise ValueError("none of crop_px, crop_nm and crop_share is set")
        return bounds

    def blur_reach(self) -> int:
        """Half the width in pixels of every blur's window, without its middle: 3 of the largest standard deviation.

        One for all views, or what a view looks like would depend on which others are blurred with it.
        """
        return min(math.ceil(3 * self.blur_sigma_px[1]), self.size_px // 2 - 1)

    def of_view(self, name: str, view: int) -> float:
        """The probability ``name`` of view ``view``: that of the second view differs where the recipe says so."""
        second = getattr(self, f"{name}_second")
        return float(getattr(self, name) if view == 0 or second is None else second)


def check_pixel_sizes(sizes: npt.NDArray[np.float64], what: str, name: Callable[[int], str]) -> None:
    """Raise ``UserError`` where one of ``sizes`` (n, 2) is unknown (NaN), as crops in nanometres need them.

    Args:
        sizes: nanometres a pixel.
        what: these are of.
        name: of the one in a row.
    """
    unknown = np.flatnonzero(np.isnan(sizes).any(1))
    if len(unknown):
        raise UserError(
            f"views.crop_nm: {len(unknown)} of {len(sizes)} {what} have no pixel size, such as "
            f"{name(int(unknown[0]))}; set views.crop_px or crop_share instead"
        )
