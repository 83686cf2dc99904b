"""The data set on disk: layout, calibration, determinism, refusals."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from nanodist.cli import main
from nanodist.synth import MORPHOLOGIES, Settings, make, read_instances, write

SIZE = 96


def _hashes(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _synth(out: Path, *more: str) -> int:
    return main(["synth", "wires", "--out", str(out), "--size", str(SIZE), "--seed", "7", *more])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("synth") / "set"
    assert _synth(out, "--micrographs", "3", "--pixel-size-nm", "0.37") == 0
    return out


def test_layout_and_tables(dataset):
    with open(dataset / "meta.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"{c}/{c}-{i:05d}.tif" for c in MORPHOLOGIES for i in range(3)]
    assert {row["file"].split("/")[0] for row in rows} == set(MORPHOLOGIES) == {row["label"] for row in rows}
    assert len({row["micrograph"] for row in rows}) == 12
    found = {str(p.relative_to(dataset / "images")) for p in (dataset / "images").rglob("*.*")}
    assert found == {row["file"] for row in rows}
    with open(dataset / "wires.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == sum(int(row["wires"]) for row in rows)
    assert json.loads((dataset / "settings.json").read_text())["seed"] == 7


def test_images_carry_their_pixel_size(dataset):
    for path in (dataset / "images").rglob("*.tif"):
        with tifffile.TiffFile(path) as tif:
            assert tif.imagej_metadata["unit"] == "nm"
            top, bottom = tif.pages[0].tags["XResolution"].value
            assert bottom / top == pytest.approx(0.37, rel=1e-6)
            image = tif.asarray()
        assert image.shape == (SIZE, SIZE) and image.dtype == np.uint16


def test_files_hold_what_make_gives(dataset):
    for name in MORPHOLOGIES:
        one = make(7, name, 2, Settings(SIZE, 0.37))
        stem = dataset / "truth" / name / f"{name}-00002"
        np.testing.assert_array_equal(tifffile.imread(dataset / "images" / name / f"{name}-00002.tif"), one.image)
        layers = read_instances(stem.with_suffix(".instances.tif"))
        np.testing.assert_array_equal(layers, one.instances)
        assert json.loads(stem.with_suffix(".json").read_text()) == one.truth
        union = np.asarray(Image.open(stem.with_suffix(".mask.png")))
        np.testing.assert_array_equal(union, one.instances.any(axis=0) * np.uint8(255))


def test_bytes_do_not_depend_on_processes_order_or_company(dataset, tmp_path):
    assert _synth(tmp_path / "two", "--micrographs", "3", "--pixel-size-nm", "0.37", "--workers", "2") == 0
    assert _hashes(tmp_path / "two") == _hashes(dataset)
    # Fewer, of fewer classes, in another order: each file is what it was.
    some = ["--classes", "singular,network", "--micrographs", "2", "--pixel-size-nm", "0.37"]
    assert _synth(tmp_path / "some", *some) == 0
    whole, part = _hashes(dataset), _hashes(tmp_path / "some")
    shared = [name for name in part if name.startswith(("images", "truth"))]
    assert len(shared) == 4 * 4
    assert all(part[name] == whole[name] for name in shared)


def test_seeds_and_indices_differ():
    settings = Settings(SIZE)
    images = [make(seed, "bundle", index, settings).image.tobytes() for seed in (0, 1) for index in (0, 1)]
    assert len(set(images)) == 4


def test_a_used_directory_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert _synth(tmp_path, "--micrographs", "1") == 2
    assert "not an empty directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--classes", "network,mesh"], "bundle, dispersed, network, singular"),
        (["--classes", "network,network"], "each once"),
        (["--micrographs", "0"], "micrographs"),
        (["--workers", "0"], "worker"),
        (["--haadf-share", "2"], "HAADF"),
    ],
)
def test_bad_options_are_one_sentence_and_leave_nothing(tmp_path, capsys, options, words):
    assert _synth(tmp_path / "out", *options) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    def failing(seed, morphology, index, settings):
        if morphology == "network":
            raise MemoryError("half way")
        return make(seed, morphology, index, settings)

    monkeypatch.setattr(write, "make", failing)
    with pytest.raises(MemoryError, match="half way"):
        write.write_dataset(tmp_path / "out", 0, 1, list(MORPHOLOGIES), Settings(SIZE))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_mask_is_refused_by_name(tmp_path):
    from hpc.errors import UserError

    (tmp_path / "x.tif").write_text("no tiff")
    with pytest.raises(UserError, match=r"x\.tif"):
        read_instances(tmp_path / "x.tif")
