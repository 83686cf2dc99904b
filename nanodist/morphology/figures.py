"""Pictures of what was measured: histograms of a specimen's sizes, and an overlay on each mask."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from skimage.color import label2rgb
from skimage.segmentation import find_boundaries

from nanodist.morphology.measure import Measurement

Rows = Sequence[dict[str, Any]]
LARGEST_PX = 2048
WHOLE, CUT, LINE = (90, 150, 220), (190, 190, 190), (220, 60, 20)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")


def overlay(mask: npt.NDArray[Any], measured: Measurement) -> bytes:
    """The mask as PNG with object outlines, wire centre lines and object numbers; what the border cuts is grey.

    At most ``LARGEST_PX`` a side; larger masks are drawn smaller.
    """
    union = np.asarray(mask.any(axis=0) if mask.ndim == 3 else mask > 0)
    step = max(1, -(-max(union.shape) // LARGEST_PX))
    small = np.ascontiguousarray(union[::step, ::step])
    picture = np.where(small[..., None], np.array(WHOLE, np.uint8), np.uint8(255))
    if mask.ndim == 2 and mask.dtype != bool:
        labels = mask[::step, ::step]
        picture = (255 * label2rgb(labels, bg_label=0, bg_color=(1, 1, 1))).astype(np.uint8)
        picture[find_boundaries(labels, mode="inner")] = (40, 40, 40)
    image = Image.fromarray(picture.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    scale = (measured.pixel_size_nm or 1.0) * step
    unit = "px" if measured.pixel_size_nm is None else "nm"
    for row in measured.objects if len(measured.objects) <= 2000 else []:
        box = [row[f"{side}_{unit}"] / scale for side in ("left", "top", "right", "bottom")]
        if row["border_cut"]:
            # What is thinner than a pixel of the picture is a line in it.
            draw.rectangle([*box[:2], max(box[0], box[2] - 1), max(box[1], box[3] - 1)], outline=CUT)
        draw.text((box[0] + 1, box[1]), str(row["object"]), fill=(20, 20, 20))
    for line in measured.lines:
        draw.line([(x / step, y / step) for y, x in line.tolist()], fill=LINE, width=max(1, small.shape[0] // 400))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def histograms(objects: Rows, wires: Rows, widths: dict[str, npt.NDArray[Any]], unit: str) -> bytes | None:
    """Histograms as PNG, of every specimen in one unit; ``None`` where nothing is measured in it.

    Object and wire sizes are weighted against the border; widths are those of every point of every wire.

    Args:
        objects: rows with ``specimen``.
        wires: alike.
        widths: of each specimen, (n,) in ``unit``.
        unit: ``nm`` or ``px``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [
        ("equivalent diameter", f"equivalent_diameter_{unit}", objects, "border_weight"),
        ("contour length of whole wires", f"contour_length_{unit}", wires, "border_weight"),
    ]
    panels = [(title, _by_specimen(rows, name, weight)) for title, name, rows, weight in drawn]
    panels.insert(1, ("width along wires", {s: (w, np.ones(len(w))) for s, w in widths.items() if len(w)}))
    panels = [(title, data) for title, data in panels if data]
    if not panels:
        return None
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for position, (title, data) in enumerate(panels, start=1):
        ax = figure.add_subplot(1, len(panels), position)
        every = np.concatenate([values for values, _ in data.values()])
        bins = np.histogram_bin_edges(every, bins=min(40, max(5, round(len(every) ** 0.5)))).tolist()
        for k, (specimen, (values, weights)) in enumerate(data.items()):
            name = f"{specimen} (n = {len(values)})"
            ax.hist(values, bins, weights=weights, density=True, histtype="step", lw=1.6, label=name,
                    color=_COLOURS[k % len(_COLOURS)])  # fmt: skip
        ax.set(xlabel=f"{title} ({unit})", ylabel=f"share per {unit}")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    return buffer.getvalue()


def _by_specimen(rows: Rows, name: str, weight: str) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if row.get(name) is not None and row[weight] > 0:
            values, weights = found.setdefault(row["specimen"], ([], []))
            values.append(row[name])
            weights.append(row[weight])
    return {specimen: (np.array(v), np.array(w)) for specimen, (v, w) in found.items()}
