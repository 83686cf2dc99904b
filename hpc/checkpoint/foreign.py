"""Weights from DeepSpeed's own checkpoints, which are pickles: loading one may run whatever code it carries."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc.errors import UserError

_SHARD = "mp_rank_{:02d}_model_states.pt"


def read_deepspeed(path: str | Path, trust: bool = False) -> dict[str, Tensor]:
    """The module's weights and buffers by name, on the CPU, floating ones as float32.

    Torch's restricted reader is tried first; where it suffices, nothing has to be trusted.

    Args:
        path: a folder that DeepSpeed's ``save_checkpoint`` wrote (with the file ``latest``), one of its tags, or a
            file ``mp_rank_00_model_states.pt``.
        trust: unpickle what the restricted reader refuses, which runs the code in it.

    Raises:
        UserError: nothing of that kind is there; the model is in parts (model parallelism, ZeRO 3); or the file holds
            more than tensors and ``trust`` is false.
    """
    file = model_states(Path(path))
    content = _load(file, trust)
    module = content.get("module") if isinstance(content, Mapping) else None
    if not isinstance(module, Mapping) or not module or not all(torch.is_tensor(t) for t in module.values()):
        raise UserError(f"{file} holds no weights by name under 'module'; is it a DeepSpeed checkpoint?")
    return {str(name): _plain(tensor) for name, tensor in module.items()}


def model_states(path: Path) -> Path:
    """The one file with the module's weights of a DeepSpeed checkpoint.

    Raises:
        UserError: there is none, or the model is in parts.
    """
    if path.is_file() and path.name != "latest":
        return path
    folder = _tag(path.parent if path.is_file() else path)
    if list(folder.glob("zero_pp_rank_*_model_states.pt")):
        raise UserError(f"{folder} was saved at ZeRO stage 3, in parts; join them with its own zero_to_fp32.py first")
    if (folder / _SHARD.format(1)).exists():
        raise UserError(f"{folder} was saved with model parallelism, in parts, which is not read here")
    file = folder / _SHARD.format(0)
    if not file.is_file():
        raise UserError(f"{folder} is no DeepSpeed checkpoint: it has no {file.name}")
    return file


def _tag(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path} is not there")
    pointer = path / "latest"
    if not pointer.is_file():
        return path
    tag = pointer.read_text(errors="replace").strip()
    # The file is somebody else's, and must not lead out of the folder.
    if tag in ("", ".", "..") or Path(tag).name != tag or not (path / tag).is_dir():
        raise UserError(f"{pointer} names {tag!r}, which is no folder in {path}")
    return path / tag


def _load(file: Path, trust: bool) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not trust:
            raise UserError(_refusal(file, error)) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({_first_line(error)})") from None
    try:
        return torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:  # a pickle may raise anything
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {_first_line(error)})") from None


def _refusal(file: Path, error: Exception) -> str:
    words = str(error)
    held = next((part.split()[0] for part in words.split("GLOBAL ")[1:]), "")
    what = f"more than tensors ({held})" if held else "more than tensors"
    return (
        f"{file} is a pickle that holds {what}, and loading it runs whatever code it carries; "
        "give --trust if you trust whoever wrote it, or have its weights saved as safetensors"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _plain(tensor: Tensor) -> Tensor:
    # A copy, as a view of DeepSpeed's flat buffers would keep all of them in memory.
    tensor = tensor.detach()
    return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()
