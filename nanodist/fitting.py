"""Models for weights out of files that others made: what a file claims is checked before memory is taken for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hpc.errors import UserError

M = TypeVar("M", bound=nn.Module)
# What values of the wrong kind in a file that others wrote may raise.
DAMAGED = (KeyError, ValueError, TypeError, AttributeError, RuntimeError)
# Larger than any option of a trunk that somebody trains, such as channels, depth or image side in pixels.
MOST = 65536
# Arguments of timm.create_model that load files or fetch them.
FETCHING = {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


def refuse_options(options: dict[str, Any], where: str | Path) -> None:
    """Raise ``UserError`` where ``options`` of a trunk, out of the file ``where``, load other files or are gigantic."""
    fetching = sorted(FETCHING & options.keys())
    if fetching:
        raise UserError(
            f"{where}: trunk option '{fetching[0]}' is not allowed in a file of weights, as it loads others"
        )
    for name, value in options.items():
        if not _bounded(value):
            raise UserError(f"{where}: trunk option '{name}' is larger than anything that is trained (over {MOST})")


def _bounded(value: Any) -> bool:
    if isinstance(value, Mapping | list | tuple):
        parts = [*value.values()] if isinstance(value, Mapping) else value
        return len(parts) <= MOST and all(map(_bounded, parts))
    return not isinstance(value, int | float) or abs(value) <= MOST


def fitting(make: Callable[[], M], weights: Mapping[str, Tensor], where: str | Path, what: str = "the model") -> M:
    """The model that ``make`` gives, with ``weights`` in it.

    It is made without memory first, so that a file cannot ask for more than its weights take.

    Args:
        make: builds the model on torch's default device.
        weights: by name, all of them.
        where: the file or folder that describes the model.
        what: how errors call the model.

    Raises:
        UserError: a weight is missing, is too much or has another shape; the text names the first.
    """
    _refuse_misfit(make, weights, f"{where}: the weights do not fit {what}")
    model = make()
    model.load_state_dict(dict(weights))
    return model


def _refuse_misfit(make: Callable[[], nn.Module], weights: Mapping[str, Tensor], said: str) -> None:
    try:
        with torch.device("meta"):
            wanted = make().state_dict()
    except (UserError, RuntimeError, NotImplementedError) as error:
        if "meta" in str(error):  # something of it computes while it is built, and shows when it is built
            return
        raise
    for name in [*(wanted.keys() - weights.keys()), *(weights.keys() - wanted.keys())]:
        raise UserError(f"{said} (first mismatch: {name})")
    for name, value in wanted.items():
        if value.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, and not {tuple(value.shape)}"
            raise UserError(f"{said} ({name} is {shapes})")
