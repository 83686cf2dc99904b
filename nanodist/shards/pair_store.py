"""Pairs of a scattering pattern and a micrograph, read from a store that ``nanodist pack --pairs`` wrote."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from hpc.errors import UserError
from nanodist.decoding.codec import decode
from nanodist.decoding.reading import FileReader
from nanodist.scattering.pattern import Pattern, QGrid
from nanodist.shards.pair_manifest import Item, Member, PairManifest, load_pair_manifest


class PairStore:
    """Items of a pair store by number; safe to share between threads, cheap to send to another process.

    Attributes:
        path: folder of the store.
        manifest: what the store is made of.
        keys: one of each item.
        samples: the specimen of each item; a split never parts one.
        grid: the q grid of all patterns.
        reference: I0 of asinh(I / I0), in the unit of the patterns, from all patterns of the store.
        manifest_hash: hex hash of the manifest's content, the identity of the data.
    """

    def __init__(self, path: Path, manifest: PairManifest) -> None:
        self.path, self.manifest = path, manifest
        self.keys = tuple(item.key for item in manifest.items)
        self.samples = tuple(item.sample for item in manifest.items)
        self.grid: QGrid = manifest.grid
        self.reference: float = manifest.reference
        self.manifest_hash: str = manifest.content_hash
        self._files = FileReader([path / shard.file for shard in manifest.shards])

    @classmethod
    def open(cls, path: Path) -> PairStore:
        """Open the pair store in the folder ``path``; shards are only looked at for their presence and length.

        Raises:
            UserError: there is none, it is a store of micrographs, or it is damaged.
        """
        path = Path(path)
        manifest = load_pair_manifest(path)
        for shard in manifest.shards:
            try:
                found = (path / shard.file).stat().st_size
            except FileNotFoundError:
                raise UserError(f"{path / shard.file} is missing: restore it or pack again") from None
            if found != shard.bytes:
                what = "truncated" if found < shard.bytes else "too long"
                raise UserError(
                    f"{path / shard.file} is {what} ({found} bytes and not {shard.bytes}): restore it or pack again"
                )
        return cls(path, manifest)

    def __reduce__(self) -> tuple[Callable[[Path], PairStore], tuple[Path]]:
        return type(self).open, (self.path,)

    def __len__(self) -> int:
        return len(self.keys)

    def pattern(self, i: int) -> Pattern | None:
        """The pattern of item ``i``, checked against its hash; ``None`` where the item has none.

        Raises:
            UserError: the shard is gone or damaged; names shard and item.
        """
        item = self.manifest.items[i]
        if item.saxs is None:
            return None
        planes = self._planes(item, self._bytes(item, item.saxs))
        mask = ~np.isnan(planes[0])
        kind = "counts" if self.manifest.kind == "counts" else "reduced"
        values = np.where(mask, planes, np.float32(0))
        return Pattern(values[0], values[1] if len(planes) == 2 else None, mask, self.grid, kind)  # type: ignore[arg-type]

    def micrograph(self, i: int) -> tuple[npt.NDArray[np.uint8], tuple[float, float]] | None:
        """(pixels (H, W), pixel size (y, x) in nm) of item ``i``, checked; ``None`` where the item has none.

        Raises:
            UserError: the shard is gone or damaged; names shard and item.
        """
        item = self.manifest.items[i]
        if item.sem is None:
            return None
        assert item.height and item.width and item.pixel_size_nm  # as the manifest was checked
        try:
            pixels = decode(self._bytes(item, item.sem), item.height, item.width, 8, "png")
        except ValueError as error:
            raise self.error(item, f"its micrograph is damaged ({error})") from None
        return pixels, item.pixel_size_nm

    def truth(self, i: int) -> dict[str, Any]:
        """What is known of item ``i`` from its synthesis, {} for real data.

        ``morphology``, ``period_nm`` (2 pi / q*), ``centre_distance_nm`` (hexagonal lattices), ``orientation_deg`` (of
        the first peak; modulo 180, of hexagonal lattices modulo 60; None: not oriented), ``order_parameter``,
        ``area_fraction``.
        """
        return dict(self.facts(i).get("truth") or {})

    def facts(self, i: int) -> dict[str, Any]:
        """Everything that ``KEY.json`` says of item ``i``: key, sample, truth, and what ``saxs`` and ``sem`` are."""
        item = self.manifest.items[i]
        try:
            values = json.loads(self._bytes(item, item.json))
        except (ValueError, RecursionError) as error:
            raise self.error(item, f"its JSON is damaged ({error})") from None
        if not isinstance(values, dict) or values.get("key") != item.key:
            raise self.error(item, "its JSON is another item's")
        return values

    def error(self, item: Item, fault: str) -> UserError:
        """What to raise about an item."""
        shard = self.path / self.manifest.shards[item.shard].file
        return UserError(f"{shard}, item {item.key}: {fault}; restore the shard or pack again")

    def close(self) -> None:
        """Close the shard files; they open again when they are read."""
        self._files.close()

    def _bytes(self, item: Item, member: Member) -> bytes:
        try:
            data = bytes(self._files.read(item.shard, member.offset, member.size))
        except OSError as error:
            raise self.error(item, f"the shard cannot be read ({error.strerror or error})") from None
        if xxhash.xxh3_64_hexdigest(data) != member.xxh3:
            raise self.error(item, "its bytes are damaged (their xxh3 differs)")
        return data

    def _planes(self, item: Item, data: bytes) -> npt.NDArray[np.float32]:
        """(1 or 2, size, size): intensity and, of reduced data, sigma; NaN where nothing was measured."""
        count = 1 if self.manifest.kind == "counts" else 2
        shape = (count, self.grid.size, self.grid.size)
        header = npy_header(shape)
        # Nothing of a size that the file alone claims is allocated.
        if data[: len(header)] != header or len(data) != len(header) + 4 * int(np.prod(shape)):
            raise self.error(item, f"its pattern is no float32 array of shape {shape}")
        return np.frombuffer(data, "<f4", offset=len(header)).reshape(shape)


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The header of an NPY file of little-endian float32 numbers."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()
