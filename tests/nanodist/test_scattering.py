"""Patterns on the q grid, how frames come onto it, and I(q)."""

from dataclasses import replace

import numpy as np
import pytest

from hpc.errors import UserError
from nanodist.scattering import Frame, Geometry, Pattern, QGrid, azimuthal, compressed, decompressed, regrid
from nanodist.scattering.curve import integrate
from nanodist.scattering.noise import estimated_sigma
from nanodist.scattering.transmission import friedel_ratio

SHAPE = (301, 361)
GEOMETRY = Geometry(700.0, (140.3, 188.1), (0.172, 0.172), 0.15418)


def law(q):
    return 40 * np.exp(-q * q) + 0.5


def measured(seed=0, shape=SHAPE, geometry=GEOMETRY):
    q = np.hypot(*geometry.q(shape))
    counts = np.random.default_rng(seed).poisson(law(q)).astype(np.float32)
    mask = np.ones(shape, dtype=bool)
    mask[95:112] = False
    return Frame(np.where(mask, counts, 0), mask, "counts", "simulated", geometry)


def test_the_grid_has_the_beam_between_its_middle_pixels_and_q_up():
    grid = QGrid(4, 2.0)
    q_y, q_x = grid.q()
    assert grid.q_step_inv_nm == 1.0
    assert q_x[0].tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert q_y[:, 0].tolist() == [1.5, 0.5, -0.5, -1.5]
    assert QGrid(5, 2.5).modulus()[2, 2] == 0
    with pytest.raises(UserError, match="positive q_max_inv_nm"):
        QGrid(64, 0.0)


def test_compression_is_linear_through_zero_and_goes_back():
    values = np.array([-50.0, -1e-3, 0.0, 1e-3, 1.0, 1e6], dtype=np.float32)
    small = compressed(values, 2.0)
    assert small[3] == pytest.approx(5e-4, rel=1e-5) and small[1] == -small[3] and small[2] == 0
    assert small[5] == pytest.approx(np.log(1e6), rel=1e-6)
    np.testing.assert_allclose(decompressed(small, 2.0), values, rtol=1e-5)
    with pytest.raises(ValueError, match="positive"):
        compressed(values, 0.0)


def test_a_pattern_checks_its_planes():
    plane = np.zeros((4, 4), dtype=np.float32)
    with pytest.raises(ValueError, match="mask has shape"):
        Pattern(plane, None, np.ones((3, 4), dtype=bool), QGrid(4, 1.0), "counts")
    with pytest.raises(ValueError, match="not bool"):
        Pattern(plane, None, np.ones((4, 4)), QGrid(4, 1.0), "counts")


def test_counts_on_a_coarser_grid_are_poisson_with_the_expected_mean():
    grid = QGrid(64, 2.0)
    pattern = regrid(measured(), grid)
    per_pixel = (grid.q_step_inv_nm / (2 * np.pi / 0.15418 * 0.172 / 700)) ** 2
    expected = law(grid.modulus()) * per_pixel
    score = ((pattern.intensity - expected) / np.sqrt(expected))[pattern.mask]
    assert per_pixel > 10
    assert abs(score.mean()) < 0.15
    # Shared pixels make neighbours a little alike, so a little less than 1.
    assert 0.8 < score.std() < 1.05


def test_gaps_and_what_lies_beyond_the_detector_are_masked():
    grid = QGrid(128, 2.0)
    pattern = regrid(measured(), grid)
    q_y, q_x = grid.q()
    step = 2 * np.pi / 0.15418 * 0.172 / 700
    row, column = 140.3 - q_y / step, 188.1 + q_x / step
    # A pixel of the grid is 3 of the detector.
    inside = (row > 2) & (row < 298) & (column > 2) & (column < 358) & ((row < 92) | (row > 114))
    outside = (row < -3) | (row > 303) | (column < -3) | (column > 363) | ((row > 98) & (row < 108))
    assert inside.sum() > 1000 and outside.sum() > 1000
    assert pattern.mask[inside].all() and not pattern.mask[outside].any()
    assert (pattern.intensity[~pattern.mask] == 0).all()


