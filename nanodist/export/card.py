"""The model card: what an encoder was trained on and how, and how others load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from nanodist._version import __version__
from nanodist.export.loading import TITLES, loading_code

if TYPE_CHECKING:
    from nanodist.encoders import EncoderSpec

UNSTATED = "unknown"  # the Hugging Face hub's word for a licence that nobody stated

OBJECTIVES = {"simclr": "SimCLR (NT-Xent)", "barlow_twins": "Barlow Twins"}

_HEADER = """---
library_name: timm
license: {license}
tags:
- timm
- nanodist
- electron-microscopy
- self-supervised
- feature-extraction
---

# {name}

"""

_WHAT = """A {architecture} trunk for grey-scale electron micrographs (one channel in), pretrained without labels by
{objective} with nanodist.

"""

_LOAD = """## How to load it

The trunk was built for one grey channel and trained on views of {size} x {size} px; `embed` gives {features} features
and is what every score in this card was measured with. It takes the pixels as they are in the file: no resizing to a
standard size, no conversion to 8 bit. Nothing here needs nanodist.

"""

_NOTES = {
    "timm": """**Write `pretrained=True`.** Without it timm builds the same architecture and *silently keeps random
weights*: no error, no warning, only useless features. For a classifier, `timm.create_model(..., pretrained=True,
num_classes=N)` adds a new, untrained layer. With nanodist installed, `nanodist.encoders.load_encoder(folder).embed`
does the same.
""",
    "huggingface": """`AutoModel` wraps the timm model of this folder (`pip install transformers timm`). Its image
processor resizes and crops, which the scores in this card were not measured with; use `embed`.
""",
    "torchvision": """The keys are torchvision's own. `torchvision/model_rgb.safetensors` fits its unchanged model of
three channels: leave out the line with `conv1` and call the model with the same grey image in all of them,
`x.expand(-1, 3, -1, -1)`; the features are the same. For a classifier keep the layer `fc` and load with
`strict=False`. Where there is no safetensors package, nanodist's guide to exports has a reader of ten lines.
""",
    "onnx": """One graph, opset {opset}: scaling, cropping, normalisation, trunk and pooling are inside. It takes
`images` (batch, 1, height, width), float32, black 0 and full scale 1, and gives `features` (batch, {features}).
{sizes} `onnx/model.json` says the same for programs.
""",
    "torch-export": """The whole of `embed` as a program of `torch.export`, with the input and output of
`torch-export/model.json`. {sizes}
""",
}

_USE = """## Intended use and limits

Features for classification, segmentation, retrieval and clustering of electron micrographs that resemble the training
data, after a check on labelled micrographs of your own instrument. The features know nothing of materials, voltages,
detectors or magnifications that the training data did not hold. Split your data by micrograph when you measure: crops
of one micrograph on both sides of a split make any score look better than it is. Not for medical diagnosis.

"""

CITATION = """## Citation

The workflow that nanodist implements at scale comes from:

- S. Lu, B. Montz, T. Emrick, A. Jayaraman, *Semi-supervised machine learning workflow for analysis of nanowire
  morphologies from transmission electron microscopy images*, Digital Discovery (2022), doi:10.1039/D2DD00066K
- S. Lu, A. Jayaraman, *Pair-Variational Autoencoders for Linking and Cross-Reconstruction of Characterization Data
  from Complementary Structural Characterization Techniques*, JACS Au (2023), doi:10.1021/jacsau.3c00275
"""


def facts(
    name: str,
    recipe: Mapping[str, Any],
    info: Mapping[str, Any],
    seen: Mapping[str, Any] | None,
    scores: Sequence[Mapping[str, Any]] = (),
    license_name: str = "",
    data_note: str = "",
    pixel_size_nm: Sequence[float] | None = None,
) -> dict[str, Any]:
    """What a card says, gathered from a run.

    Args:
        name: name of the run.
        recipe: the recipe as it ran.
        info: what ``run.json`` holds (fingerprint, starts).
        seen: what the encoder was pretrained on (store hash, step, seed).
        scores: ``summary`` rows of a probe's ``scores.json``.
        license_name: SPDX name of the licence of the weights.
        data_note: a sentence about the training data and its licence.
        pixel_size_nm: the least and the largest of the training data.
    """
    seen = seen or {}
    train = recipe.get("train") if isinstance(recipe.get("train"), Mapping) else {}
    batch = (train or {}).get("global_batch_size")
    starts = info.get("starts") or [{}]
    return {
        "name": name,
        "license": license_name,
        "data_note": data_note,
        "pixel_size_nm": pixel_size_nm,
        "objective": OBJECTIVES.get(objective_name(recipe), objective_name(recipe)),
        "step": seen.get("step"),
        "global_batch_size": batch,
        "seed": seen.get("seed", recipe.get("seed")),
        "manifest_hash": seen.get("manifest_hash"),
        "fingerprint": info.get("fingerprint"),
        "git_commit": starts[-1].get("git_commit"),
        "recipe": without_paths(dict(recipe)),
        "scores": [dict(row) for row in scores],
    }


def objective_name(recipe: Mapping[str, Any]) -> str:
    """The name of a recipe's objective."""
    section = recipe.get("objective")
    name = section.get("name") if isinstance(section, Mapping) else None
    return str(name) if name else "self-supervision"


