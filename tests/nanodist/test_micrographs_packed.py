"""Microscopes' own formats on their way into a store: what is set aside, and pixel sizes that the user knows better."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from hpc.errors import UserError
from nanodist.cli import main
from nanodist.shards import PackOptions, Store, pack

pytest.importorskip("rsciio", reason="the extra 'io' is not installed")
pytest.importorskip("h5py", reason="the extra 'io' is not installed")
pytest.importorskip("mrcfile", reason="the extra 'io' is not installed")

from tests.nanodist.microscope_files import write_dm3, write_emi, write_mrc, write_ser, write_velox

TILE = PackOptions(tile=16)


def stack(seed=0, shape=(3, 32, 32)):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(np.uint16)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "session"
    root.mkdir()
    write_dm3(root / "image.dm3", stack(1)[0], (0.5, 0.25), ("nm", "nm"), {"Voltage": 300000.0})
    write_dm3(root / "saed.dm3", stack(2)[0], (0.5, 0.5), ("1/nm", "1/nm"), {})
    write_ser(root / "scan_1.ser", stack(3), 2e-9)
    write_emi(root / "scan.emi", 1)
    write_velox(root / "si.emd", [(np.moveaxis(stack(4), 0, 2), 1e-9, "m")], spectra=1)
    write_mrc(root / "tomogram.mrc", stack(5), 4.0)
    Image.fromarray(stack(6)[0].astype(np.uint8)).save(root / "plain.png")
    return root


def test_a_session_packs_without_skipping_bad_files(folder, tmp_path):
    store = pack([folder], tmp_path / "store", TILE)
    assert {s.source for s in store.samples} == {
        "image.dm3", "scan_1.ser", "si.emd", "tomogram.mrc", "plain.png",
    }  # fmt: skip
    reasons = {entry["source"]: entry["reason"] for entry in store.manifest.dropped}
    assert set(reasons) == {"saed.dm3", "scan.emi"}
    assert "pixels in 1/nm" in reasons["saed.dm3"] and "no pixels" in reasons["scan.emi"]
    assert str(folder) not in str(reasons)
    sizes = {s.source: s.pixel_size_nm for s in store.samples}
    assert sizes["image.dm3"] == pytest.approx((0.5, 0.25)) and sizes["scan_1.ser"] == pytest.approx((2, 2))
    assert sizes["si.emd"] == pytest.approx((1, 1)) and sizes["tomogram.mrc"] == pytest.approx((0.4, 0.4))
    assert sizes["plain.png"] is None
    keys = [s.key for s in store.samples if s.source == "tomogram.mrc"]
    assert keys == [f"tomogram--p{page}-y{y:05d}x{x:05d}" for page in range(3) for y in (0, 16) for x in (0, 16)]


def test_the_same_bytes_with_workers(folder, tmp_path):
    one = pack([folder], tmp_path / "one", TILE)
    two = pack([folder], tmp_path / "two", TILE, workers=2)
    assert one.manifest_hash == two.manifest_hash


def test_a_damaged_one_stops_the_packing_and_is_named(folder, tmp_path):
    data = (folder / "image.dm3").read_bytes()
    (folder / "image.dm3").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"image\.dm3 is a damaged or truncated Gatan DM file"):
        pack([folder], tmp_path / "store", TILE)
    store = pack([folder], tmp_path / "store", PackOptions(tile=16, skip_bad=True))
    assert "image.dm3" in {entry["source"] for entry in store.manifest.dropped}


def calibration(folder, text):
    (folder / "sizes.csv").write_text(text)
    return folder / "sizes.csv"


def test_a_calibration_takes_the_place_of_the_files_own(folder, tmp_path):
    table = calibration(
        folder, "file,pixel_size_nm,pixel_size_nm_y,uncertainty\nplain.png,0.7,,0.02\nimage.dm3,0.3,0.6,\nsi.emd,,,\n"
    )
    command = ["pack", str(folder), "--out", str(tmp_path / "store"), "--tile", "16", "--calibration", str(table)]
    assert main(command) == 0
    store = Store.open(tmp_path / "store")
    sizes = {s.source: s.pixel_size_nm for s in store.samples}
    assert sizes["plain.png"] == pytest.approx((0.7, 0.7)) and sizes["image.dm3"] == pytest.approx((0.6, 0.3))
    assert sizes["si.emd"] == pytest.approx((1, 1))  # an empty row leaves the file's own
    shard = (tmp_path / "store" / "shard-000000.tar").read_bytes()
    facts = [json.loads(part.split(b"\0")[0]) for part in shard.split(b"\0") if part.startswith(b'{"key": "plain')]
    assert facts[0]["pixel_size_source"] == "calibration table sizes.csv"
    assert facts[0]["pixel_size_uncertainty"] == 0.02


def test_another_calibration_is_another_packing(folder, tmp_path):
    """A piece of an interrupted packing is not taken for one with other sizes."""
    (folder / "zzz.png").write_text("text")
    table = calibration(folder, "file,pixel_size_nm\nplain.png,0.7\n")
    with pytest.raises(UserError, match=r"zzz\.png"):
        pack([folder], tmp_path / "store", TILE, calibration=table)
    (folder / "zzz.png").unlink()
    calibration(folder, "file,pixel_size_nm\nplain.png,0.9\n")
    store = pack([folder], tmp_path / "store", TILE, calibration=table)
    assert {s.pixel_size_nm for s in store.samples if s.source == "plain.png"} == {(0.9, 0.9)}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name,size\n", "must have the columns file, pixel_size_nm"),
        ("file,pixel_size_nm\nplain.png,0\n", r"line 2: pixel_size_nm is '0'; it must be a number above 0"),
        ("file,pixel_size_nm\nplain.png,-1\n", "must be a number above 0"),
        ("file,pixel_size_nm\nplain.png,1 nm\n", "pixel_size_nm is '1 nm'"),
        ("file,pixel_size_nm,uncertainty\nplain.png,1,x\n", "uncertainty .* is 'x'"),
        ("file,pixel_size_nm\nplain.png,1\n./plain.png,2\n", "line 3 gives a second pixel size"),
        ("file,pixel_size_nm\nother.png,1\n", "to none of the 7 files"),
    ],
)
def test_calibrations_that_are_refused(folder, tmp_path, text, reason):
    with pytest.raises(UserError, match=reason):
        pack([folder], tmp_path / "store", TILE, calibration=calibration(folder, text))
    with pytest.raises(UserError, match="named by --calibration, does not exist"):
        pack([folder], tmp_path / "store", TILE, calibration=folder / "gone.csv")
    assert not (tmp_path / "store").exists()


def test_tiles_of_a_mapped_tiff_are_those_of_a_compressed_one(tmp_path):
    pixels = stack(7, (64, 48))
    for name, compression in (("mapped", None), ("packed", "zlib")):
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "a.tif", pixels, compression=compression)
    stores = [pack([tmp_path / name], tmp_path / f"{name}-store", TILE) for name in ("mapped", "packed")]
    assert len(stores[0]) == len(stores[1]) == 12
    for i in range(12):
        np.testing.assert_array_equal(stores[0].read(i), stores[1].read(i))
