"""Lens and camera against textbook numbers."""

from __future__ import annotations

import numpy as np
import pytest

from nanodist.synth import optics
from nanodist.synth.detector import Camera, to_uint16
from nanodist.synth.optics import Lens
from nanodist.synth.specimen import absorption, two_beam


@pytest.mark.parametrize(("kv", "pm"), [(80, 4.1757), (100, 3.7014), (120, 3.3492), (200, 2.5079), (300, 1.9687)])
def test_wavelengths_are_those_of_the_tables(kv, pm):
    assert optics.wavelength_nm(kv) * 1e3 == pytest.approx(pm, abs=2e-4)


@pytest.mark.parametrize(("kv", "value"), [(100, 9.244e-3), (200, 7.288e-3), (300, 6.526e-3)])
def test_interaction_constants_are_those_of_the_tables(kv, value):
    assert optics.interaction_rad_per_v_nm(kv) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("cs_mm", [0.0, 1.2])
def test_ctf_vanishes_exactly_where_the_aberration_phase_is_a_multiple_of_pi(cs_mm):
    lens = Lens(200.0, cs_mm, 800.0)
    wave, cs = optics.wavelength_nm(200.0), cs_mm * 1e6
    # chi = -n pi: Cs lambda^3 q^4 / 2 - defocus lambda q^2 + n = 0, solved for q^2.
    for n in range(1, 6):
        a, b = 0.5 * cs * wave**3, 800.0 * wave
        q2 = n / b if a == 0 else (b - np.sqrt(b * b - 4 * a * n)) / (2 * a)
        q = np.sqrt(q2)
        assert abs(lens.phase_contrast(np.array([q]))[0]) < 1e-9
        either = lens.phase_contrast(np.array([q * 0.99, q * 1.01]))
        assert either[0] * either[1] < 0


def test_scherzer_defocus_has_its_first_zero_at_the_scherzer_resolution():
    wave, cs = optics.wavelength_nm(200.0), 1.2e6
    lens = Lens(200.0, 1.2, np.sqrt(1.5 * cs * wave))
    q = np.linspace(0.5, 6, 40001)
    sign = np.sign(lens.phase_contrast(q))
    first = q[1:][np.diff(sign) != 0][0]
    assert first == pytest.approx(6**0.25 / (cs * wave**3) ** 0.25, rel=1e-3)


def _grating(period_px: int, phase: float, size: int = 128) -> np.ndarray:
    return phase * np.cos(2 * np.pi * np.arange(size) / period_px)[None, :].repeat(size, 0)


def test_image_of_a_weak_phase_grating_has_the_contrast_that_the_ctf_says():
    lens = Lens(200.0, 1.2, 900.0, focal_spread_nm=8.0, semi_angle_mrad=0.1)
    for period in (4, 8, 16):
        wave = np.exp(1j * _grating(period, 1e-3))
        seen = optics.image(wave, lens, 1.0)
        amplitude = 2 * (seen * np.cos(2 * np.pi * np.arange(128) / period)).mean()
        assert amplitude == pytest.approx(1e-3 * lens.phase_contrast(np.array([1 / period]))[0], rel=1e-3)


def test_in_focus_a_phase_object_is_invisible_and_absorption_is_kept():
    lens = Lens(200.0, 0.0, 0.0)
    np.testing.assert_allclose(optics.image(np.exp(1j * _grating(8, 1.0)), lens, 1.0), 1.0, atol=1e-12)
    share = absorption(np.abs(_grating(8, 30.0)), 50.0)
    np.testing.assert_allclose(optics.image(np.sqrt(share).astype(complex), lens, 1.0), share, atol=1e-12)


def test_envelope_falls_and_starts_at_one():
    lens = Lens(200.0, 1.2, 900.0, focal_spread_nm=8.0, semi_angle_mrad=0.2)
    damping = lens.envelope(np.linspace(0, 1.0, 50))
    assert damping[0] == 1.0
    assert (np.diff(damping) <= 0).all()
    assert damping[-1] < 0.9


def test_beer_lambert_and_two_beam_limits():
    assert absorption(np.array([70.0]), 35.0)[0] == pytest.approx(np.exp(-2))
    # At the Bragg condition all intensity is diffracted at half the extinction distance, and back at a whole one.
    assert two_beam(np.array([20.0, 40.0]), np.zeros(2), 40.0) == pytest.approx([0.0, 1.0], abs=1e-12)
    assert two_beam(np.array([20.0]), np.array([30.0]), 40.0)[0] > 0.998


def test_camera_without_blur_counts_poisson():
    camera = Camera(dose_e_nm2=25.0, mtf_half=0.0, gain=1.0, offset=0.0, read_noise_counts=0.0)
    counts = camera.counts(np.ones((512, 512)), 2.0, np.random.default_rng(0))
    assert counts.mean() == pytest.approx(100.0, rel=2e-3)
    assert counts.var() == pytest.approx(counts.mean(), rel=0.02)


def test_camera_keeps_counts_blurs_noise_by_the_mtf_and_adds_read_noise():
    camera = Camera(dose_e_nm2=100.0, mtf_half=0.5, gain=7.0, offset=40.0, read_noise_counts=30.0)
    counts = camera.counts(np.ones((512, 512)), 1.0, np.random.default_rng(0))
    f = np.hypot(np.fft.fftfreq(512, 0.5)[:, None], np.fft.fftfreq(512, 0.5)[None, :])
    expected = 49 * 100 * (camera.mtf(f) ** 2).mean() + 30.0**2
    assert counts.mean() == pytest.approx(740.0, rel=1e-3)
    assert counts.var() == pytest.approx(expected, rel=0.02)
    assert camera.mtf(np.array([0.5]))[0] == 0.5


def test_sixteen_bits_round_and_clip():
    assert to_uint16(np.array([[-3.0, 0.6, 65534.6, 1e9]])).tolist() == [[0, 1, 65535, 65535]]
