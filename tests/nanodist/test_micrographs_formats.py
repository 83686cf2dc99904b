"""Microscopes' own formats: native pixels, sizes in nm, no operators, and a true reason where it is no image."""

from __future__ import annotations

import gzip
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc import extras
from hpc.errors import UserError
from nanodist.micrographs import NotAMicrograph, count_micrographs, isolated, read_micrograph, read_micrographs
from nanodist.micrographs.micrograph import MAX_PIXELS
from nanodist.micrographs.mrc import is_mrc

pytest.importorskip("rsciio", reason="the extra 'io' is not installed")
pytest.importorskip("h5py", reason="the extra 'io' is not installed")
pytest.importorskip("mrcfile", reason="the extra 'io' is not installed")

from tests.nanodist.microscope_files import (
    write_dm3,
    write_emi,
    write_mrc,
    write_ncem,
    write_ser,
    write_velox,
)

INFO = {"Voltage": 200000.0, "Indicated Magnification": 5e4, "Name": "Titan", "Operator": "Jane Operator"}


def stack(dtype="uint16", shape=(3, 20, 30)):
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def check(path, expected, size_nm):
    """Every page is the expected image, with the expected size; gives the metadata of the last."""
    assert count_micrographs(path) == len(expected)
    for found, pixels in zip(read_micrographs(path), expected, strict=True):
        assert found.pixels.dtype == pixels.dtype and found.pixels.dtype.isnative
        np.testing.assert_array_equal(found.pixels, pixels)
        assert found.pixel_size_nm == (None if size_nm is None else pytest.approx(size_nm))
    with pytest.raises(UserError, match=f"has {len(expected)} micrographs, so there is no number {len(expected)}"):
        read_micrograph(path, len(expected))
    assert "Jane" not in str(found.metadata) and len(found.metadata["file_xxh3"]) == 32
    return found.metadata


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_gatan_stack(tmp_path, dtype):
    write_dm3(tmp_path / "a.dm3", stack(dtype), (1.0, 0.5, 250.0), ("s", "nm", "pm"), INFO)
    facts = check(tmp_path / "a.dm3", stack(dtype), (0.5, 0.25))
    assert (facts["voltage_kv"], facts["magnification"], facts["instrument"]) == (200, 5e4, "Titan")


def test_gatan_without_a_believable_size(tmp_path):
    for scale, unit, reason in [(0.0, "nm", "0 x 0 nm"), (-0.5, "nm", "-0.5"), (1.0, "", "states none")]:
        write_dm3(tmp_path / "a.dm3", stack()[0], (scale, scale), (unit, unit), {})
        found = read_micrograph(tmp_path / "a.dm3")
        assert found.pixel_size_nm is None and reason in found.pixel_size_source
        assert found.pixel_size_source.startswith("unknown: ")


@pytest.mark.parametrize(
    ("units", "info", "reason"),
    [
        (("1/nm", "1/nm"), {}, r"diffraction pattern .*pixels in 1/nm"),
        (("mrad", "mrad"), {}, r"diffraction pattern .*pixels in mrad"),
        (("nm", "eV"), {}, r"spectrum \(an axis in eV\)"),
        (("", ""), {"Operation Mode": "DIFFRACTION"}, "diffraction pattern .*diffraction mode"),
    ],
)
def test_gatan_that_is_no_image(tmp_path, units, info, reason):
    write_dm3(tmp_path / "a.dm3", stack()[0], (0.5, 0.5), units, info)
    for read in (count_micrographs, read_micrograph):
        with pytest.raises(NotAMicrograph, match=rf"a\.dm3 holds a {reason}.*, no micrograph"):
            read(tmp_path / "a.dm3")


