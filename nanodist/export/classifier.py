"""A fine-tuned classifier as one graph that others run without nanodist: pixels of a tile in, probabilities out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanodist.downstream.finetune.load import Loaded
from nanodist.encoders import Encoder
from nanodist.export.card import (
    CITATION,
    head_of,
    one_line,
    parity_table,
    pixel_size_note,
    recipe_block,
)
from nanodist.export.folder import made_whole, require_graphs, tell
from nanodist.export.loading import TITLES, loading_code
from nanodist.export.precision import require_half
from nanodist.export.weights import refuse_taken, tensors_of

_CARD = """---
license: {license}
pipeline_tag: image-classification
tags:
- nanodist
- electron-microscopy
---

# {name}

{licence}A classifier of grey-scale electron micrographs ({trunk}, one channel in), fine-tuned with nanodist {version}.
It tells {count} classes apart, in this order: {classes}.

## How to run it

`predict` takes a tile of {height} x {width} px, uint8 or uint16, as packing makes it: of each *micrograph* (not of each
tile) the 0.1 and 99.9 % quantiles become black and white where it is not 8 bit already. It gives a probability for each
class. For a larger micrograph, average over its tiles. Scaling, cropping, normalisation, trunk, head and the average
over {symmetries} rotations and reflections{scales} are inside; `model.json` names the classes for programs.
{pixel_size}

"""

_USE = """## Intended use and limits

For micrographs like those that it was trained on: of the same kind of specimen, contrast and magnification. It answers
with one of its classes whatever it is shown; `nanodist predict` also says how unlike the training an image is. Scores
are on micrographs that were not trained on; check it on labelled micrographs of your own. Not for medical diagnosis.

"""


class _Predictor(Encoder):
    """A classifier in the place of an encoder: what it "embeds" an image to are probabilities."""

    output = "probabilities"

    def __init__(self, loaded: Loaded, name: str) -> None:
        super().__init__(loaded.model.spec, loaded.model.trunk, name)
        self._model = loaded.model
        self.head = nn.Sequential(loaded.model.head, nn.Softmax(-1)).float().eval().requires_grad_(False)

    @torch.inference_mode()
    def embed_batch(self, images: Tensor) -> Tensor:
        """Probabilities (n, classes) of ``images`` (n, 1, H, W) in [0, 1]."""
        return self._model.looked_at(images)[0]


def export_classifier(
    loaded: Loaded,
    target: Path,
    formats: Sequence[str],
    name: str,
    card: Mapping[str, Any],
    precision: str = "fp32",
) -> dict[str, Any]:
    """Write a classifier in every format of ``formats`` to the folder ``target``, or nothing at all.

    Args:
        loaded: from :func:`nanodist.downstream.finetune.load.load_classifier`.
        target: a folder that does not exist yet, or is empty.
        formats: some of :data:`nanodist.export.folder.GRAPHS`.
        name: on the card.
        card: ``license``, ``data_note``, ``recipe`` and ``scores`` (rows of ``scores.json``), each of which may lack.
        precision: ``fp32`` or ``fp16``, which the trunk then computes in.

    Returns:
        The parity report, as in ``parity.json``: see :func:`nanodist.export.parity.compare`.

    Raises:
        UserError: a format that a classifier has not, or that needs what is not installed; ``target`` is taken or
            cannot be written; or what is loaded back gives other probabilities.
    """
    from nanodist.export.graph import ClassifierGraph, program, write_graphs
    from nanodist.export.parity import check

    wanted = require_graphs(formats, "a classifier", "its head is our own")
    refuse_taken(target)
    source = _Predictor(loaded, name)
    tensors = tensors_of(source)  # refuses weights that are not finite before any work
    if precision == "fp16":
        require_half(tensors, name)
    with made_whole(target) as folder:
        made, facts = program(source, precision, partial(ClassifierGraph, joined=loaded.model.joined))
        facts = {**facts, "classes": list(loaded.classes), "tile_px": list(loaded.tile_px)}
        write_graphs(made, facts, folder, wanted)
        parity = check(source, folder, wanted, bool(facts["any_size"]), precision)
        tell(folder, parity, _card(source, loaded, name, card, wanted, parity, target.name))
    return parity


def _card(
    source: Encoder,
    loaded: Loaded,
    name: str,
    card: Mapping[str, Any],
    formats: Sequence[str],
    parity: Mapping[str, Any],
    location: str,
) -> str:
    code = []
    for kind in formats:
        text = loading_code(source.spec, json.dumps(one_line(location))[1:-1], kind).replace("def embed", "def predict")
        code.append(f"### {TITLES[kind]}\n\n```python\n{text}```\n\n")
    head = _CARD.format(
        **head_of(card, name),
        trunk=source.spec.trunk,
        count=len(loaded.classes),
        classes=", ".join(f"`{one_line(one)}`" for one in loaded.classes),
        height=loaded.tile_px[0],
        width=loaded.tile_px[1],
        symmetries=source.spec.looks[0][2],
        scales=f", at {len(source.spec.looks)} scales," if len(source.spec.looks) > 1 else "",
        pixel_size=pixel_size_note(card),
    )
    return "".join([head, *code, parity_table(parity), _scores(card), _USE, recipe_block(card), CITATION])


def _scores(card: Mapping[str, Any]) -> str:
    rows = card.get("scores") or ()
    if not rows:
        return "## Scores\n\nNot measured.\n\n"
    lines = []
    for row in rows:
        cells = (row["labels_per_class"], row["n_train"], row["n_test"], f"{row['balanced_accuracy']:.3f}")
        lines.append(f"| {' | '.join(map(one_line, cells))} | {row['low']:.3f} to {row['high']:.3f} |\n")
    head = "| labels per class | trained on | tested on | balanced accuracy | 95 % interval |\n|---|---|---|---|---|\n"
    return "## Scores\n\nOn micrographs that were not trained on.\n\n" + head + "".join(lines) + "\n"
