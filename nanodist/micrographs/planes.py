"""What every reader of a microscope's own format finds: images, each with axes, or why something is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nanodist.micrographs.pixel_size import no_length

Axis = tuple[float, str]


@dataclass(frozen=True)
class Images:
    """A signal of a file: one image, or a stack of them.

    Attributes:
        shape: (..., H, W).
        dtype: of the pixels.
        y, x: length and unit of a pixel.
        read: gives (H, W) pixels of an image by the index of its leading axes.
        facts: plain values about the instrument.
        source: what states the pixel size.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    y: Axis
    x: Axis
    read: Callable[[tuple[int, ...]], npt.NDArray[Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    source: str = "calibration"

    @property
    def count(self) -> int:
        """How many images it is."""
        return math.prod(self.shape[:-2])

    def plane(self, k: int) -> npt.NDArray[Any]:
        """Image number ``k`` of the stack."""
        index = tuple(int(i) for i in np.unravel_index(k, self.shape[:-2])) if len(self.shape) > 2 else ()
        return np.asarray(self.read(index))


def refusal(shape: tuple[int, ...], dtype: np.dtype[Any], units: tuple[str, ...], kind: str = "") -> str | None:
    """Why a signal is no micrograph, as the end of a sentence, or ``None`` where it is one.

    Args:
        shape: of its data.
        dtype: of its data; structured ones are colours or complex numbers.
        units: of its axes, in the order of ``shape``.
        kind: what the file itself calls the signal, such as ``EELS``.
    """
    if kind.upper().startswith(("EELS", "EDS", "CL", "EBIC", "XRF")):
        return f"a spectrum ({kind})"
    if "diffraction" in kind.lower():
        return "a diffraction pattern"
    for unit in reversed(units):
        found = no_length(unit)
        if found:
            return found
    if dtype.kind == "O":
        return "a table of objects without pixels"
    if dtype.kind == "c":
        return "an image of complex numbers, such as a Fourier transform"
    if dtype.kind not in "biuf" and not (dtype.names and set(dtype.names) <= set("RGBA")):
        return f"data of type {dtype}, which are no pixels"
    if len(shape) > 3:
        return f"data of {len(shape)} dimensions, such as a scan of diffraction patterns"
    if len(shape) < 2 or min(shape[-2:]) < 2:
        return f"a line of {math.prod(shape)} values (a spectrum or a line profile)"
    return None