def test_gatan_of_four_dimensions_and_of_one(tmp_path):
    write_dm3(tmp_path / "a.dm3", stack(shape=(2, 2, 8, 8)), (1.0,) * 4, ("nm", "nm", "", ""), {})
    with pytest.raises(NotAMicrograph, match="4 dimensions, such as a scan of diffraction patterns"):
        read_micrograph(tmp_path / "a.dm3")
    write_dm3(tmp_path / "b.dm3", stack(shape=(1, 500)), (1.0, 1.0), ("nm", "nm"), {})
    with pytest.raises(NotAMicrograph, match="a line of 500 values"):
        read_micrograph(tmp_path / "b.dm3")


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
def test_ser_with_the_settings_of_its_emi(tmp_path, dtype):
    # TIA stores the bottom row first.
    images = stack(dtype)
    write_ser(tmp_path / "many_1.ser", images, 2e-9)
    write_emi(tmp_path / "many.emi", 1)
    facts = check(tmp_path / "many_1.ser", images[:, ::-1], (2, 2))
    assert facts["voltage_kv"] == 200 and facts["magnification"] == 50000 and facts["instrument"] == "Tecnai F20"
    write_ser(tmp_path / "alone_1.ser", images[:1], 2e-9)
    assert "voltage_kv" not in check(tmp_path / "alone_1.ser", images[:1, ::-1], (2, 2))


def test_ser_of_diffraction_patterns(tmp_path):
    write_ser(tmp_path / "a_1.ser", stack()[:1], 2e7)  # 1/m: no pixel of an image is 20,000 km
    with pytest.raises(NotAMicrograph, match=r"diffraction pattern \(pixels in 1/m\)"):
        read_micrograph(tmp_path / "a_1.ser")
    write_ser(tmp_path / "b_1.ser", stack()[:1], 2e-9)
    write_emi(tmp_path / "b.emi", 1, mode="TEM uP Diffraction")
    with pytest.raises(NotAMicrograph, match="diffraction pattern"):
        read_micrograph(tmp_path / "b_1.ser")
    camera = "<AcquireInfo><CameraNamePath>CCD</CameraNamePath></AcquireInfo>"
    write_emi(tmp_path / "b.emi", 1, mode="STEM nP", more=camera)
    with pytest.raises(NotAMicrograph, match="diffraction pattern"):
        read_micrograph(tmp_path / "b_1.ser")


def test_emi_says_where_its_pixels_are(tmp_path):
    write_emi(tmp_path / "a.emi", 2)
    with pytest.raises(NotAMicrograph, match="none of which lies beside it"):
        read_micrograph(tmp_path / "a.emi")
    write_ser(tmp_path / "a_1.ser", stack()[:1], 2e-9)
    with pytest.raises(NotAMicrograph, match=r"no pixels.*SER files, which lie beside it \(a_1\.ser\)"):
        count_micrographs(tmp_path / "a.emi")


def test_velox_images_and_what_is_left_out(tmp_path):
    images = stack()
    frames = np.moveaxis(images, 0, 2)
    write_velox(tmp_path / "a.emd", [(frames, 1.5e-10, "m"), (frames, 1e9, "1/m")], spectra=2)
    facts = check(tmp_path / "a.emd", images, (0.15, 0.15))
    assert facts["left_out"][1] == "2 x Spectrum" and "reciprocal" in facts["left_out"][0]
    assert (facts["voltage_kv"], facts["instrument"], facts["detector"]) == (200, "Talos", "HAADF")
    write_velox(tmp_path / "b.emd", [(frames, 1e9, "1/m")])
    with pytest.raises(NotAMicrograph, match="reciprocal space"):
        read_micrograph(tmp_path / "b.emd")
    write_velox(tmp_path / "c.emd", [], spectra=3)
    with pytest.raises(NotAMicrograph, match="holds 3 x Spectrum"):
        read_micrograph(tmp_path / "c.emd")


def test_velox_complex_images_are_left_out(tmp_path):
    fft = np.zeros((8, 8, 1), [("realFloatHalfEven", "<f4"), ("imagFloatHalfEven", "<f4")])
    write_velox(tmp_path / "a.emd", [(fft, 1e-9, "m")])
    with pytest.raises(NotAMicrograph, match="complex numbers"):
        read_micrograph(tmp_path / "a.emd")


