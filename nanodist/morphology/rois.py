"""Objects to and from ImageJ (ROI sets) and napari (label images, shapes), so that a person can correct them.

ImageJ's ROI files are read and written by roifile; a label image is a TIFF of whole numbers, which napari opens as a
labels layer; centre lines are napari's CSV of shapes (``index, shape-type, vertex-index, axis-0, axis-1``).
"""

from __future__ import annotations

import csv
import struct
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from scipy import ndimage
from skimage.draw import polygon2mask
from skimage.measure import find_contours

from hpc.errors import UserError

Floats = npt.NDArray[np.float64]
_LARGEST_FILE = 2**28
_MOST_ROIS = 100_000
_NO_AREAS = ("LINE", "FREELINE", "POLYLINE", "ANGLE", "POINT", "NOROI", "UNKNOWN")


def needs_roifile(what: str) -> None:
    """Refuse ``what`` where roifile is not installed (:class:`UserError`)."""
    if find_spec("roifile") is None:
        raise UserError(f"{what}: roifile, which ImageJ's ROIs are read and written with, is not installed: pip install"
                        " 'nanodist[measure]'")  # fmt: skip


def labels_of(mask: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """One number an object (height, width); where layers overlap, the last one is on top."""
    if mask.ndim == 3:
        labels = np.zeros(mask.shape[1:], np.int32)
        for number, layer in enumerate(mask, start=1):
            labels[layer] = number
        return labels
    if mask.dtype == bool:
        return np.asarray(ndimage.label(mask, np.ones((3, 3)), output=np.int32)[0])
    return mask.astype(np.int32)


def write_labels(path: Path, mask: npt.NDArray[Any], pixel_size_nm: float | None) -> None:
    """A TIFF of labels with the pixel size, 16 bits where they suffice; napari and ImageJ open it."""
    labels = labels_of(mask)
    pixels = labels.astype(np.uint16) if labels.max() < 2**16 else labels.astype(np.float32)
    options: dict[str, Any] = {"metadata": {"axes": "YX"}}
    if pixel_size_nm is not None:
        options = {"resolution": (1 / pixel_size_nm,) * 2, "metadata": {"unit": "nm", "axes": "YX"}}
    tifffile.imwrite(path, pixels, imagej=True, **options)


def write_shapes(path: Path, lines: Sequence[Floats]) -> None:
    """Centre lines (n, 2), in pixels from the corner of the image, as paths in napari's CSV of shapes."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index", "shape-type", "vertex-index", "axis-0", "axis-1"])
        for index, line in enumerate(lines):
            # napari's coordinates are those of pixel centres.
            for vertex, (y, x) in enumerate((line[:: max(1, len(line) // 100)] - 0.5).tolist()):
                writer.writerow([index, "path", vertex, f"{y:.3f}", f"{x:.3f}"])


def write_imagej(path: Path, mask: npt.NDArray[Any]) -> int:
    """Outlines of all objects as an ImageJ ROI set (``.zip``), and their number; those with holes are composites.

    Raises:
        UserError: roifile is not installed.
    """
    needs_roifile(str(path))
    import roifile

    labels = labels_of(mask) if mask.ndim == 2 else None
    boxes = ndimage.find_objects(labels) if labels is not None else [None] * len(mask)
    rois = []
    for number, box in enumerate(boxes, start=1):
        if labels is not None and box is None:
            continue
        part, top, left = (
            (mask[number - 1], 0, 0) if labels is None else (labels[box] == number, box[0].start, box[1].start)
        )
        outer, holes = _outlines(np.pad(part, 1))
        paths = [(path + np.array([top - 0.5, left - 0.5]))[:, ::-1] for path in [*outer, *holes]]
        if holes:
            rois.append(_composite(paths, f"{number:05d}"))
        else:
            rois += [roifile.ImagejRoi.frompoints(path, name=f"{number:05d}") for path in paths]
    path.unlink(missing_ok=True)
    if rois:
        roifile.roiwrite(path, rois)
    return len(rois)


def _composite(paths: Sequence[Floats], name: str) -> Any:
    """An ImageJ ROI of several closed paths (n, 2) of x and y, which is filled by the even-odd rule."""
    import roifile

    move, line, close = 0, 1, 4
    flat: list[float] = []
    for path in paths:
        flat += [move, *path[0].tolist()]
        for point in path[1:]:
            flat += [line, *point.tolist()]
        flat.append(close)
    every = np.concatenate(paths)
    roi = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.RECT, name=name)
    roi.left, roi.top = (int(v) for v in np.floor(every.min(0)))
    roi.right, roi.bottom = (int(v) for v in np.ceil(every.max(0)))
    roi.multi_coordinates, roi.shape_roi_size = np.asarray(flat, np.float32), len(flat)
    return roi


def _outlines(mask: npt.NDArray[Any]) -> tuple[list[Floats], list[Floats]]:
    """Contours at 1/2 around an object, and those around its holes, in index coordinates."""
    found = []
    for contour in find_contours(mask.astype(np.float32), 0.5, fully_connected="high"):
        y, x = contour.T
        if np.sum(y[:-1] * x[1:] - y[1:] * x[:-1]) != 0 and len(contour) >= 4:
            found.append(contour)
    areas = [float(np.sum(c[:-1, 0] * c[1:, 1] - c[1:, 0] * c[:-1, 1])) for c in found]
    if not areas:
        return [], []
    around = np.sign(areas) == np.sign(areas[int(np.argmax(np.abs(areas)))])
    pairs = list(zip(found, around, strict=True))
    return [contour for contour, outer in pairs if outer], [contour for contour, outer in pairs if not outer]


def read_imagej(path: Path, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Layers (n, height, width) of an ImageJ ``.roi`` or ROI set ``.zip``; ROIs of one name are one object.

    Args:
        path: the file.
        shape: (height, width) of the image that the ROIs were drawn on.

    Raises:
        UserError: unreadable, too large, without areas or outside the image, or roifile is not installed.
    """
    needs_roifile(str(path))
    import roifile

    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{path} has more than {_LARGEST_FILE // 2**20} MiB; it is no set of ROIs")
        read = roifile.roiread(path)
    except (OSError, ValueError, KeyError, IndexError, struct.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as ImageJ ROIs ({error}): save it again from the ROI manager") from None
    rois = read if isinstance(read, list) else [read]
    if not rois or len(rois) > _MOST_ROIS:
        raise UserError(f"{path} holds {len(rois)} ROIs; give 1 to {_MOST_ROIS}")
    found: dict[str, npt.NDArray[np.bool_]] = {}
    for position, roi in enumerate(rois):
        name = roi.name or str(position)
        outlines = [np.atleast_2d(each) for each in roi.coordinates(multi=True)]
        if roi.roitype.name in _NO_AREAS or not outlines or any(len(each) < 3 for each in outlines):
            raise UserError(f"{path}: ROI {name} is no area; draw objects as polygons or freehand")
        inside = np.zeros(shape, bool)
        for points in outlines:  # of a composite, by the even-odd rule
            # Pixel centres lie at half numbers of ImageJ's coordinates.
            inside ^= polygon2mask(shape, points[:, ::-1] - 0.5)
        if not inside.any():
            raise _off_image(path, f"ROI {name}", shape)
        found[name] = found[name] | inside if name in found else inside
    return np.stack(list(found.values()))


def read_napari(path: Path, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Layers (n, height, width) of napari's CSV of shapes: its polygons, rectangles and ellipses.

    Args:
        path: the file that napari wrote of a shapes layer.
        shape: (height, width) of the image that the shapes were drawn on.

    Raises:
        UserError: unreadable, too large, or with shapes that are no areas.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{path} has more than {_LARGEST_FILE // 2**20} MiB; it is no set of shapes")
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        lacking = {"index", "shape-type", "axis-0", "axis-1"} - set((rows or [{}])[0])
        if rows and lacking:
            raise UserError(
                f"{path} has no column '{min(lacking)}', so that it is no shapes layer as napari saves it (points have "
                "no area, and a spreadsheet may change the commas); leave it out, or save the layer again"
            )
        axes = sorted((name for name in (rows or [{}])[0] if name.startswith("axis-")), key=lambda name: int(name[5:]))
        corners: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for row in rows:
            y, x = (float(row[name]) for name in axes[-2:])
            corners.setdefault((int(row["index"]), row["shape-type"]), []).append((y, x))
        planes = {tuple(float(row[name]) for name in axes[:-2]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as napari's CSV of shapes ({error}): save the layer again") from None
    flat = next((f"{kind} {index}" for (index, kind), at in corners.items() if not _is_area(kind, at)), None)
    if not corners or len(corners) > _MOST_ROIS or flat:
        what = f"holds {len(corners)} shapes" if flat is None else f"has '{flat}', which is no area"
        raise UserError(f"{path} {what}; give 1 to {_MOST_ROIS} polygons, rectangles or ellipses of two axes")
    if len(planes) > 1:
        raise UserError(f"{path} has shapes on {len(planes)} planes of a stack; save those of each plane by themselves")
    layers = np.stack([polygon2mask(shape, _outline(kind, np.asarray(at))) for (_, kind), at in corners.items()])
    outside = next((key for key, layer in zip(corners, layers, strict=True) if not layer.any()), None)
    if outside is not None:
        raise _off_image(path, f"'{outside[1]} {outside[0]}'", shape)
    return layers


def _off_image(path: Path, what: str, shape: tuple[int, int]) -> UserError:
    where = f"an image of {shape[0]} x {shape[1]} pixels"
    return UserError(f"{path}: {what} covers no pixel of {where}; was it drawn on this one?")


def _is_area(kind: str, at: Sequence[tuple[float, float]]) -> bool:
    return (kind == "polygon" and len(at) >= 3) or (kind in ("rectangle", "ellipse") and len(at) == 4)


def _outline(kind: str, corners: Floats) -> Floats:
    """Vertices (n, 2); an ellipse is given by the corners of the rectangle around it."""
    if kind != "ellipse":
        return corners
    turn = np.linspace(0, 2 * np.pi, 180, endpoint=False)[:, None]
    centre, first, second = corners.mean(0), (corners[1] - corners[0]) / 2, (corners[3] - corners[0]) / 2
    return np.asarray(centre + np.cos(turn) * first + np.sin(turn) * second)
