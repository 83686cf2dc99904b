"""Objects to ImageJ and napari and back, and the images that corrected masks are of."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from PIL import Image

from hpc.errors import UserError
from nanodist.cli import main
from nanodist.shards import Store
from nanodist.shards.companions import read_mask_of
from tests.nanodist.test_morphology_files import SHAPE, _png, _rows, _wires


def test_rois_go_to_imagej_and_come_back(tmp_path, capsys):
    pytest.importorskip("roifile")
    from nanodist.morphology.rois import read_imagej, read_napari

    first, second = _wires((20, 20, 60, 30, 8.0), (-5, 80, 100, 90, 8.0))
    _png(tmp_path / "m.png", first | second)
    assert main(["measure", str(tmp_path / "m.png"), "--out", str(tmp_path / "out"), "--rois"]) == 0
    folder = tmp_path / "out" / "rois"
    layers = read_imagej(folder / "00001-m.rois.zip", SHAPE)
    assert len(layers) == 2
    for layer, mask in zip(layers, (first, second), strict=True):
        # Outlines cut the corners of pixels: a pixel on the rim may change sides.
        assert (layer & mask).sum() >= 0.95 * mask.sum() and (layer & ~mask).sum() <= 0.05 * mask.sum()
    assert set(np.unique(tifffile.imread(folder / "00001-m.labels.tif"))) == {0, 1, 2}
    shapes = _rows(folder / "00001-m.centre-lines.csv")
    assert {row["shape-type"] for row in shapes} == {"path"} and {row["index"] for row in shapes} == {"0", "1"}
    # What a person corrected comes back as masks under the names of the images.
    (tmp_path / "images").mkdir()
    back = ["masks", str(folder), "--images", str(tmp_path / "images"), "--out"]
    assert main([*back, str(tmp_path / "none")]) == 2 and "has no image of that name" in capsys.readouterr().err
    _png(tmp_path / "images" / "m.png", first)
    assert main([*back, str(tmp_path / "back")]) == 0 and main([*back, str(tmp_path / "o"), "--instances"]) == 0
    material, objects = (np.asarray(Image.open(tmp_path / name / "m.png")) for name in ("back", "o"))
    np.testing.assert_array_equal(material, layers.any(axis=0))
    assert objects.max() == 2 and not ((objects == 1) ^ (layers[0] & ~layers[1])).any()
    with pytest.raises(UserError, match="'path 0', which is no area"):
        read_napari(folder / "00001-m.centre-lines.csv", SHAPE)
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"bad\.zip"):
        read_imagej(tmp_path / "bad.zip", SHAPE)


def test_shapes_of_napari_are_read_and_others_refused(tmp_path):
    from nanodist.morphology.rois import read_napari

    _png(tmp_path / "images" / "m.png", _wires((20, 20, 60, 30, 8.0))[0])
    back = ["masks", str(tmp_path / "m.csv"), "--images", str(tmp_path / "images"), "--out"]
    # napari's rectangle and ellipse of one frame; coordinates are those of pixel centres.
    head, frame = (
        "index,shape-type,vertex-index,axis-0,axis-1\n",
        [(19.5, 29.5), (19.5, 69.5), (59.5, 69.5), (59.5, 29.5)],
    )
    rows = [
        f"{i},{kind},{v},{y},{x}\n" for i, kind in enumerate(("rectangle", "ellipse")) for v, (y, x) in enumerate(frame)
    ]
    (tmp_path / "m.csv").write_text(head + "".join(rows))
    square, disc = read_napari(tmp_path / "m.csv", SHAPE)
    expected = np.zeros(SHAPE, bool)
    expected[20:60, 30:70] = True
    np.testing.assert_array_equal(square, expected)
    assert disc.sum() == pytest.approx(np.pi * 20**2, rel=0.01) and not (disc & ~square).any()
    assert main([*back, str(tmp_path / "napari")]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "napari" / "m.png")) > 0, square)
    # Of a stack napari writes the plane first.
    deep = head.replace("axis-0,axis-1", "axis-0,axis-1,axis-2")
    (tmp_path / "m.csv").write_text(deep + "".join(f"0,rectangle,{v},4,{y},{x}\n" for v, (y, x) in enumerate(frame)))
    np.testing.assert_array_equal(read_napari(tmp_path / "m.csv", SHAPE)[0], expected)
    two = "".join(f"{i},rectangle,{v},{i},{y},{x}\n" for i in (0, 1) for v, (y, x) in enumerate(frame))
    (tmp_path / "m.csv").write_text(deep + two)
    with pytest.raises(UserError, match="shapes on 2 planes of a stack"):
        read_napari(tmp_path / "m.csv", SHAPE)
    (tmp_path / "m.csv").write_text(
        head + "".join(f"0,rectangle,{v},{y + 500},{x}\n" for v, (y, x) in enumerate(frame))
    )
    with pytest.raises(UserError, match="'rectangle 0' covers no pixel of an image of 120 x 120"):
        read_napari(tmp_path / "m.csv", SHAPE)
    for table in (head.replace(",", ";") + "0;rectangle;0;1;2\n", "index,axis-0,axis-1\n0,1,2\n"):
        (tmp_path / "m.csv").write_text(table)
        with pytest.raises(UserError, match=r"m\.csv has no column '.*', so that it is no shapes layer"):
            read_napari(tmp_path / "m.csv", SHAPE)
    (tmp_path / "m.csv").write_text(head)
    with pytest.raises(UserError, match="holds 0 shapes; give 1 to"):
        read_napari(tmp_path / "m.csv", SHAPE)


def test_outlines_keep_holes(tmp_path):
    """As a composite of ImageJ; with another object in a hole, and one beside it."""
    pytest.importorskip("roifile")
    from nanodist.morphology.rois import read_imagej, write_imagej

    mask = np.hypot(*np.mgrid[-40:40, -40:40]) < 30
    mask &= ~(np.hypot(*np.mgrid[-40:40, -40:40]) < 20)
    labels = mask.astype(np.int32)
    labels[38:44, 38:44], labels[2:6, 2:9] = 2, 3
    assert write_imagej(tmp_path / "m.zip", labels) == 3
    layers = read_imagej(tmp_path / "m.zip", labels.shape)
    for number, layer in enumerate(layers, 1):
        np.testing.assert_array_equal(layer, labels == number)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("POINT", "ROI a is no area"), ("POLYLINE", "ROI a is no area"), ("POLYGON", "ROI a covers no pixel of an image")],
)
def test_rois_that_are_no_object_of_the_image_are_refused(tmp_path, kind, words):
    roifile = pytest.importorskip("roifile")
    from nanodist.morphology.rois import read_imagej

    roi = roifile.ImagejRoi.frompoints(np.array([[500, 500], [520, 500], [520, 520], [500, 520]]), name="a")
    roi.roitype = roifile.ROI_TYPE[kind]
    roi.tofile(tmp_path / "a.roi")
    with pytest.raises(UserError, match=words):
        read_imagej(tmp_path / "a.roi", (540, 540) if kind != "POLYGON" else SHAPE)


def test_corrected_masks_find_their_images(tmp_path):
    """Names with dots; and label images as ``measure --rois`` wrote them."""
    pytest.importorskip("roifile")
    for name, wire in (("w_1.5um", (20, 20, 60, 30, 8.0)), ("w_1.8um", (30, 60, 90, 70, 8.0))):
        _png(tmp_path / "masks" / f"{name}.png", _wires(wire)[0])
        _png(tmp_path / "images" / f"{name}.png", np.random.default_rng(0).integers(0, 200, SHAPE, np.uint8))
    assert main(["measure", str(tmp_path / "masks"), "--out", str(tmp_path / "out"), "--rois"]) == 0
    (tmp_path / "out" / "rois").rename(tmp_path / "rois")
    back = ["masks", str(tmp_path / "rois"), "--images", str(tmp_path / "images"), "--out", str(tmp_path / "back")]
    assert main(back) == 0
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["w_1.5um.png", "w_1.8um.png"]
    pack = ["pack", str(tmp_path / "images"), "--tile", "none", "--workers", "1"]
    for masks in ("back", "rois"):
        assert main([*pack, "--masks", f"images={masks}", "--out", str(tmp_path / f"store-{masks}")]) == 0
        store = Store.open(tmp_path / f"store-{masks}")
        assert [read_mask_of(store, at).any() for at in range(len(store.samples))] == [True, True]
    (tmp_path / "rois" / "00009-w_1.5um.labels.tif").write_bytes(
        (tmp_path / "rois" / "00001-w_1.5um.labels.tif").read_bytes()
    )
    assert main([*pack, "--masks", "images=rois", "--out", str(tmp_path / "twice")]) == 2


def test_corrected_masks_of_images_in_subfolders_find_them(tmp_path):
    """Two of one name; ``measure --rois`` writes both into one folder."""
    pytest.importorskip("roifile")
    wires = {"day1": (20, 20, 60, 30, 8.0), "day2": (30, 60, 90, 70, 12.0)}
    for day, wire in wires.items():
        _png(tmp_path / "masks" / day / "x.png", _wires(wire)[0])
        _png(tmp_path / "images" / day / "x.png", np.random.default_rng(0).integers(0, 200, SHAPE, np.uint8))
    assert main(["measure", str(tmp_path / "masks"), "--out", str(tmp_path / "out"), "--rois"]) == 0
    (tmp_path / "out" / "rois").rename(tmp_path / "rois")
    back = ["masks", str(tmp_path / "rois"), "--images", str(tmp_path / "images"), "--out", str(tmp_path / "back")]
    assert main(back) == 0
    pack = ["pack", str(tmp_path / "images"), "--tile", "none", "--workers", "1"]
    for masks in ("back", "rois"):
        assert main([*pack, "--masks", f"images={masks}", "--out", str(tmp_path / f"store-{masks}")]) == 0
        store = Store.open(tmp_path / f"store-{masks}")
        found = {sample.source: (read_mask_of(store, i) > 0) for i, sample in enumerate(store.samples)}
        for day, wire in wires.items():
            np.testing.assert_array_equal(next(m for s, m in found.items() if day in s), _wires(wire)[0])