def test_a_pattern_on_the_grid_comes_back_as_it_is():
    grid = QGrid(33, 1.5)
    rng = np.random.default_rng(1)
    values, mask = rng.normal(size=(33, 33)).astype(np.float32), rng.random((33, 33)) > 0.2
    sigma = rng.uniform(0.5, 1, (33, 33)).astype(np.float32)
    frame = Frame(np.where(mask, values, 0), mask, "reduced", "x", q_planes=grid.q(), sigma=np.where(mask, sigma, 0))
    again = regrid(frame, grid)
    assert np.array_equal(again.mask, mask)
    np.testing.assert_allclose(again.intensity, frame.intensity, atol=1e-6)
    np.testing.assert_allclose(again.sigma, frame.sigma, atol=1e-6)


def test_negative_reduced_values_are_averaged_with_their_sigma():
    frame = measured()
    noise = np.random.default_rng(2).normal(scale=3.0, size=SHAPE).astype(np.float32)
    sigma = np.full(SHAPE, 3.0, dtype=np.float32)
    reduced = replace(frame, intensity=np.where(frame.mask, noise, 0), kind="reduced", sigma=sigma)
    pattern = regrid(reduced, QGrid(64, 2.0))
    assert (pattern.intensity < 0)[pattern.mask].mean() > 0.4
    assert 0.85 < (pattern.intensity / np.maximum(pattern.sigma, 1e-9))[pattern.mask].std() < 1.05
    finer = regrid(reduced, QGrid(256, 0.6))
    # Half a pixel is known no better than its pixel.
    assert np.median(finer.sigma[finer.mask]) == pytest.approx(3.0, rel=0.02)


def test_pixels_without_q_take_no_part():
    frame = measured()
    q_y, q_x = (plane.copy() for plane in GEOMETRY.q(SHAPE))
    q_x[140:160, 170:190] = np.nan
    holed = regrid(replace(frame, geometry=None, q_planes=(q_y, q_x)), QGrid(64, 2.0))
    whole = regrid(frame, QGrid(64, 2.0))
    lost = whole.mask & ~holed.mask
    assert 5 < lost.sum() < 60
    assert np.isfinite(holed.intensity).all()
    far = holed.mask & (holed.grid.modulus() > 0.5)
    np.testing.assert_allclose(holed.intensity[far], whole.intensity[far], rtol=1e-5)


def test_sigma_that_is_not_stated_is_estimated_from_neighbours():
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 500, 120)[:, None] + np.zeros((120, 90))
    mask = rng.random((120, 90)) > 0.1
    sigma = estimated_sigma(np.where(mask, smooth + rng.normal(scale=4.0, size=smooth.shape), 0), mask)
    assert np.median(sigma[mask]) == pytest.approx(4.0, rel=0.1)
    assert (sigma[~mask] == 0).all()


def test_the_side_of_a_spot_is_kept():
    geometry = Geometry(500.0, (50.0, 50.0), (0.2, 0.2), 0.1)
    counts = np.zeros((101, 101), dtype=np.float32)
    counts[20, 70] = 900
    frame = Frame(counts, np.ones_like(counts, dtype=bool), "counts", "x", geometry, setup="transmission")
    pattern = regrid(frame, QGrid(41, 1.2))
    row, column = np.unravel_index(pattern.intensity.argmax(), (41, 41))
    q_y, q_x = pattern.grid.q()
    angle = np.degrees(np.arctan2(q_y[row, column], q_x[row, column]))
    assert angle == pytest.approx(np.degrees(np.arctan2(30, 20)), abs=2)


@pytest.mark.parametrize("kind", ["counts", "reduced"])
def test_the_mean_over_rings_and_its_error_follow_the_law(kind):
    frame = measured(3)
    if kind == "reduced":
        frame = replace(frame, kind="reduced", sigma=np.sqrt(law(np.hypot(*GEOMETRY.q(SHAPE)))).astype(np.float32))
    pattern = regrid(frame, QGrid(128, 2.0))
    q, intensity, sigma = azimuthal(pattern)
    per_pixel = (pattern.grid.q_step_inv_nm / (2 * np.pi / 0.15418 * 0.172 / 700)) ** 2 if kind == "counts" else 1.0
    # Between a ring's mean q and the mean of a curved law lies a little, too.
    score = (intensity / per_pixel - law(q)) / (sigma / per_pixel)
    assert len(q) == 64 and (np.diff(q) > 0).all()
    assert abs(np.nanmean(score)) < 1.0 and 0.6 < np.nanstd(score) < 1.6


