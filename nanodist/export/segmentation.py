"""A fine-tuned segmentation as one graph that others run without nanodist: pixels of a tile in, probabilities out."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpc.seeding import generator
from nanodist.downstream.segment.model import Segmenter
from nanodist.downstream.segment.predict import LoadedSegmenter
from nanodist.downstream.segment.windows import strips, turned_back
from nanodist.encoders import normalise, symmetries
from nanodist.export.card import (
    CITATION,
    head_of,
    interval,
    one_line,
    parity_table,
    pixel_size_note,
    recipe_block,
)
from nanodist.export.folder import made_whole, require_graphs, tell
from nanodist.export.loading import TITLES
from nanodist.export.precision import DTYPES, require_half
from nanodist.export.weights import refuse_taken, require_finite
from nanodist.pixels import Image

_SEGMENT = """

def segment(pixels):  # a grey micrograph: array (H, W) of uint8 or uint16; gives probabilities (classes, H, W)
    side, (height, width) = {side}, pixels.shape
    images = pixels.astype("float32") / np.float32(np.iinfo(pixels.dtype).max)
    images = np.pad(images, ((0, max(0, side - height)), (0, max(0, side - width))), mode="symmetric")
    along = 1 - abs((np.arange(side) + 0.5) * 2 / side - 1) + 1e-3
    weights = np.outer(along, along).astype("float32")
    total = np.zeros(({classes} + 1, *images.shape), "float32")
    for y in starts(images.shape[0], side):
        for x in starts(images.shape[1], side):
            tile = np.ascontiguousarray(images[None, None, y : y + side, x : x + side])
            total[:-1, y : y + side, x : x + side] += probabilities(tile)[0] * weights
            total[-1, y : y + side, x : x + side] += weights
    return (total[:-1] / total[-1])[:, :height, :width]


def starts(length, side):  # of the fewest tiles that cover it and share {overlap} pixels or more
    count = 1 + -(-(length - side) // (side - {overlap}))
    return [round(i * (length - side) / (count - 1)) if count > 1 else 0 for i in range(count)]


VALUES = np.array({values})  # what a mask holds for each class: mask = VALUES[segment(pixels).argmax(0)]
"""
_ONNX = """import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{location}/onnx/model.onnx", providers=["CPUExecutionProvider"])


def probabilities(tiles):
    return session.run(None, {{"images": tiles}})[0]
"""
_TORCH_EXPORT = """import numpy as np
import torch

model = torch.export.load("{location}/torch-export/model.pt2").module()


@torch.inference_mode()
def probabilities(tiles):
    return model(torch.from_numpy(tiles)).numpy()
"""
_CARD = """---
license: {license}
pipeline_tag: image-segmentation
tags:
- nanodist
- electron-microscopy
---

# {name}

{licence}A segmentation of grey-scale electron micrographs (decoder {decoder} on {trunk}, one channel), fine-tuned with
nanodist {version}. Its classes, in this order, by their numbers in a mask: {classes}.

## How to run it

`segment` takes a micrograph of any size, uint8 or uint16, as packing makes it: of the *whole micrograph* the 0.1 and
99.9 % quantiles become black and white where it is not 8 bit already. Inside the graph, for a tile of {side} x
{side} px: {inside}. Beside it, in the code below and in `model.json`: a pixel over the largest value of
its type, mirror images where a micrograph is smaller than a tile, tiles that overlap by half, and how they are blended.
{pixel_size}

"""
_USE = """## Intended use and limits

For micrographs like those that it was trained on: of the same kind of specimen, contrast and pixel size. Every pixel
gets one of its classes whatever it shows. Scores are on micrographs that were not trained on; look at masks of your own
micrographs before you count with them. Not for medical diagnosis.

"""


class Tile(nn.Module):
    """What nanodist does with one window of a micrograph, as a graph.

    Args:
        loaded: the model; it is copied where ``dtype`` is another than its own.
        dtype: of the network; pixels, resizing and softmax stay float32.
    """

    def __init__(self, loaded: LoadedSegmenter, dtype: torch.dtype) -> None:
        super().__init__()
        self.model: Segmenter = loaded.model if dtype == torch.float32 else copy.deepcopy(loaded.model).to(dtype)
        self.size_px, self.symmetries, self.dtype = loaded.size_px, loaded.symmetries, dtype

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities (n, classes, P, P) of ``images`` (n, 1, P, P) in [0, 1].

        Rotations and reflections go through the network as one batch, or a graph would hold up to eight copies of it.
        """
        side, size, turns = images.shape[-1], self.size_px, self.symmetries
        if side != size:
            images = functional.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)
        pixels = normalise(torch.cat(list(symmetries(images, turns))), self.model.spec)
        made = self.model._logits(pixels.to(self.dtype)).float().softmax(1).unflatten(0, (turns, -1))
        total = torch.stack([turned_back(made[i], i) for i in range(turns)]).sum(0) / turns
        if side != size:
            total = functional.interpolate(total, (side, side), mode="bilinear", align_corners=False)
        return total