@pytest.mark.parametrize("unit", ["nm", "[n_m]"])
def test_ncem_with_y_and_x_last(tmp_path, unit):
    write_ncem(tmp_path / "a.emd", stack(), 0.3, unit)
    check(tmp_path / "a.emd", stack(), (0.3, 0.3))


def test_hdf5_that_would_have_other_files_read(tmp_path):
    import h5py

    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(64)))
    for name in ("raw", "link", "virtual"):
        write_velox(tmp_path / "a.emd", [(np.zeros((8, 8, 1), np.uint8), 1e-9, "m")])
        with h5py.File(tmp_path / "a.emd", "r+") as file:
            group = file["Data/Image"][f"{0:032x}"]
            del group["Data"]
            if name == "raw":
                group.create_dataset("Data", (8, 8, 1), np.uint8, external=[(str(secret), 0, 64)])
            elif name == "link":
                group["Data"] = h5py.ExternalLink(str(secret), "/x")
            else:
                layout = h5py.VirtualLayout((8, 8, 1), np.uint8)
                layout[:] = h5py.VirtualSource(str(secret), "x", (8, 8, 1))
                group.create_virtual_dataset("Data", layout)
        os.utime(tmp_path / "a.emd", ns=(len(name), len(name)))
        with pytest.raises(UserError, match="in another file"):
            read_micrograph(tmp_path / "a.emd")


