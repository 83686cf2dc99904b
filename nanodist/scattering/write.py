"""Patterns as float TIFF with q, which ImageJ shows with its scale and `read_frame` reads back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from hpc.atomic import write_bytes
from nanodist.scattering.files import MARKER
from nanodist.scattering.frame import Frame
from nanodist.scattering.pattern import Pattern


def write_pattern(path: Path, pattern: Pattern, **facts: Any) -> None:
    """A TIFF of float32 with NaN where nothing was measured; its second page, for reduced data, is sigma.

    The description holds JSON: the grid, the kind, the unit 1/nm, and ``facts`` (plain values). The resolution tags
    hold pixels per 1/nm.
    """
    import tifffile

    description = {MARKER: {"grid": pattern.grid.as_dict(), "kind": pattern.kind, "q_unit": "1/nm", **facts}}
    options: dict[str, Any] = {
        "photometric": "minisblack",
        "resolution": (1 / pattern.grid.q_step_inv_nm, 1 / pattern.grid.q_step_inv_nm),
        "resolutionunit": "NONE",
        "compression": "zlib",
        "metadata": None,
    }
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        planes = [pattern.intensity] if pattern.sigma is None else [pattern.intensity, pattern.sigma]
        for number, plane in enumerate(planes):
            values = np.where(pattern.mask, plane, np.nan).astype(np.float32)
            writer.write(values, description=json.dumps(description) if number == 0 else None, **options)
    write_bytes(path, buffer.getvalue())


def as_frame(pattern: Pattern, name: str) -> Frame:
    """A pattern on its grid as a frame of its own, for readers of frames."""
    return Frame(
        intensity=pattern.intensity,
        mask=pattern.mask,
        kind=pattern.kind,
        name=name,
        q_planes=pattern.grid.q(),
        sigma=pattern.sigma,
        setup="transmission",
    )
