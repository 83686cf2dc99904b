"""What lies beside a sample's image in its shard: the mask that was packed with it."""

from __future__ import annotations

import tarfile
from typing import Any

import numpy.typing as npt

from nanodist.decoding.codec import decode as decode_image
from nanodist.decoding.codec import probe
from nanodist.shards.masks import MASK_ENCODING, MASK_SUFFIX
from nanodist.shards.store import Store
from nanodist.shards.tar import BLOCK, padded

# After its image a sample has at most a mask and its JSON.
_MEMBERS = 2


def find_companion(store: Store, i: int, suffix: str) -> tuple[int, int] | None:
    """Where the member ``suffix`` of sample ``i`` lies behind its image: offset and size in the shard; else ``None``.

    Raises:
        OSError: the shard cannot be read.
        tarfile.HeaderError: what follows is no member of a tar.
    """
    sample = store.samples[i]
    offset = sample.offset + padded(sample.size)
    for _ in range(_MEMBERS):
        head = bytes(store.files.read(sample.shard, offset, BLOCK))
        if not head.strip(b"\0"):
            return None  # the end of the tar
        info = tarfile.TarInfo.frombuf(head, "ascii", "strict")
        offset += BLOCK
        if info.name == f"{sample.key}.{suffix}" and info.isreg():
            return offset, info.size
        offset += padded(info.size)
    return None


def read_mask_bytes(store: Store, i: int) -> bytes | None:
    """The encoded mask of sample ``i``, or ``None`` where it was packed without one.

    Raises:
        SampleError: the shard cannot be read, or what follows the image is no member of a tar.
    """
    try:
        found = find_companion(store, i, MASK_SUFFIX)
        if found is None:
            return None
        data = bytes(store.files.read(store.samples[i].shard, *found))
    except OSError as error:
        raise store.error(i, f"the shard cannot be read ({error.strerror or error})") from None
    except tarfile.HeaderError as error:
        raise store.error(i, f"no member of a tar follows its image ({error})") from None
    if len(data) != found[1]:
        raise store.error(i, "the shard ends inside its mask")
    return data


def read_mask_of(store: Store, i: int) -> npt.NDArray[Any] | None:
    """The mask (H, W) of sample ``i``, uint8 or uint16, or ``None`` where it was packed without one.

    Raises:
        SampleError: the mask is damaged, or of another size than the image; names shard and sample.
    """
    data = read_mask_bytes(store, i)
    if data is None:
        return None
    expected = tuple(int(store.samples.columns[name][i]) for name in ("height", "width"))
    try:
        height, width, depth = probe(data, MASK_ENCODING)
        if (height, width) != expected:
            raise ValueError(f"it has {height} x {width} pixels, and the image {expected[0]} x {expected[1]}")
        return decode_image(data, height, width, depth, MASK_ENCODING)
    except ValueError as error:
        raise store.error(i, f"its mask: {error}") from None