def without_paths(value: Any) -> Any:
    """``value`` with every absolute path cut to its last part: a published card tells nothing about a machine."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str):
        for path in (PurePosixPath(value), PureWindowsPath(value)):
            if path.is_absolute():
                return path.name
    return value


def render(
    card: Mapping[str, Any],
    spec: EncoderSpec,
    features: int,
    location: str,
    formats: Sequence[str] = ("timm",),
    graph: Mapping[str, Any] | None = None,
    parity: Mapping[str, Any] | None = None,
) -> str:
    """The card as Markdown with the front matter of the Hugging Face hub.

    Args:
        card: what :func:`facts` returns; a missing fact is left out, a missing licence is said.
        spec: how the encoder reads an image.
        features: length of an embedding.
        location: name of the folder, for the code that loads it.
        formats: what is in the folder.
        graph: what :func:`nanodist.export.graph.describe` says, where there is a graph.
        parity: what :func:`nanodist.export.parity.check` found.
    """
    name = one_line(card.get("name") or "encoder")
    objective = one_line(card.get("objective") or "self-supervision")
    license_name = json.dumps(str(card.get("license") or UNSTATED).lower())
    precision = str((parity or {}).get("precision", "fp32"))
    parts = [
        _HEADER.format(license=license_name, name=name),
        licence_note(card),
        _WHAT.format(architecture=spec.trunk, objective=objective),
        _LOAD.format(size=spec.image_size, features=features),
        *(_loading(kind, spec, features, location, graph or {}, precision) for kind in formats),
        parity_table(parity),
        _training(card),
        f"{pixel_size_note(card)}\n\n",
        _scores(card),
        _USE,
        recipe_block(card),
        CITATION,
    ]
    return "".join(parts)


def _loading(
    kind: str, spec: EncoderSpec, features: int, location: str, graph: Mapping[str, Any], precision: str
) -> str:
    code = loading_code(spec, json.dumps(one_line(location))[1:-1], kind, precision)
    note = _NOTES[kind].format(features=features, sizes=graph.get("sizes", ""), opset=graph.get("opset", ""))
    return f"### {TITLES[kind]}\n\n```python\n{code}```\n\n{note}\n"


def libraries_of(row: Mapping[str, Any]) -> str:
    """The libraries, with their versions, that a row of the parity report was loaded with."""
    return ", ".join(f"{name} {version}" for name, version in row["loaded_with"].items())


def parity_table(parity: Mapping[str, Any] | None) -> str:
    """The table of differences between the run and what others load, from image files on."""
    if not parity:
        return ""
    lines = []
    for row in parity["formats"]:
        sizes = ", ".join(f"{width} x {height} {kind}" for height, width, kind in row["images"])
        lines.append(f"| {row['format']} | {libraries_of(row)} | {sizes} | {row['relative_difference']:.1e} |\n")
    rows = {row["format"]: row["loaded_with"] for row in parity["formats"]}
    note, half = "", ""
    if parity.get("precision") == "fp16":
        half = " The weights of this folder are rounded to fp16; the run is float32."
    if "huggingface" in rows and "transformers" not in rows["huggingface"]:
        note = "transformers was not installed there: its row is from the same files by timm, which it wraps.\n\n"
    return (
        "## Parity\n\nThe code above was run in a process without nanodist, on image files, before this folder got its "
        f"name. Largest difference from the run's own answers, relative to the largest; more than "
        f"{parity['tolerance']:.0e} would have been refused.{half}\n\n"
        "| format | loaded with | images (px) | difference |\n|---|---|---|---|\n" + "".join(lines) + "\n" + note
    )


# "NC" of the Creative Commons, and the words.
_NON_COMMERCIAL = re.compile(r"\bNC\b|non-?\s?commercial", re.IGNORECASE)


def pixel_size_note(card: Mapping[str, Any]) -> str:
    """A sentence on the pixel sizes that were trained on."""
    known = card.get("pixel_size_nm")
    if not known:
        return "The pixel size of the training data was not stated."
    low, high = known
    span = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    return f"It was trained at a pixel size of {span} nm; bring micrographs of another to it first."


def licence_note(card: Mapping[str, Any]) -> str:
    """What has to be said at the top where a licence is not known, or forbids commercial use."""
    lines = []
    for what, text in (("These weights are", card.get("license")), ("The training data are", card.get("data_note"))):
        if _NON_COMMERCIAL.search(str(text or "")):
            lines.append(f"**{what} for non-commercial use only**: {one_line(text)}")
    if not card.get("license"):
        lines.append(
            "**No licence was stated for these weights**: ask whoever gave them to you before you pass them on."
        )
    if not card.get("data_note"):
        lines.append("**The training data's origin and licence were not stated** by whoever exported this.")
    return "".join(f"> {line}\n\n" for line in lines)


def head_of(card: Mapping[str, Any], name: str) -> dict[str, str]:
    """What the head of every card that is no encoder's begins with."""
    return {
        "license": json.dumps(str(card.get("license") or UNSTATED).lower()),
        "name": one_line(name),
        "licence": licence_note(card),
        "version": __version__,
    }


