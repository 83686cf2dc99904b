"""The files of one checkpoint: safetensors and JSON, each with its hash in an index; nothing is ever unpickled.

``checkpoints/step-00001200/`` holds ``model.safetensors`` (fp32 weights and buffers by name), ``optimizer.safetensors``
(``<slot>/<parameter name>``), ``state.json`` and ``index.json`` (size and xxh3 of each file and of the index itself,
written last). ``checkpoints/latest`` is a text file with the name of the newest whole one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hpc import atomic
from hpc.checkpoint.layout import Facts, file_facts, write_tensors
from hpc.checkpoint.retention import Retention, best_of, step_of, surplus

VERSION = 1
LATEST = "latest"
INDEX = "index.json"
STATE = "state.json"
# Keys of all samples of a large store that were trained on, and more.
_MOST_JSON_BYTES = 1 << 28


class CheckpointError(Exception):
    """A checkpoint is missing or not whole; the text names the file."""


class Ledger:
    """What one process knows already of the checkpoints in a folder, so that it need not read them again."""

    def __init__(self) -> None:
        self._whole: set[str] = set()
        self._scores: dict[str, float | None] = {}

    def note(self, folder: Path, score: float | None) -> None:
        """A whole checkpoint was just written."""
        self._whole.add(folder.name)
        self._scores[folder.name] = score

    def whole(self, folder: Path) -> bool:
        """Whether every hash agrees, or agreed before."""
        if folder.name not in self._whole and is_whole(folder):
            self._whole.add(folder.name)
        return folder.name in self._whole

    def score(self, folder: Path) -> float | None:
        """What the checkpoint was ranked by; ``None`` where it has no rank or cannot be read."""
        if folder.name not in self._scores:
            try:
                value = read_state(folder).get("score")
            except CheckpointError:
                value = None
            self._scores[folder.name] = value if isinstance(value, (int, float)) else None
        return self._scores[folder.name]


def step_name(step: int) -> str:
    """``1200`` -> ``step-00001200``."""
    return f"step-{step:08d}"


def encode_state(step: int, state: Mapping[str, Any], score: float | None = None) -> bytes:
    """``state.json``. A score that is not finite ranks nothing and is left out.

    Without indentation, which Python writes ten times slower, and holding its lock meanwhile.
    """
    rank = score if score is not None and math.isfinite(score) else None
    return json.dumps({"version": VERSION, "step": step, "score": rank, **state}).encode()


def write(
    checkpoints: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int | Retention,
    score: float | None = None,
) -> Path:
    """Write one checkpoint whole or not at all, move ``latest`` to it, then delete what need not stay.

    Args:
        checkpoints: the folder of all checkpoints of the run.
        step: optimizer steps done.
        tensors: file stem -> tensors by name, such as ``{"model": {...}, "optimizer": {...}}``.
        state: JSON-able rest.
        keep: which checkpoints stay; a number: so many of the newest.
        score: what ranks this one among the best, lower being better.

    Raises:
        OSError: the disk is full, say; ``latest`` is as it was, and nothing half-written is left.
    """
    encoded = encode_state(step, state, score)
    ledger = Ledger()
    target = put(checkpoints, step, tensors, encoded, ledger)
    prune(checkpoints, target, Retention(last=keep) if isinstance(keep, int) else keep, ledger)
    return target


def put(
    checkpoints: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: bytes, ledger: Ledger
) -> Path:
    """The writing half of :func:`write`; ``state`` is what :func:`encode_state` gave."""
    target = checkpoints / step_name(step)
    if target.exists():
        # Left by a start that saved this step and died before the next one, or broken since.
        if is_whole(target):
            _point(checkpoints, target)
            return target
        remove(target)
    with atomic.directory(target) as folder:
        facts = {f"{stem}.safetensors": write_tensors(folder / f"{stem}.safetensors", t) for stem, t in tensors.items()}
        _write(folder / STATE, state)
        facts[STATE] = Facts(len(state), xxhash.xxh3_128(state).hexdigest())
        _write(folder / INDEX, _index(facts))
        # Read back, since the hashes are those of the memory.
        problem = fault(folder)
        if problem is not None:
            raise CheckpointError(f"read back after writing, {problem}")
    _point(checkpoints, target)
    ledger.note(target, json.loads(state)["score"])
    return target


def prune(checkpoints: Path, newest: Path, retention: Retention, ledger: Ledger) -> None:
    """Delete what need not stay beside ``newest``, a whole checkpoint."""
    for old in surplus(checkpoints.iterdir(), newest, retention, ledger.whole, ledger.score):
        remove(old)


def remove(folder: Path) -> None:
    """Delete a checkpoint, which vanishes at once: it is renamed first, so that no reader meets half of one."""
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean(checkpoints: Path) -> list[str]:
    """Delete what a killed writer left half-written or half-deleted, and return the names; for rank 0, at a start.

    Checkpoints themselves are left alone, broken ones as well.
    """
    left = [path for path in checkpoints.glob(".*.tmp") if path.name.startswith((".step-", f".{LATEST}."))]
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return sorted(path.name for path in left)


def _point(checkpoints: Path, target: Path) -> None:
    atomic.write_text(checkpoints / LATEST, target.name + "\n")


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _index(facts: Mapping[str, Facts]) -> bytes:
    files = {name: {"bytes": fact.size, "xxh3_128": fact.xxh3_128} for name, fact in sorted(facts.items())}
    return json.dumps({"version": VERSION, "files": files, "xxh3_128": _own_hash(files)}, indent=1).encode()


def _own_hash(files: Any) -> str:
    return xxhash.xxh3_128(json.dumps(files, sort_keys=True).encode()).hexdigest()


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or ``None`` where every hash agrees."""
    try:
        index = _read_json(folder / INDEX)
        if index["version"] != VERSION:
            return f"{folder / INDEX} is of checkpoint format {index['version']}, this nanodist reads {VERSION}"
        # Indices of older checkpoints have no hash of their own; a flipped byte does not make one of these.
        if not index["files"] or not {"version", "files"} <= set(index) <= {"version", "files", "xxh3_128"}:
            return f"{folder / INDEX} is damaged"
        if index.get("xxh3_128", _own_hash(index["files"])) != _own_hash(index["files"]):
            return f"{folder / INDEX} does not match its hash"
        for name, facts in index["files"].items():
            if name != Path(name).name:
                return f"{folder / INDEX} names {name!r}, which is no plain file name"
            file = folder / name
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != facts["bytes"] or file_facts(file).xxh3_128 != facts["xxh3_128"]:
                return f"{file} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / INDEX} cannot be read ({error})"
    return None


