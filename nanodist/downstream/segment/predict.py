"""Masks of micrographs from a microscope: TIFF files with their pixel size, overlays, and what went wrong."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from hpc import atomic
from hpc.config import build
from hpc.devices import inference_device
from hpc.errors import UserError
from hpc.progress import Progress
from hpc.tables import csv_text
from nanodist.downstream.finetune.load import read_run, size_of
from nanodist.downstream.finetune.predict import grey, read_each
from nanodist.downstream.finetune.recipe import DecoderConfig
from nanodist.downstream.finetune.reference import Reference, read_reference
from nanodist.downstream.segment.hysteresis import faint_classes, joined
from nanodist.downstream.segment.model import Segmenter
from nanodist.downstream.segment.promise import DicePromise
from nanodist.downstream.segment.windows import mean_features, strips, window_count
from nanodist.encoders import EncoderSpec, create_trunk
from nanodist.fitting import DAMAGED, fitting, refuse_options
from nanodist.micrographs import Micrograph
from nanodist.shards.masks import stem_of

U8 = npt.NDArray[np.uint8]
REPORT, SHARES = "report.json", "shares.csv"
OVERLAY_PX = 2048
LARGEST_VIEW_PX = 4096
# Okabe and Ito's colours, which colour-blind readers tell apart; the background stays as it is.
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


@dataclass(frozen=True)
class LoadedSegmenter:
    """A segmentation model in eval mode on the CPU, and how it wants to be shown a micrograph.

    Attributes:
        faint: pixels of at least this probability (of all classes but the background) belong to what they continue;
            ``None``: they do not.
        reference: knows what the training images looked like; ``None`` where the run does not keep it.
    """

    model: Segmenter
    values: tuple[int, ...]
    crop_px: int
    size_px: int
    symmetries: int
    checkpoint: Path
    faint: float | None = None
    reference: Reference | None = None


@dataclass(frozen=True)
class Segmented:
    """A segmented micrograph.

    Attributes:
        classes: (H, W) places in the ``values`` of the model.
        expected_dice: the Dice of the mask that the probabilities themselves promise, from 0 to 1.
    """

    classes: U8
    expected_dice: float


def load_segmenter(run_dir: str | Path, faint: float | None = None) -> LoadedSegmenter:
    """The model of a run directory of ``nanodist finetune`` with ``task=segmentation``; ``faint`` as it has it.

    Raises:
        UserError: the folder is none, or holds no whole checkpoint, or ``faint`` is no probability below a half.
    """
    if faint is not None and not 0.0 < faint < 0.5:
        raise UserError(f"--faint is {faint:g}; it must lie between 0 and 0.5, such as 0.15")
    folder, task, weights = read_run(run_dir, "segmentation")
    try:
        spec = build(EncoderSpec, task["encoder"], str(folder))
        refuse_options(spec.trunk_options, folder)
        values = tuple(int(str(name)) for name in task["classes"])
        if not 1 <= len(values) <= 256 or not all(0 <= value <= 65535 for value in values):
            raise ValueError("classes must be 1 to 256 whole numbers from 0 to 65535")
        decoder = build(DecoderConfig, task["decoder"], str(folder))

        def make() -> Segmenter:
            return Segmenter(create_trunk(spec.trunk, 0, **spec.trunk_options), len(values), spec, decoder, True)

        model = fitting(make, weights, folder)
        crop_px, size_px = (size_of(task[name], name) for name in ("crop_px", "size_px"))
        symmetries = size_of(task["symmetries"], "symmetries", 8)
        if size_px % 32 or size_px > LARGEST_VIEW_PX:
            raise ValueError(f"size_px is {size_px}; it must be a multiple of 32 up to {LARGEST_VIEW_PX}")
    except DAMAGED as error:
        raise UserError(f"{run_dir}: cannot load the model: {' '.join(str(error).split())[:300]}") from None
    known = read_reference(Path(run_dir))
    return LoadedSegmenter(model.float().eval(), values, crop_px, size_px, symmetries, folder, faint, known)


def segment(loaded: LoadedSegmenter, pixels: npt.NDArray[Any], progress: bool = False) -> Segmented:
    """The classes of a uint8 or uint16 micrograph (H, W), and how sure of them the model is."""
    low, promise = loaded.faint, DicePromise(len(loaded.values))
    bar = Progress(window_count(pixels.shape, loaded.crop_px), "segmenting", "windows", enabled=progress)
    made = strips(loaded.model, pixels, loaded.crop_px, loaded.size_px, loaded.symmetries, bar.update)
    classes = np.empty(pixels.shape, np.uint8)
    faint = classes if low is None else np.empty_like(classes)
    for y, likely in made:
        rows = slice(y, y + likely.shape[1])
        classes[rows] = likely.argmax(0)
        promise.add(likely, classes[rows])
        if low is not None:
            faint[rows] = faint_classes(likely, low)
    bar.close()
    return Segmented(classes if low is None else joined(classes, faint), promise.dice())


def predict_masks(loaded: LoadedSegmenter, paths: Sequence[Path], out: Path) -> dict[str, str]:
    """Segment every micrograph of ``paths`` into ``out/masks`` and ``out/overlays``, and write the report.

    Returns:
        The files that could not be predicted, each with the reason, as the report has them.

    Raises:
        UserError: no such path, none of the files is a micrograph, or ``out`` has masks already.
    """
    if (out / "masks").is_dir() and any((out / "masks").iterdir()):
        raise UserError(f"{out} has masks of another prediction, which would be mixed with these; name another folder")
    names: set[str] = set()
    problems: dict[str, str] = {}
    loaded.model.to(inference_device())
    folders = [path for path in paths if path.is_dir()]

    def one(file: Path, page: int, micrograph: Micrograph) -> list[Any]:
        inner = next((file.relative_to(folder).parent for folder in folders if folder in file.parents), Path())
        return _one(loaded, file, page, micrograph, out, inner, names)

    rows = read_each(paths, one, problems)
    header = ["file", "page", "mask", "pixel_size_y_nm", *(f"share_{value}" for value in loaded.values)]
    atomic.write_text(out / SHARES, csv_text([*header, "expected_dice", "unlike_training"], rows))
    strange = [row[0] for row in rows if row[-1] and float(row[-1]) > 1]
    document = {
        "schema": 1,
        "checkpoint": str(loaded.checkpoint),
        "classes": list(loaded.values),
        "faint": loaded.faint,
        "predicted": len(rows),
        "unlike_anything_in_training": strange,
        "not_predicted": problems,
    }
    atomic.write_json(out / REPORT, document)
    return problems


def _one(
    loaded: LoadedSegmenter,
    file: Path,
    page: int,
    micrograph: Micrograph,
    out: Path,
    inner: Path,
    names: set[str],
) -> list[Any]:
    """Segment one micrograph and write its files; the row of the table.

    They have its name, in the subfolder ``inner`` that it lies in, or one that is not yet in ``names``.
    """
    pixels = grey(file, micrograph, least_px(loaded))
    made = segment(loaded, pixels, progress=pixels.size > 2**24)
    classes, known = made.classes, loaded.reference
    name = str(inner / stem_of(file.name)) + (
        f"-p{page}" if page or int(micrograph.metadata.get("pages", 1)) > 1 else ""
    )
    # Files of one name from several folders are numbered, past those that have such a name already.
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    stem = next(each for each in itertools.chain([name], numbered) if each not in names)
    names.add(stem)
    for kind in ("masks", "overlays"):
        (out / kind / inner).mkdir(parents=True, exist_ok=True)
    mask = out / "masks" / f"{stem}.tif"
    # Narrow types, and counts class by class: in 64 bits each would take eight times the micrograph.
    values = np.asarray(loaded.values, np.uint8 if max(loaded.values) < 256 else np.uint16)
    atomic.write_bytes(mask, mask_tiff(values[classes], micrograph.pixel_size_nm))
    atomic.write_bytes(out / "overlays" / f"{stem}.png", _png(overlay(pixels, classes)))
    shares = [np.count_nonzero(classes == place) / classes.size for place in range(len(loaded.values))]
    size = "" if micrograph.pixel_size_nm is None else f"{micrograph.pixel_size_nm[0]:g}"
    unlike = "" if known is None else f"{known.unlikeness(features_of(loaded, pixels)[None])[0]:.3f}"
    row = [str(file), page, str(mask.relative_to(out)), size, *(f"{share:.6f}" for share in shares)]
    # What --faint adds has little probability by itself, so that nothing is promised of it.
    return [*row, "" if loaded.faint is not None else f"{made.expected_dice:.4f}", unlike]


def least_px(loaded: LoadedSegmenter) -> int:
    """The shortest side of a micrograph that is segmented."""
    return max(8, loaded.crop_px // 4)


def features_of(loaded: LoadedSegmenter, pixels: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Features (d,) of the trunk, averaged over a micrograph."""
    return mean_features(loaded.model, pixels, loaded.crop_px, loaded.size_px)


