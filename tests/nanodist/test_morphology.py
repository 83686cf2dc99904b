"""Wires and objects of known shape: drawn from their equations, or by hand."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.measure import euler_number, perimeter_crofton

import nanodist
from hpc.errors import UserError
from nanodist.morphology import border, measure, statistics
from nanodist.morphology.bundles import bundles
from nanodist.morphology.objects import shape_of
from nanodist.morphology.orientation import axis_deg, moment, order_parameter
from nanodist.morphology.persistence import mean_square_2d, persistence_length

Y, X = np.mgrid[:240, :240]


def stadium(x0, y0, x1, y1, width, shape=(240, 240)):
    """Pixels whose centre lies within half a width of a segment, in pixels from the corner of the image."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    dx, dy = x1 - x0, y1 - y0
    along = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - x0 - along * dx, y - y0 - along * dy) <= width / 2


@pytest.mark.parametrize(("width", "angle"), [(5.3, 17.0), (12.4, 63.0), (31.0, 128.0)])
def test_a_straight_wire_has_its_width_length_and_direction(width, angle):
    step = 70 * np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    (x0, y0), (x1, y1) = np.array([120.3, 119.6]) - step, np.array([120.3, 119.6]) + step
    found = measure(stadium(x0, y0, x1, y1, width), 2.0)
    (wire,), (row,) = found.wires, found.objects
    assert wire["width_mean_nm"] == pytest.approx(2 * width, rel=0.015)
    assert wire["contour_length_nm"] == pytest.approx(280, rel=0.01)
    assert wire["tip_to_tip_length_nm"] == pytest.approx(280 + 2 * width, rel=0.01)
    assert wire["end_to_end_nm"] == pytest.approx(280, rel=0.01)
    assert wire["orientation_deg"] == pytest.approx(angle, abs=1.0)
    assert wire["ends"] == "tip+tip" and not wire["border_cut"]
    assert row["width_mean_nm"] == wire["width_mean_nm"] and row["wires"] == 1
    assert row["area_nm2"] == pytest.approx(4 * (width * 140 + np.pi * width**2 / 4), rel=0.02)
    widths = found.widths["width_nm"]
    assert len(widths) > 100 and np.abs(widths - 2 * width).max() < 3.0


def test_an_arc_is_measured_along_its_curve():
    radius, theta = np.hypot(X - 120, Y - 200), np.arctan2(200 - Y, X - 120)
    mask = (np.abs(radius - 90) <= 6) & (theta > 0.3) & (theta < np.pi - 0.3)
    (wire,) = measure(mask).wires
    # Flat ends: the line reaches the tips at full length, its end caps' centres lie half a width inside.
    assert wire["tip_to_tip_length_px"] == pytest.approx(90 * (np.pi - 0.6), rel=0.015)
    assert wire["width_mean_px"] == pytest.approx(12, abs=0.2)
    chord = 2 * 90 * np.sin((np.pi - 0.6) / 2 - 6 / 90)
    assert wire["end_to_end_px"] == pytest.approx(chord, rel=0.02)


def test_a_ring_is_closed():
    (wire,) = measure(np.abs(np.hypot(X - 119.4, Y - 120.2) - 70) <= 5).wires
    assert wire["ends"] == "closed+closed"
    assert wire["contour_length_px"] == pytest.approx(2 * np.pi * 70, rel=0.01)
    assert wire["end_to_end_px"] == 0


def test_the_border_cuts_lengths_where_the_wire_leaves():
    found = measure(stadium(-50, 100.2, 150.4, 131, 9.0))
    (wire,) = found.wires
    assert wire["border_cut"] and wire["border_weight"] == 0 and wire["ends"] == "border+tip"
    assert wire["contour_length_px"] == pytest.approx(150.4 * np.hypot(200.4, 30.8) / 200.4, rel=0.01)
    assert wire["width_mean_px"] == pytest.approx(9.0, rel=0.02)
    assert found.image["contour_length_n"] == 0 and found.image["contour_length_number_mean_px"] is None


def test_crossing_wires_are_traced_through_their_crossing():
    mask = stadium(30, 40, 210, 190, 9.0) | stadium(40, 200, 200, 35, 7.0)
    found = measure(mask)
    assert len(found.objects) == 1 and found.objects[0]["crossings"] == 1
    wide, thin = sorted(found.wires, key=lambda row: -row["width_mean_px"])
    assert wide["width_mean_px"] == pytest.approx(9.0, rel=0.03)
    assert thin["width_mean_px"] == pytest.approx(7.0, rel=0.03)
    assert wide["contour_length_px"] == pytest.approx(np.hypot(180, 150), rel=0.01)
    assert thin["contour_length_px"] == pytest.approx(np.hypot(160, 165), rel=0.01)
    assert found.objects[0]["contour_length_px"] is None  # two wires have no one length


