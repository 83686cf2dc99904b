"""``index``: shards that others wrote (webdataset's ShardWriter, or tar) made a store, without changing them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import xxhash

from hpc import atomic
from hpc.errors import UserError
from hpc.progress import Progress
from nanodist._version import __version__
from nanodist.decoding.codec import IMAGE_SUFFIXES, decode, probe, sample_hash
from nanodist.shards import index
from nanodist.shards.index import Sample
from nanodist.shards.manifest import NAME, Manifest, ShardEntry, kept_name, load_manifest

_MAX_FACTS = 1 << 24
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_MAX_KEY = 80


def safe_key(name: str) -> str:
    """The key of a sample that its tar calls ``name``: itself where it is plain, else with a hash of the whole name."""
    plain = _UNSAFE.sub("-", name)
    if plain == name and 0 < len(name) <= _MAX_KEY:
        return name
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=5).hexdigest()
    return f"{plain[:_MAX_KEY].strip('-')}-{digest}"


def split_name(name: str) -> tuple[str, str]:
    """A member's name at the first dot of its last part, where webdataset cuts it: sample, and ending."""
    folder, _, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


def check_member(member: tarfile.TarInfo) -> str | None:
    """Why a member of a tar is not to be used, or ``None``."""
    if member.isdir():
        return None
    if not member.isreg():
        return f"the member {member.name!r} is a link or device and no file"
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return f"the member {member.name!r} points outside the tar"
    return None


@dataclass
class _Found:
    """What a shard holds: its entry, samples, and exact sums over their pixels by depth."""

    entry: ShardEntry
    samples: list[Sample] = field(default_factory=list)
    depths: Counter[int] = field(default_factory=Counter)
    pixels: int = 0
    total: int = 0
    total_of_squares: int = 0
    without_image: int = 0


def index_shards(folder: Path, image: str = "", workers: int | None = None) -> Manifest:
    """Write ``manifest.json`` and an index for the ``*.tar`` in ``folder``, so that it is a store.

    Every image is decoded once, so that pixels, sizes and hashes are known. A sample's JSON gives its label, group,
    source and pixel_size_nm where it has them; a ``.cls`` or ``.txt`` gives the label too; else it has none, and is a
    group of its own. Called again once shards were added, it keeps the manifest of before for runs that use it.

    Args:
        folder: with the shards.
        image: ending of the image members, where samples have several (such as ``seg.png``).
        workers: threads; ``None`` takes one a core.

    Raises:
        UserError: no shards, a damaged one, unsafe members, no images, or images that make no store; names shard and
            sample.
    """
    shards = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not shards:
        raise UserError(f"{folder} holds no *.tar: name the folder with the shards that webdataset wrote")
    old = load_manifest(folder) if (folder / NAME).exists() else None
    if old and not old.options.get("indexed"):
        raise UserError(f"{folder} is a store that 'nanodist pack' wrote, and has its index already")
    bar = Progress(len(shards), "indexing", "shards")
    found: list[_Found] = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        work = partial(_index_shard, image=image.lower().lstrip("."))
        for one in pool.map(work, shards, range(len(shards))):
            found.append(one)
            bar.update()
    bar.close()
    return _write(folder, found, image, old)


def _write(folder: Path, found: list[_Found], image: str, old: Manifest | None) -> Manifest:
    samples = [sample for one in found for sample in one.samples]
    depths = sum((one.depths for one in found), Counter[int]())
    if not samples:
        raise UserError(f"{folder}: no sample has an image ({', '.join(IMAGE_SUFFIXES)}); see --image")
    if len(depths) > 1:
        raise UserError(f"{folder} mixes images of 8 and of 16 bits ({depths[8]} and {depths[16]}): make two stores")
    key, count = Counter(sample.key for sample in samples).most_common(1)[0]
    if count > 1:
        raise UserError(f"{folder} has {count} samples of the key {key}: rename them, or leave a shard out")
    depth = next(iter(depths))
    data = index.to_bytes(samples)
    digest = xxhash.xxh3_128_hexdigest(data)
    manifest = Manifest(
        shards=[one.entry for one in found],
        # Named by its content: a manifest of before and its index stay a pair.
        index={"file": f"index-{digest[:12]}.npz", "bytes": len(data), "xxh3": digest},
        samples=len(samples),
        depth=depth,
        statistics=_statistics(samples, found, depth),
        options={"indexed": True, "image": image},
        dropped=[
            {"source": one.entry.file, "reason": f"{one.without_image} samples without an image"}
            for one in found
            if one.without_image
        ],
        provenance={"nanodist": __version__},
    )
    if old and old.content_hash != manifest.content_hash:
        atomic.write_bytes(folder / kept_name(old.content_hash), (folder / NAME).read_bytes())
    atomic.write_bytes(folder / manifest.index["file"], data)
    atomic.write_json(folder / NAME, manifest.to_dict())
    return manifest


