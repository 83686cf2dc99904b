"""From pixels to features as one graph: a program of torch.export, and ONNX made of it."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hpc import atomic
from hpc.errors import UserError
from nanodist.encoders import normalise, pooled_features, resized
from nanodist.export.precision import DTYPES

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from nanodist.encoders import Encoder

# Resize with antialiasing needs 18; 20 is what torch's exporter writes without converting down.
OPSET = 20
INPUT = "images"


class Graph(nn.Module):
    """:meth:`nanodist.encoders.Encoder.embed_batch` without what ties a trace to one image size.

    Args:
        encoder: its trunk must be on the CPU.
        fixed: the trunk takes one size only, so that what a look cuts out has that very size.
        dtype: of the trunk and what it computes in; pixels, their preparation and the head stay float32.
    """

    def __init__(self, encoder: Encoder, fixed: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        trunk = encoder.trunk if dtype == torch.float32 else copy.deepcopy(encoder.trunk).to(dtype)
        self.trunk, self.head, self.spec, self.fixed, self.dtype = trunk, encoder.head, encoder.spec, fixed, dtype

    def forward(self, images: Tensor) -> Tensor:
        """Features (n, d) of ``images`` (n, 1, H, W) in [0, 1]."""
        return torch.cat([self._look(images, *look) for look in self.spec.looks], dim=1)

    def _look(self, images: Tensor, scale: float, crop_px: int, symmetries: int) -> Tensor:
        images = self._seen(images, scale, crop_px)
        turned = [self.head(self._turned(images, symmetries, quarter)).sum(0) for quarter in range(min(2, symmetries))]
        return torch.stack(turned).sum(0) / symmetries

    def _seen(self, images: Tensor, scale: float, crop_px: int) -> Tensor:
        if crop_px:
            images = self._central(self._central(images, -2, crop_px), -1, crop_px)
        return normalise(_resized(images, scale), self.spec)

    def _turned(self, images: Tensor, symmetries: int, quarter: int) -> Tensor:
        """Features (k, n, d) by the k symmetries that turn by an even (0) or odd (1) number of quarters.

        These have one shape and go through the trunk as one batch, or a graph would hold up to eight copies of it.
        """
        chosen = [i for i in range(symmetries) if i % 2 == quarter]
        turned = [torch.rot90(images.flip(-1) if i >= 4 else images, i % 4, dims=(-2, -1)) for i in chosen]
        pooled = pooled_features(self.trunk, torch.cat(turned).to(self.dtype), self.spec.pooling)
        return pooled.float().unflatten(0, (len(chosen), images.shape[0]))

    def _central(self, images: Tensor, dim: int, crop_px: int) -> Tensor:
        extent = images.shape[dim]
        if self.fixed:
            return images.narrow(dim, (extent - crop_px) // 2, crop_px)
        # By index, since a slice that may be the whole image makes torch.export guard on whether it is.
        first = torch.sym_max(0, (extent - crop_px) // 2)
        return images.index_select(dim, torch.arange(torch.sym_min(extent, crop_px)) + first)


class ClassifierGraph(Graph):
    """The probabilities of :meth:`nanodist.downstream.finetune.model.Classifier.looked_at`, likewise.

    Args:
        encoder: its head ends in a softmax, and all its looks have as many symmetries.
        joined: the head sees the features of all looks at once; else the probabilities of the looks are averaged.
        fixed, dtype: as :class:`Graph` has them.
    """

    def __init__(self, encoder: Encoder, fixed: bool, dtype: torch.dtype, *, joined: bool) -> None:
        super().__init__(encoder, fixed, dtype)
        self.joined = joined

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities (n, classes) of ``images`` (n, 1, H, W) in [0, 1]."""
        looks, count = self.spec.looks, self.spec.looks[0][2]
        seen = [self._seen(images, scale, crop_px) for scale, crop_px, _ in looks]
        sums = []
        for quarter in range(min(2, count)):
            features = [self._turned(one, count, quarter) for one in seen]
            features = [torch.cat(features, -1)] if self.joined else features
            sums += [self.head(one).sum(0) for one in features]
        return torch.stack(sums).sum(0) / (count if self.joined else count * len(looks))


