"""``verify`` of pair stores: every hash checked, every member decoded, each fault named."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import xxhash

from hpc.errors import UserError
from nanodist.shards.foreign import check_member
from nanodist.shards.pair_manifest import Member, PairManifest, load_pair_manifest
from nanodist.shards.pair_store import PairStore
from nanodist.shards.verify import Fault


def verify_pairs(path: Path) -> tuple[PairManifest, list[Fault]]:
    """The manifest of a pair store, and all its faults in the order of its shards and items.

    Raises:
        UserError: no pair store, or its manifest is damaged, so that nothing says what should be there.
    """
    manifest = load_pair_manifest(path)
    store = PairStore(path, manifest)
    faults: list[Fault] = []
    for number, shard in enumerate(manifest.shards):
        file = path / shard.file
        try:
            data = file.read_bytes()
        except OSError as error:
            what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            faults.append(Fault(shard.file, "", what))
            continue
        if len(data) != shard.bytes:
            faults.append(Fault(shard.file, "", f"has {len(data)} bytes and not {shard.bytes}"))
        elif xxhash.xxh3_128_hexdigest(data) != shard.xxh3:
            faults.append(Fault(shard.file, "", f"its xxh3 is not {shard.xxh3}"))
        faults += [Fault(shard.file, "", fault) for fault in _members(file, manifest, number)]
        faults += _items(store, number)
    return manifest, faults


def _members(file: Path, manifest: PairManifest, number: int) -> Iterator[str]:
    """Members that lie elsewhere than the manifest says, that it does not know, or that are not there."""
    expected: dict[str, Member] = {}
    for item in manifest.items:
        if item.shard == number:
            places = {"saxs.npy": item.saxs, "sem.png": item.sem, "json": item.json}
            expected |= {f"{item.key}.{name}": place for name, place in places.items() if place is not None}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                place = expected.pop(member.name, None)
                if (reason := check_member(member)) is not None:
                    yield reason
                elif place is None:
                    yield f"has the member {member.name!r}, which the manifest does not know"
                elif (member.offset_data, member.size) != (place.offset, place.size):
                    yield f"has the member {member.name!r} at another place than the manifest says"
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield f"is a damaged tar ({error})"
    for name in expected:
        yield f"has no member {name!r}"


def _items(store: PairStore, number: int) -> Iterator[Fault]:
    for i, item in enumerate(store.manifest.items):
        if item.shard != number:
            continue
        for read in (store.pattern, store.micrograph, store.facts):
            try:
                read(i)  # type: ignore[operator]
            except UserError as error:
                yield Fault(store.manifest.shards[number].file, item.key, str(error).partition(f"{item.key}: ")[2])
