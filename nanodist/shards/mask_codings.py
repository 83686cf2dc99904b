"""Masks that others coded otherwise, as PNGs of numbers that ``nanodist pack --masks`` takes.

Two codings are known: colours (one RGB colour a class, as painting programs and many data sets write) and COCO JSON
(polygons or run lengths an object, as annotation tools write).
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpc import atomic
from hpc.errors import UserError

Kind = Literal["classes", "instances"]
LEGEND = "legend.json"
IMAGES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg")
# More colours than this are no classes: edges that were smoothed, or a JPEG.
MOST_COLOURS = 64
_MOST_PIXELS = 1 << 30


def read_colours(path: Path) -> dict[str, int]:
    """The number of each colour ``#rrggbb``, of a CSV with the columns ``color`` and ``class`` (numbers).

    Raises:
        UserError: unreadable, another form, or a colour twice.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        numbers = {row["color"].strip().lower(): int(row["class"]) for row in rows}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (KeyError, ValueError, AttributeError):
        raise UserError(f"{path} must be a CSV with the columns color (#rrggbb) and class (a number)") from None
    wrong = [c for c in numbers if len(c) != 7 or c[0] != "#" or set(c[1:]) - set("0123456789abcdef")]
    if wrong or len(numbers) != len(rows) or not all(0 <= n < 65536 for n in numbers.values()):
        what = f"'{wrong[0]}' is no colour" if wrong else "a colour stands twice, or a class is not from 0 to 65535"
        raise UserError(f"{path}: {what}; colours are written as #rrggbb")
    return numbers


def convert_colours(
    folder: Path, out: Path, colours: dict[str, int] | None = None, nearest: bool = False
) -> dict[str, Any]:
    """Write a PNG of numbers for each colour-coded mask in ``folder``, at any depth, under the same name in ``out``.

    Args:
        folder: with RGB images.
        out: a new folder; appears whole or not at all. ``legend.json`` in it has the number of each colour.
        colours: number of each ``#rrggbb``; ``None``: black is 0, and the others count up in the order of their codes.
        nearest: a colour without a number takes that of the nearest one in RGB, as smoothed edges need it.

    Returns:
        What ``legend.json`` holds.

    Raises:
        UserError: no images, one that cannot be read, or a colour without a number; names the file.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES and p.is_file())
    if not paths:
        raise UserError(f"{folder} holds no masks ({', '.join(IMAGES)})")
    if colours is None:
        found: set[int] = set()
        for path in paths:
            found.update(np.unique(_codes(path)).tolist())
            if len(found) > MOST_COLOURS:
                raise UserError(
                    f"{path}: more than {MOST_COLOURS} colours: its edges are smoothed, or it was a JPEG; paint "
                    "masks without smoothing, or name the colours with --colors FILE.csv and --nearest"
                )
        others = sorted(found - {0})
        colours = {_text(0): 0, **{_text(code): n for n, code in enumerate(others, 1)}}
    legend = {"colours": colours}
    with new_mask_folder(out) as temporary:
        for path in paths:
            target = temporary / path.relative_to(folder).with_suffix(".png")
            write_mask(target, _numbers(path, colours, nearest))
        atomic.write_json(temporary / LEGEND, legend)
    return legend


def _codes(path: Path) -> npt.NDArray[np.int64]:
    """(H, W) 0xrrggbb."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise UserError(f"{path} has {image.width} x {image.height} pixels, more than {_MOST_PIXELS}")
            rgb = np.asarray(image.convert("RGB"), np.int64)
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from None
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def _text(code: int) -> str:
    return f"#{code:06x}"


def _numbers(path: Path, colours: dict[str, int], nearest: bool) -> npt.NDArray[Any]:
    codes = _codes(path)
    values, inverse = np.unique(codes, return_inverse=True)
    known = np.asarray([int(colour[1:], 16) for colour in colours])
    unknown = np.setdiff1d(values, known)
    if len(unknown) and not nearest:
        raise UserError(
            f"{path}: the colour {_text(int(unknown[0]))} has no class ({len(unknown)} such colours); add it to the "
            "CSV, or give --nearest"
        )
    apart = np.square(_rgb(values)[:, None] - _rgb(known)[None]).sum(2)
    table = np.asarray(list(colours.values()))[apart.argmin(1)]
    return np.asarray(table[inverse].reshape(codes.shape))


def _rgb(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], 1)


