"""Stores on other machines: manifest and index come whole, shards block by block."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import xxhash

from hpc.errors import UserError
from nanodist.decoding.remote import Cache, RemoteReader, default_cache, fetch, keep_local
from nanodist.shards.index import Samples
from nanodist.shards.manifest import NAME, Manifest, kept_name, load_manifest
from nanodist.shards.store import Store, load_index


class RemoteStore(Store):
    """A store at an address; see :class:`Store`."""

    def __init__(self, url: str, folder: Path, manifest: Manifest, samples: Samples, cache: Cache) -> None:
        super().__init__(folder, manifest, samples)
        self.url, self.cache = url, cache
        blocks = self.blocks
        rows = (
            []
            if blocks is None
            else zip(blocks.shard.tolist(), blocks.start.tolist(), blocks.length.tolist(), strict=True)
        )
        self.files = RemoteReader([f"{url}/{shard.file}" for shard in manifest.shards], list(rows), cache)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_remote, (self.url, self.manifest_hash, self.cache)


def open_remote(url: str, pinned: str = "", cache: Cache | None = None) -> RemoteStore:
    """Open the store at ``url`` (``https://``, ``s3://`` and what else fsspec reads).

    Raises:
        UserError: it cannot be reached, or is no store.
    """
    url, cache = url.rstrip("/"), cache or default_cache()
    names = [kept_name(pinned), NAME] if pinned else [NAME]
    data = _first(url, names)
    digest = hashlib.blake2b(url.encode() + data, digest_size=12).hexdigest()
    folder = Path(cache.folder) / "stores" / digest
    keep_local(folder, NAME, lambda: data, lambda found: found == data)
    manifest = load_manifest(folder, pinned)
    name, expected = manifest.index["file"], manifest.index["xxh3"]
    try:
        keep_local(
            folder, name, lambda: fetch(f"{url}/{name}"), lambda found: xxhash.xxh3_128_hexdigest(found) == expected
        )
    except OSError as error:
        raise UserError(f"the index of the store {url} cannot be read: {error}") from None
    return RemoteStore(url, folder, manifest, load_index(folder, manifest), cache)


def _first(url: str, names: list[str]) -> bytes:
    for name in names:
        try:
            return fetch(f"{url}/{name}")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"the store {url} cannot be read: {error}") from None
    raise UserError(
        f"{url} has no {NAME}, so it is no store: make one with 'nanodist pack SRC --out STORE' and copy it"
    )
