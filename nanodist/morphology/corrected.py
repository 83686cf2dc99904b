"""Objects that a person corrected in ImageJ or napari, as masks that ``nanodist pack --masks`` takes."""

from __future__ import annotations

import re
from pathlib import Path

from hpc.errors import UserError
from nanodist.micrographs import is_named_like_one, read_micrograph
from nanodist.morphology.rois import labels_of, read_imagej, read_napari
from nanodist.shards.mask_codings import new_mask_folder, write_mask
from nanodist.shards.masks import NUMBERED, stem_of

ROI_FILES = (".zip", ".roi", ".csv")
_ENDING = re.compile(r"(\.rois?)?\.(zip|roi|csv)$", re.IGNORECASE)
_LINES = ".centre-lines.csv"  # of ``nanodist measure --rois``, which are no areas
# What a mask has at the end of its image's name.
_MASKS = (".mask", ".instances", ".labels")


def roi_files(source: Path) -> list[Path]:
    """The ROI files of a folder, or the one file that ``source`` is; empty where it is neither."""
    paths = sorted(source.iterdir()) if source.is_dir() else [source]
    return [p for p in paths if p.suffix.lower() in ROI_FILES and not p.name.endswith(_LINES) and p.is_file()]


def convert_rois(source: Path, images: Path, out: Path, instances: bool, value: int = 1) -> int:
    """Write a PNG of numbers for each ROI set, under the name and in the subfolder of its image; the number of sets.

    A set ``NAME.zip``, ``NAME.rois.zip`` or ``00001-NAME.rois.zip`` (as ``nanodist measure --rois`` writes), or
    napari's ``NAME.csv`` of shapes, is of the image ``NAME`` in ``images``, whose size the mask has; of an image in a
    subfolder, ``FOLDER-NAME`` is as good.

    Args:
        source: folder of ROI sets, or one.
        images: folder of the micrographs, at any depth, or of their masks.
        out: a new folder; appears whole or not at all.
        instances: number the objects from 1 on (a later ROI on top); otherwise material is ``value``.
        value: see above.

    Raises:
        UserError: a set without an image, or that cannot be read; names the file.
    """
    known, sets = _by_stem(images), roi_files(source)
    with new_mask_folder(out) as temporary:
        for path in sets:
            image = _image_of(path, known, images)
            reader = read_napari if path.suffix.lower() == ".csv" else read_imagej
            layers = reader(path, read_micrograph(image).pixels.shape[-2:])
            mask = labels_of(layers) if instances else value * (labels_of(layers) > 0)
            target = temporary / image.relative_to(images).parent / f"{_of_image(stem_of(image.name))}.png"
            if target.exists():
                raise UserError(f"{path}: another set is of the image '{image.name}' too; leave one out")
            write_mask(target, mask)
    return len(sets)


def _by_stem(images: Path) -> dict[str, list[Path]]:
    """Files by the name of their image."""
    if not images.is_dir():
        raise UserError(f"--images {images} is no folder; give that of the micrographs, whose sizes masks have")
    known: dict[str, list[Path]] = {}
    for path in sorted(p for p in images.rglob("*") if p.is_file() and is_named_like_one(p)):
        name, inner = _of_image(stem_of(path.name)), path.relative_to(images).parent.parts
        for each in {name, "-".join([*inner, name])}:
            known.setdefault(each, []).append(path)
    return known


def _of_image(stem: str) -> str:
    """The name of an image, from that of its mask."""
    return next((stem.removesuffix(kind) for kind in _MASKS if stem.endswith(kind)), stem)


def _image_of(path: Path, known: dict[str, list[Path]], images: Path) -> Path:
    stem = _ENDING.sub("", path.name)
    # Sets are named after images with their ending too.
    stems = [_of_image(each) for each in (stem, stem_of(stem))]
    stems += [NUMBERED.sub("", each) for each in stems]
    found = next((known[each] for each in stems if each in known), [])
    if len(found) != 1:
        what = "has no image of that name" if not found else f"has {len(found)} images of that name"
        raise UserError(f"{path}: {images} {what}; give the ROI set the name of its image")
    return found[0]
