"""Means of each specimen over its images, and specimens against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from nanodist.morphology.statistics import bootstrap_difference, column_of, mean_interval
from nanodist.morphology.units import column

Rows = list[dict[str, Any]]

# What is compared, and the column that says on how many objects an image's value rests (none: images count alike).
QUANTITIES = {
    "coverage": None,
    "equivalent_diameter_number_mean": "equivalent_diameter_n",
    "equivalent_diameter_volume_mean": "equivalent_diameter_n",
    "width_mean_number_mean": "width_mean_n",
    "width_mean_volume_mean": "width_mean_n",
    "width_length_mean": "wire_length_density",
    "contour_length_number_mean": "contour_length_n",
    "tip_to_tip_length_number_mean": "tip_to_tip_length_n",
    "order_parameter": None,
    "persistence_length_2d": None,
    "persistence_length_projected": None,
    "wire_length_density": None,
    "branch_point_density": None,
    "bundle_size_mean": "wires",
    "domain_chord_mean": "domain_chords",
    "gap_chord_mean": "gap_chords",
    "s2_correlation_length": None,
    "s2_spacing": None,
    "interface_density": None,
    "percolates": None,
}


def _columns(images: Rows) -> list[tuple[str, str | None]]:
    """Those of the quantities, with their units, that the images have."""
    present = {name for image in images for name in image}
    found: list[tuple[str, str | None]] = []
    for name, count in QUANTITIES.items():
        for unit in ("nm", "px"):
            pair = column(name, unit), column(count, unit) if count else None
            if pair[0] in present and pair not in found:
                found.append(pair)
    return found


def _weights(images: Rows, count: str | None) -> Any:
    return np.ones(len(images)) if count is None else np.nan_to_num(column_of(images, count))


def summarise(images: Rows, seed: int = 0) -> Rows:
    """A row for each specimen and quantity: mean over images with its 95 % bootstrap interval, and what it rests on."""
    rows: Rows = []
    for specimen in dict.fromkeys(image["specimen"] for image in images):
        own = [image for image in images if image["specimen"] == specimen]
        for name, count in _columns(own):
            values, weights = column_of(own, name), _weights(own, count)
            mean, low, high = mean_interval(values, weights, seed, specimen, name)
            used = int((np.isfinite(values) & (weights > 0)).sum())
            things = (
                int(weights[np.isfinite(values)].sum()) if count and count.endswith(("_n", "wires", "chords")) else None
            )
            rows.append(
                {
                    "specimen": specimen,
                    "quantity": name,
                    "mean": mean,
                    "low": low,
                    "high": high,
                    "images": used,
                    "n": things,
                }
            )
    return _plain(rows)


def compare(images: Rows, seed: int = 0) -> Rows:
    """A row for each pair of specimens and quantity: the difference with its 95 % bootstrap interval over images."""
    specimens = list(dict.fromkeys(image["specimen"] for image in images))
    rows: Rows = []
    for first, second in combinations(specimens, 2):
        pair = [[image for image in images if image["specimen"] == s] for s in (first, second)]
        for name, count in _columns(images):
            values = column_of(pair[0], name), column_of(pair[1], name)
            weights = _weights(pair[0], count), _weights(pair[1], count)
            rows.append(asdict(bootstrap_difference(name, (first, second), values, weights, seed)))
    return _plain(rows)


def _plain(rows: Sequence[dict[str, Any]]) -> Rows:
    return [{k: None if isinstance(v, float) and v != v else v for k, v in row.items()} for row in rows]
