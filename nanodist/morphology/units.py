"""Pixels to nanometres, said in the name of every column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Power of a length in each quantity; what is not named here has no unit (or carries it in its name: degrees).
LENGTHS = (
    "width_mean", "width_median", "width_sd", "width_p05", "width_p95", "contour_length", "tip_to_tip_length",
    "end_to_end", "persistence_length_2d", "persistence_length_projected", "skeleton_length", "equivalent_diameter",
    "perimeter", "major_axis", "minor_axis", "feret_max", "feret_min", "middle_x", "middle_y", "left", "top", "right",
    "bottom", "field_height", "field_width", "domain_chord_mean", "domain_chord_weighted_mean", "gap_chord_mean",
    "gap_chord_weighted_mean", "s2_correlation_length", "s2_spacing", "arc", "width", "r",
    "persistence_length_2d_low", "persistence_length_2d_high", "persistence_length_projected_low",
    "persistence_length_projected_high",
)  # fmt: skip
POWERS = {
    **dict.fromkeys(LENGTHS, 1),
    "area": 2,
    "wire_length_density": -1,
    "interface_density": -1,
    "branch_point_density": -2,
    "object_density": -2,
}
_STATISTICS = ("_number_mean", "_number_median", "_number_sd", "_volume_mean", "_length_mean", "_length_sd")
_SUFFIX = {1: "{}", 2: "{}2", -1: "per_{}", -2: "per_{}2"}


def power(name: str) -> int:
    """The power of a length in a quantity, 0 for what has no unit."""
    if name in POWERS:
        return POWERS[name]
    for ending in _STATISTICS:
        if name.endswith(ending):
            return POWERS.get(name.removesuffix(ending), 0)
    return 0


def column(name: str, unit: str) -> str:
    """``area`` -> ``area_nm2``; ``wire_length_density`` -> ``wire_length_density_per_nm``."""
    exponent = power(name)
    return f"{name}_{_SUFFIX[exponent].format(unit)}" if exponent else name


def convert(row: Mapping[str, Any], pixel_size_nm: float | None) -> dict[str, Any]:
    """A row whose lengths are in pixels as one in nm, or in pixels where the size of a pixel is unknown."""
    unit, scale = ("px", 1.0) if pixel_size_nm is None else ("nm", pixel_size_nm)
    return {
        column(name, unit): value * scale ** power(name) if power(name) and value is not None else value
        for name, value in row.items()
    }
