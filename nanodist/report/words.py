"""What files hold under short names, in words for people: settings, scores, quantities and spans of time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nanodist.report.markup import Markup, number

OBJECTIVES = {"simclr": "SimCLR", "barlow_twins": "Barlow Twins", "vicreg": "VICReg"}
METHODS = {"linear": "linear probe", "knn": "k nearest neighbours"}
WEIGHTS = {"given": "pretrained weights", "random": "random weights"}


@dataclass(frozen=True)
class PairScore:
    """A score of a PairVAE: a short name for the head of a column, its unit (``%``, ``°`` or none) and what it is."""

    name: str
    unit: str
    meaning: str


PAIR_SCORES = {
    "period_error": PairScore("period", "%", "d = 2π/q* against the true period"),
    "q_star_error": PairScore("q*", "%", "place of the first peak"),
    "width_error": PairScore("peak width", "%", "width of that peak, which order and grain size set"),
    "orientation_error_deg": PairScore("orientation", "°", "angle to the true direction, where there is one"),
    "anisotropy_error": PairScore("anisotropy", "", "difference of the strengths of direction, each 0 to 1"),
    "s2_error": PairScore("S2", "", "mean difference of the two-point correlations"),
    "chord_error": PairScore("chord", "%", "mean length of chords in the bright phase"),
    "area_error": PairScore("area", "", "difference of the area fractions of the bright phase"),
    "scattering_mismatch": PairScore("scattering", "", "the generated image's own scattering against the given one"),
    "centre_distance_error": PairScore("centres", "%", "distance of neighbours, hexagonal specimens alone"),
    "saxs_mae": PairScore("pattern", "", "mean absolute error of asinh(I / I0), in shares of the training's largest"),
    "iq_error": PairScore("I(q)", "", "mean |ln I - ln I true| after one common factor"),
}


def pair_score(name: str) -> PairScore:
    """A score by its name in ``scores.json``; one that is not known keeps that name."""
    return PAIR_SCORES.get(name, PairScore(name.replace("_deg", " (°)").replace("_", " "), "", ""))


def setting(key: str, value: Any) -> str:
    """``train.tuned_layers`` and its value as ``all layers tuned``; what has no words is ``key value``."""
    last = key.split(".")[-2 if key.endswith(".name") and "." in key else -1]
    if last == "objective":
        told = OBJECTIVES.get(str(value), str(value))
        return f"pretrained by {told}" if key.startswith("pretrain.") else told
    if last == "tuned_layers":
        words = {None: "all layers tuned", 0: "trunk frozen", 1: "last block tuned"}
        return words.get(value) or f"last {value} blocks tuned"
    known = {"method": METHODS, "weights": WEIGHTS}.get(last, {})
    name = f"pretraining's {plain(last)}" if key.startswith("pretrain.") else plain(last)
    return known.get(value) or f"{name} {'null' if value is None else value}"


def term(name: str) -> str:
    """A term of a loss: ``sem_saxs`` as ``SEM to SAXS``, ``kl_sem`` as ``KL of SEM``; others without underscores."""
    first, _, second = name.partition("_")
    if {first, second} <= {"sem", "saxs"}:
        return f"{first.upper()} to {second.upper()}"
    return f"KL of {second.upper()}" if first == "kl" and second in ("sem", "saxs") else plain(name)


def plain(name: str) -> str:
    """A name without underscores."""
    return name.replace("_", " ")


def quantity(name: str) -> str:
    """``contour_length_number_mean_nm`` as ``contour length, number mean (nm)``."""
    ends = (("_per_nm2", "nm⁻²"), ("_per_nm", "nm⁻¹"), ("_nm2", "nm²"), ("_nm", "nm"), ("_deg", "°"), ("", ""))
    end, unit = next(pair for pair in ends if name.endswith(pair[0]))
    found = re.fullmatch(r"(.+?)_((?:number_|volume_|length_)?mean)", name.removesuffix(end))
    told = f"{plain(found[1])}, {plain(found[2])}" if found else plain(name.removesuffix(end))
    return f"{told} ({unit})" if unit else told


def spent(seconds: float) -> str:
    """``218`` -> ``3 min 38 s``; ``7500`` -> ``2 h 5 min``; ``200000`` -> ``2 d 7 h``."""
    whole = round(max(0.0, seconds))
    steps = ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    for long, name, short, rest in steps:
        if whole >= long:
            return f"{whole // long} {name} {whole % long // short} {rest}"
    return f"{whole} s"


def timed(seconds: float) -> Markup:
    """The same for a cell of a table that sorts by it."""
    return Markup(f'<span data-value="{seconds:.0f}">{spent(seconds)}</span>')


def counted(amount: Any, thing: str) -> str:
    """``1 label per class`` or ``4 labels per class`` of ``labels per class``."""
    one = re.sub(r"s\b", "", thing, count=1)
    return f"{number(amount)} {one if amount == 1 else thing}"