def test_rings_depend_on_the_grid_alone_and_empty_ones_are_nan():
    grid = QGrid(64, 2.0)
    mask = grid.modulus() > 0.5
    flat = Pattern(np.where(mask, 7, 0).astype(np.float32), None, mask, grid, "counts")
    q, intensity, sigma = azimuthal(flat)
    everything = azimuthal(replace(flat, mask=np.ones((64, 64), dtype=bool)))
    assert np.array_equal(q, everything[0])
    assert np.isnan(intensity[:7]).all() and np.isnan(sigma[:7]).all()
    np.testing.assert_allclose(intensity[9:], 7)


def test_pyfai_and_the_grid_agree_on_the_curve():
    frame = measured(4)
    curve = integrate(frame, 60, solid_angle=False)
    score = (curve.intensity - law(curve.q_inv_nm)) / curve.sigma
    assert abs(score.mean()) < 0.6 and 0.7 < score.std() < 1.4
    assert curve.facts["corrections"]["solid_angle"] == "unknown"
    corrected = integrate(frame, 60)
    assert corrected.facts["corrections"]["solid_angle"] == "done"
    # At the largest angle a pixel sees 1 / cos^3 less.
    two_theta = 2 * np.arcsin(curve.q_inv_nm[-1] * 0.15418 / (4 * np.pi))
    ratio = corrected.intensity[-1] / curve.intensity[-1]
    assert ratio == pytest.approx(1 / np.cos(two_theta) ** 3, rel=1e-4)
    # Without a geometry, from q of each pixel.
    by_q = integrate(replace(frame, geometry=None, q_planes=GEOMETRY.q(SHAPE)), 60)
    np.testing.assert_allclose(by_q.intensity, curve.intensity, rtol=1e-3)
    np.testing.assert_allclose(by_q.sigma, curve.sigma, rtol=1e-3)


def test_grazing_incidence_is_seen_by_its_halves():
    rows, columns = np.indices(SHAPE)
    upper = 400 * np.exp(-np.abs(columns - 188) / 20) + 30
    rng = np.random.default_rng(0)

    def frame(share):
        counts = rng.poisson(np.where(rows < 140, upper, share * upper)).astype(np.float32)
        return Frame(counts, np.ones(SHAPE, dtype=bool), "counts", "frame.tif", GEOMETRY)

    grid = QGrid(96, 1.2)
    with pytest.raises(UserError, match=r"frame.tif differs between q and -q .*grazing incidence"):
        regrid(frame(0.3), grid)
    kept = regrid(replace(frame(0.3), setup="transmission"), grid)
    assert friedel_ratio(kept) == pytest.approx(1 / 0.3, rel=0.1)
    # A beam that is a little off, or a sample that absorbs more on one side, is no reason.
    assert friedel_ratio(regrid(frame(0.7), grid)) == pytest.approx(1 / 0.7, rel=0.1)
    assert friedel_ratio(regrid(measured(), grid)) < 1.3


def test_what_is_no_pattern_of_a_pair_is_refused_in_one_sentence():
    frame, grid = measured(), QGrid(32, 1.0)
    with pytest.raises(UserError, match=r"simulated has no geometry.*PONI"):
        regrid(replace(frame, geometry=None), grid)
    masked = replace(frame, mask=np.zeros(SHAPE, dtype=bool), masked={"sentinels": 5})
    with pytest.raises(UserError, match=r"simulated has no measured pixel.*sentinels 5"):
        regrid(masked, grid)
    for refused in (lambda one: regrid(one, grid), integrate):
        with pytest.raises(UserError, match="simulated was measured at grazing incidence"):
            refused(replace(frame, setup="grazing"))
    far = replace(frame, geometry=replace(GEOMETRY, beam_centre_px=(5000.0, 5000.0)))
    with pytest.raises(UserError, match="measured nothing between q = 0 and 1 1/nm"):
        regrid(far, grid)