def interval(row: Mapping[str, Any], digits: str = ".3f") -> str:
    """The interval of a row of scores; empty where it has none."""
    low, high = row.get("low"), row.get("high")
    return "" if low is None or high is None else f"{low:{digits}} to {high:{digits}}"


def _training(card: Mapping[str, Any]) -> str:
    rows = [
        ("Training data", card.get("data_note")),
        ("Store (hash of its manifest)", card.get("manifest_hash")),
        ("Objective", card.get("objective")),
        ("Steps", card.get("step")),
        ("Global batch", card.get("global_batch_size")),
        ("Samples seen", _product(card.get("step"), card.get("global_batch_size"))),
        ("Seed", card.get("seed")),
        ("Fingerprint of the recipe", card.get("fingerprint")),
        ("Source revision", card.get("git_commit")),
        ("nanodist", __version__),
    ]
    lines = [f"| {label} | {one_line(value)} |" for label, value in rows if value not in (None, "")]
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(lines) + "\n\n"


def _scores(card: Mapping[str, Any]) -> str:
    rows = [row for row in card.get("scores") or () if row.get("mean") is not None]
    if not rows:
        return "## Scores\n\nNot measured: `nanodist probe` measures the frozen features on labelled data.\n\n"
    head = "| encoder | method | labels per class | balanced accuracy | interval |\n|---|---|---|---|---|\n"
    lines = []
    for row in rows:
        name = str(row.get("encoder")) + {True: " \\*", None: " ?"}.get(row.get("transductive", False), "")
        cells = (name, row.get("method"), row.get("labels_per_class"), f"{row['mean']:.3f}", interval(row))
        lines.append("| " + " | ".join(one_line(cell) for cell in cells) + " |\n")
    notes = ""
    if any(row.get("transductive") for row in rows):
        notes += "\n\\* Transductive: pretraining saw the test micrographs, without their labels.\n"
    if any(row.get("transductive", False) is None for row in rows):
        notes += "\n? It is not known whether pretraining saw the test micrographs.\n"
    return "## Scores\n\nFrozen features, split by micrograph.\n\n" + head + "".join(lines) + notes + "\n"


def recipe_block(card: Mapping[str, Any]) -> str:
    """The recipe as it ran."""
    import yaml

    if not card.get("recipe"):
        return ""
    text = yaml.safe_dump(card["recipe"], sort_keys=False, allow_unicode=True).replace("```", "'''")
    return f"## Recipe\n\n```yaml\n{text}```\n\n"


def _product(a: Any, b: Any) -> int | None:
    return a * b if isinstance(a, int) and isinstance(b, int) else None


def one_line(value: Any) -> str:
    """One line of Markdown text: no line break, no table separator, no markup from a name."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
