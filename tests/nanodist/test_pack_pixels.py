"""One pixel size for all, and tiles that show nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from hpc.errors import UserError
from nanodist.cli import main
from nanodist.micrographs.resample import resample
from nanodist.shards import PackOptions, pack
from nanodist.shards.quality import EMPTY, LEAST_CONTRAST, SATURATED, contrast, fault_of, span_of
from tests.nanodist.packing import clean_environment, command, micrographs, tree

# Resampling.


def test_a_slope_stays_the_slope_it_was():
    """In nanometres: pixel centres lie at (k + 1/2) of a pixel, before and after."""
    y, x = np.mgrid[:600, :200]
    plane = (3.0 * (y + 0.5) * 0.5 + 2.0 * (x + 0.5) * 0.8).astype(np.float32)  # pixels of 0.5 x 0.8 nm
    for target in (0.7, 1.3, 4.0):
        got = resample(plane, (0.5, 0.8), target)
        rows, columns = got.shape
        assert (rows, columns) == (int(300 / target + 1e-9), int(160 / target + 1e-9))
        v, u = np.mgrid[:rows, :columns]
        expected = 3.0 * (v + 0.5) * target + 2.0 * (u + 0.5) * target
        inner = np.s_[3:-3, 3:-3]  # at the edges the filter reaches beyond the micrograph
        assert np.abs(got - expected)[inner].max() < 0.05 * target * 3.0 + 1e-3  # a twentieth of a pixel


def test_what_is_finer_than_the_new_pixels_does_not_fold_back():
    rows = np.arange(512)[:, None] % 2 * np.ones((1, 64))
    stripes = (100 * rows).astype(np.float32)
    got = resample(stripes, (1.0, 1.0), 3.7)
    assert np.abs(got[2:-2] - 50).max() < 2.5  # taking every 3.7th row would give 0 and 100


def test_strips_are_those_of_the_whole():
    pixels = np.random.default_rng(0).integers(0, 60000, (1500, 40)).astype(np.uint16)
    got = resample(pixels, (1.0, 1.0), 1.9)
    rows, columns = got.shape
    image = Image.fromarray(pixels.astype(np.float32))
    whole = np.asarray(image.resize((columns, rows), Image.Resampling.BILINEAR, box=(0, 0, columns * 1.9, rows * 1.9)))
    assert got.dtype == np.uint16 and rows > 600
    assert np.abs(got - whole).max() <= 2  # of 60000: Pillow rounds the box to float32


def test_the_same_size_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 255, (300, 33)).astype(np.uint8)
    np.testing.assert_array_equal(resample(pixels, (0.7, 0.7), 0.7), pixels)
    with pytest.raises(ValueError, match="less than one"):
        resample(pixels, (0.7, 0.7), 300.0)


def save(path, pixels, size_nm=None):
    more = (
        {"resolution": (1 / size_nm[1] * 1e7, 1 / size_nm[0] * 1e7), "resolutionunit": "CENTIMETER"} if size_nm else {}
    )
    tifffile.imwrite(path, pixels, **more)


def test_a_store_of_one_pixel_size(tmp_path, capsys):
    source = tmp_path / "src"
    source.mkdir()
    rng = np.random.default_rng(0)
    save(source / "fine.tif", rng.integers(0, 255, (128, 128)).astype(np.uint8), (0.5, 1.0))
    save(source / "right.tif", rng.integers(0, 255, (64, 64)).astype(np.uint8), (1.0, 1.0))
    save(source / "coarse.tif", rng.integers(0, 255, (64, 64)).astype(np.uint8), (2.5, 2.5))
    save(source / "unknown.tif", rng.integers(0, 255, (64, 64)).astype(np.uint8))
    line = ["pack", str(source), "--out", str(tmp_path / "store"), "--tile", "32", "--pixel-size-nm", "1"]
    assert main(line) == 0
    said = capsys.readouterr().out
    from nanodist.shards import Store

    store = Store.open(tmp_path / "store")
    assert {s.pixel_size_nm for s in store.samples} == {(1.0, 1.0)}
    tiles = [s.source for s in store.samples]
    assert tiles.count("fine.tif") == 2 * 4 and tiles.count("right.tif") == 4 and len(tiles) == 12
    reasons = {e["source"]: e["reason"] for e in store.manifest.dropped}
    assert "its pixel size is unknown" in reasons["unknown.tif"] and "more than 2 times" in reasons["coarse.tif"]
    assert "set aside 1: its pixel size is unknown" in said
    assert store.manifest.options["pixel_size_nm"] == 1.0
    with pytest.raises(UserError, match="--pixel-size-nm is -1"):
        PackOptions(pixel_size_nm=-1.0)


# Tiles that show nothing.


def film(seed=0, side=256, noise=12.0):
    return (120 + np.random.default_rng(seed).normal(0, noise, (side, side))).clip(0, 255).astype(np.uint8)


def test_contrast_by_hand():
    y, x = np.mgrid[:256, :256]
    assert contrast((0.1 * x + 0.3 * y).astype(np.float64))[1] == pytest.approx(0, abs=1e-9)
    step = np.where(x < 128, 0.0, 60.0)  # half and half: 30, and 30 sqrt(1 - 3/4) without its slope
    assert contrast(step) == pytest.approx((30.0, 15.0), rel=2e-3)
    assert contrast(film().astype(np.float64))[0] == pytest.approx(12 / 8, rel=0.1)  # means of 64 pixels


@pytest.mark.parametrize(
    ("tile", "expected"),
    [
        (film(noise=8.0), EMPTY),
        ((film(noise=4.0) + np.linspace(0, 9, 256)[:, None]).astype(np.uint8), EMPTY),
        (np.full((256, 256), 90, np.uint8), EMPTY),
        (np.where(np.arange(256) < 140, 0, film()).astype(np.uint8), SATURATED),
        (np.where(np.arange(256) < 140, 65535, film().astype(np.uint16) * 200).astype(np.uint16), SATURATED),
        (np.where(np.arange(256) < 110, 0, film()).astype(np.uint8), None),
        (np.tile(np.arange(256), (256, 1)).astype(np.uint8), None),  # a slope over all of the range
        (np.random.default_rng(0).integers(0, 255, (32, 32)).astype(np.uint8), None),
    ],
)
def test_what_shows_something(tile, expected):
    assert fault_of(tile, 200.0 if tile.dtype == np.uint8 else 51400.0) == expected


def test_a_faint_particle_shows_something():
    tile = film(noise=8.0).astype(float)
    y, x = np.mgrid[:256, :256]
    tile[(y - 100) ** 2 + (x - 60) ** 2 < 20**2] += 12
    assert contrast(tile)[1] > LEAST_CONTRAST * 200
    assert fault_of(tile.astype(np.uint8), 200.0) is None


def test_dropped_tiles_are_listed_and_may_be_kept(tmp_path, capsys):
    pixels = film(side=192, noise=1.0)
    pixels[:64, :64] = np.random.default_rng(1).integers(0, 255, (64, 64))
    pixels[64:128, 64:128] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert main(["pack", str(tmp_path / "a.png"), "--out", str(tmp_path / "store"), "--tile", "64"]) == 0
    said = capsys.readouterr().out
    assert f"set aside 7 in 1 files: {EMPTY}" in said and f"set aside 1: {SATURATED}" in said
    store = pack([tmp_path / "a.png"], tmp_path / "again", PackOptions(tile=64))
    assert store.keys == ["a--y00000x00000"]
    assert {"source": "a.png", "reason": SATURATED, "key": "a--y00064x00064"} in store.manifest.dropped
    assert len(pack([tmp_path / "a.png"], tmp_path / "all", PackOptions(tile=64, empty_tiles="keep"))) == 9


def test_the_span_leaves_hot_pixels_out():
    pixels = film(noise=10.0).astype(np.uint16)
    pixels[0, 0] = 65000
    assert span_of(pixels) < 80


# A disk that fills, for real.


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0, reason="a small disk needs Linux and root"
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_fills_is_said_and_nothing_is_lost(tmp_path, workers):
    source = micrographs(tmp_path / "src", 100)
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("no tmpfs may be mounted here")
    line = command(source, "--out", disk / "store", "--tile", "32", "--skip-bad", "--workers", workers)
    try:
        full = subprocess.run(line, env=clean_environment(), capture_output=True, text=True, timeout=120)
        assert full.returncode == 2 and full.stderr.count("\n") == 1, full.stderr
        assert (
            "the disk is full while packing to" in full.stderr and "the same command goes on from there" in full.stderr
        )
        assert not (disk / "store").exists() and any(disk.glob(".store.packing/pieces/*.json"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True, capture_output=True)
        done = subprocess.run(line, env=clean_environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found = tree(disk / "store")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    pack([source], tmp_path / "whole", PackOptions(tile=32, skip_bad=True))
    assert found == tree(tmp_path / "whole")
