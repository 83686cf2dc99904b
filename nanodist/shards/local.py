"""Shards copied to a disk of the node, by all ranks of it together, each shard once."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from hpc.errors import UserError
from nanodist.shards.manifest import ShardEntry
from nanodist.shards.store import Store

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_CHUNK = 8 << 20
_ROOM = 64 << 20


def stage(store: Store, folder: Path, local_rank: int = 0, say: Callable[[str], None] = lambda _: None) -> Store:
    """``store`` with its shards read from copies in ``folder``, which are made where they are not there yet.

    Every rank of the node calls this; each takes the next shard that nobody copies, so that each shard is copied once.
    Copies are named by the store's hash, checked against the manifest while they are made, and stay for the next run.

    Args:
        store: on a file system that is slow or shared.
        folder: on a disk of the node, such as ``$TMPDIR``.
        local_rank: where this rank begins, so that ranks rarely meet.
        say: tells what is done.

    Raises:
        UserError: no room, a damaged shard, or the folder cannot be written.
    """
    shards = store.manifest.shards
    target = Path(os.path.expandvars(folder)) / f"nanodist-{store.manifest_hash[:16]}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        missing = [shard for shard in shards if not _is_whole(target, shard)]
        if missing and local_rank == 0:
            _check_room(target, sum(shard.bytes for shard in missing))
            say(f"copying {len(missing)} of {len(shards)} shards of {store.path} to {target}")
        begin = local_rank * 7 % max(1, len(shards))
        for shard in shards[begin:] + shards[:begin]:
            if not _is_whole(target, shard):
                with _locked(target / f".{shard.file}.lock"):
                    if not _is_whole(target, shard):
                        _copy(store.folder / shard.file, target / shard.file, shard)
    except OSError as error:
        raise UserError(f"shards cannot be copied to {target}: {error.strerror or error}; see data.stage_to") from None
    there = Store(store.path, store.manifest, store.samples, target)
    there.manifest_hash = store.manifest_hash  # that of a subset is its own
    return there


def _is_whole(target: Path, shard: ShardEntry) -> bool:
    try:
        return (target / shard.file).stat().st_size == shard.bytes
    except FileNotFoundError:
        return False


def _check_room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if free < needed + _ROOM:
        raise UserError(
            f"{target} has {free / 2**30:.1f} GiB free and the shards need {needed / 2**30:.1f} GiB: choose another "
            "data.stage_to, or none"
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "wb") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)  # freed with the process, also a killed one
        yield


def _copy(source: Path, target: Path, shard: ShardEntry) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    digest = xxhash.xxh3_128()
    try:
        with open(source, "rb") as read, open(temporary, "wb") as write:
            while block := read.read(_CHUNK):
                digest.update(block)
                write.write(block)
        if digest.hexdigest() != shard.xxh3:
            raise UserError(f"{source} is damaged (its xxh3 differs from the manifest's): restore it or pack again")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
