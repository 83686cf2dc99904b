"""Everything that is measured on one mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from hpc.errors import UserError
from hpc.progress import Progress
from nanodist.morphology import border, domains
from nanodist.morphology.bundles import bundles
from nanodist.morphology.centre_line import Field
from nanodist.morphology.objects import shape_of
from nanodist.morphology.orientation import axis_deg, order_parameter
from nanodist.morphology.percolation import percolation
from nanodist.morphology.persistence import MODELS, persistence_length
from nanodist.morphology.statistics import sizes
from nanodist.morphology.units import convert
from nanodist.morphology.wires import SLENDER, trace

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Rows = list[dict[str, Any]]
Columns = dict[str, npt.NDArray[Any]]

SHAPES = ("auto", "wires", "particles")
SMALLEST_SIDE = 8
# The summary of a wire that is all of its object, repeated in the object's row.
_OF_WIRE = (
    "width_mean", "width_median", "width_sd", "width_p05", "width_p95", "contour_length", "tip_to_tip_length",
    "end_to_end", "straightness", "orientation_deg",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """How to measure.

    Args:
        shape: ``wires`` and ``particles`` say what objects are; ``auto`` traces every object and keeps as wires what is
            at least ``slender`` times longer than wide.
        min_area_px: objects of fewer pixels are counted and left out.
        slender: see ``shape``; ``wires`` takes 1.
        model: of the persistence length, ``2d`` or ``projected``.
        percolation_reach_px: 2 as in paper 1, or 1 for the 8 neighbours only.
        seed: of bootstraps.
    """

    shape: str = "auto"
    min_area_px: int = 16
    slender: float = SLENDER
    model: str = "2d"
    percolation_reach_px: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise UserError(f"no shape {self.shape!r}; there are {', '.join(SHAPES)}")
        if self.model not in MODELS:
            raise UserError(f"no persistence model {self.model!r}; there are {', '.join(MODELS)}")
        if self.min_area_px < 1 or self.percolation_reach_px not in (1, 2):
            raise UserError("the smallest area must be 1 pixel or more and the percolation reach 1 or 2 pixels")


@dataclass(frozen=True)
class Measurement:
    """One image, measured.

    Attributes:
        pixel_size_nm: ``None`` where unknown; then every length is in pixels and its column ends in ``_px``.
        image: one row of plain values.
        objects: a row an object. Where an object is one wire, its row holds the wire's numbers as well.
        wires: a row a wire; an object that is a network has many.
        widths: columns ``wire``, ``arc`` and ``width`` with a value for each point of a wire's centre line.
        s2: columns ``r`` and ``s2`` with a value for each distance of the two-point correlation.
        lines: centre line (n, 2) of each wire, (row, column) in pixels from the corner of the image.
    """

    pixel_size_nm: float | None
    image: dict[str, Any]
    objects: Rows
    wires: Rows
    widths: Columns
    s2: Columns
    lines: list[Floats]


def measure(
    mask: npt.NDArray[Any], pixel_size_nm: float | None = None, options: Options | None = None, **changes: Any
) -> Measurement:
    """Measure what a mask shows.

    Args:
        mask: (height, width), bool for one phase whose connected pieces (8 neighbours) are the objects, or integers
            for labelled objects (0 is background); or (n, height, width) bool, one layer an object, where objects
            overlap.
        pixel_size_nm: side of a pixel in nm, or ``None``.
        options: how to measure.
        **changes: fields of :class:`Options` to set, such as ``shape="particles"``.

    Raises:
        UserError: the mask has another shape or type, a side below 8 pixels, or an option is out of range.
    """
    chosen = Options(**changes) if options is None else options
    mask = _checked(mask, pixel_size_nm)
    union = np.asarray(mask.any(axis=0) if mask.ndim == 3 else mask > 0)
    lag = max(1, min(domains.LARGEST_LAG, min(union.shape) // 2))
    blocks = math.prod(-(-side // domains.BLOCK) for side in union.shape)
    fields = _Fields(mask)
    bar = Progress(
        fields.pixels + blocks * domains.BLOCK**2, "measuring", "pixels", None if union.size > 2**22 else False
    )
    rows, found = _objects(fields, chosen, bar.update)
    image = _image(union, rows, found, chosen, fields)
    seen = domains.two_point_correlation(union, lag, lambda: bar.update(domains.BLOCK**2))
    bar.close()
    image["s2_correlation_length"], image["s2_spacing"] = seen.correlation_length, seen.spacing
    image["interface_density"] = seen.interface
    for row, members in zip(rows, found.by_object, strict=True):
        if chosen.shape != "particles":
            _summarise_wires(row, [found.rows[i] for i in members])
    return Measurement(
        pixel_size_nm,
        _named({"pixel_size_nm": pixel_size_nm, **convert(image, pixel_size_nm)}),
        [_named(convert(row, pixel_size_nm)) for row in rows],
        [_named(convert({k: v for k, v in row.items() if k != "turn"}, pixel_size_nm)) for row in found.rows],
        convert(found.width_columns(), pixel_size_nm),
        convert({"r": seen.r, "s2": seen.s2}, pixel_size_nm),
        [line + 0.5 for line in found.lines],
    )


def _checked(mask: npt.NDArray[Any], pixel_size_nm: float | None) -> npt.NDArray[Any]:
    mask = np.asarray(mask)
    if mask.ndim not in (2, 3) or mask.dtype.kind not in "bui":
        raise UserError(
            f"a mask is (height, width) or (n, height, width) of booleans or integers, not {mask.shape} of {mask.dtype}"
        )
    if mask.ndim == 3 and mask.dtype != bool:
        raise UserError("layers (n, height, width) must be boolean; give labelled objects as one (height, width)")
    if min(mask.shape[-2:]) < SMALLEST_SIDE:
        raise UserError(
            f"the mask has {mask.shape[-2]} x {mask.shape[-1]} pixels; it takes {SMALLEST_SIDE} a side to measure one"
        )
    if mask.dtype.kind == "i" and mask.min() < 0:
        raise UserError(f"the labels go down to {mask.min()}; give 0 to the background and positive numbers to objects")
    if pixel_size_nm is not None and not 0 < pixel_size_nm < math.inf:
        raise UserError(f"the pixel size must be above 0 nm, not {pixel_size_nm}")
    return mask


class _Fields:
    """The objects of a mask one after the other, each cut out with a margin of background."""

    def __init__(self, mask: npt.NDArray[Any]) -> None:
        self.shape = (int(mask.shape[-2]), int(mask.shape[-1]))
        self._layers: npt.NDArray[Any] | None = mask if mask.ndim == 3 else None
        self._label: npt.NDArray[Any] | None = None
        if mask.ndim == 3:
            self.boxes = [_box(layer) for layer in mask]
        else:
            self._label = mask if mask.dtype != bool else ndimage.label(mask, np.ones((3, 3)), output=np.int32)[0]
            self.boxes = ndimage.find_objects(self._label)
        self.pixels = sum(self._size(box) for box in self.boxes if box is not None)

    @staticmethod
    def _size(box: tuple[slice, slice]) -> int:
        return (box[0].stop - box[0].start) * (box[1].stop - box[1].start)

    def __iter__(self) -> Iterator[tuple[int, tuple[slice, slice], Field]]:
        for number, box in enumerate(self.boxes):
            if box is None:
                continue
            rows, columns = (
                slice(max(0, side.start - 1), min(limit, side.stop + 1))
                for side, limit in zip(box, self.shape, strict=True)
            )
            if self._layers is not None:
                part = self._layers[number, rows, columns]
            else:
                assert self._label is not None
                part = self._label[rows, columns] == number + 1
            yield number + 1, box, Field(np.ascontiguousarray(part), (rows.start, columns.start), self.shape)


def _box(layer: Mask) -> tuple[slice, slice] | None:
    rows, columns = np.flatnonzero(layer.any(axis=1)), np.flatnonzero(layer.any(axis=0))
    if len(rows) == 0:
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


class _Wires:
    """All wires of an image."""

    def __init__(self) -> None:
        self.rows: Rows = []
        self.lines: list[Floats] = []
        self.widths: list[Floats] = []
        self.by_object: list[list[int]] = []
        self.branch_points = self.crossings = 0
        self.skeleton_length = 0.0

    def width_columns(self) -> Columns:
        """The widths along all wires where they are known, one under the other."""
        arcs = [np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))]) for line in self.lines]
        numbers = [np.full(len(line), i) for i, line in enumerate(self.lines, start=1)]
        columns = (np.concatenate(parts) if parts else np.zeros(0) for parts in (numbers, arcs, self.widths))
        wire, arc, width = columns
        known = np.isfinite(width)
        return {"wire": wire[known].astype(np.int64), "arc": arc[known], "width": width[known]}


def _objects(fields: _Fields, options: Options, tick: Callable[[int], None]) -> tuple[Rows, _Wires]:
    rows: Rows = []
    found = _Wires()
    slender = 1.0 if options.shape == "wires" else options.slender
    for number, box, field in fields:
        area = int(np.count_nonzero(field.mask))
        tick(fields._size(box))
        if area < options.min_area_px:
            continue
        row: dict[str, Any] = {"object": number, **shape_of(field.mask), **_place(box, fields.shape)}
        members: list[int] = []
        if options.shape != "particles":
            traced = trace(field, slender)
            row["branch_points"], row["crossings"] = len(traced.branch_points), len(traced.crossings)
            row["skeleton_length"] = traced.skeleton_length if traced.wires else float("nan")
            found.branch_points += len(traced.branch_points)
            found.crossings += len(traced.crossings)
            found.skeleton_length += traced.skeleton_length if traced.wires else 0.0
            for wire, line, widths in zip(traced.wires, traced.lines, traced.widths, strict=True):
                members.append(len(found.rows))
                found.rows.append({"object": number, "wire": len(found.rows) + 1, **wire})
                found.lines.append(line)
                found.widths.append(widths)
        rows.append(row)
        found.by_object.append(members)
    _bundle(found, options)
    return rows, found


def _place(box: tuple[slice, slice], shape: tuple[int, int]) -> dict[str, Any]:
    rows, columns = box
    return {
        "left": float(columns.start),
        "top": float(rows.start),
        "right": float(columns.stop),
        "bottom": float(rows.stop),
        "border_cut": border.is_cut(box, shape),
        "border_weight": border.weight(box, shape),
    }


def _bundle(found: _Wires, options: Options) -> None:
    """Bundle and persistence length of every wire."""
    group = bundles(found.lines, [row["width_mean"] for row in found.rows])
    size = np.bincount(group, minlength=1)
    for row, line, number in zip(found.rows, found.lines, group.tolist(), strict=True):
        row["bundle"], row["bundle_size"] = number + 1, int(size[number])
        alone = persistence_length([line], _shortest([row]), options.model, candidates=100)
        row[f"persistence_length_{options.model}"] = alone.length


def _shortest(rows: Rows) -> float:
    widths = [row["width_median"] for row in rows if math.isfinite(row["width_median"])]
    return max(10.0, 2.0 * float(np.median(widths))) if widths else 10.0


def _summarise_wires(row: dict[str, Any], wires: Rows) -> None:
    row["wires"] = len(wires)
    row["bundle_size"] = max((wire["bundle_size"] for wire in wires), default=0)
    alone = wires[0] if len(wires) == 1 else {}
    for name in _OF_WIRE:
        row[name] = alone.get(name, float("nan"))


def _image(union: Mask, rows: Rows, found: _Wires, options: Options, fields: _Fields) -> dict[str, Any]:
    height, width = union.shape
    spans = percolation(union, options.percolation_reach_px)
    weights = [row["border_weight"] for row in rows]
    diameters = [row["equivalent_diameter"] for row in rows]
    return {
        "height_px": height,
        "width_px": width,
        "field_height": float(height),
        "field_width": float(width),
        "coverage": float(np.count_nonzero(union) / union.size),
        "objects": len(rows),
        "objects_border_cut": sum(row["border_cut"] for row in rows),
        "objects_left_out": sum(box is not None for box in fields.boxes) - len(rows),
        "object_density": sum(weights) / union.size,
        **sizes("equivalent_diameter", diameters, weights, [d**3 for d in diameters]),
        **({} if options.shape == "particles" else _of_wires(found, union.size, options)),
        **domains.chord_summary(union),
        "spans_left_right": spans.left_right,
        "spans_top_bottom": spans.top_bottom,
        "percolates": spans.both,
        "largest_cluster_share": spans.largest_share,
    }


def _of_wires(found: _Wires, pixels: int, options: Options) -> dict[str, Any]:
    """What an image's row says of its wires."""
    lengths = [row["contour_length"] for row in found.rows]
    total = float(np.sum(lengths)) if lengths else 0.0
    turns = [row["turn"] for row in found.rows]
    bend = persistence_length(found.lines, _shortest(found.rows), options.model, options.seed)
    name = f"persistence_length_{options.model}"
    known = np.concatenate(found.widths) if found.widths else np.zeros(0)
    known = known[np.isfinite(known)]
    return {
        "wires": len(found.rows),
        "wires_border_cut": sum(row["border_cut"] for row in found.rows),
        **_wire_sizes(found.rows),
        "width_length_mean": float(known.mean()) if len(known) else float("nan"),
        "width_length_sd": float(known.std()) if len(known) else float("nan"),
        "wire_length_density": total / pixels,
        "branch_points": found.branch_points,
        "crossings": found.crossings,
        "branch_point_density": (found.branch_points + found.crossings) / pixels,
        "order_parameter": order_parameter(turns, total),
        "director_deg": axis_deg(sum(turns)) if turns else float("nan"),
        "bundle_size_mean": float(np.mean([r["bundle_size"] for r in found.rows])) if found.rows else float("nan"),
        name: bend.length,
        f"{name}_low": bend.low,
        f"{name}_high": bend.high,
        f"{name}_note": bend.why,
    }


def _wire_sizes(wires: Rows) -> dict[str, Any]:
    """Widths and lengths; a wire that ends under another has a width but no length."""
    weights = [row["border_weight"] for row in wires]
    volumes = [row["width_mean"] ** 2 * row["tip_to_tip_length"] for row in wires]
    whole = [0.0 if row["ends_hidden"] else w for row, w in zip(wires, weights, strict=True)]
    result: dict[str, Any] = {}
    for name, used in (("width_mean", weights), ("contour_length", whole), ("tip_to_tip_length", whole)):
        result.update(sizes(name, [row[name] for row in wires], used, volumes))
    return result


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """NaN and numpy's scalars as plain values: what is unknown is ``None``."""
    plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}