def export_segmentation(
    loaded: LoadedSegmenter,
    target: Path,
    formats: Sequence[str],
    name: str,
    card: Mapping[str, Any],
    precision: str = "fp32",
) -> dict[str, Any]:
    """Write a segmentation in every format of ``formats`` to the folder ``target``, or nothing at all.

    Args:
        loaded: from :func:`nanodist.downstream.segment.predict.load_segmenter`.
        target: a folder that does not exist yet, or is empty.
        formats: some of :data:`nanodist.export.folder.GRAPHS`.
        name: on the card.
        card: ``license``, ``data_note``, ``recipe``, ``pixel_size_nm`` (least, largest) and ``scores`` (the rows of
            ``scores.json``), each of which may lack.
        precision: ``fp32`` or ``fp16``, which the network then computes in.

    Returns:
        The parity report, as in ``parity.json``: see :func:`nanodist.export.parity.compare`.

    Raises:
        UserError: a format that a segmentation has not, or that needs what is not installed; ``target`` is taken or
            cannot be written; or what is loaded back gives other probabilities.
    """
    from torch.export import Dim

    from nanodist.export.graph import traced, write_graphs
    from nanodist.export.parity import Job, compare

    wanted = require_graphs(formats, "a segmentation", "its decoder is our own")
    refuse_taken(target)
    weights = loaded.model.state_dict()
    require_finite(weights, name)
    if precision == "fp16":
        require_half(weights, name)
    with made_whole(target) as folder:
        example = torch.zeros(2, 1, loaded.crop_px, loaded.crop_px)
        graph = Tile(loaded, DTYPES[precision]).eval()
        made = traced(graph, (example,), ({0: Dim("batch", min=1)},), f"the segmentation {name}")
        write_graphs(made, _facts(loaded, card, precision), folder, wanted)
        images = _images(loaded.crop_px)
        expected = [[_segmented(loaded, image)] for image in images]
        here = json.dumps(str(folder.resolve()))[1:-1]
        jobs = [Job(kind, code_of(loaded, here, kind), "segment", expected) for kind in wanted]
        parity = compare(jobs, images, precision)
        tell(folder, parity, _card(loaded, name, card, wanted, parity, target.name))
    return parity


