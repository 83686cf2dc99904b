"""Writes a safetensors file piece by piece and hashes it on the way.

safetensors' own ``save_file`` holds Python's lock while it serialises in the oldest version that is supported (0.4.5:
1.6 s for 400 MB, in which a training loop stands still) and copies all tensors first. The format is an 8-byte length,
a JSON header and the raw data, so that it is written here from the tensors' own memory; ``write``, ``fsync`` and
xxhash all release the lock.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

PIECE = 1 << 22
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Facts:
    """Size in bytes and xxh3 (128 bit, hex) of a file."""

    size: int
    xxh3_128: str


def file_facts(path: Path) -> Facts:
    """Size and hash of a file, read from the start to the end."""
    digest, size = xxhash.xxh3_128(), 0
    place = memoryview(bytearray(PIECE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(place):
            digest.update(place[:count])
            size += count
    return Facts(size, digest.hexdigest())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Facts:
    """Write ``tensors`` by name as a safetensors file; the facts are those of the memory, not of what the disk kept.

    Raises:
        OSError: the file cannot be written; a part of it is left.
        TypeError: a tensor has a type that is not written, such as complex numbers; it is named.
    """
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "wb", buffering=0) as file:
        for piece in _pieces(tensors):
            digest.update(piece)
            size += len(piece)
            _write_all(file, piece)
        # Some file systems (NFS, quotas) say only here that there is no room.
        os.fsync(file.fileno())
    return Facts(size, digest.hexdigest())


def _write_all(file: BinaryIO, piece: memoryview) -> None:
    # A disk with room for a part takes that part without an error; the error comes with the rest.
    while len(piece):
        piece = piece[file.write(piece) :]


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    # Wide types first, so that every tensor starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    yield memoryview(_header({name: tensors[name] for name in names}))
    for name in names:
        raw = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data = raw.numpy().data
        for start in range(0, len(data), PIECE):
            yield data[start : start + PIECE]


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise TypeError(f"tensor '{name}' has type {tensor.dtype}, which a checkpoint cannot hold")
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
