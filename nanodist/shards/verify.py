"""``verify``: every hash of a store checked and every sample decoded, and each fault named."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash

from hpc.progress import Progress
from nanodist.shards.foreign import check_member, safe_key, split_name
from nanodist.shards.index import Sample
from nanodist.shards.manifest import ShardEntry, load_manifest
from nanodist.shards.store import SampleError, Store, load_index

_CHUNK = 64
_MAX_JSON = 1 << 24
MASK_SUFFIX = "mask.png"


@dataclass(frozen=True)
class Fault:
    """What is wrong where; ``sample`` is the key, or empty where a whole file is meant."""

    shard: str
    sample: str
    fault: str


def verify(path: Path, workers: int | None = None) -> list[Fault]:
    """Check a store and give all its faults, in the order of its shards and samples.

    Every shard's length and hash, every tar member (name, kind, place), and every sample's hash, pixels and JSON.

    Args:
        path: folder of the store.
        workers: threads (hashing and decoding let go of the interpreter); ``None`` takes one a core.

    Raises:
        UserError: no store, or its manifest or index is damaged, so that nothing says what should be there.
    """
    manifest = load_manifest(path)
    store = Store(path, manifest, load_index(path, manifest))
    tasks: list[Callable[[], list[Fault]]] = []
    for number, shard in enumerate(manifest.shards):
        here = [i for i, n in enumerate(store.samples.columns["shard"].tolist()) if n == number]
        tasks.append(partial(_check_shard, store, shard, here))
        if not (path / shard.file).is_file():
            continue  # one fault says it for all samples
        tasks += [partial(_check_samples, store, here[i : i + _CHUNK]) for i in range(0, len(here), _CHUNK)]
    bar = Progress(len(tasks), "verifying", "parts")
    faults: list[Fault] = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for found in pool.map(lambda task: task(), tasks):
            faults += found
            bar.update()
    bar.close()
    store.close()
    return faults


def _check_samples(store: Store, numbers: list[int]) -> list[Fault]:
    faults = []
    for i in numbers:
        try:
            store.read(i)
        except SampleError as error:
            faults.append(Fault(error.shard, error.key, error.fault))
    return faults


def _check_shard(store: Store, shard: ShardEntry, numbers: list[int]) -> list[Fault]:
    """The file as a whole and its members; the pixels are :func:`_check_samples`'s."""
    path = store.path / shard.file
    try:
        length, digest = _length_and_hash(path)
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        return [Fault(shard.file, "", what)]
    faults = []
    if length != shard.bytes:
        faults.append(f"has {length} bytes and not {shard.bytes}")
    elif digest != shard.xxh3:
        faults.append(f"has xxh3 {digest} and not {shard.xxh3}")
    if len(numbers) != shard.samples:
        faults.append(f"has {len(numbers)} samples in the index and {shard.samples} in the manifest")
    if len({store.keys[i] for i in numbers}) != len(numbers):
        faults.append("has two samples of one key")
    return [Fault(shard.file, "", fault) for fault in faults] + list(_check_members(store, path, numbers))


def _length_and_hash(path: Path) -> tuple[int, str]:
    digest, length = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            length += len(block)
    return length, digest.hexdigest()


def _check_members(store: Store, path: Path, numbers: list[int]) -> Iterator[Fault]:
    """Every member is one that the index promises, at its place, and none lacks; nothing is extracted."""
    samples = [store.samples[i] for i in numbers]
    indexed = bool(store.manifest.options.get("indexed"))  # others wrote the shards, with members of any kind
    images = {s.offset: s for s in samples}
    masks = {(s.key, MASK_SUFFIX) for s in samples}
    texts = {} if indexed else {f"{s.key}.json": s for s in samples}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                reason = check_member(member)
                image = images.pop(member.offset_data, None) if not reason else None
                text = texts.pop(member.name, None)
                if reason:
                    yield Fault(path.name, "", reason)
                elif image and (fault := _image_fault(member, image, indexed)):
                    yield Fault(path.name, image.key, fault)
                elif text and (fault := _json_fault(tar, member, text.key)):
                    yield Fault(path.name, text.key, fault)
                elif not image and not text and not indexed and split_name(member.name) not in masks:
                    yield Fault(path.name, "", f"has the member {member.name!r}, which the index does not know")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield Fault(path.name, "", f"is a damaged tar ({error})")
    for sample in images.values():
        yield Fault(path.name, sample.key, f"the tar has no image at byte {sample.offset}, where the index has it")
    for name, sample in texts.items():
        yield Fault(path.name, sample.key, f"the tar has no member {name}")


def _image_fault(member: tarfile.TarInfo, sample: Sample, indexed: bool) -> str | None:
    name, ending = split_name(member.name)
    if member.size != sample.size:
        return f"has {member.size} bytes in the tar and {sample.size} in the index"
    if (safe_key(name) if indexed else name) != sample.key or ending.rpartition(".")[2] != sample.suffix:
        return f"is {member.name!r} in the tar"
    return None


def _json_fault(tar: tarfile.TarFile, member: tarfile.TarInfo, key: str) -> str | None:
    if member.size > _MAX_JSON:
        return f"its JSON claims {member.size} bytes"
    file = tar.extractfile(member)
    assert file is not None  # a regular member
    try:
        values = json.loads(file.read())
    except (ValueError, RecursionError, tarfile.TarError) as error:
        return f"its JSON is damaged ({error})"
    return None if isinstance(values, dict) and values.get("key") == key else "its JSON is another sample's"
