"""The wires of one object: traced, measured, and described by numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nanodist.morphology import border
from nanodist.morphology.centre_line import BORDER, JUNCTION, NONE, CentreLine, Field, measure_path
from nanodist.morphology.orientation import axis_deg, moment
from nanodist.morphology.skeleton import Graph, distance_to_background, graph_of, prune
from nanodist.morphology.tracing import merge_crossings, paths

Floats = npt.NDArray[np.float64]

SLENDER = 3.0  # tip to tip length over width from which on an object is a wire


@dataclass(frozen=True)
class Traced:
    """The wires of an object (in the image's index coordinates), and the junctions of its skeleton.

    Attributes:
        wires: one row of plain values each, lengths in pixels.
        lines: the centre line (n, 2) of each.
        widths: width (n,) at each point of its centre line, NaN where there is none.
        branch_points: (k, 2) where three branches meet.
        crossings: (k, 2) where more do.
        skeleton_length: length of all branches that are left after pruning.
    """

    wires: list[dict[str, Any]]
    lines: list[Floats]
    widths: list[Floats]
    branch_points: Floats
    crossings: Floats
    skeleton_length: float


def trace(field: Field, slender: float = SLENDER) -> Traced:
    """Trace all wires of one object.

    Args:
        field: the object's mask with a margin of background, but none at the border of the image.
        slender: least length over width; what is stubbier is no wire.
    """
    distance = distance_to_background(field.mask)
    graph = graph_of(field.mask, distance)
    prune(graph)
    merge_crossings(graph, distance)
    origin = np.asarray(field.origin, float)
    found: list[tuple[dict[str, Any], Floats, Floats]] = []
    for path in paths(graph, distance):
        line = measure_path(field, path, distance)
        if line is None or (path.closed and not np.isfinite(line.widths).any()):  # a gap in a bundle is no ring
            continue
        width = line.width if math.isfinite(line.width) else line.rough_width
        if line.tip_to_tip_length < slender * max(width, 1.0):
            continue
        points = line.points + origin
        found.append((describe(line, points, field, len(path.crossings)), points, line.widths))
    degrees = _degrees(graph)
    places = {k: [graph.centres[j] + origin for j, d in degrees.items() if min(d, 4) == k] for k in (3, 4)}
    return Traced(
        [row for row, _, _ in found],
        [line for _, line, _ in found],
        [widths for _, _, widths in found],
        np.array(places[3], float).reshape(-1, 2),
        np.array(places[4], float).reshape(-1, 2),
        sum(branch.length() for branch in graph.branches.values()),
    )


def _degrees(graph: Graph) -> dict[int, int]:
    count = dict.fromkeys(graph.centres, 0)
    for branch in graph.branches.values():
        for junction in branch.ends:
            if junction in count:
                count[junction] += 1
    return count


def describe(line: CentreLine, points: Floats, field: Field, junctions: int) -> dict[str, Any]:
    """One wire as plain values: lengths in pixels, angles in degrees."""
    known = line.widths[np.isfinite(line.widths)]
    ends = float(np.hypot(*(points[-1] - points[0]))) if line.ends[0] != NONE else 0.0
    turn = moment(points)
    half = (line.width if math.isfinite(line.width) else line.rough_width) / 2
    low, high = points.min(axis=0) - half, points.max(axis=0) + half
    box = (
        slice(math.floor(low[0] + 0.5), math.ceil(high[0] + 0.5)),
        slice(math.floor(low[1] + 0.5), math.ceil(high[1] + 0.5)),
    )
    cut = BORDER in line.ends or border.is_cut(box, field.shape)
    quantiles = np.quantile(known, [0.05, 0.5, 0.95]) if len(known) else [float("nan")] * 3
    return {
        "width_mean": line.width,
        "width_median": float(quantiles[1]),
        "width_sd": float(known.std()) if len(known) else float("nan"),
        "width_p05": float(quantiles[0]),
        "width_p95": float(quantiles[2]),
        "width_points": len(known),
        "contour_length": line.contour_length,
        "tip_to_tip_length": line.tip_to_tip_length,
        "end_to_end": ends,
        "straightness": ends / line.contour_length if line.contour_length > 0 else float("nan"),
        "orientation_deg": axis_deg(turn),
        "turn": turn,
        "junctions": junctions,
        "ends": "+".join(sorted(line.ends)),
        "ends_hidden": JUNCTION in line.ends,
        "border_cut": cut,
        "border_weight": 0.0 if cut else border.weight(box, field.shape),
        "middle_x": float(points[len(points) // 2, 1] + 0.5),
        "middle_y": float(points[len(points) // 2, 0] + 0.5),
    }
