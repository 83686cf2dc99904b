"""What a pretraining will take of memory and disk, from its recipe alone.

The trunk is made on torch's meta device, where tensors have shapes and no contents, and run on it once, so that this
takes a fraction of a second for any model. What autograd keeps is counted, not guessed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpc.errors import UserError
from nanodist.encoders import create_trunk, output_width
from nanodist.heads import build_projector
from nanodist.pretrain.recipe import PretrainRecipe

# Tensors of the size of the weights that an optimizer keeps.
_SLOTS = {"adamw": 2, "lamb": 2, "sgd": 1, "lars": 1}
_SAMPLES = 2
_FILES_A_CHECKPOINT = 5  # with its folder


@dataclass(frozen=True)
class Size:
    """What a model is: numbers of weights and of buffer elements, and bytes that backward keeps of one view.

    ``unknown`` says why the latter could not be counted and are 0.
    """

    parameters: int
    buffers: int
    view_bytes: int
    unknown: str = ""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: ``states`` (weights, gradients, optimizer) are certain, ``activations`` an estimate."""

    states: int
    activations: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.states + self.activations


def model_size(recipe: PretrainRecipe) -> Size:
    """Count the model of a recipe.

    Raises:
        UserError: timm cannot make the trunk, or it does not take views of the recipe's size.
    """
    with torch.device("meta"):
        trunk = create_trunk(recipe.encoder.trunk, 0, **recipe.encoder.trunk_options)
        projector = build_projector(output_width(trunk, recipe.views.size_px), recipe.projector, 0)
    model = nn.Sequential(trunk, projector)
    if recipe.encoder.checkpointing and hasattr(trunk, "set_grad_checkpointing"):
        trunk.set_grad_checkpointing(True)  # type: ignore[operator]
    counts = sum(p.numel() for p in model.parameters()), sum(b.numel() for b in model.buffers())
    try:
        return Size(*counts, _kept_bytes(model, recipe.views.size_px) // _SAMPLES)
    except AssertionError as error:  # how timm's trunks refuse a size
        side = recipe.views.size_px
        raise UserError(
            f"trunk '{recipe.encoder.trunk}' does not take views.size_px={side} ({_line(error)}); change it, or give "
            f"encoder.trunk_options={{img_size: {side}}} where the trunk has a fixed size"
        ) from None
    except (RuntimeError, TypeError, ValueError) as error:
        # An operation that the meta device lacks says nothing about a real one.
        return Size(*counts, 0, _line(error))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _kept_bytes(model: nn.Module, side: int) -> int:
    """Bytes that autograd keeps of ``_SAMPLES`` views, without the weights."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no storage is freed and its number given to another

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.empty(_SAMPLES, 1, side, side, device="meta"))
    return sum(kept.values())


def optimizer_slots(recipe: PretrainRecipe) -> int:
    """Tensors of the size of the weights that the optimizer keeps."""
    momentum = recipe.optimizer.momentum
    return 0 if recipe.optimizer.name == "sgd" and not momentum else _SLOTS.get(recipe.optimizer.name, 2)


def memory(recipe: PretrainRecipe, size: Size, world_size: int, micro_batches: int) -> Memory:
    """Predicted bytes of a rank at the end of the forward, where they are most.

    Not counted: the framework itself (0.5 GiB or so), workspaces of convolutions, fragmentation.
    """
    width = 8 if recipe.train.precision == "fp64" else 4
    stage, weights = recipe.engine.zero_stage, size.parameters * width
    gradients = weights // world_size if stage == 2 else weights
    optimizer = optimizer_slots(recipe) * weights
    if stage:
        # The optimizer's copy of the weights is one more, as are the buffers that partitions are gathered in.
        optimizer = (optimizer + weights) // world_size + weights
    samples = recipe.train.global_batch_size // (world_size * micro_batches)
    share = {"fp32": 1.0, "bf16": 0.5, "fp64": 2.0}[recipe.train.precision]
    pixels = 2 * recipe.train.global_batch_size // world_size * recipe.views.size_px**2 * 4
    return Memory(weights + gradients + optimizer, round(2 * samples * size.view_bytes * share) + pixels)


@dataclass(frozen=True)
class Disk:
    """Bytes of one checkpoint, the most that lie there at a time, and files and folders of these."""

    checkpoint: int
    most: int
    files: int


def disk(recipe: PretrainRecipe, size: Size, steps: int) -> Disk:
    """What the checkpoints of a run of ``steps`` take; while one is written, those to be deleted are still there."""
    width = 8 if recipe.train.precision == "fp64" else 4
    one = (size.parameters * (1 + optimizer_slots(recipe)) + size.buffers) * width
    saving = recipe.checkpoint
    for_good = steps // saving.keep_every_steps if saving.keep_every_steps else 0
    made = -(-steps // saving.every_steps)
    count = min(saving.keep + saving.keep_best + for_good + 1, made)
    return Disk(one, count * one, count * _FILES_A_CHECKPOINT + 20)