def test_a_branch_is_no_crossing_and_ends_hidden():
    found = measure(stadium(20, 120, 220, 120, 9.0) | stadium(120, 120, 130, 220, 9.0))
    assert found.objects[0]["branch_points"] == 1 and found.objects[0]["crossings"] == 0
    main, side = sorted(found.wires, key=lambda row: -row["contour_length_px"])
    assert main["contour_length_px"] == pytest.approx(200, rel=0.01) and not main["ends_hidden"]
    assert side["ends_hidden"]
    assert found.image["contour_length_n"] == 1


def test_layers_keep_overlapping_wires_apart():
    layers = np.stack([stadium(30, 100, 200, 110, 8.0), stadium(35, 90, 205, 120, 8.0)])
    found = measure(layers)
    assert len(found.wires) == 2
    for wire, length in zip(found.wires, (np.hypot(170, 10), np.hypot(170, 30)), strict=True):
        assert wire["contour_length_px"] == pytest.approx(length, rel=0.01)
        assert wire["width_mean_px"] == pytest.approx(8.0, rel=0.03)


def test_labels_that_touch_are_objects_of_their_own():
    labels = np.zeros((60, 80), np.int32)
    labels[10:40, 10:30], labels[10:40, 30:70] = 7, 3
    rows = {row["object"]: row for row in measure(labels, shape="particles").objects}
    assert rows[7]["area_px2"] == 600 and rows[3]["area_px2"] == 1200
    assert rows[3]["aspect_ratio"] == pytest.approx(4 / 3)
    assert rows[7]["feret_min_px"] == 20 and "branch_points" not in rows[7]


def test_shapes_of_discs_ellipses_and_frames():
    disc = shape_of(np.hypot(X - 100.3, Y - 119.6) < 60)
    assert disc["equivalent_diameter"] == pytest.approx(120, rel=0.005)
    assert disc["circularity"] == pytest.approx(1.0, abs=0.02)
    assert disc["feret_max"] == pytest.approx(120, rel=0.015)
    turned = (X - 120) * np.cos(0.5) + (Y - 120) * np.sin(0.5), (Y - 120) * np.cos(0.5) - (X - 120) * np.sin(0.5)
    ellipse = shape_of((turned[0] / 90) ** 2 + (turned[1] / 30) ** 2 < 1)
    assert ellipse["aspect_ratio"] == pytest.approx(3.0, rel=0.01)
    assert ellipse["axis_angle_deg"] == pytest.approx(np.degrees(0.5), abs=0.3)
    assert ellipse["feret_min"] == pytest.approx(60, rel=0.03)
    frame = np.ones((40, 50), bool)
    frame[10:20, 10:20] = frame[25:30, 5:40] = False
    assert shape_of(frame)["holes"] == 2


def test_perimeter_and_holes_are_those_of_scikit_image():
    mask = np.random.default_rng(0).random((2100, 60)) < 0.55
    found = shape_of(mask)
    assert found["perimeter"] == pytest.approx(perimeter_crofton(np.pad(mask, 1), 4))
    assert found["holes"] == 1 - euler_number(np.pad(mask, 1), 2)


def test_border_weights_undo_what_the_border_takes():
    """Discs dropped uniformly: the large ones are cut more often, and the weighted mean is still that of all."""
    rng = np.random.default_rng(2)
    small, large, weights, sizes = 20, 60, [], []
    for _ in range(4000):
        size = int(rng.choice([small, large]))
        top, left = rng.integers(-60, 200, 2)
        if top + size <= 0 or left + size <= 0 or top >= 200 or left >= 200:
            continue
        box = slice(max(0, top), min(200, top + size)), slice(max(0, left), min(200, left + size))
        weights.append(border.weight(box, (200, 200)))
        sizes.append(size)
    x, w = np.array(sizes), np.array(weights)
    assert np.average(x[w > 0]) < 37.5  # what a plain mean of the whole ones says
    assert np.average(x, weights=w) == pytest.approx(40, abs=1.5)
    assert border.weight((slice(0, 5), slice(3, 9)), (200, 200)) == 0


def test_number_and_volume_weights():
    found = statistics.sizes("d", [1.0, 1.0, 3.0, 9.0], [1, 1, 2, 0], [1.0, 1.0, 27.0, 729.0])
    assert found["d_n"] == 3
    assert found["d_number_mean"] == pytest.approx((1 + 1 + 6) / 4)
    assert found["d_volume_mean"] == pytest.approx((1 + 1 + 2 * 81) / (1 + 1 + 54))


