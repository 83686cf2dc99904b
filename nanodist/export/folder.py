"""An encoder in several formats in one folder, each checked in a process without nanodist before any is there."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hpc import atomic
from hpc.errors import UserError
from nanodist.export.card import render
from nanodist.export.loading import FORMATS
from nanodist.export.precision import require_half
from nanodist.export.weights import features_of, refuse_taken, tensors_of, write_timm

if TYPE_CHECKING:
    from nanodist.encoders import Encoder

# The formats of what no foreign library knows as a model.
GRAPHS = ("onnx", "torch-export")
# What a format needs beyond a plain install.
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torchvision": ("torchvision",)}


def export(
    encoder: Encoder, target: Path, card: dict[str, Any], formats: Sequence[str], precision: str = "fp32"
) -> dict[str, Any]:
    """Write ``encoder`` in every format of ``formats`` to the folder ``target``, or nothing at all.

    ``README.md`` (the model card) and ``parity.json`` lie at the top, as do the files of ``timm`` and ``huggingface``,
    which are the same; ``torchvision``, ``onnx`` and ``torch-export`` have a folder each.

    Args:
        encoder: what to export.
        target: a folder that does not exist yet, or is empty.
        card: facts for the model card, as :func:`nanodist.export.card.facts` collects them.
        formats: some of :data:`nanodist.export.loading.FORMATS`.
        precision: ``fp32`` or ``fp16``. In fp16 weights are rounded; graphs compute their trunk in it too.

    Returns:
        The parity report, as in ``parity.json``: see :func:`nanodist.export.parity.compare`.

    Raises:
        UserError: a format is unknown, needs what is not installed or does not suit the trunk; ``target`` is taken or
            cannot be written; the weights are not finite; or what is loaded back gives other features.
    """
    from nanodist.export.parity import check

    wanted = require(formats)
    target = Path(target)
    refuse_taken(target)
    source = _on_cpu(encoder)
    tensors = tensors_of(source)  # refuses weights that are not finite before any work
    if precision == "fp16":
        require_half(tensors, source.name)
    if "torchvision" in wanted:
        from nanodist.export.twin import require_twin

        require_twin(source)
    with made_whole(target) as folder:
        graph = _write(source, folder, card, wanted, precision)
        parity = check(source, folder, wanted, bool(graph and graph["any_size"]), precision)
        text = render(card, source.spec, features_of(source), target.name, wanted, graph, parity)
        tell(folder, parity, text)
    return parity


@contextlib.contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """A folder that gets its name ``target`` once all that is written in it is there.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with atomic.directory(target) as folder:
            yield folder
    except OSError as error:
        raise UserError(f"The export cannot be written to {target}: {error}.") from error


def tell(folder: Path, parity: dict[str, Any], card: str) -> None:
    """Write the parity report and the model card of an export."""
    atomic.write_json(folder / "parity.json", parity)
    atomic.write_text(folder / "README.md", card)


def require_graphs(formats: Sequence[str], what: str, why: str) -> list[str]:
    """As :func:`require`, for ``what`` has only graphs, since ``why``."""
    wrong = [name for name in formats if name not in GRAPHS]
    if wrong:
        raise UserError(f"{what} is exported as {' or '.join(GRAPHS)}, not as {wrong[0]}: {why}")
    return require(formats)


def require(formats: Sequence[str]) -> list[str]:
    """``formats`` without repetitions, in the order of a card.

    Raises:
        UserError: one does not exist, or needs what is not installed.
    """
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--format {name!r} does not exist; allowed: {', '.join(FORMATS)}.")
    if not formats:
        raise UserError(f"--format names no format; allowed: {', '.join(FORMATS)}.")
    wanted = [name for name in FORMATS if name in formats]
    for name in wanted:
        missing = [package for package in NEEDS.get(name, ()) if not _installed(package)]
        if missing:
            raise UserError(f"--format {name} needs {', '.join(missing)}: pip install 'nanodist[export]'")
    return wanted


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module that was imported without a spec, or blocked
        return False


def _on_cpu(encoder: Encoder) -> Encoder:
    from nanodist.encoders import Encoder

    trunk = copy.deepcopy(encoder.trunk).to("cpu", torch.float32)
    return Encoder(encoder.spec, trunk, encoder.name, encoder.seen)


def _write(
    encoder: Encoder, folder: Path, card: dict[str, Any], formats: list[str], precision: str
) -> dict[str, Any] | None:
    """Every format's files, and what :func:`nanodist.export.graph.describe` says where there is a graph."""
    if "timm" in formats or "huggingface" in formats:
        write_timm(encoder, folder, card, precision)
    if "torchvision" in formats:
        from nanodist.export.twin import write_torchvision

        write_torchvision(encoder, folder, precision)
    if "onnx" not in formats and "torch-export" not in formats:
        return None
    from nanodist.export.graph import program, write_graphs

    made, facts = program(encoder, precision)
    write_graphs(made, facts, folder, formats)
    return facts
