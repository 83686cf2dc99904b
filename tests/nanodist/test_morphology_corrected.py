"""``nanodist masks`` on ROI sets: which image a set is of."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from nanodist.cli import main
from nanodist.morphology.rois import write_imagej

MASK = np.zeros((60, 60), bool)
MASK[10:50, 20:40] = True
NAMES = {
    "w_1.5um": (
        "w_1.5um.zip", "w_1.5um.rois.zip", "w_1.5um.roi.zip", "w_1.5um.csv", "w_1.5um.tif.zip",
        "00001-w_1.5um.tif.rois.zip", "00007-w_1.5um.instances.rois.zip", "00012-w_1.5um.mask.rois.zip",
    ),
    "W": ("W.ROIS.ZIP",),
}  # fmt: skip


@pytest.mark.parametrize(("image", "name"), [(image, name) for image, names in NAMES.items() for name in names])
def test_a_set_is_of_the_image_whose_name_it_has_before_the_ending(tmp_path, image, name):
    pytest.importorskip("roifile")
    (tmp_path / "images").mkdir()
    for each in (image, "w_1.8um", "w_1"):
        Image.fromarray(MASK).save(tmp_path / "images" / f"{each}.png")
    if name.endswith(".csv"):
        corners = [f"0,rectangle,{v},{y},{x}\n" for v, (y, x) in enumerate([(9, 9), (9, 50), (50, 50), (50, 9)])]
        (tmp_path / name).write_text("index,shape-type,vertex-index,axis-0,axis-1\n" + "".join(corners))
    else:
        write_imagej(tmp_path / "set.zip", MASK)
        (tmp_path / "set.zip").rename(tmp_path / name)
    line = ["masks", str(tmp_path / name), "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    assert main(line) == 0 and [path.name for path in (tmp_path / "out").iterdir()] == [f"{image}.png"]


def test_a_set_of_an_image_that_is_missing_is_not_of_one_with_half_its_name(tmp_path, capsys):
    pytest.importorskip("roifile")
    (tmp_path / "images").mkdir()
    Image.fromarray(MASK).save(tmp_path / "images" / "w_1.png")
    write_imagej(tmp_path / "w_1.5um.zip", MASK)
    line = ["masks", str(tmp_path / "w_1.5um.zip"), "--images", str(tmp_path / "images")]
    assert main([*line, "--out", str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()
    assert "has no image of that name" in capsys.readouterr().err
