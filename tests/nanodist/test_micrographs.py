"""Readers: native pixels, believable pixel sizes, and one sentence for everything that is no micrograph."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from hpc.errors import UserError
from nanodist.micrographs import count_micrographs, read_micrograph, read_micrographs
from nanodist.micrographs.micrograph import MAX_PIXELS


def noise(dtype, shape=(20, 30), seed=0):
    values = np.random.default_rng(seed).random(shape) * 200
    return (values * 100 if np.dtype(dtype).itemsize > 1 else values).astype(dtype)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_png_keeps_its_depth(tmp_path, dtype):
    pixels = noise(dtype)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    micrograph = read_micrograph(tmp_path / "a.png")
    assert micrograph.pixels.dtype == dtype
    np.testing.assert_array_equal(micrograph.pixels, pixels)
    assert micrograph.pixel_size_nm is None and micrograph.pixel_size_source.startswith("unknown")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "uint32", "float32", "float64"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_keeps_its_depth(tmp_path, dtype, order):
    pixels = noise(dtype)
    tifffile.imwrite(tmp_path / "a.tif", pixels, byteorder=order)
    found = read_micrograph(tmp_path / "a.tif").pixels
    assert found.dtype == np.dtype(dtype) and found.dtype.isnative
    np.testing.assert_array_equal(found, pixels)


def test_the_content_decides_and_not_the_suffix(tmp_path):
    pixels = noise("uint8")
    Image.fromarray(pixels).save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_micrograph(tmp_path / "a.tif").pixels, pixels)


@pytest.mark.parametrize("kind", ["pages", "imagej stack", "compressed"])
def test_every_page_is_a_micrograph(tmp_path, kind):
    stack = noise("uint16", (3, 20, 30))
    path = tmp_path / "stack.tif"
    if kind == "pages":
        with tifffile.TiffWriter(path) as writer:
            for page in stack:
                writer.write(page, contiguous=False, metadata=None)
    elif kind == "imagej stack":  # one page directory, three images
        tifffile.imwrite(path, stack, imagej=True, metadata={"axes": "ZYX"})
    else:
        tifffile.imwrite(path, stack, compression="zlib", photometric="minisblack")
    assert count_micrographs(path) == 3
    for found, expected in zip(read_micrographs(path), stack, strict=True):
        np.testing.assert_array_equal(found.pixels, expected)
        assert found.metadata["pages"] == 3
    with pytest.raises(UserError, match="has 3 micrographs, so there is no number 3"):
        read_micrograph(path, 3)


def test_thumbnails_are_no_micrographs(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(noise("uint8", (40, 40)), metadata=None)
        writer.write(noise("uint8", (10, 10)), subfiletype=1, metadata=None)
    assert count_micrographs(tmp_path / "a.tif") == 1


def test_lzw_without_imagecodecs_goes_through_pillow(tmp_path, monkeypatch):
    pixels = [noise("uint16", seed=0), noise("uint16", seed=1)]
    first, second = (Image.fromarray(p) for p in pixels)
    first.save(tmp_path / "a.tif", compression="tiff_lzw", save_all=True, append_images=[second])

    def refuse(*_, **__):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", refuse)
    monkeypatch.setattr(tifffile.TiffFrame, "asarray", refuse)
    for page, expected in enumerate(pixels):
        np.testing.assert_array_equal(read_micrograph(tmp_path / "a.tif", page).pixels, expected)


def test_imagej_calibration_is_nanometres_y_x(tmp_path):
    options = {"imagej": True, "resolution": (4.0, 2.0), "metadata": {"unit": "nm"}}
    tifffile.imwrite(tmp_path / "nm.tif", noise("uint16"), **options)
    assert read_micrograph(tmp_path / "nm.tif").pixel_size_nm == pytest.approx((0.5, 0.25))
    options["metadata"] = {"unit": "um"}
    tifffile.imwrite(tmp_path / "um.tif", noise("uint16"), **options)
    assert read_micrograph(tmp_path / "um.tif").pixel_size_nm == pytest.approx((500, 250))
    options["metadata"] = {"unit": "sec"}
    tifffile.imwrite(tmp_path / "s.tif", noise("uint16"), **options)
    assert "'sec' is no length" in read_micrograph(tmp_path / "s.tif").pixel_size_source


@pytest.mark.parametrize(
    ("resolution", "unit", "expected"),
    [
        ((2e7, 2e7), "CENTIMETER", (0.5, 0.5)),
        ((2.54e7, 5.08e7), "INCH", (0.5, 1.0)),
        ((72, 72), "INCH", None),
        ((96, 96), "INCH", None),
        ((300, 300), "INCH", None),
        ((28, 28), "CENTIMETER", None),
        ((0, 0), "CENTIMETER", None),
        ((1, 1), "NONE", None),
    ],
)
def test_resolution_tags_and_default_dpi(tmp_path, resolution, unit, expected):
    tifffile.imwrite(tmp_path / "a.tif", noise("uint8"), resolution=resolution, resolutionunit=unit)
    micrograph = read_micrograph(tmp_path / "a.tif")
    if expected is None:
        assert micrograph.pixel_size_nm is None and micrograph.pixel_size_source.startswith("unknown: ")
    else:
        assert micrograph.pixel_size_nm == pytest.approx(expected)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_display_resolution_in_png_and_jpeg_is_unknown(tmp_path, suffix):
    Image.fromarray(noise("uint8")).save(tmp_path / f"a.{suffix}", dpi=(96, 96))
    assert read_micrograph(tmp_path / f"a.{suffix}").pixel_size_nm is None


def test_png_resolution_of_a_microscope(tmp_path):
    Image.fromarray(noise("uint8")).save(tmp_path / "a.png", dpi=(2.54e6, 2.54e6))
    assert read_micrograph(tmp_path / "a.png").pixel_size_nm == pytest.approx((10, 10), rel=1e-6)


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_equal_channels_become_gray_and_colour_is_refused(tmp_path, suffix):
    gray = np.repeat(noise("uint8")[..., None], 3, axis=2)
    Image.fromarray(gray).save(tmp_path / f"gray.{suffix}")
    assert read_micrograph(tmp_path / f"gray.{suffix}").pixels.shape == (20, 30)
    Image.fromarray(noise("uint8", (20, 30, 3))).save(tmp_path / f"photo.{suffix}")
    with pytest.raises(UserError, match=rf"photo\.{suffix} is a colour picture"):
        read_micrograph(tmp_path / f"photo.{suffix}")


def test_planar_rgb_and_palette_tiffs(tmp_path):
    gray = noise("uint16")
    tifffile.imwrite(tmp_path / "p.tif", np.stack([gray] * 3), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_micrograph(tmp_path / "p.tif").pixels, gray)
    ramp = np.arange(256, dtype=np.uint16)[::-1] * 257
    indices = noise("uint8")
    tifffile.imwrite(tmp_path / "c.tif", indices, photometric="palette", colormap=np.stack([ramp] * 3))
    np.testing.assert_array_equal(read_micrograph(tmp_path / "c.tif").pixels, 255 - indices)


def test_white_stored_as_zero_is_turned_and_said(tmp_path):
    pixels = noise("uint8")
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite")
    micrograph = read_micrograph(tmp_path / "a.tif")
    np.testing.assert_array_equal(micrograph.pixels, 255 - pixels)
    assert "inverted" in micrograph.metadata


def test_transparency(tmp_path):
    gray = noise("uint8")
    Image.fromarray(np.dstack([gray, np.full_like(gray, 255)]), "LA").save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(read_micrograph(tmp_path / "opaque.png").pixels, gray)
    Image.fromarray(np.dstack([gray, gray]), "LA").save(tmp_path / "thin.png")
    with pytest.raises(UserError, match="partly transparent"):
        read_micrograph(tmp_path / "thin.png")


def test_16_bit_colour_png_is_refused_instead_of_cut_to_8_bits(tmp_path):
    (tmp_path / "a.png").write_bytes(png_header(4, 4, depth=16, colour=2))
    with pytest.raises(UserError, match="16-bit colour"):
        read_micrograph(tmp_path / "a.png")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinite_pixels(tmp_path, value):
    pixels = noise("float32")
    pixels[3, 4] = value
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    with pytest.raises(UserError, match=r"a\.tif has 1 pixels that are NaN or infinite"):
        read_micrograph(tmp_path / "a.tif")


def test_complex_pixels(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", noise("float32").astype(np.complex64))
    with pytest.raises(UserError, match="complex64"):
        read_micrograph(tmp_path / "a.tif")


def test_text_empty_and_foreign_files(tmp_path):
    (tmp_path / "text.png").write_text("operator: nobody\nmicroscope: größer\n")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "zip.tif").write_bytes(b"PK\x03\x04" + bytes(60))
    for name, words in [("text", "is a text file"), ("empty", "is empty"), ("zip", "is no image"), ("gone", "exist")]:
        path = next(tmp_path.glob(f"{name}.*"), tmp_path / "gone.png")
        with pytest.raises(UserError, match=words) as error:
            read_micrograph(path)
        assert path.name in str(error.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_truncated_files(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise("uint8", (90, 90))).save(path)
    whole = path.read_bytes()
    for keep in (20, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:keep])
        with pytest.raises(UserError, match="damaged or truncated"):
            read_micrograph(path)


def test_pages_behind_a_broken_list_are_not_lost_silently(tmp_path):
    path, pages = tmp_path / "stack.tif", noise("uint8", (5, 48, 48))
    with tifffile.TiffWriter(path) as file:
        for page in pages:
            file.write(page, contiguous=False)
    with tifffile.TiffFile(path) as file:
        third = file.pages[3].offset
    path.write_bytes(path.read_bytes()[:third])
    assert count_micrographs(path) == 4
    assert all(np.array_equal(read_micrograph(path, n).pixels, pages[n]) for n in range(3))
    with pytest.raises(UserError, match=r"breaks off after 3 micrographs, and what follows is lost"):
        read_micrograph(path, 3)
    with pytest.raises(UserError, match="has 3 micrographs, so there is no number 4"):
        read_micrograph(path, 4)


def test_of_a_stack_cut_in_its_last_directory_the_other_pages_are_read(tmp_path):
    path, pages = tmp_path / "stack.tif", noise("uint8", (4, 48, 48))
    tifffile.imwrite(path, pages, imagej=True)
    with tifffile.TiffFile(path) as file:
        last = file.pages[3].offset
    whole = path.read_bytes()
    if last > len(whole) - 400:  # directories at the end of the file
        path.write_bytes(whole[: last + 60])
        assert count_micrographs(path) >= 3
        assert all(np.array_equal(read_micrograph(path, n).pixels, pages[n]) for n in range(3))


def test_a_list_of_pages_that_leads_back_to_the_first_is_whole(tmp_path):
    path = tmp_path / "ring.tif"
    tifffile.imwrite(path, noise("uint8", (48, 48)), metadata=None)
    data = bytearray(path.read_bytes())
    tags = int.from_bytes(data[8:10], "little")
    data[10 + 12 * tags : 14 + 12 * tags] = (8).to_bytes(4, "little")
    path.write_bytes(data)
    assert count_micrographs(path) == 1 and read_micrograph(path).pixels.shape == (48, 48)


def test_missing_strips_are_not_filled_with_zeros(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise("uint8", (64, 64)), rowsperstrip=8)
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages[0].tags["StripByteCounts"].overwrite([512] * 7 + [0])
    with pytest.raises(UserError, match="pixels are missing"):
        read_micrograph(path)


def test_flipped_bits_in_a_png(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(noise("uint8", (90, 90))).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        read_micrograph(path)


def test_decompression_bombs_and_zero_sizes(tmp_path):
    bomb = png_header(60000, 60000) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(UserError, match=f"60000 x 60000 pixels, more than the {MAX_PIXELS}"):
        read_micrograph(tmp_path / "bomb.png")
    (tmp_path / "zero.png").write_bytes(png_header(0, 5) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(UserError, match=r"zero\.png"):
        read_micrograph(tmp_path / "zero.png")
    path = tmp_path / "bomb.tif"
    tifffile.imwrite(path, noise("uint8", (16, 16)), metadata=None)
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages[0].tags["ImageWidth"].overwrite(60000)
        tif.pages[0].tags["ImageLength"].overwrite(60000)
    with pytest.raises(UserError, match="60000 x 60000"):
        read_micrograph(path)