def _images(side: int) -> list[Image]:
    """Noise in the size of a tile, smaller, and larger by no whole number of tiles."""
    draw = generator(0, "export parity of segmentations")
    shapes = ((side, side), (side // 2 + 1, side + 7), (2 * side + 5, side + side // 2))
    types = (np.uint8, np.uint16, np.uint8)
    return [
        draw.integers(0, np.iinfo(kind).max, shape, endpoint=True).astype(kind)
        for shape, kind in zip(shapes, types, strict=True)
    ]


def _segmented(loaded: LoadedSegmenter, image: Image) -> Image:
    made = strips(loaded.model, image, loaded.crop_px, loaded.size_px, loaded.symmetries)
    return np.concatenate([rows for _, rows in made], axis=1)


def _facts(loaded: LoadedSegmenter, card: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """``model.json``: what a program must know beside the graph."""
    from nanodist.export.graph import INPUT, OPSET

    side, spec = loaded.crop_px, loaded.model.spec
    sizes = f"The batch is free; tiles are {side} x {side} px."
    return {
        "schema": 1,
        "task": "segmentation",
        "input": {"name": INPUT, "shape": ["batch", 1, side, side]},
        "input_type": "float32",
        "input_scale": "pixel / largest value of its type (255 or 65535)",
        "output": {"name": "probabilities", "type": "float32", "shape": ["batch", len(loaded.values), side, side]},
        "classes": list(loaded.values),
        "tile_px": side,
        "overlap_px": side // 2,
        "blending": "weighted mean; weight of pixel i along a side of P: 1 - |(i + 0.5) * 2 / P - 1| + 0.001, product "
        "of both axes",
        "smaller_than_a_tile": "continued by its mirror image (numpy.pad, mode symmetric)",
        "pixel_size_nm": card.get("pixel_size_nm"),
        "inside": {
            "resized_to_px": loaded.size_px,
            "normalise": spec.normalise,
            "mean": spec.mean if spec.normalise == "store" else None,
            "std": spec.std if spec.normalise == "store" else None,
            "symmetries": loaded.symmetries,
            "softmax": True,
        },
        "precision": precision,
        "sizes": sizes,
        "opset": OPSET,
    }


def code_of(loaded: LoadedSegmenter, location: str, kind: str) -> str:
    """Python that defines ``segment(pixels)``, which gives the probabilities that nanodist predicts masks from."""
    side = loaded.crop_px
    head = {"onnx": _ONNX, "torch-export": _TORCH_EXPORT}[kind].format(location=location)
    values = list(loaded.values)
    return head + _SEGMENT.format(side=side, overlap=side // 2, classes=len(values), values=values)


def _card(
    loaded: LoadedSegmenter,
    name: str,
    card: Mapping[str, Any],
    formats: Sequence[str],
    parity: Mapping[str, Any],
    location: str,
) -> str:
    here, spec, side = json.dumps(one_line(location))[1:-1], loaded.model.spec, loaded.crop_px
    resized = "" if side == loaded.size_px else f"resizing to {loaded.size_px} px and back, "
    turns = "" if loaded.symmetries == 1 else f", the average over {loaded.symmetries} rotations and reflections"
    head = _CARD.format(
        **head_of(card, name),
        decoder=type(loaded.model.decoder).__name__,
        trunk=spec.trunk,
        classes=", ".join(f"`{value}`" for value in loaded.values),
        side=side,
        inside=f"{resized}normalisation, trunk, decoder and softmax{turns}",
        pixel_size=pixel_size_note(card),
    )
    code = [f"### {TITLES[kind]}\n\n```python\n{code_of(loaded, here, kind)}```\n\n" for kind in formats]
    return "".join([head, *code, parity_table(parity), _scores(card), _USE, recipe_block(card), CITATION])


def _scores(card: Mapping[str, Any]) -> str:
    rows = [row for row in card.get("scores") or () if row.get("mean") is not None]
    if not rows:
        return "## Scores\n\nNot measured.\n\n"
    lines = []
    for row in rows:
        cells = (
            row["metric"],
            row["class"],
            row.get("n_train"),
            row.get("n_test"),
            f"{row['mean']:.3f}",
            interval(row),
        )
        lines.append(f"| {' | '.join(map(one_line, cells))} |\n")
    head = "| metric | class | trained on | tested on | mean over images | 95 % interval |\n|---|---|---|---|---|---|\n"
    return "## Scores\n\nOn micrographs that were not trained on.\n\n" + head + "".join(lines) + "\n"
