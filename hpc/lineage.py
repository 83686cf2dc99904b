"""What a run was made from and what came of it, as W&B's artifacts: a store, checkpoints, an export.

An artifact here is a list of names and hashes. Files stay where they are, and no path of a machine is told, so the same
content is the same artifact wherever it lies, and a start that names it again changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from hpc.errors import UserError

DATASET, CHECKPOINT, EXPORT = "dataset", "checkpoint", "export"
MOST_FILES = 5_000
_BLOCK = 1 << 22


@dataclass(frozen=True)
class File:
    """One file of an artifact: name inside it, xxh3 hash as hex, and size in bytes."""

    name: str
    xxh3: str
    size: int


@dataclass(frozen=True)
class Artifact:
    """Something that a run uses or makes.

    Attributes:
        name: in W&B; letters, digits, dots, dashes and underscores.
        kind: :data:`DATASET`, :data:`CHECKPOINT` or :data:`EXPORT`.
        files: what it consists of; artifacts of one name are versions, told apart by these.
        facts: what W&B shows of it.
        said: a sentence on it.
    """

    name: str
    kind: str
    files: tuple[File, ...]
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)
    said: str = ""

    def references(self) -> dict[str, str]:
        """File name -> an address that says what the file is and not where it lies."""
        return {one.name: f"nanodist://{self.name}/{one.name}?xxh3={one.xxh3}&bytes={one.size}" for one in self.files}


def of_data(*data: Any) -> tuple[Artifact, ...]:
    """The stores that ``data`` are, or that they mix: each by its manifest's hash and its shards.

    What has no manifest, such as pairs in memory, is left out.
    """
    found = []
    for store in (store for one in data for store in getattr(one, "stores", [one])):
        manifest = getattr(store, "manifest", None)
        if manifest is not None:
            shards = tuple(File(shard.file, shard.xxh3, shard.bytes) for shard in manifest.shards)
            found.append(_of_store(str(store.path).rstrip("/").rpartition("/")[2], store.manifest_hash, shards))
    return tuple(dict.fromkeys(found))


def _of_store(name: str, manifest_hash: str, shards: tuple[File, ...]) -> Artifact:
    facts = {"folder": name, "manifest_hash": manifest_hash, "shards": len(shards), "bytes": _sum(shards)}
    # W&B puts very long lists into a file beside the run, which may be gone when an offline run is sent.
    files = shards if len(shards) <= MOST_FILES else (File("manifest.json", manifest_hash, _sum(shards)),)
    return Artifact(f"store-{manifest_hash[:12]}", DATASET, files, facts, f"{name}: {len(shards)} shards")


def of_checkpoint(folder: Path, fingerprint: str) -> Artifact | None:
    """A checkpoint by its index, which holds the hash of every file; ``None`` where there is no readable one."""
    try:
        listed = json.loads((folder / "index.json").read_text())["files"]
        files = tuple(File(name, one["xxh3_128"], int(one["bytes"])) for name, one in sorted(listed.items()))
        step = int(folder.name.removeprefix("step-"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    facts = {"fingerprint": fingerprint, "step": step, "bytes": _sum(files)}
    return Artifact(f"checkpoint-{fingerprint}", CHECKPOINT, files, facts, f"step {step} of run {fingerprint}")


def newest_checkpoint(run: Path) -> Artifact | None:
    """The checkpoint that a run's ``latest`` names, or ``None``."""
    try:
        fingerprint = str(json.loads((run / "run.json").read_text())["fingerprint"])
        latest = (run / "checkpoints" / "latest").read_text().strip()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return of_checkpoint(run / "checkpoints" / Path(latest).name, fingerprint)


def of_folder(folder: Path, facts: Mapping[str, Any] | None = None) -> Artifact:
    """An export by the hashes of its files; it is named by them, so that its copies are the same artifact.

    Raises:
        UserError: a file cannot be read.
    """
    files = []
    try:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            files.append(File(path.relative_to(folder).as_posix(), _hash(path), path.stat().st_size))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from None
    listed = "".join(f"{one.name}:{one.xxh3}\n" for one in files)
    told = {"bytes": _sum(files), **(facts or {})}
    return Artifact(f"export-{xxhash.xxh3_128(listed.encode()).hexdigest()[:12]}", EXPORT, tuple(files), told)


def of_source(path: str | Path) -> Artifact | None:
    """The run or export that another run starts from; ``None`` where it is neither (a name of timm, say)."""
    folder = Path(path)
    if (folder / "run.json").is_file():
        return newest_checkpoint(folder)
    if folder.parent.name == "checkpoints" and (folder / "index.json").is_file():
        try:
            fingerprint = str(json.loads((folder.parent.parent / "run.json").read_text())["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return of_checkpoint(folder, fingerprint)
    return of_folder(folder) if (folder / "config.json").is_file() else None


def _sum(files: Iterable[File]) -> int:
    return sum(one.size for one in files)


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
