"""Projected wires against analytic volumes, areas and lengths."""

from __future__ import annotations

import numpy as np
import pytest

from nanodist.synth.geometry import Frame, Wire, layer, project, spans


def _wire(start, end, radius):
    return Wire(np.array([start, end], float), radius)


@pytest.mark.parametrize("pixel_nm", [0.5, 2.0])
@pytest.mark.parametrize("angle", [0.0, 17.0, 45.0])
@pytest.mark.parametrize("radius_px", [2.0, 5.3, 12.0])
def test_volume_and_area_are_those_of_a_round_ended_cylinder(pixel_nm, angle, radius_px):
    frame, rng, areas = Frame(160, pixel_nm, 20), np.random.default_rng(0), []
    direction = 40 * np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    r, length = radius_px * pixel_nm, 80 * pixel_nm
    for middle in 80 + rng.random((16, 2)):
        wire = _wire((middle - direction) * pixel_nm, (middle + direction) * pixel_nm, r)
        seen = project(wire, frame)
        volume = seen.thickness_nm.sum() * pixel_nm**2
        assert volume == pytest.approx(np.pi * r**2 * length + 4 / 3 * np.pi * r**3, rel=0.003)
        assert r < seen.thickness_nm.max() <= 2 * r * (1 + 1e-9)
        areas.append(layer(seen, frame).sum() * pixel_nm**2)
    # One wire along the rows has a whole number of pixels across, so its area is right only on average.
    assert np.mean(areas) == pytest.approx(2 * r * length + np.pi * r**2, rel=0.03)


def test_profile_across_a_wire_is_a_half_circle():
    frame = Frame(101, 1.0)
    seen = project(_wire((-50, 50.5), (150, 50.5), 20.0), frame)
    full = np.zeros((101, 101))
    full[seen.window] = seen.thickness_nm
    across = np.arange(101) - 50.0
    inside = np.abs(across) < 18
    np.testing.assert_allclose(full[inside, 50], 2 * np.sqrt(400 - across[inside] ** 2), rtol=2e-3)


def test_the_mask_is_where_pixel_centres_lie_within_the_radius():
    frame = Frame(64, 1.0)
    wire = _wire((10.2, 20.7), (50.1, 41.3), 6.4)
    mask = layer(project(wire, frame), frame)
    y, x = np.mgrid[:64, :64] + 0.5
    start, delta = wire.points[0], wire.points[1] - wire.points[0]
    along = np.clip(((x - start[0]) * delta[0] + (y - start[1]) * delta[1]) / (delta @ delta), 0, 1)
    distance = np.hypot(x - start[0] - along * delta[0], y - start[1] - along * delta[1])
    certain = np.abs(distance - 6.4) > 0.02
    assert (mask == (distance <= 6.4))[certain].all()


def test_a_curved_line_keeps_its_volume_and_arc():
    t = np.linspace(0, np.pi, 200)
    arch = np.stack([100 + 60 * np.cos(t), 130 - 60 * np.sin(t)], axis=1)
    frame, wire = Frame(200, 1.0), Wire(arch, 8.0)
    seen = project(wire, frame)
    # Pappus: a tube about a plane curve has the volume of the straight one.
    assert wire.contour_length_nm == pytest.approx(60 * np.pi, rel=1e-4)
    assert seen.thickness_nm.sum() == pytest.approx(np.pi * 64 * 60 * np.pi + 4 / 3 * np.pi * 512, rel=0.01)
    assert seen.arc_nm[seen.mask].max() == pytest.approx(60 * np.pi, rel=0.01)


def test_a_margin_moves_nothing():
    wire = _wire((-30, 10), (70, 55), 7.0)
    alone, padded = Frame(64, 1.0), Frame(64, 1.0, 16)
    np.testing.assert_array_equal(layer(project(wire, alone), alone), layer(project(wire, padded), padded))


def test_wires_outside_are_none():
    assert project(_wire((200, 200), (300, 300), 5.0), Frame(64, 1.0)) is None


def test_lengths_orientation_and_cut():
    wire = _wire((-50, 0), (50, 100), 4.0)
    assert wire.contour_length_nm == pytest.approx(wire.end_to_end_nm)
    assert wire.orientation_deg == pytest.approx(45.0)
    assert Wire(wire.points[::-1], 4.0).orientation_deg == pytest.approx(45.0)
    assert wire.visible_length_nm(100.0) == pytest.approx(50 * np.sqrt(2), rel=1e-3)
    assert wire.is_cut(100.0)
    assert not _wire((10, 10), (50, 90), 4.0).is_cut(100.0)
    assert _wire((3, 10), (50, 90), 4.0).is_cut(100.0)


def test_spans_needs_one_piece_from_side_to_side():
    mask = np.zeros((20, 20), bool)
    mask[10] = True
    assert spans(mask) == (True, False)
    mask[10, 7] = False
    assert spans(mask) == (False, False)
    mask[9, 7] = True  # diagonal neighbours count
    assert spans(mask) == (True, False)
    assert spans(mask.T) == (False, True)
