"""Grey PNG that is quick to read, its reader, and the quickest reader of PNG that others wrote.

PNG of other writers is slow to decode for its Paeth filter, which goes pixel by pixel, more than for inflate. Written
with the Sub filter in every row and compressed by libdeflate it is the same format to everybody, 4 % larger, and three
to four times as fast to decode (docs/benchmarks.md): one inflate and one cumulative sum.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[Any]

_SUB = 1
_LEVEL = 6
# Tells that the filter of all rows is Sub, so that nothing is inflated to find out.
_TEXT = b"Software\0nanodist, rows: Sub"


def untyped_imagecodecs() -> Any:
    """The library, imported where it is first needed; its types are narrower than what it takes."""
    import imagecodecs

    return imagecodecs


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


_END = _chunk(b"IEND", b"")


@lru_cache(64)
def png_header(height: int, width: int, depth: int) -> bytes:
    """Everything before the pixels' chunk of what :func:`encode_png` writes."""
    facts = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + facts + _chunk(b"tEXt", _TEXT)


def encode_png(tile: Pixels) -> bytes:
    """A (H, W) uint8 or uint16 tile as PNG, losslessly."""
    height, width = tile.shape
    each = tile.dtype.itemsize
    pixels = np.ascontiguousarray(tile, tile.dtype.newbyteorder(">")).view(np.uint8).reshape(height, width, each)
    rows = np.empty((height, 1 + width * each), np.uint8)
    rows[:, 0] = _SUB
    differences = rows[:, 1:].reshape(height, width, each)
    differences[:, 0] = pixels[:, 0]
    np.subtract(pixels[:, 1:], pixels[:, :-1], out=differences[:, 1:])
    packed = untyped_imagecodecs().deflate_encode(rows, level=_LEVEL)
    return png_header(height, width, 8 * each) + _chunk(b"IDAT", bytes(packed)) + _END


def is_own_png(data: bytes | memoryview, height: int, width: int, depth: int) -> bool:
    """Whether ``data`` is what :func:`encode_png` writes of such a tile, as far as its frame tells."""
    head = png_header(height, width, depth)
    if data[: len(head)] != head:
        return False
    length = len(data) - len(head) - 12 - len(_END)
    return length >= 0 and data[len(head) : len(head) + 8] == struct.pack(">I4s", length, b"IDAT")


def decode_own_png(data: bytes | memoryview, out: Pixels) -> None:
    """The pixels of what :func:`is_own_png` says yes to, into ``out`` (H, W), C-contiguous uint8 or uint16.

    Raises:
        ValueError: damaged.
        Exception: of imagecodecs, where the compressed bytes are damaged (their checksum is looked at).
    """
    codecs = untyped_imagecodecs()
    height, width = out.shape
    each = out.dtype.itemsize
    start = len(png_header(height, width, 8 * each)) + 8
    flat = np.empty(height * (1 + width * each), np.uint8)
    made = codecs.deflate_decode(memoryview(data)[start : len(data) - len(_END) - 4], out=flat)
    rows = flat.reshape(height, 1 + width * each)
    if len(made) != len(flat) or (rows[:, 0] != _SUB).any():
        raise ValueError("its rows are not as its header says")
    pixels = out.view(np.uint8).reshape(height, width, each)
    codecs.delta_decode(rows[:, 1:].reshape(height, width, each), axis=1, out=pixels)
    if each == 2 and np.little_endian:
        out.byteswap(inplace=True)


@lru_cache(2)
def _rust_decoder(each: int) -> Callable[[bytes, tuple[int, int], str], Pixels] | None:
    """Kornia's PNG decoder for pixels of ``each`` bytes: it undoes Paeth rows of grey three times as fast."""
    try:
        import kornia_rs
    except ImportError:  # an installation that does not train
        return None
    name = "decode_image_png_u8" if each == 1 else "decode_image_png_u16"
    found: Callable[[bytes, tuple[int, int], str], Pixels] | None
    found = getattr(getattr(kornia_rs, "io", kornia_rs), name, None) or getattr(kornia_rs, name, None)
    return found


def decode_foreign_png(data: bytes | memoryview, out: Pixels) -> None:
    """The pixels of any grey PNG of 8 or 16 bits into ``out`` (H, W) of that type and size.

    libpng has the last word, so that what counts as damaged does not depend on which libraries are installed.

    Raises:
        Exception: of imagecodecs, where the file is damaged.
    """
    decode = _rust_decoder(out.dtype.itemsize)
    if decode is not None:
        try:
            out[:] = decode(bytes(data), out.shape, "mono")[..., 0]
            return
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # a panic in Rust is no Exception
            pass
    untyped_imagecodecs().png_decode(data, out=out)