def _statistics(samples: list[Sample], found: list[_Found], depth: int) -> dict[str, Any]:
    top = 2**depth - 1
    pixels, total, squares = (sum(getattr(one, n) for one in found) for n in ("pixels", "total", "total_of_squares"))
    sizes_nm = [max(s.pixel_size_nm) for s in samples if s.pixel_size_nm]
    return {
        "mean": total / (pixels * top),
        "std": math.sqrt(pixels * squares - total**2) / (pixels * top),
        "pixel_size_nm": [min(sizes_nm), max(sizes_nm)] if sizes_nm else None,
        "pixel_size_unknown": len(samples) - len(sizes_nm),
        "tile_sizes": dict(sorted(Counter(f"{s.height}x{s.width}" for s in samples).items())),
        "labels": dict(sorted(Counter(s.label for s in samples if s.label is not None).items())),
        "groups": len({s.group for s in samples}),
        "sources": len({s.source for s in samples}),
    }


def _index_shard(path: Path, number: int, image: str) -> _Found:
    length, digest = 0, xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            length += len(block)
        file.seek(max(0, length - 1024))
        if length < 1024 or file.read().strip(b"\0"):
            raise UserError(f"{path} is truncated (it has no end of a tar): restore it, or leave it out")
    found = _Found(ShardEntry(path.name, 0, length, digest.hexdigest()))
    try:
        with tarfile.open(path, "r:") as tar:
            for name, members in _samples(tar, path):
                chosen = _image_of(members, image)
                if chosen is None:
                    found.without_image += 1
                    continue
                _add(found, tar, path, number, name, members, chosen)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} is a damaged tar ({error}): restore it, or leave it out") from None
    found.entry = replace(found.entry, samples=len(found.samples))
    return found


def _samples(tar: tarfile.TarFile, path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Each sample's members by their endings: members that follow each other and share what is before the first dot."""
    name, members = "", dict[str, tarfile.TarInfo]()
    for member in tar:
        reason = check_member(member)
        if reason:
            raise UserError(f"{path}: {reason}: do not use this shard")
        if member.isdir() or member.name.startswith("__"):  # such as __metadata__
            continue
        stem, ending = split_name(member.name)
        if stem != name:
            if members:
                yield name, members
            name, members = stem, {}
        if ending in members:
            raise UserError(f"{path} has two members {member.name!r} of one sample: rename one")
        members[ending] = member
    if members:
        yield name, members


def _image_of(members: dict[str, tarfile.TarInfo], image: str) -> str | None:
    if image:
        return image if image in members else None
    return next((ending for ending in members if ending.rpartition(".")[2] in IMAGE_SUFFIXES), None)


def _add(
    found: _Found,
    tar: tarfile.TarFile,
    path: Path,
    number: int,
    name: str,
    members: dict[str, tarfile.TarInfo],
    chosen: str,
) -> None:
    """Decode one sample's image and note what is known of it."""
    member, suffix = members[chosen], chosen.rpartition(".")[2]
    key = safe_key(name)
    where = f"{path}, sample {name}"
    data = _read(tar, member)
    if len(data) != member.size:
        raise UserError(f"{path} is truncated in sample {name}: restore it, or leave it out")
    try:
        height, width, depth = probe(data, suffix)
        pixels = decode(data, height, width, depth, suffix)
    except ValueError as error:
        raise UserError(f"{where}: {error}; take it out of the shard, or choose other members by --image") from None
    facts = _facts(tar, members, where)
    found.samples.append(
        Sample(
            key=key,
            shard=number,
            offset=member.offset_data,
            size=member.size,
            suffix=suffix,
            label=_label(tar, members, facts),
            group=str(facts.get("group") or key),
            pixel_size_nm=_pixel_size(facts.get("pixel_size_nm")),
            height=height,
            width=width,
            source=str(facts.get("source") or member.name),
            xxh3=sample_hash(data),
        )
    )
    found.depths[depth] += 1
    found.pixels += pixels.size
    for row in range(0, height, 128):
        wide = pixels[row : row + 128].astype(np.uint64)
        found.total += int(wide.sum())
        found.total_of_squares += int(np.vdot(wide, wide))


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # a regular member
    try:
        return file.read()
    except tarfile.ReadError:
        return b""


def _facts(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], where: str) -> dict[str, Any]:
    member = members.get("json")
    if member is None:
        return {}
    if member.size > _MAX_FACTS:
        raise UserError(f"{where}: its JSON has {member.size} bytes; more than 16 MiB are not read")
    try:
        values = json.loads(_read(tar, member))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: its JSON is damaged ({error})") from None
    return values if isinstance(values, dict) else {}


def _label(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], facts: dict[str, Any]) -> str | None:
    if isinstance(facts.get("label"), (str, int)):
        return str(facts["label"])
    for ending in ("cls", "txt"):
        if ending in members and members[ending].size <= 256:
            text = _read(tar, members[ending]).decode("utf-8", "replace").strip()
            return text or None
    return None


def _pixel_size(value: Any) -> tuple[float, float] | None:
    both = value if isinstance(value, list) else [value, value]
    good = len(both) == 2 and all(isinstance(v, (int, float)) and math.isfinite(v) and v > 0 for v in both)
    return (float(both[0]), float(both[1])) if good else None