def _resized(images: Tensor, scale: float) -> Tensor:
    """:func:`nanodist.encoders.resized` with sizes in integers where those are exact.

    torch.export cannot bound sizes that went through a float (2.15: "cannot determine truth value of Relational").
    """
    while scale <= 0.5:
        images, scale = nn.functional.avg_pool2d(images, 2), 2 * scale
    numerator, denominator = scale.as_integer_ratio()
    if numerator == denominator or denominator > 1024:
        return resized(images, scale)
    size = [extent * numerator // denominator for extent in images.shape[-2:]]
    return nn.functional.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)


def accepts(encoder: Encoder, height: int, width: int) -> bool:
    """Whether the encoder embeds images of this size."""
    try:
        encoder.embed_batch(torch.zeros(1, 1, height, width))
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def _takes_one_size(encoder: Encoder) -> bool:
    size = encoder.spec.image_size
    try:
        with torch.inference_mode():
            encoder.trunk(torch.zeros(1, 1, 2 * size, 3 * size))
    except (RuntimeError, AssertionError, ValueError):
        return True
    return False


def smallest_side(encoder: Encoder) -> int:
    """Side in px of the smallest square that a trunk accepts that takes the size of its views only."""
    return max([crop or round(encoder.spec.image_size / scale) for scale, crop, _ in encoder.spec.looks])


def program(
    encoder: Encoder, precision: str = "fp32", make: Callable[[Encoder, bool, torch.dtype], Graph] = Graph
) -> tuple[ExportedProgram, dict[str, Any]]:
    """The encoder as a program, for any batch and any image size that the trunk takes; and what to say of it.

    Args:
        encoder: on the CPU, in float32.
        precision: of the trunk in the program, a key of :data:`nanodist.export.precision.DTYPES`.
        make: from the encoder, whether its trunk takes one size only, and the type that this computes in, the module
            that is traced.

    Raises:
        UserError: torch.export cannot trace the trunk.
    """
    from torch.export import Dim

    side = smallest_side(encoder)
    one_size = _takes_one_size(encoder)
    any_size = accepts(encoder, 3 * side, 2 * side)
    # Multiples of the view, which suit the patches of transformers too, and not square.
    example = torch.zeros(2, 1, 3 * side, 2 * side) if any_size else torch.zeros(2, 1, side, side)
    dims = {0: Dim("batch", min=1), **({2: Dim.AUTO, 3: Dim.AUTO} if any_size else {})}
    made = traced(make(encoder, one_size, DTYPES[precision]).eval(), (example,), (dims,), encoder.spec.trunk)
    return made, {**describe(encoder, one_size, any_size, side), "precision": precision}


def traced(graph: nn.Module, examples: tuple[Tensor, ...], dims: tuple[dict[int, Any], ...], what: str) -> Any:
    """The program, with as few demands on the sizes as torch can do without.

    Raises:
        UserError: torch.export cannot trace it; ``what`` names it.
    """
    from torch.export import export

    # The second attempt refuses images whose last feature map is one pixel. It is for scales that are no short binary
    # fraction: see _resized.
    for any_small_size in (True, False):
        try:
            with _quiet(), _sizes_of_one() if any_small_size else contextlib.nullcontext():
                made = export(
                    graph,
                    examples,
                    dynamic_shapes=dims,
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=True,
                )
            return _of_one_too(made)
        except Exception as error:  # torch.export raises whatever the tracer met
            reason = error
    text = " ".join(str(reason).split())[:200]
    raise UserError(f"torch.export cannot trace {what}, so there is no graph of it: {text}") from reason


def _of_one_too(made: Any) -> Any:
    """Without the demands that a size is not 1, which two inputs of one batch bring: no value depends on them."""
    for node in list(made.graph.nodes):
        asserts = node.target is torch.ops.aten._assert_scalar.default
        if asserts and getattr(node.args[0], "target", None) is torch.sym_not:
            made.graph.erase_node(node)
    made.graph.eliminate_dead_code()
    made.graph_module.recompile()
    return made


