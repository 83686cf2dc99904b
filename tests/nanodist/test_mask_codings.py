"""Colour-coded and COCO masks become numbers that packing takes."""

import json

import numpy as np
import pytest
from PIL import Image

from nanodist.cli import main
from nanodist.shards import Store
from nanodist.shards.companions import read_mask_of

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def _paint(path, colours):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(colours, np.uint8)).save(path)


@pytest.fixture
def painted(tmp_path):
    """A mask of black, red and green, and one of black and green in a folder."""
    black, red, green = (0, 0, 0), (255, 0, 0), (0, 255, 0)
    _paint(tmp_path / "rgb" / "a.png", [[black, red], [green, green]])
    _paint(tmp_path / "rgb" / "deep" / "b.tif", [[black, black], [green, black]])
    return tmp_path / "rgb"


def _read(path):
    return np.asarray(Image.open(path)).tolist()


def test_colours_count_up_the_same_in_all_files(painted, tmp_path, capsys):
    assert main(["masks", str(painted), "--out", str(tmp_path / "masks")]) == 0
    assert _read(tmp_path / "masks" / "a.png") == [[0, 2], [1, 1]]
    assert _read(tmp_path / "masks" / "deep" / "b.png") == [[0, 0], [1, 0]]
    assert capsys.readouterr().out.strip().endswith("classes 0 #000000, 1 #00ff00, 2 #ff0000")


def test_named_colours_and_the_nearest_of_them(painted, tmp_path, capsys):
    (tmp_path / "c.csv").write_text("color,class\n#000000,0\n#FF0000,7\n#00ff00,300\n")
    _paint(painted / "a.png", [[(9, 0, 0), (250, 5, 5)], [(0, 255, 0), (0, 255, 0)]])
    command = ["masks", str(painted), "--out", str(tmp_path / "masks"), "--colors", str(tmp_path / "c.csv")]
    assert main(command) == 2
    assert "a.png: the colour #090000 has no class (2 such colours)" in capsys.readouterr().err
    assert not (tmp_path / "masks").exists()
    assert main([*command, "--nearest"]) == 0
    assert _read(tmp_path / "masks" / "a.png") == [[0, 7], [300, 300]]


def _coco(path, annotations, name="deep/a.tif"):
    images = [{"id": 5, "file_name": name, "height": 8, "width": 10}]
    categories = [{"id": 20, "name": "rod"}, {"id": 3, "name": "sphere"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


RECTANGLE = {"id": 1, "image_id": 5, "category_id": 20, "segmentation": [[1, 1, 5, 1, 5, 4, 1, 4]]}
# Column by column: 0 for 8 * 6 pixels, then a whole column.
RUNS = {"id": 2, "image_id": 5, "category_id": 3, "segmentation": {"counts": [48, 8, 24], "size": [8, 10]}}


def test_coco_polygons_and_runs_are_packed_as_masks(tmp_path):
    pytest.importorskip("pycocotools")
    crowd = {**RUNS, "id": 3, "iscrowd": 1, "segmentation": {"counts": [72, 8], "size": [8, 10]}}
    _coco(tmp_path / "c.json", [RECTANGLE, RUNS, crowd])
    assert main(["masks", str(tmp_path / "c.json"), "--out", str(tmp_path / "data" / "masks")]) == 0
    expected = np.zeros((8, 10), int)
    expected[1:4, 1:5] = 2
    expected[:, [6, 9]] = 1
    assert _read(tmp_path / "data" / "masks" / "deep" / "a.png") == expected.tolist()
    assert main(["masks", str(tmp_path / "c.json"), "--out", str(tmp_path / "objects"), "--instances"]) == 0
    objects = np.asarray(_read(tmp_path / "objects" / "deep" / "a.png"))
    assert (objects[1:4, 1:5] == 1).all() and (objects[:, 6] == 2).all() and (objects[:, 9] == 0).all()
    pixels = np.random.default_rng(0).integers(0, 255, (8, 10))
    _paint(tmp_path / "data" / "images" / "deep" / "a.tif", pixels)
    source = [str(tmp_path / "data" / "images"), "--out", str(tmp_path / "store"), "--masks", "images=masks"]
    assert main(["pack", *source, "--tile", "none", "--empty-tiles", "keep"]) == 0
    assert read_mask_of(Store.open(tmp_path / "store"), 0).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("annotation", "name", "said"),
    [
        ({**RECTANGLE, "image_id": 6}, "a.tif", "annotation 1 names an image or a category that is not in the file"),
        ({**RECTANGLE, "segmentation": [[1, 2]]}, "a.tif", "annotation 1 has no valid segmentation"),
        ({**RUNS, "segmentation": {"counts": [4], "size": [2, 2]}}, "a.tif", "annotation 2"),
        (RECTANGLE, "../a.tif", "the image name '../a.tif' leaves its folder"),
    ],
)
def test_a_bad_coco_file_is_one_sentence_and_leaves_nothing(tmp_path, capsys, annotation, name, said):
    pytest.importorskip("pycocotools")
    _coco(tmp_path / "c.json", [annotation], name)
    assert main(["masks", str(tmp_path / "c.json"), "--out", str(tmp_path / "masks")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


def test_smoothed_edges_are_no_classes(tmp_path, capsys):
    _paint(tmp_path / "rgb" / "a.png", np.arange(300).reshape(10, 10, 3) % 256)
    assert main(["masks", str(tmp_path / "rgb"), "--out", str(tmp_path / "masks")]) == 2
    assert "more than 64 colours" in capsys.readouterr().err
