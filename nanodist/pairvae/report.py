"""Figures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nanodist.pairvae.describe import describe_pattern
from nanodist.pairvae.figures import Cell, shown_pattern, write_curves, write_grid, write_latent
from nanodist.pairvae.load import Trained
from nanodist.pairvae.scores import Truth, over_both
from nanodist.scattering.azimuthal import azimuthal
from nanodist.scattering.pattern import Pattern

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
_MOST_ROWS, _MOST_CURVES = 8, 9


@dataclass(frozen=True)
class Row:
    """What one method scored on one item."""

    direction: str
    method: str
    key: str
    specimen: str
    scores: dict[str, float]


def write_figures(
    folder: Path, trained: Trained, truths: Sequence[Truth], known: Sequence[Pattern], made: Sequence[Mapping[str, F32]]
) -> None:
    """Grids of both directions, I(q) overlays, and the latent coloured by period, as PNG in ``folder``."""
    order = np.argsort([truth.period_nm for truth in truths])
    picked = [int(order[i]) for i in np.unique(np.linspace(0, len(order) - 1, _MOST_ROWS).round().astype(int))]
    reference = trained.geometry.reference
    names = [_name(truths[i]) for i in picked]
    to_sem: list[list[Cell | None]] = []
    to_saxs: list[list[Cell | None]] = []
    for i in picked:
        truth, own = truths[i], made[i]
        given: Cell = ("saxs", shown_pattern(truth.pattern.intensity, truth.pattern.mask, reference))
        draws: list[Cell | None] = [("sem", image) for image in own["SEM"][:3]]
        spread: Cell = ("sem", own["SEM"].std(0) * 2)
        others: list[Cell | None] = [("sem", own["nearest SEM"]), ("sem", own["random field"])]
        to_sem.append([given, ("sem", truth.crops[0]), *draws, spread, *others])
        patterns = (own["SAXS"], own["nearest SAXS"])
        shown: list[Cell | None] = [("saxs", shown_pattern(p, None, reference)) for p in patterns]
        to_saxs.append([("sem", truth.crops[0]), given, *shown])
    columns = [
        "given SAXS",
        "true SEM",
        "draw 1",
        "draw 2",
        "draw 3",
        "2 x spread",
        "nearest neighbour",
        "random field",
    ]
    write_grid(folder / "saxs-to-sem.png", columns, to_sem, names)
    write_grid(folder / "sem-to-saxs.png", ["given SEM", "true SAXS", "generated", "nearest"], to_saxs, names)
    write_curves(folder / "iq.png", [_curves(truths[i], made[i]) for i in picked[:_MOST_CURVES]], names)
    patterns_all = [*(truth.pattern for truth in truths), *known]
    latents = np.stack([trained.latent_of(pattern, None) for pattern in patterns_all])
    period = np.array([describe_pattern(pattern).period_nm for pattern in patterns_all])
    write_latent(folder / "latent.png", latents, period, np.arange(len(period)) >= len(truths))


def _name(truth: Truth) -> str:
    return f"{truth.period_nm:.0f} nm"


def _curves(
    truth: Truth, made: Mapping[str, F32]
) -> dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """I(q) of the truth, of what its SEM image gave and of the nearest neighbour, at the truth's scale."""
    q, whole, _ = azimuthal(truth.pattern)
    curves = {"true": (q, whole)}
    for name, key in (("generated", "SAXS"), ("nearest", "nearest SAXS")):
        true, own = (azimuthal(pattern)[1] for pattern in over_both(truth.pattern, made[key]))
        good = (true > 0) & (own > 0)
        curves[name] = (q, own * np.exp(np.median(np.log(true[good] / own[good]))))
    return curves
