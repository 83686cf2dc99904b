"""The files of one checkpoint: safetensors and JSON, each with its hash in an index; nothing is ever unpickled.

``checkpoints/step-00001200/`` holds ``model.safetensors`` (fp32 weights and buffers by name), ``optimizer.safetensors``
(``<slot>/<parameter name>``), ``state.json`` and ``index.json`` (size and xxh3 of each file, written last).
``checkpoints/latest`` is a text file with the name of the newest whole one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hpc import atomic

VERSION = 1
LATEST = "latest"
INDEX = "index.json"


class CheckpointError(Exception):
    """A checkpoint is missing or not whole; the text names the file."""


def step_name(step: int) -> str:
    """``1200`` -> ``step-00001200``."""
    return f"step-{step:08d}"


def file_hash(path: Path) -> str:
    """xxh3 (128 bit, hex) of a file."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def write(
    checkpoints: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Write one checkpoint whole or not at all, move ``latest`` to it, then delete all but the newest ``keep``.

    Args:
        checkpoints: the folder of all checkpoints of the run.
        step: optimizer steps done.
        tensors: file stem -> tensors by name, such as ``{"model": {...}, "optimizer": {...}}``.
        state: JSON-able rest.
        keep: how many checkpoints stay.
    """
    target = checkpoints / step_name(step)
    if target.exists():
        # Left by a start that saved this step and died before the next one; it is whole, as it has its final name.
        if is_whole(target):
            atomic.write_text(checkpoints / LATEST, target.name + "\n")
            return target
        _remove(target)
    with atomic.directory(target) as folder:
        for stem, named in tensors.items():
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
            save_file(contiguous, folder / f"{stem}.safetensors")
        (folder / "state.json").write_text(json.dumps({"version": VERSION, "step": step, **state}, indent=1))
        index = {
            file.name: {"bytes": file.stat().st_size, "xxh3_128": file_hash(file)} for file in sorted(folder.iterdir())
        }
        (folder / INDEX).write_text(json.dumps({"version": VERSION, "files": index}, indent=1))
    atomic.write_text(checkpoints / LATEST, target.name + "\n")
    for old in sorted(checkpoints.glob("step-*"))[: -max(keep, 1)]:
        if old.name < target.name:
            _remove(old)
    return target


def _remove(folder: Path) -> None:
    # The index goes first, so that a half-deleted checkpoint is never taken for a whole one.
    (folder / INDEX).unlink(missing_ok=True)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or ``None`` where every hash agrees."""
    try:
        index = json.loads((folder / INDEX).read_text())
        if index["version"] != VERSION:
            return f"{folder}: checkpoint format {index['version']}, this nanodist reads {VERSION}"
        for name, facts in index["files"].items():
            file = folder / name
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != facts["bytes"] or file_hash(file) != facts["xxh3_128"]:
                return f"{file} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / INDEX} cannot be read ({error})"
    return None


def is_whole(folder: Path) -> bool:
    """Whether every file of the checkpoint is there and matches its hash."""
    return fault(folder) is None


def candidates(checkpoints: Path) -> list[Path]:
    """All checkpoints, the one that ``latest`` names first, then from new to old."""
    found = sorted((p for p in checkpoints.glob("step-*") if p.is_dir()), reverse=True)
    try:
        named = checkpoints / (checkpoints / LATEST).read_text().strip()
    except OSError:
        return found
    return [named, *(p for p in found if p != named)] if named in found else found


def latest_checkpoint(checkpoints: Path) -> Path:
    """The newest whole checkpoint.

    Raises:
        CheckpointError: there is none; the text says what is wrong with the newest.
    """
    faults = []
    for folder in candidates(checkpoints):
        problem = fault(folder)
        if problem is None:
            return folder
        faults.append(problem)
    raise CheckpointError(faults[0] if faults else f"{checkpoints} holds no checkpoint yet")


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        CheckpointError: it is missing, unreadable or of another version.
    """
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'state.json'} cannot be read ({error})") from None
    if state.get("version") != VERSION:
        raise CheckpointError(f"{folder}: state version {state.get('version')}, this nanodist reads {VERSION}")
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return load_file(path, device="cpu")
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