def describe(encoder: Encoder, one_size: bool, any_size: bool, side: int) -> dict[str, Any]:
    """What a program must know beside the graph: input, output, preprocessing that is inside, and legal sizes."""
    if not any_size:
        sizes = f"Images are {side} x {side} px: the trunk takes no other size."
    elif one_size:
        sizes = f"Batch and image size are free, from {side} x {side} px: the trunk takes no smaller part."
    else:
        sizes = "Batch and image size are free."
    spec = encoder.spec
    return {
        "schema": 1,
        "input": {"name": INPUT, "shape": ["batch", 1, *(["height", "width"] if any_size else [side, side])]},
        "input_type": "float32",
        "input_scale": "pixel / largest value of its type (255 or 65535)",
        "output": {"name": encoder.output, "type": "float32"},
        "inside": {
            "looks (scale, crop_px, symmetries)": [list(look) for look in spec.looks],
            "normalise": spec.normalise,
            "mean": spec.mean if spec.normalise == "store" else None,
            "std": spec.std if spec.normalise == "store" else None,
            "pooling": spec.pooling,
        },
        "any_size": any_size,
        "sizes": sizes,
        "opset": OPSET,
    }


def write_graphs(
    made: ExportedProgram, facts: dict[str, Any], folder: Path, formats: Sequence[str], stem: str = "model"
) -> None:
    """Write a program in those of ``formats`` that are graphs; arguments as :func:`write_onnx` has them."""
    # In this order, as the conversion to ONNX changes the program.
    if "torch-export" in formats:
        write_torch_export(made, facts, folder, stem)
    if "onnx" in formats:
        write_onnx(made, facts, folder, stem)


def write_torch_export(made: ExportedProgram, facts: dict[str, Any], folder: Path, stem: str = "model") -> None:
    """Write ``torch-export/model.pt2`` and ``model.json``, under another ``stem`` where there are several."""
    (folder / "torch-export").mkdir(exist_ok=True)
    with _quiet():
        torch.export.save(made, folder / "torch-export" / f"{stem}.pt2")
    told = {k: v for k, v in facts.items() if k != "opset"}
    atomic.write_json(folder / "torch-export" / f"{stem}.json", told)


def write_onnx(made: ExportedProgram, facts: dict[str, Any], folder: Path, stem: str = "model") -> None:
    """Write ``onnx/model.onnx`` (weights inside, below 2 GB) and ``model.json``; after ``.pt2``, as this changes
    the program.

    Args:
        made: from :func:`traced`.
        facts: ``input`` or ``inputs`` with names and shapes, ``output`` or ``outputs`` with names, ``sizes``.
        folder: of the export.
        stem: name of the files.

    Raises:
        UserError: an operation has no counterpart in ONNX.
    """
    import onnx

    (folder / "onnx").mkdir(exist_ok=True)
    inputs = facts.get("inputs") or [facts["input"]]
    try:
        with _quiet():
            converted = torch.onnx.export(
                made,
                dynamo=True,
                opset_version=OPSET,
                input_names=[one["name"] for one in inputs],
                output_names=[one["name"] for one in facts.get("outputs") or [facts["output"]]],
                external_data=False,
                verbose=False,
            )
            assert converted is not None  # only without dynamo
            proto = converted.model_proto
    except Exception as error:  # the converter's errors have no common class
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"torch.onnx cannot convert the model: {reason}; leave onnx out of --format.") from error
    _name_sizes(proto, [one["shape"] for one in inputs])
    proto.doc_string = facts["sizes"]
    onnx.checker.check_model(proto, full_check=True)
    onnx.save_model(proto, str(folder / "onnx" / f"{stem}.onnx"))
    atomic.write_json(folder / "onnx" / f"{stem}.json", facts)


def _name_sizes(proto: Any, shapes: list[list[Any]]) -> None:
    """Call the free sizes batch, height and width, as ``shapes`` of the inputs do, in place of the tracer's symbols."""
    words = {}
    for value, shape in zip(proto.graph.input, shapes, strict=True):
        for dim, word in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            if dim.dim_param and isinstance(word, str):
                words[dim.dim_param] = word
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda found: words.get(found[0], found[0]), dim.dim_param)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings and log lines, which tell a user nothing to act on."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _sizes_of_one() -> contextlib.AbstractContextManager[Any]:
    """Do not trace as if no size could be 1: a small image has a last feature map of one pixel."""
    try:
        from torch.fx.experimental import _config

        return _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    except (ImportError, AttributeError):  # a torch without it guards on such sizes, and says so when it meets one
        return contextlib.nullcontext()