def is_whole(folder: Path) -> bool:
    """Whether every file of the checkpoint is there and matches its hash."""
    return fault(folder) is None


def candidates(checkpoints: Path) -> list[Path]:
    """All checkpoints, the one that ``latest`` names first, then from new to old."""
    return _candidates(checkpoints)[0]


def _candidates(checkpoints: Path) -> tuple[list[Path], str | None]:
    """The checkpoints in the order in which to try them, and what is wrong with ``latest``."""
    steps = {path: step for path in checkpoints.glob("step-*") if path.is_dir() and (step := step_of(path)) is not None}
    found = sorted(steps, key=lambda path: steps[path], reverse=True)
    if not found:
        return [], None
    pointer = checkpoints / LATEST
    try:
        name = pointer.read_text().strip()
    except (OSError, ValueError) as error:
        return found, f"{pointer} cannot be read ({getattr(error, 'strerror', None) or error})"
    named = checkpoints / name
    if named not in found:
        return found, f"{pointer} names {name!r}, which is not there"
    # Either a start was killed between a checkpoint and the move of latest, or somebody went back by hand.
    behind = f"{pointer} names {name}, and {found[0].name} is newer" if named != found[0] else None
    return [named, *(path for path in found if path != named)], behind


def newest_whole(checkpoints: Path) -> tuple[Path, list[str]]:
    """The checkpoint to continue from, and a sentence for each thing that was found wrong before it.

    Raises:
        CheckpointError: there is none; the text says what is wrong with the newest.
    """
    found, problem = _candidates(checkpoints)
    said = [] if problem is None else [problem]
    faults: list[str] = []
    for folder in found:
        broken = fault(folder)
        if broken is None:
            return folder, said + faults
        faults.append(broken)
    raise CheckpointError(faults[0] if faults else f"{checkpoints} holds no checkpoint yet")


def latest_checkpoint(checkpoints: Path) -> Path:
    """The newest whole checkpoint.

    Raises:
        CheckpointError: there is none; the text says what is wrong with the newest.
    """
    return newest_whole(checkpoints)[0]


def best_checkpoint(checkpoints: Path) -> Path | None:
    """The whole checkpoint of the lowest score, the newer of two equal ones; ``None`` where none has a score."""
    ledger = Ledger()
    return next(iter(best_of(candidates(checkpoints), 1, ledger.whole, ledger.score)), None)


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        CheckpointError: it is missing, unreadable or of another version.
    """
    try:
        state: dict[str, Any] = _read_json(folder / STATE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read ({error})") from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, dict) else None
        raise CheckpointError(f"{folder}: state version {found}, this nanodist reads {VERSION}")
    return state


def _read_json(path: Path) -> Any:
    """JSON of a file that anybody may have written."""
    if path.exists() and not path.is_file():  # a pipe would keep its reader waiting
        raise ValueError("it is no file")
    if path.stat().st_size > _MOST_JSON_BYTES:
        raise ValueError(f"it is larger than the {_MOST_JSON_BYTES >> 20} MiB that it may have")
    try:
        return json.loads(path.read_text())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: missing or damaged.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} cannot be read (it is no file)")
    try:
        return load_file(path, device="cpu")
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
