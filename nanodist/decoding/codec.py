"""Tiles to the bytes that stand in a shard, and back.

Every encoding is a file format that others read: ``webdataset``'s own ``decode("l")`` reads all of them for 8 bits, and
:func:`webdataset_decoder` those of 16 bits too. docs/benchmarks.md has their sizes and speeds.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from PIL import Image

from nanodist.decoding.png import decode_foreign_png, decode_own_png, encode_png, is_own_png, untyped_imagecodecs

# Names of --encoding, the default first.
ENCODINGS = ("tif", "raw", "png", "jpg")
# Endings of members that hold an image, as other writers name them.
IMAGE_SUFFIXES = ("tif", "tiff", "pgm", "npy", "png", "jpg", "jpeg")
RAW_SUFFIXES = ("pgm", "npy")
_ZSTD_LEVEL = 9
_JPEG_QUALITY = 95
_MAX_PIXELS = 2**29
_ZSTD, _PREDICTOR = 50000, 2

Pixels = npt.NDArray[Any]


def suffix_of(encoding: str, depth: int) -> str:
    """The ending of members of ``encoding`` that hold ``depth`` bits a pixel.

    Raw pixels carry the smallest header there is: PGM, or, as a PGM of 16 bits has its bytes swapped, NPY.
    """
    return ("npy" if depth == 16 else "pgm") if encoding == "raw" else encoding


def encode(tile: Pixels, encoding: str) -> bytes:
    """A (H, W) uint8 or uint16 tile as a file of ``encoding``; all but ``jpg`` are lossless.

    Raises:
        ValueError: no such tile or encoding, or 16 bits as JPEG, which has 8.
    """
    if tile.dtype not in (np.uint8, np.uint16) or tile.ndim != 2:
        raise ValueError(f"a tile is (H, W) uint8 or uint16, not {tile.shape} {tile.dtype}")
    if encoding == "tif":
        return _encode_tiff(tile)
    if encoding == "raw":
        return raw_header(*tile.shape, 8 * tile.dtype.itemsize) + tile.tobytes()
    if encoding == "jpg" and tile.dtype != np.uint8:
        raise ValueError("JPEG holds 8 bits a pixel and not 16")
    if encoding == "png":
        return encode_png(tile)
    if encoding != "jpg":
        raise ValueError(f"there is no encoding '{encoding}': {', '.join(ENCODINGS)}")
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return buffer.getvalue()


def decode(data: bytes, height: int, width: int, depth: int, suffix: str = "png") -> Pixels:
    """The (height, width) tile of ``depth`` 8 (uint8) or 16 (uint16) bits in ``data``.

    Raises:
        ValueError: damaged, or of another size or depth, with what was found instead.
    """
    tile = np.empty((height, width), np.uint16 if depth == 16 else np.uint8)
    decode_into(data, suffix, tile)
    return tile


def decode_into(data: bytes | memoryview, suffix: str, out: Pixels) -> None:
    """Write the pixels of ``data`` into ``out`` (H, W), C-contiguous uint8 or uint16; what it held is lost.

    Raises:
        ValueError: damaged, or of another size or depth, with what was found instead.
    """
    height, width = out.shape
    depth = 8 * out.dtype.itemsize
    # What nanodist itself wrote begins with bytes that are known.
    if suffix in RAW_SUFFIXES and _is_raw(data, height, width, depth):
        start = len(data) - out.nbytes
        out.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8, offset=start)
        return
    if suffix == "tif" and data[: len(head := _tiff_header(height, width, depth, len(data)))] == head:
        _decode_zstd(memoryview(data)[len(head) :], out)
        return
    if suffix == "png" and is_own_png(data, height, width, depth):
        _failing("PNG", lambda: decode_own_png(data, out))
        return
    found = probe(data, suffix)
    if found[:2] != (height, width):  # before anything of that size is allocated
        raise ValueError(f"it is {found[0]} x {found[1]} pixels and not {height} x {width}")
    if found[2] != depth:
        raise ValueError(f"it has {found[2]} bits a pixel and not {depth}")
    _reader(suffix)(data, out)


def probe(data: bytes | memoryview, suffix: str) -> tuple[int, int, int]:
    """Height, width and bits a pixel (8 or 16) of an image, of which only the header is read.

    Raises:
        ValueError: no grey image of a format that is read, or more than 2^29 pixels.
    """
    found = _VIEW_PROBES.get(suffix)
    if found is not None:
        height, width, depth = found(memoryview(data))
    else:
        reader = _probe_npy if suffix == "npy" else _probe_pillow
        height, width, depth = reader(bytes(data[: 1 << 20]) if suffix != "tif" else bytes(data))
    if not 0 < height * width <= _MAX_PIXELS:
        raise ValueError(f"it claims {height} x {width} pixels")
    return height, width, depth


def sample_hash(data: bytes | memoryview) -> str:
    """The xxh3 of a sample's bytes, as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


def webdataset_decoder(key: str, data: bytes) -> Pixels | None:
    """For webdataset: ``WebDataset(urls).decode(webdataset_decoder)`` gives uint8 or uint16 (H, W) without loss.

    ``decode("l")`` reads the same shards, but makes 8 bits of 16. Keys that hold no image are left to webdataset.
    """
    suffix = key.rpartition(".")[2].lower()
    if suffix not in IMAGE_SUFFIXES:
        return None
    return decode(data, *probe(data, suffix), suffix)


def _failing(what: str, decoder: Callable[[], Any]) -> Any:
    """What ``decoder`` gives; whatever it raises about the data becomes a ``ValueError`` of one line."""
    try:
        return decoder()
    except MemoryError:
        raise
    except Exception as error:  # each library has errors of its own
        raise ValueError(f"no readable {what} ({' '.join(str(error).split()) or type(error).__name__})") from None


