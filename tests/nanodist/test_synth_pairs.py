"""synth pairs: fields scatter as theory says, images and patterns show one specimen, bytes depend on nothing else."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from scipy.special import j1

from hpc.seeding import generator
from nanodist.cli import main
from nanodist.micrographs import read_micrograph
from nanodist.scattering import QGrid, azimuthal, read_frame, regrid
from nanodist.synth.copolymers import FilmField, draw_specimen, make_field, measure_order
from nanodist.synth.field_scattering import power, scatter, sharp
from nanodist.synth.pairs import write_frame
from nanodist.synth.phase_field import Box, dot_box
from nanodist.synth.saxs_frame import draw_beamline, expose
from nanodist.synth.sem import SemSettings, edge_distance, render_sem, sem_conditions
from tests.e2e.pair_physics import direction, dots, film, measured, peak, porod, specimen


def waves(box, *vectors):
    """A field of plane waves (k_x, k_y), in waves a period."""
    y, x = (np.arange(n) * length / n for n, length in zip(box.points, box.periods, strict=True))
    return sum(np.cos(2 * np.pi * (kx * x[None, :] + ky * y[:, None])) for kx, ky in vectors).astype(np.float32)


@pytest.mark.parametrize("fraction", [0.5, 0.3])
def test_perfect_lamellae_scatter_as_a_square_wave(fraction):
    # Points and periods have no common factor, so that edges lie everywhere between points.
    box, period = Box((7.0, 7.0), (64, 64)), 40.0
    phases, _ = sharp(FilmField(waves(box, (1, 0)), box, 0.0, 1.0), fraction, 4)
    assert phases.mean() == pytest.approx(fraction, abs=0.01)
    fraction = float(phases.mean())
    area = (7 * period) ** 2
    spectrum = power(phases, (7 * period, 7 * period), 5 * 2 * np.pi / period)
    middle_y, middle_x = (side // 2 for side in spectrum.shape)
    orders = np.arange(1, 5)
    expected = area * (np.sin(orders * np.pi * fraction) / (orders * np.pi)) ** 2  # Fourier series of a square wave
    np.testing.assert_allclose(
        spectrum[middle_y, middle_x + 7 * orders], expected, rtol=0.02, atol=2e-4 * expected.max()
    )
    on_axis = spectrum[middle_y].copy()
    on_axis[middle_x % 7 :: 7] = 0
    assert on_axis.max() < 1e-4 * expected.max()
    spectrum[middle_y] = 0
    assert spectrum.max() < 1e-6 * expected.max()


def test_a_lattice_of_discs_has_their_form_factor_already():
    box, period = Box(dot_box(8).periods, (58, 62)), 40.0
    turns = [(1, 0), (0.5, np.sqrt(3) / 2), (-0.5, np.sqrt(3) / 2)]
    field = FilmField(waves(box, *turns), box, 0.0, 1.0)
    fraction = 0.05  # so small that what lies above the level is round
    q_star = 2 * np.pi / period
    pattern = scatter([field], fraction, period, q_max_inv_nm=3 * q_star, fold=6, oriented=True, bins=601)
    ratios = np.array([1, np.sqrt(3), 2, np.sqrt(7)])
    angles = np.radians([0, 30, 0, 19.1066])
    found = pattern.at(ratios * q_star * np.sin(angles), ratios * q_star * np.cos(angles))
    fraction = float(sharp(field, fraction, 8)[0].mean())
    radius = np.sqrt(fraction * 2 / np.sqrt(3) * period**2 / np.pi * 2 / np.sqrt(3))
    form = (2 * j1(ratios * q_star * radius) / (ratios * q_star * radius)) ** 2
    np.testing.assert_allclose(found / found[0], form / form[0], rtol=0.08)


def test_peaks_of_annealed_dots_lie_at_the_ratios_of_a_hexagonal_lattice():
    lattice = dots(4)
    assert lattice["order"] > 0.85
    assert all(abs(lattice[f"{name}_error"]) < 0.01 for name in ("q_star", "sqrt3", "2", "sqrt7"))


@pytest.mark.parametrize("morphology", ["lamellae", "spinodal"])
def test_sharp_fields_follow_porods_law_of_two_dimensions(morphology):
    law = porod(morphology, 3)
    assert law["slope"] == pytest.approx(-3, abs=0.12)
    assert law["prefactor_ratio"] == pytest.approx(1, abs=0.04)
    assert law["invariant_ratio"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("period_nm", [20.0, 64.0])
def test_lamellae_peak_at_their_period_and_along_their_normal(period_nm):
    sample = specimen("lamellae", period_nm, True)
    pattern, edges, _ = film(sample, 6, 0.95)
    on_grid = measured(pattern)
    q_star = 2 * np.pi / period_nm
    seen = peak(*azimuthal(on_grid)[:2], 0.7 * q_star, 1.4 * q_star)
    assert seen == pytest.approx(q_star, rel=0.01)
    assert seen == pytest.approx(np.pi * edges, rel=0.015)  # two edges a period, measured in real space
    turned, order = direction(on_grid, seen, 2)
    assert order > 0.6 and abs(turned - sample.orientation_deg) < 2


def test_image_and_pattern_point_the_same_way_and_show_the_same_period():
    sample = specimen("lamellae", 30.0, True, orientation_deg=115.0)
    settings = SemSettings(256, 2.0)
    field = make_field(sample, generator(3, "test"), 26)
    unit = sample.period_nm * measure_order([field], 2).wave
    _, level = sharp(field, 0.5, 2)
    angle = 115.0 + field.turned_deg
    distance = edge_distance(field, level, unit, angle, settings, generator(4, "test"))
    image = render_sem(distance, 0.5, sem_conditions(generator(5, "test")), settings, generator(6, "test"))
    assert image[distance > 3].mean() > image[distance < -3].mean() + 40
    assert (distance > 0).mean() == pytest.approx(0.5, abs=0.04)
    spectrum = np.abs(np.fft.fftshift(np.fft.fft2((image - image.mean()) * np.outer(*[np.hanning(256)] * 2)))) ** 2
    axis = 2 * np.pi / (256 * 2.0) * (np.arange(256) - 128)
    radius = np.hypot(axis[:, None], axis[None, :])
    near = np.abs(radius * 30 / (2 * np.pi) - 1) < 0.3
    turn = np.arctan2(-axis[:, None], axis[None, :])  # rows go down, angles are counted with y up
    mean = np.degrees(np.angle(np.sum(spectrum[near] * np.exp(2j * turn[near])))) / 2 % 180
    assert abs(mean - angle) < 5
    assert np.average(radius[near], weights=spectrum[near]) == pytest.approx(2 * np.pi / 30, rel=0.04)


def test_fields_of_a_specimen_differ_and_share_its_statistics():
    sample = specimen("dots", 30.0, False, steps=30)
    one, other = (make_field(sample, generator(0, "test", n), 16) for n in range(2))
    assert abs(np.corrcoef(one.values.ravel(), other.values.ravel())[0, 1]) < 0.1
    np.testing.assert_array_equal(one.values, make_field(sample, generator(0, "test", 0), 16).values)
    assert measure_order([one], 6).wave == pytest.approx(measure_order([other], 6).wave, rel=0.03)


def test_long_annealing_stays_finite():
    field = make_field(specimen("lamellae", 30.0, False, steps=600), generator(0, "test"), 16)
    assert np.isfinite(field.values).all() and 0.3 < field.values.std() < 0.6


def test_specimens_cover_periods_and_morphologies_evenly():
    made = [draw_specimen(1, index) for index in range(72)]
    for name in ("lamellae", "dots", "mixed"):
        periods = np.array([one.period_nm for one in made if one.morphology == name])
        assert len(periods) == 12 and periods.max() / periods.min() > 2.5
    assert {one.orientation_deg is None for one in made} == {True, False}
    assert all(one.centre_distance_nm == pytest.approx(2 * one.period_nm / np.sqrt(3)) for one in made if one.fold == 6)


def test_a_frame_goes_to_disk_with_its_geometry_and_its_gaps(tmp_path):
    line = draw_beamline(generator(0, "test"))
    pattern, _, _ = film(specimen("lamellae", 40.0, True), 2, 0.95)
    counts = expose(pattern, line, generator(1, "test"))
    write_frame(tmp_path / "a.tif", counts, line.geometry)
    frame = read_frame(tmp_path / "a.tif")
    assert frame.kind == "counts" and not frame.mask[195:212].any()
    assert frame.geometry.beam_centre_px == pytest.approx(line.geometry.beam_centre_px, abs=1e-4)
    assert frame.geometry.distance_mm == pytest.approx(line.geometry.distance_mm, rel=1e-7)
    q_y, q_x = frame.q()
    assert not frame.mask[np.hypot(q_y, q_x) < line.beam_stop_inv_nm].any()
    assert (~frame.mask & (counts >= 0)).mean() < 0.001  # hot and dead pixels that the reader finds by itself
    assert regrid(frame, QGrid(64, 0.5)).mask.mean() > 0.7


def test_a_set_is_a_function_of_its_seed_and_says_what_is_true(tmp_path, capsys):
    options = ["--samples", "2", "--classes", "dots,lamellae", "--size", "128", "--pixel-size-nm", "2.5", "--seed", "5"]
    for workers, extra in (("1", []), ("2", [])):
        out = tmp_path / workers
        assert main(["synth", "pairs", "--out", str(out), "--workers", workers, *options, *extra]) == 0
    assert "nanodist pack --pairs" in capsys.readouterr().out
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert len(files) == 8
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in files)
    rows = list(csv.DictReader((tmp_path / "1" / "pairs.csv").read_text().splitlines()))
    truth = json.loads((tmp_path / "1" / "truth" / "film-00000.json").read_text())
    assert rows[0]["morphology"] == "dots" and float(rows[0]["period_nm"]) == truth["period_nm"]
    assert float(rows[0]["centre_distance_nm"]) == pytest.approx(2 / np.sqrt(3) * truth["period_nm"])
    assert not rows[1]["centre_distance_nm"]
    image = read_micrograph(tmp_path / "1" / rows[0]["sem"])
    assert image.pixels.shape == (128, 128) and image.pixel_size_nm == pytest.approx((2.5, 2.5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--fields", "8"], "64 fields or more"),
        (["--size", "64"], "shows periods of"),
        (["--classes", "gyroid"], "no morphology gyroid"),
        (["--periods-nm", "30"], "give two numbers"),
        (["--periods-nm", "50,30"], "a lowest and a highest"),
        (["--samples", "0"], "1 to 99999 samples"),
        (["--dose", "3"], "leave them out"),
        (["--workers", "0"], "1 worker or more"),
    ],
)
def test_impossible_sets_are_refused(options, words, tmp_path, capsys):
    assert main(["synth", "pairs", "--out", str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