def test_a_bomb_of_zeros_is_refused_unread(tmp_path):
    import h5py

    with h5py.File(tmp_path / "a.emd", "w") as file:
        file.create_dataset(
            "Data/Image/0/Data", (10**6, 10**6, 1), np.uint8, chunks=(4096, 4096, 1), compression="gzip"
        )
    assert (tmp_path / "a.emd").stat().st_size < 10_000_000
    with pytest.raises(UserError, match=rf"1000000 x 1000000 pixels, more than the {MAX_PIXELS}"):
        read_micrograph(tmp_path / "a.emd")


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "float16", "float32"])
def test_mrc_stack_stays_in_its_file(tmp_path, dtype):
    images = (stack() // 2).astype(dtype)
    write_mrc(tmp_path / "a.mrc", images, 3.5)
    check(tmp_path / "a.mrc", images, (0.35, 0.35))
    assert isinstance(read_micrograph(tmp_path / "a.mrc", 1).pixels, np.memmap)


def test_mrc_of_the_other_byte_order(tmp_path):
    import mrcfile

    images = stack("int16")
    with mrcfile.new(tmp_path / "a.mrc") as mrc:
        mrc.set_data(images.astype(">i2"))
        mrc.voxel_size = 2.0
    assert (tmp_path / "a.mrc").read_bytes()[:4] == b"\0\0\0\x1e"  # 30 columns, most significant byte first
    check(tmp_path / "a.mrc", images, (0.2, 0.2))


@pytest.mark.parametrize(
    ("side", "reason"), [(0.0, "0 x 0 angstrom"), (-2.0, "-2 x -2 angstrom"), (1.0, "default of 1 angstrom")]
)
def test_mrc_sizes_that_are_unknown(tmp_path, side, reason):
    write_mrc(tmp_path / "a.mrc", stack(), side)
    found = read_micrograph(tmp_path / "a.mrc")
    assert found.pixel_size_nm is None and found.pixel_size_source.startswith("unknown: ")
    assert reason in found.pixel_size_source


def test_mrc_without_its_mark_is_told_by_its_length(tmp_path):
    path = tmp_path / "a.mrc"
    write_mrc(path, stack(), 3.0)
    data = bytearray(path.read_bytes())
    data[208:212] = bytes(4)
    path.write_bytes(data)
    found = read_micrograph(path, 2)
    np.testing.assert_array_equal(found.pixels, stack()[2])
    assert found.pixel_size_nm is None and "lacks the mark 'MAP'" in found.pixel_size_source
    path.write_bytes(data + b"\0")
    with pytest.raises(UserError, match="no MRC file"):
        read_micrograph(path)
    assert not is_mrc(bytes(1024), 1024)


def test_mrc_of_fourier_transforms_and_imods_unsigned_bytes(tmp_path):
    path = tmp_path / "a.mrc"
    write_mrc(path, stack("float32").astype(np.complex64), 3.0)
    with pytest.raises(NotAMicrograph, match="Fourier transform"):
        read_micrograph(path)
    write_mrc(path, np.array([[[-1, 1], [2, 3]]], np.int8), 3.0)
    data = bytearray(path.read_bytes())
    assert read_micrograph(path).pixels.dtype == np.int8
    data[152:160] = struct.pack("<ii", 1146047817, 0)
    path.write_bytes(data)
    np.testing.assert_array_equal(read_micrograph(path).pixels, np.array([[255, 1], [2, 3]], np.uint8))


def test_mrc_larger_than_memory_allows_is_read_in_windows(tmp_path):
    """32k x 32k bytes of zeros that take no room on disk."""
    side = 32768
    write_mrc(tmp_path / "a.mrc", np.zeros((4, 4), np.int8), 3.0)
    header = bytearray((tmp_path / "a.mrc").read_bytes()[:1024])
    header[:12] = struct.pack("<3i", side, side, 1)
    header[28:40] = struct.pack("<3i", side, side, 1)
    with open(tmp_path / "a.mrc", "wb") as file:
        file.write(header)
        file.seek(1024 + side * side - 1)
        file.write(b"\7")
    micrograph = read_micrograph(tmp_path / "a.mrc")
    assert micrograph.pixels.shape == (side, side) and side * side > MAX_PIXELS
    assert micrograph.pixels[-1, -4:].tolist() == [0, 0, 0, 7]


def test_uncompressed_tiff_is_read_in_windows(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", stack(), photometric="minisblack")
    for page, pixels in enumerate(read_micrographs(tmp_path / "a.tif")):
        assert isinstance(pixels.pixels, np.memmap)
        np.testing.assert_array_equal(pixels.pixels, stack()[page])
    side = 32768
    with tifffile.TiffWriter(tmp_path / "big.tif") as writer:
        writer.write(shape=(side, side), dtype="uint8")  # a hole in the file
    assert read_micrograph(tmp_path / "big.tif").pixels[side - 1, side - 2 :].tolist() == [0, 0]


def test_gzip_of_a_tiff(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", stack()[0])
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif.gz").write_bytes(gzip.compress(data))
    np.testing.assert_array_equal(read_micrograph(tmp_path / "a.tif.gz").pixels, stack()[0])
    (tmp_path / "b.tif.gz").write_bytes(gzip.compress(b"text"))
    with pytest.raises(UserError, match="what it holds is no TIFF"):
        read_micrograph(tmp_path / "b.tif.gz")
    (tmp_path / "c.tif.gz").write_bytes(gzip.compress(data)[:-9])
    with pytest.raises(UserError, match="truncated gzip"):
        read_micrograph(tmp_path / "c.tif.gz")


def test_gzip_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr("nanodist.micrographs.tiff._MAX_UNPACKED", 10_000)
    (tmp_path / "a.tif.gz").write_bytes(gzip.compress(b"II*\0" + bytes(20_000)))
    with pytest.raises(UserError, match="unpacks to more than 10000 bytes"):
        read_micrograph(tmp_path / "a.tif.gz")


def test_ome_and_gatan_tags_and_reciprocal_imagej(tmp_path):
    path = tmp_path / "a.ome.tif"
    metadata = {"axes": "YX", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5e-3}
    tifffile.imwrite(path, stack()[0], metadata=metadata, ome=True)  # y in OME's own unit, the micrometre
    found = read_micrograph(path)
    assert found.pixel_size_nm == pytest.approx((0.5, 0.25)) and found.pixel_size_source.startswith("OME")

    def gatan(unit):
        tags = [(65003, "s", 0, unit, True), (65004, "s", 0, unit, True)]
        tifffile.imwrite(
            tmp_path / "g.tif", stack()[0], extratags=[*tags, (65009, "d", 1, 0.25, True), (65010, "d", 1, 0.5, True)]
        )
        return read_micrograph(tmp_path / "g.tif")

    assert gatan("nm").pixel_size_nm == pytest.approx((0.5, 0.25))  # x comes first
    with pytest.raises(NotAMicrograph, match="diffraction pattern"):
        gatan("1/nm")
    tifffile.imwrite(tmp_path / "i.tif", stack()[0], imagej=True, resolution=(4.0, 4.0), metadata={"unit": "1/nm"})
    with pytest.raises(NotAMicrograph, match=r"pixels in 1/nm\), no micrograph \(ImageJ"):
        read_micrograph(tmp_path / "i.tif")


def test_fei_tag(tmp_path):
    text = (
        "[User]\r\nUser=Jane Operator\r\n[System]\r\nSystemType=Helios\r\n[Beam]\r\nHV=5000\r\n"
        "[Scan]\r\nPixelWidth=1.5e-09\r\nPixelHeight=2e-09\r\n"
    )
    tifffile.imwrite(tmp_path / "a.tif", stack()[0], extratags=[(34682, "s", 0, text, True)], metadata=None)
    found = read_micrograph(tmp_path / "a.tif")
    assert found.pixel_size_nm == pytest.approx((2, 1.5)) and found.pixel_size_source.startswith("FEI")
    assert found.metadata["voltage_kv"] == 5 and found.metadata["instrument"] == "Helios"
    assert "Jane" not in str(found)


def test_without_the_libraries_the_error_says_what_to_install(tmp_path, monkeypatch):
    write_dm3(tmp_path / "a.dm3", stack()[0], (0.5, 0.5), ("nm", "nm"), {})
    write_mrc(tmp_path / "a.mrc", stack(), 3.0)
    write_velox(tmp_path / "a.emd", [])
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for name in ("a.dm3", "a.mrc", "a.emd"):
        with pytest.raises(UserError, match=r"a\.\w+ is an? .*not installed: pip install 'nanodist\[io\]'"):
            read_micrograph(tmp_path / name)


def test_a_reader_that_hangs_or_dies_costs_one_file(tmp_path, monkeypatch):
    path = tmp_path / "a.dm3"
    write_dm3(path, stack()[0], (0.5, 0.5), ("nm", "nm"), {})
    read_micrograph(path)
    monkeypatch.setattr(isolated, "SECONDS", 0.5)
    child = isolated._reader.process
    os.kill(child.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"a\.dm3 is a damaged .*nothing came of it"):
        read_micrograph(path)
    assert time.monotonic() - began < 10 and child.poll() is not None
    monkeypatch.setattr(isolated, "SECONDS", 120.0)
    read_micrograph(path)
    child = isolated._reader.process
    os.kill(child.pid, signal.SIGSTOP)
    threading.Timer(0.3, child.kill).start()
    with pytest.raises(UserError, match="its reader crashed on it"):
        read_micrograph(path)
    np.testing.assert_array_equal(read_micrograph(path).pixels, stack()[0])


def test_the_reading_process_ends_with_its_parent(tmp_path):
    path = tmp_path / "a.dm3"
    write_dm3(path, stack()[0], (0.5, 0.5), ("nm", "nm"), {})
    code = (
        "import os, sys, pathlib; from nanodist.micrographs import isolated, read_micrograph\n"
        "read_micrograph(pathlib.Path(sys.argv[1])); print(isolated._reader.process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    root = str(Path(__file__).resolve().parents[2])
    said = subprocess.run(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    )
    child = int(said.stdout)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _alive(child):
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False
