"""What a file holds before anything is judged: numbers as they stand, and facts of the header."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpc.errors import UserError
from nanodist.scattering.frame import Setup, State
from nanodist.scattering.pattern import Kind

# An Eiger2 XE 16M has 1.8e7 pixels, the largest mosaics some 1e8.
MAX_PIXELS = 2**27


@dataclass
class Raw:
    """Numbers and facts of one frame of a file.

    Attributes:
        values: (H, W) in the type of the file.
        frames: how many frames the file holds.
        geometry: those of distance_mm, beam_centre_px, pixel_size_mm, wavelength_nm, rotations_rad that are stated.
        q_planes: (q_y, q_x) in 1/nm where they are stated.
        sigma: (H, W) where it is stated.
        measured: bool (H, W), False where the file itself masks.
        sentinels: values that the header gives to pixels without a measurement.
        saturation: the count from which a pixel is full, where stated.
        kind: where the format decides it.
        setup: where the header decides it.
        corrections: those whose state is stated.
        metadata: exposure_s, detector, units, format, ...
    """

    values: np.ndarray
    frames: int = 1
    geometry: dict[str, Any] = field(default_factory=dict)
    q_planes: tuple[np.ndarray, np.ndarray] | None = None
    sigma: np.ndarray | None = None
    measured: np.ndarray | None = None
    sentinels: tuple[float, ...] = ()
    saturation: float | None = None
    kind: Kind | None = None
    setup: Setup | None = None
    corrections: dict[str, State] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


def check_plane(shape: tuple[int, ...], path: Path) -> None:
    """Refuse what is no plane of pixels, before it is read.

    Raises:
        UserError: not two axes, a side below 2, or more pixels than any detector has.
    """
    if len(shape) != 2 or min(shape) < 2:
        raise UserError(
            f"{path} holds numbers of shape {shape}, no two-dimensional pattern: choose another file or frame"
        )
    if shape[0] * shape[1] > MAX_PIXELS:
        raise UserError(
            f"{path} claims {shape[0]} x {shape[1]} pixels, and {MAX_PIXELS} are read at most: it is damaged, or "
            "has to be cut into parts first"
        )


def one_frame(number: int, frame: int | None, path: Path) -> int:
    """The frame to read of a file that holds ``number``.

    Raises:
        UserError: several, and none is chosen; or no such frame.
    """
    if frame is None:
        if number == 1:
            return 0
        raise UserError(f"{path} holds {number} frames: choose one (frame=0 to {number - 1})")
    if not 0 <= frame < number:
        raise UserError(f"{path} holds {number} frames, so there is no frame {frame}: choose 0 to {number - 1}")
    return frame
