"""``nanodist measure`` on folders: tables, units, specimens, mistakes, ROIs."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from PIL import Image

from hpc.errors import UserError
from nanodist.cli import main
from nanodist.downstream.segment import predict
from nanodist.downstream.segment.predict import mask_tiff
from nanodist.morphology.files import read_mask
from tests.nanodist.test_morphology import stadium

SHAPE = (120, 120)


def _wires(*lines):
    return [stadium(*line, shape=SHAPE) for line in lines]


def _png(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * (255 if mask.dtype == bool else 1)).save(path)


def _rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture
def masks(tmp_path):
    """Two specimens of six images: wires of B are twice as wide."""
    rng = np.random.default_rng(0)
    for specimen, width in (("A", 6.0), ("B", 12.0)):
        for i in range(6):
            x, y = rng.uniform(20, 40, 2)
            _png(tmp_path / specimen / f"{i}.png", stadium(x, y, x + 60, y + 50, width + rng.normal(0, 0.3), SHAPE))
    return tmp_path


def test_specimens_are_measured_compared_and_written(masks, capsys):
    out = masks / "out"
    assert main(["measure", str(masks / "A"), str(masks / "B"), "--out", str(out), "--pixel-size-nm", "0.5"]) == 0
    said = capsys.readouterr()
    assert "12 images, 12 objects, 12 wires" in said.out and said.err == ""
    assert f"{masks / 'B'} differs from {masks / 'A'} in width_mean_number_mean_nm" in said.out
    images = _rows(out / "images.csv")
    assert len(images) == 12 and {row["specimen"] for row in images} == {str(masks / "A"), str(masks / "B")}
    row = next(r for r in _rows(out / "comparison.csv") if r["quantity"] == "width_mean_number_mean_nm")
    assert float(row["low"]) < 3.0 < float(row["high"]) and float(row["difference"]) == pytest.approx(3.0, abs=0.3)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["units"] == ["nm"] and summary["wires"] == 12
    mean = next(r for r in summary["specimens"] if r["quantity"] == "width_mean_number_mean_nm")
    assert mean["n"] == 6 and mean["low"] < mean["mean"] < mean["high"]
    widths = _rows(out / "widths.csv")
    assert set(widths[0]) == {"specimen", "image", "wire", "arc_nm", "width_nm"} and len(widths) > 12 * 60
    assert len(list((out / "overlays").glob("*.png"))) == 12
    assert (out / "histograms_nm.png").stat().st_size > 5000
    assert not (out / "skipped.csv").exists()


def test_parquet_holds_what_csv_holds(masks):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = masks / "out"
    assert main(["measure", str(masks / "A"), "--out", str(out)]) == 0
    for name in ("images", "objects", "wires", "widths", "s2", "specimens"):
        table, rows = parquet.read_table(out / f"{name}.parquet"), _rows(out / f"{name}.csv")
        assert table.column_names == list(rows[0]) and table.num_rows == len(rows)
    column = parquet.read_table(out / "wires.parquet").column("width_mean_px").to_pylist()
    assert column == pytest.approx([float(row["width_mean_px"]) for row in _rows(out / "wires.csv")])


def test_units_follow_the_file_then_the_option(tmp_path):
    (mask,) = _wires((30, 30, 90, 80, 7.0))
    pixels = mask.astype(np.uint8) * 255
    tifffile.imwrite(tmp_path / "a.tif", pixels, imagej=True, resolution=(4.0, 4.0), metadata={"unit": "nm"})
    _png(tmp_path / "b.png", mask)
    both = [str(tmp_path / "a.tif"), str(tmp_path / "b.png")]
    assert main(["measure", *both, "--out", str(tmp_path / "px"), "--no-overlays"]) == 0
    rows = _rows(tmp_path / "px" / "wires.csv")
    assert float(rows[0]["width_mean_nm"]) == pytest.approx(7 / 4, rel=0.02) and rows[0]["width_mean_px"] == ""
    assert float(rows[1]["width_mean_px"]) == pytest.approx(7, rel=0.02) and rows[1]["width_mean_nm"] == ""
    assert main(["measure", *both, "--out", str(tmp_path / "nm"), "--pixel-size-nm", "2"]) == 0
    assert [float(r["width_mean_nm"]) for r in _rows(tmp_path / "nm" / "wires.csv")] == pytest.approx(
        [1.75, 14], rel=0.02
    )
    assert main(["measure", *both, "--out", str(tmp_path / "o"), "--pixel-size-nm", "2", "--override-pixel-size"]) == 0
    assert [float(r["width_mean_nm"]) for r in _rows(tmp_path / "o" / "wires.csv")] == pytest.approx([14, 14], rel=0.02)


def test_the_good_are_measured_and_the_rest_is_named(masks, capsys):
    """Issue 6: a broken image, an RGB photograph, a 1 x 1 image and a text file among good masks."""
    folder = masks / "A"
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    colour = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(colour).save(folder / "photo.png")
    _png(folder / "dot.png", np.ones((1, 1), bool))
    (folder / "notes.txt").write_text("remember the milk")
    (folder / "text.tif").write_text("no picture")
    gray = np.random.default_rng(0).integers(1, 255, (64, 64)).astype(np.uint8)
    Image.fromarray(gray).save(folder / "micrograph.png")
    out = masks / "out"
    assert main(["measure", str(folder), "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "6 images" in said.out and len(_rows(out / "images.csv")) == 6
    skipped = {row["file"].rsplit("/", 1)[1]: row for row in _rows(out / "skipped.csv")}
    assert set(skipped) == {"broken.png", "photo.png", "dot.png", "notes.txt", "text.tif", "micrograph.png"}
    for name, row in skipped.items():
        assert row["error"] == str(name != "notes.txt") and (name in row["reason"] or name == "notes.txt")
        assert (name in said.err) == (name != "notes.txt")
    assert "5 of 11 files failed" in said.err
    assert "colour" in skipped["photo.png"]["reason"] and "1 x 1" in skipped["dot.png"]["reason"]


def test_nothing_to_measure_leaves_nothing(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("no")
    for given, words in (("in", "nothing could be measured"), ("gone", "does not exist")):
        assert main(["measure", str(tmp_path / given), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err.strip()
        assert words in said and len(said.splitlines()) == 1
    (tmp_path / "in" / "a.png").unlink()
    assert main(["measure", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    assert "no image file" in capsys.readouterr().err
    (tmp_path / "in" / "mine.txt").write_text("x")
    _png(tmp_path / "m.png", _wires((30, 30, 90, 80, 7.0))[0])
    assert main(["measure", str(tmp_path / "m.png"), "--out", str(tmp_path / "in")]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "m.png"]


def test_a_size_that_is_given_overrides_a_wrong_one(tmp_path, capsys):
    """Pixels that the file says to be oblong are refused, unless their size is said anew."""
    line = ["measure", str(tmp_path / "m.tif"), "--no-overlays", "--out", str(tmp_path / "out")]
    (tmp_path / "m.tif").write_bytes(mask_tiff(np.uint8(_wires((30, 30, 90, 80, 7.0))[0]), (0.6, 0.5)))
    assert main([*line, "--pixel-size-nm", "2"]) == 2 and "resample it to square ones" in capsys.readouterr().err
    assert main([*line, "--override-pixel-size"]) == 2 and "--pixel-size-nm" in capsys.readouterr().err
    assert main([*line, "--pixel-size-nm", "2", "--override-pixel-size"]) == 0
    assert float(_rows(tmp_path / "out" / "wires.csv")[0]["width_mean_nm"]) == pytest.approx(14, rel=0.02)


def test_an_image_without_a_class_has_none_of_it(tmp_path, capsys):
    """Mean coverage is over all images; a value that no image has is a mistake."""
    maps = [np.full((40, 40), 1, np.uint8) for _ in range(4)]
    maps[0][10:20, 10:20] = 2
    for i, each in enumerate(maps):
        Image.fromarray(each).save(tmp_path / f"{i}.png")
    line = ["measure", *(str(tmp_path / f"{i}.png") for i in range(4)), "--shape", "particles", "--out"]
    assert main([*line, str(tmp_path / "out"), "--class", "2"]) == 0
    assert [float(row["coverage"]) for row in _rows(tmp_path / "out" / "images.csv")] == [100 / 1600, 0, 0, 0]
    assert main([*line, str(tmp_path / "no"), "--class", "3"]) == 2 and not (tmp_path / "no").exists()
    error = capsys.readouterr().err
    assert "--class 3: none of the 4 files that can be read has such a pixel" in error
    assert f"{tmp_path / '0.png'} has the values 1, 2" in error
    # The values are those of the first file that can be read.
    (tmp_path / "0.png").write_bytes(b"no picture")
    assert main([*line, str(tmp_path / "no"), "--class", "3"]) == 2
    assert f"none of the 3 files that can be read has such a pixel; {tmp_path / '1.png'}" in capsys.readouterr().err


def test_a_sliver_at_the_border_of_a_large_mask_is_drawn(tmp_path):
    """In a picture of fewer pixels, or of nanometres that are rounded, it is thinner than one."""
    mask = np.zeros((64, 4200), bool)
    mask[:2, 30:60] = True
    _png(tmp_path / "large.png", mask)
    mask = np.zeros(SHAPE, bool)
    mask[:9, 103] = mask[-30:-20, -30:-20] = True
    _png(tmp_path / "small.png", mask)
    line = ["measure", str(tmp_path / "large.png"), str(tmp_path / "small.png"), "--shape", "particles"]
    assert main([*line, "--out", str(tmp_path / "out"), "--pixel-size-nm", "0.37", "--min-area-px", "4"]) == 0
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 2


def test_a_damaged_layer_is_named_and_the_others_are_measured(tmp_path, capsys):
    layers = np.stack(_wires((20, 20, 60, 30, 8.0), (30, 60, 90, 70, 8.0), (30, 90, 90, 100, 8.0))).astype(np.uint8)
    tifffile.imwrite(tmp_path / "layers.tif", layers, compression="zlib", photometric="minisblack")
    with tifffile.TiffFile(tmp_path / "layers.tif") as tif:
        at, count = tif.pages[2].dataoffsets[0], tif.pages[2].databytecounts[0]
    with open(tmp_path / "layers.tif", "r+b") as file:
        file.seek(at)
        file.write(b"\xff" * count)
    _png(tmp_path / "good.png", layers[0] > 0)
    files = [str(tmp_path / name) for name in ("layers.tif", "good.png")]
    assert main(["measure", *files, "--out", str(tmp_path / "out")]) == 1
    assert f"{files[0]}, page 2: damaged" in capsys.readouterr().err
    assert [row["image"] for row in _rows(tmp_path / "out" / "images.csv")] == ["good.png"]
    with gzip.open(tmp_path / "packed.tif.gz", "wb") as file:
        file.write((tmp_path / "layers.tif").read_bytes())
    with pytest.raises(UserError, match=r"packed\.tif\.gz, page 2 is a damaged or truncated TIFF file"):
        read_mask(tmp_path / "packed.tif.gz")


def test_layers_that_are_no_pages_of_a_plain_tiff(tmp_path):
    """Of one page that stands for the stack, and of a file that is packed as a whole."""
    layers = np.stack(_wires((20, 20, 60, 30, 8.0), (30, 60, 90, 70, 8.0), (30, 90, 90, 100, 8.0)))
    tifffile.imwrite(tmp_path / "one.tif", layers.astype(np.uint8), photometric="minisblack", truncate=True)
    with gzip.open(tmp_path / "packed.tif.gz", "wb") as file:
        file.write((tmp_path / "one.tif").read_bytes())
    for name in ("one.tif", "packed.tif.gz"):
        np.testing.assert_array_equal(read_mask(tmp_path / name)[0], layers)


def test_what_pixels_mean(tmp_path):
    first, second = _wires((20, 20, 60, 30, 8.0), (20, 80, 100, 90, 8.0))
    _png(tmp_path / "mask.png", first | second)
    assert read_mask(tmp_path / "mask.png")[0].dtype == bool
    labels = first.astype(np.uint8) * 1 + second.astype(np.uint8) * 2
    _png(tmp_path / "labels.png", labels)
    assert read_mask(tmp_path / "labels.png")[0].max() == 2
    classes = labels.copy()
    classes[100:110, 5:15] = 1
    _png(tmp_path / "classes.png", classes)
    with pytest.raises(UserError, match="1 is in 2 pieces: say --as labels"):
        read_mask(tmp_path / "classes.png")
    assert read_mask(tmp_path / "classes.png", value=2)[0].sum() == second.sum()
    assert read_mask(tmp_path / "classes.png", "mask")[0].sum() == (classes > 0).sum()
    assert not read_mask(tmp_path / "classes.png", value=9)[0].any()
    tifffile.imwrite(tmp_path / "layers.tif", np.stack([first, first | second]).astype(np.uint8) * 255)
    assert read_mask(tmp_path / "layers.tif")[0].shape == (2, *SHAPE)
    tifffile.imwrite(tmp_path / "tall.tif", classes, imagej=True, resolution=(4.0, 2.0), metadata={"unit": "nm"})
    with pytest.raises(UserError, match="square"):
        read_mask(tmp_path / "tall.tif", value=1)


def test_synthetic_truth_is_found_in_its_folder(tmp_path):
    command = ["synth", "particles", "--out", str(tmp_path / "s"), "--size", "128", "--micrographs", "1"]
    assert main([*command, "--classes", "sphere,cube", "--pixel-size-nm", "0.5"]) == 0
    assert main(["measure", str(tmp_path / "s"), "--out", str(tmp_path / "m"), "--shape", "particles"]) == 0
    found = _rows(tmp_path / "m" / "objects.csv")
    true = {(row["file"], int(row["object"])): row for row in _rows(tmp_path / "s" / "objects.csv")}
    assert len(found) > 4
    for row in found:
        file = row["image"].replace(".instances.tif", ".tif")
        truth = true[file, int(row["object"]) - 1]
        if truth["border_cut"] == "False":
            assert float(row["area_nm2"]) == pytest.approx(float(truth["area_nm2"]), rel=0.08)
            assert float(row["feret_max_nm"]) == pytest.approx(float(truth["length_nm"]), rel=0.05, abs=0.6)


def test_what_is_written_of_a_packed_mask_has_its_name(tmp_path):
    tifffile.imwrite(tmp_path / "m.tif", _wires((30, 30, 90, 80, 7.0))[0].astype(np.uint8))
    with gzip.open(tmp_path / "m.tif.gz", "wb") as file:
        file.write((tmp_path / "m.tif").read_bytes())
    assert main(["measure", str(tmp_path / "m.tif.gz"), "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out" / "overlays").iterdir()] == ["00001-m.png"]


def test_a_folder_that_cannot_be_segmented_leaves_the_others(tmp_path, monkeypatch, capsys):
    """The first of two; a folder that is not there is said before anything is segmented."""
    segmented = []

    def predict_masks(_loaded, paths, out):
        segmented.append(paths[0].name)
        if paths[0].name == "A":
            raise UserError("none of the 3 files could be predicted")
        _png(out / "masks" / "m.png", _wires((30, 30, 90, 80, 7.0))[0])
        return {}

    monkeypatch.setattr(predict, "load_segmenter", lambda *_: SimpleNamespace(values=(0, 1)))
    monkeypatch.setattr(predict, "predict_masks", predict_masks)
    a, b = tmp_path / "A", tmp_path / "B"
    a.mkdir()
    b.mkdir()
    line = ["measure", "--no-overlays", "--out", str(tmp_path / "out"), "--run", "run"]
    monkeypatch.setattr(predict, "load_segmenter", lambda *_: SimpleNamespace(values=(0, 7, 9)))
    assert main([*line, str(a)]) == 2 and segmented == []
    assert "run tells several materials apart; say with --class which is measured: 7, 9" in capsys.readouterr().err
    monkeypatch.setattr(predict, "load_segmenter", lambda *_: SimpleNamespace(values=(0, 1)))
    assert main([*line, str(a), str(b), str(tmp_path / "C")]) == 2 and segmented == []
    assert f"{tmp_path / 'C'} does not exist" in capsys.readouterr().err
    assert main([*line, str(a)]) == 2 and not (tmp_path / "out").exists()
    assert main([*line, str(a), str(b)]) == 1
    assert f"not measured: {a}: none of the 3 files" in capsys.readouterr().err
    assert [row["specimen"] for row in _rows(tmp_path / "out" / "images.csv")] == [str(b)]
    assert [row["file"] for row in _rows(tmp_path / "out" / "skipped.csv")] == [str(a)]


def test_a_plain_install_measures(tmp_path):
    """Without pyarrow and roifile there are CSV files and pictures; ROIs say what to install."""
    _png(tmp_path / "m.png", _wires((30, 30, 90, 80, 7.0))[0])
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['pyarrow', 'roifile']))\n"
        "from nanodist.cli import main\n"
        f"assert main(['measure', {str(tmp_path / 'm.png')!r}, '--out', {str(tmp_path / 'a')!r}]) == 0\n"
        f"assert main(['measure', {str(tmp_path / 'm.png')!r}, '--out', {str(tmp_path / 'b')!r}, '--rois']) == 2\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pip install 'nanodist[measure]'" in done.stderr
    assert (tmp_path / "a" / "wires.csv").exists() and not list((tmp_path / "a").glob("*.parquet"))
    assert not (tmp_path / "b").exists()
