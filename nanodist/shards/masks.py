"""Masks that lie beside micrographs: which belongs to which, and what a tile's share of one says."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from nanodist.micrographs import SUFFIXES, count_micrographs, read_micrograph
from nanodist.shards.sources import Source, read_values

# Any reader of a store's tars reads it, and webdataset gives it under "mask.png".
MASK_ENCODING = "png"
MASK_SUFFIX = "mask.png"
# A class counts as the label of a tile from this share of its pixels on.
LEAST_SHARE = 0.01
_MOST_LISTED = 64
# What ``nanodist measure --rois`` writes of ``x.png``, of a mask ``x.mask.png``, and of layers ``x.instances.tif``.
_LABELS = re.compile(r"(.+?)(?:\.mask|_mask|\.instances)?\.labels$")
NUMBERED = re.compile(r"^\d{5}-")  # what it puts before a name, so that masks of one name do not meet


def find_masks(specs: Sequence[str], sources: Sequence[Source]) -> dict[Path, Path]:
    """The mask of each source that has one.

    Args:
        specs: ``FOLDER=MASKS`` (the mask of ``FOLDER/a/x.tif`` is ``MASKS/a/x.*``, ``x.mask.*``, ``x_mask.*`` or, as
            ``nanodist measure --rois`` writes, ``x.labels.*`` or ``00001-x.labels.*``, where there is none of those
            before, or ``MASKS/00001-a-x.labels.*``; the last folder of that name is meant) or ``FILE.csv:COLUMN``
            (paths from the CSV's folder); of several, the first that has one counts.
        sources: what is packed.

    Raises:
        UserError: a spec that is none, that fits nothing, a mask that is not there, or two of one name.
    """
    found: dict[Path, Path] = {}
    for spec in specs:
        matches = _from_table(spec, sources) if ".csv:" in spec.lower() else _from_folders(spec, sources)
        if not matches:
            raise UserError(
                f"--masks {spec} gives a mask to none of the {len(sources)} files (such as {sources[0].path}): of "
                "FOLDER=MASKS both are names of folders, without a path, and MASKS lies beside FOLDER"
            )
        for path, mask in matches.items():
            found.setdefault(path, mask)
    return found


def _refuse_shared(matches: dict[Path, Path]) -> None:
    """One mask of images of different names is the mask of one of them at most."""
    owners: dict[Path, Path] = {}
    for path, mask in matches.items():
        other = owners.setdefault(mask, path)
        if (other.parent, stem_of(other.name)) != (path.parent, stem_of(path.name)):
            raise UserError(f"{mask} would be the mask of {other} and of {path}: give the images different names")


def _from_table(spec: str, sources: Sequence[Source]) -> dict[Path, Path]:
    folder = Path(os.path.abspath(spec.rpartition(":")[0])).parent
    matches = {}
    for source, name in zip(sources, read_values(spec, sources, "masks"), strict=True):
        if name:
            mask = Path(os.path.normpath(folder / name))
            if not mask.is_file():
                raise UserError(f"{mask}, named by --masks as the mask of {source.name}, does not exist")
            matches[source.path] = mask
    return matches


def _from_folders(spec: str, sources: Sequence[Source]) -> dict[Path, Path]:
    images, separator, masks = spec.partition("=")
    if not separator or not images or not masks or images == masks:
        raise UserError(f"--masks is '{spec}'; it must be FOLDER=MASKS, such as images=masks, or FILE.csv:COLUMN")
    matches = {}
    folders: dict[Path, list[dict[str, list[Path]]]] = {}
    for source in sources:
        parts = source.path.parts
        places = [i for i, part in enumerate(parts[:-1]) if part == images]
        if not places:
            continue
        root, inner = Path(*parts[: places[-1]], masks), parts[places[-1] + 1 : -1]
        folder = root.joinpath(*inner)
        for each in {folder, root} - folders.keys():
            folders[each] = _by_image(sorted(each.iterdir()) if each.is_dir() else [])
        name = stem_of(source.path.name)
        found = next((kind[name] for kind in folders[folder] if name in kind), [])
        if inner and not found:  # measure --rois writes all into one folder
            found = folders[root][-1].get("-".join([*inner, name]), [])
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1]} would both be the mask of '{name}': leave one out")
        if found:
            matches[source.path] = found[0]
    _refuse_shared(matches)
    return matches


def _by_image(files: Sequence[Path]) -> list[dict[str, list[Path]]]:
    """Masks by the names of their images, in the order in which they count: plain names, labels, numbered labels."""
    plain: dict[str, list[Path]] = {}
    labels: dict[str, list[Path]] = {}
    numbered: dict[str, list[Path]] = {}
    for file in (f for f in files if f.name.lower().endswith(SUFFIXES)):
        stem = stem_of(file.name)
        plain.setdefault(stem.removesuffix(".mask").removesuffix("_mask"), []).append(file)
        if found := _LABELS.match(stem):
            labels.setdefault(found[1], []).append(file)
            # An image may itself have a name that begins like this.
            if NUMBERED.match(found[1]):
                numbered.setdefault(NUMBERED.sub("", found[1]), []).append(file)
    return [plain, labels, numbered]


def stem_of(name: str) -> str:
    """A file name without the ending that says it is a micrograph; other dots are a part of the name."""
    suffix = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)]


def read_mask(path: Path, page: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """(H, W) uint8 or uint16 numbers of classes or instances, for micrograph number ``page`` of a file.

    Raises:
        UserError: unreadable, of fewer pages or another ``shape`` than its micrograph, or no whole numbers from 0 to
            65535.
    """
    if page and count_micrographs(path) == 1:
        raise UserError(f"{path} is one mask, and its micrograph a stack: save as many pages, or the slices alone")
    pixels = read_micrograph(path, page).pixels
    if pixels.shape != shape:
        raise UserError(
            f"{path} is a mask of {pixels.shape[0]} x {pixels.shape[1]} pixels, and its micrograph has "
            f"{shape[0]} x {shape[1]}: make them alike"
        )
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind not in "iu" or low < 0 or high > 65535:
        raise UserError(
            f"{path} is a mask of {pixels.dtype} values from {low} to {high}: masks hold whole numbers from 0 to 65535"
        )
    return np.asarray(pixels, np.uint8 if high < 256 and pixels.dtype.itemsize == 1 else np.uint16)


def describe(mask: npt.NDArray[Any]) -> dict[str, Any]:
    """What a tile's JSON says of its mask: ``shares`` of the numbers in it, or how many there are, if many."""
    values, counts = np.unique(mask, return_counts=True)
    facts: dict[str, Any] = {"encoding": MASK_ENCODING, "values": len(values)}
    if len(values) <= _MOST_LISTED:
        facts["shares"] = {
            str(v): round(n / mask.size, 6) for v, n in zip(values.tolist(), counts.tolist(), strict=True)
        }
    return facts


def main_class(mask: npt.NDArray[Any]) -> str:
    """The class that fills most of a tile, background (0) only where no other fills 1 % of it."""
    values, counts = np.unique(mask, return_counts=True)
    counts = np.where(values == 0, 0, counts)
    best = int(counts.argmax())
    return str(values[best]) if counts[best] >= LEAST_SHARE * mask.size else "0"