def convert_coco(path: Path, out: Path, kind: Kind = "classes") -> dict[str, Any]:
    """Write a PNG of numbers for each image that a COCO file annotates.

    Where objects overlap, the later annotation lies on top. Crowd regions (``iscrowd``) count as their class, and are
    no object.

    Args:
        path: COCO JSON with ``images``, ``annotations`` (polygons or run lengths) and ``categories``.
        out: a new folder; the mask of the image ``a/b.tif`` is ``a/b.png`` in it. ``legend.json`` names the numbers.
        kind: numbers of classes (categories in the order of their ids, from 1) or of objects (from 1 in each image).

    Returns:
        What ``legend.json`` holds.

    Raises:
        UserError: no COCO JSON, an annotation that fits no image or category, or an unsafe name.
    """
    data = _coco(path)
    classes = {c["id"]: n for n, c in enumerate(sorted(data["categories"], key=lambda c: c["id"]), 1)}
    by_image: dict[Any, list[Any]] = {image["id"]: [] for image in data["images"]}
    for note in data["annotations"]:
        if note.get("image_id") not in by_image or note.get("category_id") not in classes:
            raise UserError(f"{path}: annotation {note.get('id')} names an image or a category that is not in the file")
        by_image[note["image_id"]].append(note)
    names = {c["name"]: classes[c["id"]] for c in data["categories"]}
    legend: dict[str, Any] = {"kind": kind, "classes": {"background": 0, **names}}
    with new_mask_folder(out) as temporary:
        for image in data["images"]:
            name = Path(image["file_name"])
            if name.is_absolute() or ".." in name.parts:
                raise UserError(f"{path}: the image name '{name}' leaves its folder")
            height, width = int(image["height"]), int(image["width"])
            mask = np.zeros((height, width), np.int64)
            objects = 0
            for note in by_image[image["id"]]:
                inside = _inside(path, note, height, width)
                objects += not note.get("iscrowd")
                if kind == "classes":
                    mask[inside] = classes[note["category_id"]]
                elif not note.get("iscrowd"):
                    mask[inside] = objects
            write_mask(temporary / name.with_suffix(".png"), mask)
        atomic.write_json(temporary / LEGEND, legend)
    return legend


def _coco(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    parts = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(part), list) for part in parts) or not data["images"]:
        raise UserError(f"{path} is no COCO file: it has no lists of images, annotations and categories")
    needed = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("segmentation",),
        "categories": ("id", "name"),
    }
    for part, keys in needed.items():
        for entry in data[part]:
            if not isinstance(entry, dict) or not all(key in entry for key in keys):
                raise UserError(f"{path}: an entry of {part} lacks one of {', '.join(keys)}: {str(entry)[:80]}")
    if any(int(i["height"]) < 1 or int(i["width"]) < 1 for i in data["images"]):
        raise UserError(f"{path}: an image has no size")
    return data


def _inside(path: Path, note: dict[str, Any], height: int, width: int) -> npt.NDArray[np.bool_]:
    """(H, W) the pixels of an annotation."""
    try:
        from pycocotools import mask as coco
    except ImportError:
        raise UserError("COCO masks take pycocotools: pip install 'nanodist[segment]'") from None
    shape = note["segmentation"]
    try:
        if isinstance(shape, list):
            runs = coco.merge(coco.frPyObjects(shape, height, width))
        else:
            runs = coco.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape
        inside = coco.decode(runs).astype(bool)
    except Exception as error:  # its C code raises what it likes
        raise UserError(f"{path}: annotation {note.get('id')} has no valid segmentation ({error})") from None
    if inside.shape != (height, width):
        raise UserError(
            f"{path}: annotation {note.get('id')} is of an image of {inside.shape[0]} x {inside.shape[1]} pixels"
        )
    return np.asarray(inside)


def new_mask_folder(out: Path) -> Any:
    """A folder of masks that appears whole or not at all, as :func:`hpc.atomic.directory`; ``out`` is new or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another folder")
    return atomic.directory(out)


def write_mask(target: Path, numbers: npt.NDArray[Any]) -> None:
    """A PNG of numbers (H, W), of 8 bits where they fit; refuses to write over another."""
    from PIL import Image

    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise UserError(f"two masks would be named {target.name}; give the images different names")
    buffer = io.BytesIO()
    Image.fromarray(numbers.astype(np.uint8 if numbers.max(initial=0) < 256 else np.uint16)).save(buffer, "PNG")
    target.write_bytes(buffer.getvalue())
