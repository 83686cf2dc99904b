"""Chords, two-point correlation and percolation against brute force, formulas and DBSCAN."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt
from sklearn.cluster import DBSCAN

from nanodist.morphology import domains, skeleton
from nanodist.morphology.percolation import percolation


def test_chords_leave_out_what_the_border_cuts():
    mask = np.zeros((3, 12), bool)
    mask[0, 2:5] = mask[0, 7:8] = mask[1, 0:4] = mask[1, 9:12] = True
    assert sorted(domains.chords(mask, 1).tolist()) == [1, 3]
    assert domains.chords(mask.T, 0).tolist() == domains.chords(mask, 1).tolist()


def test_stripes_have_their_chords_spacing_and_interface():
    mask = np.zeros((200, 300), bool)
    mask[:, np.arange(300) % 25 < 10] = True
    summary = domains.chord_summary(mask)
    assert summary["domain_chord_mean"] == 10 and summary["gap_chord_mean"] == 15
    found = domains.two_point_correlation(mask)
    assert found.s2[0] == pytest.approx(mask.mean())
    # Stripes of one direction are the worst case of Crofton's formula with two directions.
    assert found.interface == pytest.approx(2 / 25 * np.pi / 4, rel=0.06)


def test_spacing_of_a_disordered_pattern_is_where_its_covariance_peaks():
    """A random field of one wavelength L, cut at its median, has a covariance asin(J0(2 pi r / L)): peak at 1.117 L."""
    size, wavelength = 512, 32.0
    noise = np.fft.fft2(np.random.default_rng(3).normal(size=(size, size)))
    q = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None, :])
    field = np.fft.ifft2(noise * (np.abs(q - 1 / wavelength) < 0.5 / size)).real
    found = domains.two_point_correlation(field > np.median(field))
    assert found.spacing == pytest.approx(1.117 * wavelength, rel=0.05)


def test_s2_is_the_share_of_pairs_whatever_the_blocks(monkeypatch):
    mask = np.random.default_rng(1).random((45, 61)) < 0.3
    mask[10:30, 20:45] = True
    lag = 12
    monkeypatch.setattr(domains, "BLOCK", 16)
    found = domains.two_point_correlation(mask, lag)
    hits, count = np.zeros(lag + 1), np.zeros(lag + 1)
    for dy in range(-lag, lag + 1):
        for dx in range(-lag, lag + 1):
            ring = round(float(np.hypot(dy, dx)))
            if ring > lag:
                continue
            a = mask[max(0, -dy) : 45 - max(0, dy), max(0, -dx) : 61 - max(0, dx)]
            b = mask[max(0, dy) : 45 - max(0, -dy), max(0, dx) : 61 - max(0, -dx)]
            hits[ring] += (a & b).sum()
            count[ring] += a.size
    np.testing.assert_allclose(found.s2, hits / count, rtol=1e-9)


def test_s2_of_random_discs_is_the_known_one():
    """Overlapping discs (Torquato 2002, eq. 5.40): S2 of the matrix is exp(-density * area of the union of two)."""
    rng, size, radius = np.random.default_rng(0), 700, 8.0
    y, x = np.mgrid[:size, :size]
    covered = np.zeros((size, size), bool)
    density = 0.002
    for cy, cx in rng.uniform(-20, size + 20, (rng.poisson(density * (size + 40) ** 2), 2)):
        near = slice(max(0, int(cy - 9)), max(0, int(cy + 10))), slice(max(0, int(cx - 9)), max(0, int(cx + 10)))
        covered[near] |= np.hypot(y[near] + 0.5 - cy, x[near] + 0.5 - cx) < radius
    found = domains.two_point_correlation(~covered, 40)
    h = np.clip(found.r / (2 * radius), 0, 1)
    common = 2 * radius**2 * (np.arccos(h) - h * np.sqrt(1 - h**2))
    np.testing.assert_allclose(found.s2, np.exp(-density * (2 * np.pi * radius**2 - common)), atol=0.02)


def _dbscan(mask):
    """Paper 1's rule, by the library that it used."""
    where = np.argwhere(mask)
    if len(where) == 0:
        return False, False
    label = DBSCAN(eps=2, min_samples=1).fit_predict(where)
    sides = [[set(label[where[:, axis] == end]) for end in (0, mask.shape[axis] - 1)] for axis in (1, 0)]
    return bool(sides[0][0] & sides[0][1]), bool(sides[1][0] & sides[1][1])


def test_percolation_is_that_of_dbscan():
    rng = np.random.default_rng(5)
    seen = set()
    for share in np.linspace(0.1, 0.45, 60):
        mask = rng.random((18, 23)) < share
        found = percolation(mask)
        assert (found.left_right, found.top_bottom) == _dbscan(mask)
        seen.add((found.left_right, found.top_bottom))
    assert len(seen) == 4


def test_percolation_bridges_one_pixel_only_where_asked():
    mask = np.zeros((9, 20), bool)
    mask[4] = True
    mask[4, 10] = False
    assert percolation(mask).left_right and not percolation(mask, 1).left_right
    mask[4, 11] = False
    found = percolation(mask)
    assert not found.left_right and found.clusters == 2
    assert found.largest_share == pytest.approx(10 / 18)


def test_distances_in_tiles_are_those_of_the_whole(monkeypatch):
    mask = np.ones((90, 130), bool)
    mask[3, 5] = mask[80, 120] = False  # far from most pixels: margins have to grow
    whole = distance_transform_edt(mask)
    monkeypatch.setattr(skeleton, "_TILE", 32)
    np.testing.assert_allclose(skeleton.distance_to_background(mask), whole, rtol=1e-6)
