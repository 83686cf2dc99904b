"""The PNG that nanodist writes: everybody's to read, quick to decode, and never wrong pixels from damaged bytes."""

from __future__ import annotations

import io

import imagecodecs
import numpy as np
import pytest
from PIL import Image
from webdataset.autodecode import imagehandler

from nanodist.decoding import png
from nanodist.decoding.codec import decode, decode_into, encode, probe
from nanodist.decoding.png import is_own_png


def tile(shape, dtype, seed=0):
    smooth = np.cumsum(np.random.default_rng(seed).normal(size=shape), 1)
    return (smooth * 37 + 120).astype(np.int64).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (31, 65), (256, 256)])
def test_all_readers_see_the_same_pixels(shape, dtype):
    pixels = tile(shape, dtype)
    data = encode(pixels, "png")
    depth = 8 * pixels.itemsize
    assert is_own_png(data, *shape, depth) and probe(data, "png") == (*shape, depth)
    np.testing.assert_array_equal(decode(data, *shape, depth, "png"), pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    np.testing.assert_array_equal(imagecodecs.png_decode(data), pixels)
    if depth == 8:
        np.testing.assert_array_equal(imagehandler("l8")("png", data), pixels)


@pytest.mark.parametrize("layout", [lambda a: a[::2, ::3], lambda a: a.T, lambda a: a[::-1, ::-1]])
def test_the_layout_in_memory_does_not_matter(layout):
    pixels = layout(tile((40, 60), np.uint16))
    data = encode(pixels, "png")
    assert data == encode(np.ascontiguousarray(pixels, np.uint16), "png")
    np.testing.assert_array_equal(decode(data, *pixels.shape, 16, "png"), pixels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("rust", ["kornia's", "panics", "none"])
def test_png_of_others_takes_a_library_and_gives_its_pixels(monkeypatch, dtype, rust):
    def panics(*_):
        raise BaseException("PanicException")

    if rust == "kornia's":
        assert png._rust_decoder(1) is not None and png._rust_decoder(2) is not None
    else:
        monkeypatch.setattr(png, "_rust_decoder", lambda each: panics if rust == "panics" else None)
    pixels = tile((50, 40), dtype)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data, depth = buffer.getvalue(), 8 * pixels.itemsize
    assert not is_own_png(data, 50, 40, depth)
    np.testing.assert_array_equal(decode(data, 50, 40, depth, "png"), pixels)
    np.testing.assert_array_equal(decode(memoryview(data), 50, 40, depth, "png"), pixels)
    for end in range(0, len(data) - 12, 97):
        with pytest.raises(ValueError, match="PNG"):
            decode(data[:end], 50, 40, depth, "png")


def test_damage_never_gives_pixels():
    pixels = tile((16, 16), np.uint8)
    data = encode(pixels, "png")
    refused = 0
    for place in range(len(data) - 12):  # the last chunk says nothing
        bad = bytearray(data)
        bad[place] ^= 0x55
        try:
            got = decode(bytes(bad), 16, 16, 8, "png")
        except ValueError:
            refused += 1
        else:
            np.testing.assert_array_equal(got, pixels, err_msg=f"byte {place}")
    assert refused > len(data) / 2
    for end in range(len(data) - 12):
        with pytest.raises(ValueError, match="PNG"):
            decode(data[:end], 16, 16, 8, "png")


def test_another_size_or_depth_is_refused_by_name():
    data = encode(tile((16, 24), np.uint8), "png")
    with pytest.raises(ValueError, match="16 x 24 pixels and not 24 x 16"):
        decode_into(data, "png", np.empty((24, 16), np.uint8))
    with pytest.raises(ValueError, match="8 bits a pixel and not 16"):
        decode_into(data, "png", np.empty((16, 24), np.uint16))
