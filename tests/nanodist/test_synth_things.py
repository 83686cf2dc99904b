"""Particles and viruses: their truth against analytic sizes and pixels, and that brightness does not tell the class."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from hpc.errors import UserError
from nanodist.cli import main
from nanodist.synth import SHAPES, VIRUSES, Settings, make_particles, make_viruses, read_instances
from nanodist.synth.geometry import Frame
from nanodist.synth.outlines import disc, polygon, raster, rod

SMALL = Settings(size_px=160, pixel_size_nm=0.8)
MAKERS = [(make_particles, name) for name in SHAPES] + [(make_viruses, name) for name in VIRUSES]


def test_outlines_have_the_sizes_of_the_textbook():
    at = np.array([3.0, 4.0])
    assert disc(at, 10).area_nm2 == pytest.approx(25 * np.pi)
    assert disc(at, 10).feret_nm() == pytest.approx((10, 10))
    one = rod(at, 30, 10, 0.4)
    assert one.area_nm2 == pytest.approx(200 + 25 * np.pi)
    assert one.perimeter_nm == pytest.approx(40 + 10 * np.pi)
    assert one.feret_nm() == pytest.approx((10, 30))
    square = polygon(at, 4, 20, 2, 0.3)
    assert square.area_nm2 == pytest.approx(400 - (4 - np.pi) * 4)
    assert square.perimeter_nm == pytest.approx(80 - 16 + 4 * np.pi)
    assert square.feret_nm() == pytest.approx((20, 16 * np.sqrt(2) + 4))
    triangle = polygon(at, 3, 20, 0.0, 0.0)
    assert triangle.area_nm2 == pytest.approx(100 * np.sqrt(3))
    assert triangle.feret_nm() == pytest.approx((10 * np.sqrt(3), 20))
    assert not disc(np.array([5.1, 50.0]), 10).is_cut(100.0)
    assert disc(np.array([4.9, 50.0]), 10).is_cut(100.0) and disc(np.array([50.0, 95.1]), 10).is_cut(100.0)


@pytest.mark.parametrize(
    "outline", [polygon(np.array([50.2, 49.7]), 3, 60, 4, 0.7), rod(np.array([50, 50]), 70, 18, 2)]
)
def test_a_raster_covers_the_area_and_measures_distance(outline):
    seen = raster(outline, Frame(100, 1.0))
    assert seen.mask.sum() == pytest.approx(outline.area_nm2, rel=0.01)
    assert seen.covered(1.0).sum() == pytest.approx(outline.area_nm2, rel=0.003)
    # Moving out by one grows the area by the perimeter.
    grown = (seen.signed_nm <= 0.5).sum() - (seen.signed_nm <= -0.5).sum()
    assert grown == pytest.approx(outline.perimeter_nm, rel=0.03)


@pytest.mark.parametrize(("make", "name"), MAKERS)
def test_truth_agrees_with_masks_and_is_repeatable(make, name):
    whole = 0
    for index in range(4):
        one = make(5, name, index, SMALL)
        assert one.image.dtype == np.uint16 and one.image.shape == (160, 160)
        assert len(one.instances) == len(one.truth["objects"]) > 0
        assert one.truth["coverage"] == pytest.approx(one.instances.any(axis=0).mean())
        for row, mask in zip(one.truth["objects"], one.instances, strict=True):
            beyond = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
            assert beyond or not row["border_cut"] or row["area_nm2"] > 0.8**2 * mask.sum()
            if not row["border_cut"]:
                whole += 1
                assert mask.sum() * 0.8**2 == pytest.approx(row["area_nm2"], rel=0.08)
        json.dumps(one.truth, allow_nan=False)
    assert whole >= 2
    again = make(5, name, 2, SMALL)
    np.testing.assert_array_equal(again.image, make(5, name, 2, SMALL).image)
    assert again.image.tobytes() != make(6, name, 2, SMALL).image.tobytes()


def test_particles_are_dark_on_bright_and_viruses_bright_in_stain():
    for make, name in MAKERS:
        sign = 1 if make is make_particles else -1
        contrast = []
        for index in range(4):
            one = make(1, name, index, SMALL)
            inside = one.instances.any(axis=0)
            contrast.append(sign * (one.image[~inside].mean() - one.image[inside].mean()) / one.image.std())
        assert np.median(contrast) > 0.3, (name, contrast)


def test_thickness_adds_up_where_particles_overlap():
    """Beer-Lambert: at high dose and little diffraction, doubly covered pixels are the darkest."""
    darker = []
    for index in range(16):
        one = make_particles(0, "cube", index, Settings(size_px=160, pixel_size_nm=0.8, dose_e_nm2=1e5))
        depth = one.instances.sum(axis=0)
        if (depth > 1).sum() > 8:
            darker.append(one.image[depth == 1].mean() / one.image[depth > 1].mean())
    assert len(darker) >= 2
    assert min(darker) > 1.0


def test_impossible_wishes_are_refused_by_name():
    with pytest.raises(UserError, match="cube, rod, sphere, triangle"):
        make_particles(0, "star", 0, SMALL)
    with pytest.raises(UserError, match="capsid, enveloped, filament"):
        make_viruses(0, "prion", 0, SMALL)
    with pytest.raises(UserError, match="bright field only"):
        make_viruses(0, "capsid", 0, Settings(haadf_share=0.5))


def test_data_sets_have_the_same_shape_as_those_of_wires(tmp_path, capsys):
    for kind, classes in (("particles", "rod,cube"), ("viruses", "filament,capsid")):
        out = tmp_path / kind
        command = ["synth", kind, "--out", str(out), "--size", "128", "--micrographs", "2", "--classes", classes]
        assert main(command) == 0
        meta, objects = (
            list(csv.DictReader((out / name).read_text().splitlines())) for name in ("meta.csv", "objects.csv")
        )
        assert [row["label"] for row in meta] == [name for name in classes.split(",") for _ in range(2)]
        assert sum(int(row["objects"]) for row in meta) == len(objects)
        for row in meta:
            stem = out / "truth" / row["file"].removesuffix(".tif")
            layers = read_instances(stem.with_suffix(".instances.tif"))
            assert len(layers) == int(row["objects"])
            assert json.loads(stem.with_suffix(".json").read_text())["kind"] == kind
            assert (out / "images" / row["file"]).exists()
    capsys.readouterr()
    assert main(["synth", "viruses", "--out", str(tmp_path / "x"), "--classes", "rod"]) == 2
    assert "capsid, enveloped, filament" in capsys.readouterr().err
    assert main(["synth", "viruses", "--out", str(tmp_path / "x"), "--haadf-share", "0.5"]) == 2
    assert not (tmp_path / "x").exists()