def mask_tiff(mask: npt.NDArray[Any], pixel_size_nm: tuple[float, float] | None) -> bytes:
    """A mask (H, W) as a TIFF file, compressed, with its pixel size in the resolution tags where it is known."""
    buffer = io.BytesIO()
    known: dict[str, Any] = {}
    if pixel_size_nm is not None:
        y_nm, x_nm = pixel_size_nm
        known = {"resolution": (1e7 / x_nm, 1e7 / y_nm), "resolutionunit": "CENTIMETER"}
    narrow = mask.astype(np.uint8 if mask.max() < 256 else np.uint16, copy=False)
    tifffile.imwrite(buffer, narrow, compression="zlib", software="nanodist", **known)
    return buffer.getvalue()


def overlay(pixels: U8, classes: U8) -> U8:
    """The micrograph (H, W, 3) with the classes in colour, at most 2048 pixels a side."""
    step = max(1, -(-max(pixels.shape) // OVERLAY_PX))
    grey_, shown = pixels[::step, ::step], classes[::step, ::step]
    picture = np.repeat(grey_[..., None], 3, axis=2).astype(np.float32)
    for place in range(1, int(shown.max(initial=0)) + 1):
        colour = np.asarray(COLOURS[(place - 1) % len(COLOURS)], np.float32)
        picture[shown == place] = 0.6 * picture[shown == place] + 0.4 * colour
    return picture.astype(np.uint8)


def _png(picture: U8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
