"""What lies beside a sample's image in its shard: the mask that was packed with it."""

from __future__ import annotations

import tarfile
from typing import Any

import numpy.typing as npt

from nanodist.decoding.codec import decode as decode_image
from nanodist.decoding.codec import probe
from nanodist.shards.masks import MASK_ENCODING, MASK_SUFFIX
from nanodist.shards.store import SampleError, Store
from nanodist.shards.tar import BLOCK, padded


def read_companion(store: Store, i: int, suffix: str) -> bytes | None:
    """The bytes of the member that follows sample ``i``'s image, where its name ends in ``suffix``, else ``None``.

    Raises:
        SampleError: the shard cannot be read, or what follows is no member of a tar.
    """
    sample = store.samples[i]
    path = store.path / store.manifest.shards[sample.shard].file
    try:
        with open(path, "rb") as file:
            file.seek(sample.offset + padded(sample.size))
            head = file.read(BLOCK)
            if not head.strip(b"\0"):
                return None  # the end of the tar
            info = tarfile.TarInfo.frombuf(head, "ascii", "strict")
            if info.name != f"{sample.key}.{suffix}" or not info.isreg():
                return None
            data = file.read(info.size)
    except OSError as error:
        raise SampleError(path, sample.key, f"the shard cannot be read ({error.strerror})") from None
    except tarfile.HeaderError as error:
        raise SampleError(path, sample.key, f"no member of a tar follows its image ({error})") from None
    if len(data) != info.size:
        raise SampleError(path, sample.key, "the shard ends inside its mask")
    return data


def read_mask_of(store: Store, i: int) -> npt.NDArray[Any] | None:
    """The mask (H, W) of sample ``i``, uint8 or uint16, or ``None`` where it was packed without one.

    Raises:
        SampleError: the mask is damaged, or of another size than the image; names shard and sample.
    """
    data = read_companion(store, i, MASK_SUFFIX)
    if data is None:
        return None
    sample = store.samples[i]
    try:
        height, width, depth = probe(data, MASK_ENCODING)
        if (height, width) != (sample.height, sample.width):
            raise ValueError(f"its mask has {height} x {width} pixels, and it {sample.height} x {sample.width}")
        return decode_image(data, height, width, depth, MASK_ENCODING)
    except ValueError as error:
        path = store.path / store.manifest.shards[sample.shard].file
        raise SampleError(path, sample.key, f"its mask: {error}") from None