# Raw pixels.


@lru_cache(64)
def raw_header(height: int, width: int, depth: int) -> bytes:
    """What stands before the pixels of a raw tile; they fill the rest of the member, as they lie in memory."""
    if depth == 8:
        return f"P5\n{width} {height}\n255\n".encode()
    buffer = io.BytesIO()
    facts = {"descr": "<u2", "fortran_order": False, "shape": (height, width)}
    np.lib.format.write_array_header_1_0(buffer, facts)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def _is_raw(data: bytes | memoryview, height: int, width: int, depth: int) -> bool:
    head = raw_header(height, width, depth)
    return len(data) == len(head) + height * width * depth // 8 and data[: len(head)] == head


def _probe_npy(data: bytes) -> tuple[int, int, int]:
    def facts() -> Any:
        stream = io.BytesIO(data)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        return read[np.lib.format.read_magic(stream)](stream)  # type: ignore[no-untyped-call]

    shape, _, dtype = _failing("NPY", facts)
    if len(shape) != 2 or dtype not in (np.dtype("u1"), np.dtype("<u2"), np.dtype(">u2")):
        raise ValueError(f"its pixels are {dtype} {shape} and not grey uint8 or uint16")
    return shape[0], shape[1], 8 * dtype.itemsize


def _read_npy(data: bytes | memoryview, out: Pixels) -> None:
    out[:] = _failing("NPY", lambda: np.load(io.BytesIO(data), allow_pickle=False))


# TIFF: one strip of zstd over the horizontal predictor.


@lru_cache(4096)
def _tiff_header(height: int, width: int, depth: int, length: int) -> bytes:
    """Everything before the strip of a file of ``length`` bytes: the directory comes first."""
    start = 8 + 2 + 12 * 11 + 4
    entries = [  # tag, type (3: 16 bits, 4: 32 bits), value
        (256, 4, width),
        (257, 4, height),
        (258, 3, depth),
        (259, 3, _ZSTD),
        (262, 3, 1),  # black is zero
        (273, 4, start),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, max(0, length - start)),
        (317, 3, _PREDICTOR),
        (339, 3, 1),  # unsigned
    ]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    return head + b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries) + bytes(4)


def _encode_tiff(tile: Pixels) -> bytes:
    differences = tile.copy()
    differences[:, 1:] -= tile[:, :-1]
    strip = untyped_imagecodecs().zstd_encode(np.ascontiguousarray(differences).view(np.uint8), level=_ZSTD_LEVEL)
    height, width = tile.shape
    depth = 8 * tile.dtype.itemsize
    length = len(_tiff_header(height, width, depth, 0)) + len(strip)
    return _tiff_header(height, width, depth, length) + bytes(strip)


def _decode_zstd(strip: memoryview, out: Pixels) -> None:
    codecs = untyped_imagecodecs()
    flat = out.reshape(-1).view(np.uint8)
    made = _failing("TIFF", lambda: codecs.zstd_decode(strip, out=flat))
    if len(made) != len(flat):
        raise ValueError(f"it has {len(made)} bytes of pixels and not {len(flat)}")
    codecs.delta_decode(out, axis=1, out=out)


# What other programs write.


def _probe_png(data: memoryview) -> tuple[int, int, int]:
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 33:
        raise ValueError("no readable PNG (its header is damaged)")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if colour != 0 or depth not in (8, 16):
        raise ValueError(f"its pixels are no 8 or 16 bit grey (PNG colour type {colour}, {depth} bits)")
    return height, width, depth


def _probe_jpeg(data: memoryview) -> tuple[int, int, int]:
    place = 2
    while data[:2] == b"\xff\xd8" and place + 9 < len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width, channels = struct.unpack(">BHHB", data[place + 4 : place + 10])
            if channels != 1 or bits != 8:
                raise ValueError(f"its pixels are no 8 bit grey ({channels} channels of {bits} bits)")
            return height, width, 8
        place += 2 + length
    raise ValueError("no readable JPEG (its header is damaged)")


# They look at the first bytes, of which no copy is made.
_VIEW_PROBES = {"png": _probe_png, "jpg": _probe_jpeg, "jpeg": _probe_jpeg}


def _probe_pillow(data: bytes) -> tuple[int, int, int]:
    image = _failing("image", lambda: Image.open(io.BytesIO(data), formats=("TIFF", "PPM")))
    if image.mode != "L" and not image.mode.startswith("I;16"):
        raise ValueError(f"its pixels are {image.mode} and not 8 or 16 bit grey")
    return image.height, image.width, 8 if image.mode == "L" else 16


def _read_pillow(data: bytes | memoryview, out: Pixels) -> None:
    def pixels() -> Pixels:
        with Image.open(io.BytesIO(data), formats=("TIFF", "PPM")) as image:
            return np.asarray(image)

    out[:] = _failing("image", pixels)


@lru_cache(16)
def _reader(suffix: str) -> Callable[[bytes | memoryview, Pixels], None]:
    codecs = untyped_imagecodecs()

    def by(what: str, decoder: Callable[..., Any]) -> Callable[[bytes | memoryview, Pixels], None]:
        return lambda data, out: _failing(what, lambda: decoder(data, out=out))

    if suffix == "png":
        return lambda data, out: _failing("PNG", lambda: decode_foreign_png(data, out))
    if suffix in ("jpg", "jpeg"):
        return by("JPEG", codecs.jpeg8_decode)
    return _read_npy if suffix == "npy" else _read_pillow
