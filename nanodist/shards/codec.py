"""Tiles to the bytes that stand in a shard, and back."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from PIL import Image, PngImagePlugin

SUFFIX = "png"


def encode_png(tile: npt.NDArray[Any]) -> bytes:
    """A (H, W) uint8 or uint16 tile as a lossless grayscale PNG."""
    if tile.dtype not in (np.uint8, np.uint16) or tile.ndim != 2:
        raise ValueError(f"a tile is (H, W) uint8 or uint16, not {tile.shape} {tile.dtype}")
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(data: bytes, height: int, width: int, depth: int) -> npt.NDArray[Any]:
    """The (height, width) tile of ``depth`` 8 (uint8) or 16 (uint16) bits in ``data``.

    Raises:
        ValueError: damaged, or of another size or depth, with what was found instead.
    """
    try:
        with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:
            if (image.height, image.width) != (height, width):  # before anything of that size is allocated
                raise ValueError(f"it is {image.height} x {image.width} pixels and not {height} x {width}")
            tile = np.asarray(image)
    except (OSError, SyntaxError, EOFError, IndexError) as error:
        raise ValueError(f"no readable PNG ({' '.join(str(error).split())})") from None
    if depth == 16 and tile.dtype == np.int32:  # how older Pillow gives 16 bits
        tile = tile.astype(np.uint16)
    if tile.ndim != 2 or tile.dtype.kind != "u" or tile.dtype.itemsize * 8 != depth:
        raise ValueError(f"its pixels are {tile.dtype} {tile.shape} and not {depth}-bit grayscale")
    return tile


def sample_hash(data: bytes) -> str:
    """The xxh3 of a sample's bytes, as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)