def test_orientation_doubles_angles():
    line = np.array([[0, 0], [10.0, 10.0]])  # (row, column): down and to the right
    assert axis_deg(moment(line)) == pytest.approx(45)
    assert axis_deg(moment(line[::-1])) == pytest.approx(45)
    across = [moment(np.array([[0, 0], [0, 5.0]])), moment(np.array([[0, 0], [5.0, 0]]))]
    assert order_parameter(across, 10.0) == pytest.approx(0, abs=1e-12)
    assert order_parameter([across[0]] * 2, 10.0) == pytest.approx(1)


def test_persistence_length_of_worm_like_chains_lies_in_its_interval():
    rng = np.random.default_rng(3)
    for truth in (60.0, 300.0):
        turns = rng.normal(0, np.sqrt(1 / truth), (80, 400))  # <cos> falls as exp(-s / 2 P) in the plane
        heading = np.cumsum(turns, axis=1) + rng.uniform(0, 6, (80, 1))
        lines = [np.cumsum(np.stack([np.sin(h), np.cos(h)], axis=1), axis=0) for h in heading]
        found = persistence_length(lines, 10.0)
        assert found.low * 0.97 < truth < found.high * 1.03
        assert found.length == pytest.approx(truth, rel=0.2)
    straight = [np.stack([np.zeros(300), np.arange(300.0)], axis=1)] * 4
    assert np.isnan(persistence_length(straight, 10.0).length)
    assert "stiffer" in persistence_length(straight, 10.0).why


def test_the_2d_formula_has_its_limits():
    s = np.array([1.0, 50.0])
    assert mean_square_2d(s, 1e9) == pytest.approx(s**2)
    assert mean_square_2d(np.array([1e6]), 10.0) == pytest.approx(4 * 10 * 1e6, rel=1e-3)


def test_projected_chains_are_not_taken_for_flat_ones():
    rng = np.random.default_rng(4)
    truth, lines = 100.0, []
    tangent = rng.normal(size=(60, 3))
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    track = np.zeros((60, 401, 2))
    for i in range(400):
        track[:, i + 1] = track[:, i] + tangent[:, :2]
        kick = rng.normal(size=(60, 3)) / np.sqrt(truth)
        tangent = tangent + kick - (kick * tangent).sum(1, keepdims=True) * tangent
        tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    lines = list(track)
    assert persistence_length(lines, 10.0, "projected").length == pytest.approx(truth, rel=0.25)
    assert persistence_length(lines, 10.0, "2d").length < 0.65 * truth


def test_bundles_are_wires_side_by_side():
    t = np.arange(200.0)
    lines = [np.stack([np.full(200, row), t], axis=1) for row in (10.0, 20.0, 31.0, 90.0)]
    lines.append(np.stack([t, np.full(200, 100.0)], axis=1))  # crosses them all
    found = bundles(lines, [10.0] * 5)
    assert found[0] == found[1] == found[2]
    assert len({found[0], found[3], found[4]}) == 3


def test_specimens_differ_where_their_images_do():
    rng = np.random.default_rng(0)
    a, b = rng.normal(10, 1, 12), rng.normal(12, 1, 12)
    ones = np.ones(12)
    found = statistics.bootstrap_difference("x", ("A", "B"), (a, b), (ones, ones))
    error = np.sqrt(a.var() / 12 + b.var() / 12)
    assert found.difference == pytest.approx(b.mean() - a.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    one = statistics.bootstrap_difference("x", ("A", "B"), (a[:1], b), (ones[:1], ones))
    assert np.isnan(one.low) and "one image" in one.note


def test_nanodist_measure_is_this_function():
    assert nanodist.measure is measure
    assert nanodist.measure(np.zeros((20, 20), bool), pixel_size_nm=1.5).image["objects"] == 0


@pytest.mark.parametrize(
    ("mask", "options", "words"),
    [
        (np.zeros((1, 1), bool), {}, "1 x 1 pixels"),
        (np.zeros((20, 20)), {}, "float64"),
        (np.zeros((3, 20, 20), int), {}, "layers"),
        (np.full((20, 20), -1), {}, "labels go down to -1"),
        (np.zeros((20, 20), bool), {"pixel_size_nm": 0.0}, "above 0 nm"),
        (np.zeros((20, 20), bool), {"shape": "blobs"}, "auto, wires, particles"),
        (np.zeros((20, 20), bool), {"model": "3d"}, "2d, projected"),
    ],
)
def test_wrong_masks_and_options_are_one_sentence(mask, options, words):
    with pytest.raises(UserError, match=words):
        measure(mask, **options)
