"""Pictures of patterns and curves: what was measured, what is masked, where rings are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hpc.atomic import write_bytes
from nanodist.scattering.curve import Curve
from nanodist.scattering.frame import Frame
from nanodist.scattering.geometry import Geometry

_LARGEST_PX = 1200
_MASKED = "#4a7fb5"


def draw(
    path: Path, frame: Frame, geometry: Geometry | None = None, rings_inv_nm: Sequence[float] = (), title: str = ""
) -> None:
    """A PNG of a frame in logarithmic greys, masked pixels in blue, and rings of constant q in red.

    Args:
        path: the PNG.
        frame: the pattern.
        geometry: for the rings and the beam centre; the frame's own by default.
        rings_inv_nm: the q of each ring.
        title: over the picture.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    geometry = geometry or frame.geometry
    step = max(1, -(-max(frame.shape) // _LARGEST_PX))
    values, mask = frame.intensity[::step, ::step], frame.mask[::step, ::step]
    # Linear up to half the median, logarithmic above; the brightest thousandth is white.
    bright = values[mask & (values > 0)]
    least = float(np.median(bright)) / 2 if bright.size else 1.0
    shown = np.arcsinh(np.where(mask, values, np.nan) / least)
    height = 6.0 * min(1.5, max(0.5, frame.shape[0] / frame.shape[1]))
    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.subplots()
    extent = (-0.5, frame.shape[1] - 0.5, frame.shape[0] - 0.5, -0.5)
    top = float(np.nanquantile(shown, 0.999)) if mask.any() else 1.0
    axes.imshow(shown, cmap="gray", vmin=0, vmax=top, extent=extent, interpolation="nearest")
    layer = np.ma.masked_where(mask, np.ones(mask.shape))
    axes.imshow(layer, cmap=ListedColormap([_MASKED]), extent=extent, interpolation="nearest")
    if geometry is not None:
        row, column = geometry.beam_centre_px
        if -0.5 <= row <= frame.shape[0] - 0.5 and -0.5 <= column <= frame.shape[1] - 0.5:
            axes.plot([column], [row], "+", color="red", markersize=10)
    if rings_inv_nm:
        q_y, q_x = frame.q() if geometry is None else geometry.q(frame.shape)
        axes.contour(np.hypot(q_y, q_x), levels=sorted(rings_inv_nm), colors="red", linewidths=0.6, linestyles="dashed")
    axes.set(title=title, xlabel="column", ylabel="row")
    _write(path, figure)


def draw_curves(path: Path, curves: Sequence[tuple[str, Curve]]) -> None:
    """A PNG of I(q) on logarithmic axes, with sigma as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves:
        shown = curve.intensity > 0
        q, intensity = curve.q_inv_nm[shown], curve.intensity[shown]
        (line,) = axes.loglog(q, intensity, label=name, linewidth=1)
        if curve.sigma is not None:
            low = np.maximum(intensity - curve.sigma[shown], 1e-3 * intensity)
            axes.fill_between(q, low, intensity + curve.sigma[shown], color=line.get_color(), alpha=0.3, linewidth=0)
    axes.set(xlabel="q (1/nm)", ylabel=f"I ({curves[0][1].units})")
    if len(curves) <= 12:
        axes.legend(fontsize=8)
    _write(path, figure)


def _write(path: Path, figure: Any) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    # Greys, blue and red in half the bytes.
    small = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(256).save(small, format="png", optimize=True)
    write_bytes(path, small.getvalue())
