"""Weights that others published as one file: a state dict of a timm or torchvision model, on this machine.

No file is unpickled: ``.safetensors`` is read as such, anything else by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from timm.models import adapt_input_conv, load_state_dict
from torch import Tensor, nn

from hpc.errors import UserError
from nanodist.fitting import DAMAGED, fitting

_UNREADABLE = (*DAMAGED, OSError, AssertionError, EOFError, pickle.UnpicklingError, SafetensorError)


def trunk_from_file(name: str, path: Path, make: Callable[[], nn.Module]) -> nn.Module:
    """The trunk that ``make`` gives, with the weights of a file.

    What the file's classifier learned is left out, and a first convolution of colours is summed over them, which gives
    what three equal channels would.

    Args:
        name: timm model name, which says what of the file is the classifier and the first convolution.
        path: ``.safetensors``, ``.pth``, ``.pt`` or ``.bin``; torchvision's names of ResNets are timm's.
        make: the trunk with one input channel and no classifier.

    Raises:
        UserError: there is no such file, it is damaged, or it is of another model.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights (of timm:{name}@FILE)")
    try:
        weights = load_state_dict(str(path), weights_only=True)
        if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError("it holds no weights by name")
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read as weights: {reason or type(error).__name__}") from None
    return fitting(make, _one_channel(name, weights, make), path, f"timm's '{name}'")


def _one_channel(name: str, weights: Mapping[str, Tensor], make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """``weights`` under the names, and with the channels, of a trunk."""
    card = timm.get_pretrained_cfg(name)  # None where timm publishes no weights under the name
    heads = tuple(f"{head}." for head in _names(getattr(card, "classifier", None)))
    found = {key: value for key, value in weights.items() if not key.startswith(heads)}
    with torch.device("meta"):
        wanted = make().state_dict()
    for key in (f"{first}.weight" for first in _names(getattr(card, "first_conv", None))):
        if key in found and found[key].ndim == 4 and key in wanted and found[key].shape[1] != wanted[key].shape[1]:
            found[key] = adapt_input_conv(wanted[key].shape[1], found[key])
    # Counters that no forward uses; files of older versions of torch have none.
    counters = {key for key in wanted.keys() - found.keys() if key.endswith("num_batches_tracked")}
    return found | {key: torch.zeros((), dtype=torch.int64) for key in counters}


def _names(value: object) -> tuple[str, ...]:
    """Names of parts of a model in timm's card, which has one, several or none."""
    if isinstance(value, str):
        return (value,)
    return tuple(map(str, value)) if isinstance(value, tuple | list) else ()
