"""Pictures of a PairVAE: grids of patterns and micrographs, I(q) and the latent."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpc import atomic
from nanodist.pairvae.model import Inputs, PairModel

F64 = npt.NDArray[np.float64]
_PATTERNS, _IMAGES = "magma", "gray"
# Okabe and Ito's colours, which colour-blind readers tell apart, and dashes that also differ without colours.
_LOOKS = (("#000000", "-"), ("#D55E00", "--"), ("#0072B2", ":"), ("#009E73", "-."))
Cell = tuple[str, Any]


def _write(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(path, buffer.getvalue())


def _plt() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def write_grid(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Cell | None]], names: Sequence[str]) -> None:
    """Pictures; a cell is (``saxs``, compressed pattern, NaN where masked) or (``sem``, image in [0, 1])."""
    plt = _plt()
    size = (1.5 * len(columns), 1.55 * len(rows))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False)
    for r, row in enumerate(rows):
        shown = [cell[1] for cell in row if cell is not None and cell[0] == "saxs"]
        low, high = (float(np.nanmin(shown[0])), float(np.nanmax(shown[0]))) if shown else (0.0, 1.0)
        for c, cell in enumerate(row):
            axis = axes[r, c]
            axis.set_xticks([])
            axis.set_yticks([])
            if cell is None:
                axis.axis("off")
            elif cell[0] == "saxs":
                axis.imshow(cell[1], cmap=_PATTERNS, vmin=low, vmax=high)
            else:
                axis.imshow(cell[1], cmap=_IMAGES, vmin=0, vmax=1)
            if r == 0:
                axis.set_title(columns[c], fontsize=7)
            if c == 0:
                axis.set_ylabel(names[r], fontsize=7)
    figure.subplots_adjust(wspace=0.04, hspace=0.04)
    _write(figure, path)


def shown_pattern(intensity: npt.NDArray[Any], mask: npt.NDArray[np.bool_] | None, reference: float) -> F64:
    """asinh(I / I0) with NaN where nothing was measured."""
    values = np.arcsinh(np.asarray(intensity, np.float64) / reference)
    return values if mask is None else np.where(mask, values, np.nan)


@torch.no_grad()
def write_reconstructions(model: PairModel, inputs: Inputs, path: Path) -> None:
    """Each of a few unseen items given, rebuilt from itself, and made from its other member."""
    inputs = inputs._replace(features=model.pair_features(inputs))
    saxs, sem = model.encode_saxs(inputs).mean, model.encode_sem(inputs).mean
    noise = inputs.noise[:, : model.image_noise].to(saxs.dtype)
    made = {
        "saxs": (model.decode_saxs(saxs), model.decode_saxs(sem)),
        "sem": (model.reconstruct_sem(inputs)[:, 0], model.decode_sem(saxs, noise)[:, 0]),
    }
    reference, rows = model.geometry.reference, []
    for i in range(len(saxs)):
        has_saxs, has_sem = (bool(flag) for flag in inputs.has[i])
        patterns = [inputs.intensity[i], made["saxs"][0][i], made["saxs"][1][i]]
        images = [inputs.images[i, 0], made["sem"][0][i], made["sem"][1][i]]
        masks = [inputs.mask[i].numpy(force=True), None, None]
        row: list[Cell | None] = [
            ("saxs", shown_pattern(p.numpy(force=True), m, reference)) if has_saxs or n == 2 else None
            for n, (p, m) in enumerate(zip(patterns, masks, strict=True))
        ]
        row += [("sem", x.numpy(force=True)) if has_sem or n == 2 else None for n, x in enumerate(images)]
        rows.append(row)
    columns = ["SAXS given", "SAXS to SAXS", "SEM to SAXS", "SEM given", "SEM to SEM", "SAXS to SEM"]
    write_grid(path, columns, rows, [""] * len(rows))


def write_curves(path: Path, panels: Sequence[Mapping[str, tuple[F64, F64]]], names: Sequence[str]) -> None:
    """I(q) overlays, one panel an item: name -> (q in 1/nm, intensity)."""
    plt = _plt()
    wide = min(3, len(panels))
    high = -(-len(panels) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(3.2 * wide, 2.4 * high), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel, name in zip(axes.flat, panels, names, strict=False):
        for (label, (q, intensity)), (colour, dashes) in zip(panel.items(), cycle(_LOOKS)):
            width = 1.8 if label == "true" else 1.4
            axis.plot(q, intensity, label=label, color=colour, linestyle=dashes, linewidth=width)
        axis.set_yscale("log")
        axis.set_title(name, fontsize=7)
        axis.set_xlabel("q / nm$^{-1}$", fontsize=7)
        axis.tick_params(labelsize=6)
    axes.flat[0].legend(fontsize=6)
    axes.flat[0].set_ylabel("I(q)", fontsize=7)
    figure.tight_layout()
    _write(figure, path)


def write_latent(path: Path, latents: F64, period_nm: F64, seen: npt.NDArray[np.bool_]) -> None:
    """The two first principal components of latents (n, d), coloured by period; unseen items are ringed."""
    plt = _plt()
    flat = latents - latents.mean(0)
    axes = np.linalg.svd(flat, full_matrices=False)[2][:2]
    x, y = (flat @ axes.T).T
    figure, axis = plt.subplots(figsize=(4.2, 3.4))
    edges = ["none" if s else "black" for s in seen]
    points = axis.scatter(x, y, c=period_nm, cmap="viridis", s=28, edgecolors=edges)
    figure.colorbar(points, label="period / nm")
    axis.set_xlabel("first component", fontsize=8)
    axis.set_ylabel("second component", fontsize=8)
    axis.set_title("latent means of patterns; ringed: never trained on", fontsize=8)
    _write(figure, path)
