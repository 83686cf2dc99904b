"""Geometry against pyFAI's, PONI files, and the geometry of calibrants."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pyFAI.calibrant import Calibrant
from pyFAI.detectors import Detector
from pyFAI.geometryRefinement import GeometryRefinement
from pyFAI.integrator.azimuthal import AzimuthalIntegrator

from hpc.errors import UserError
from nanodist.scattering import Frame, Geometry, read_frame
from nanodist.scattering.beam_stop import beam_stop
from nanodist.scattering.calibrant import calibrate
from nanodist.scattering.crests import crests, profiles
from nanodist.scattering.geometry import from_poni
from nanodist.scattering.poni import read_poni, write_poni
from tests.e2e.calibrant import against_truth, masks, read_simulated, stop_found
from tests.nanodist.scattering_frames import PERIOD_NM, PIXEL_MM, WAVELENGTH_NM, simulated

DATA = Path(os.environ.get("NANODIST_DATA", Path(__file__).resolve().parents[3] / "shared/data")) / "saxs2d"
SIZE = (PIXEL_MM, PIXEL_MM)


def by_pyfai(orientation=3):
    detector = Detector(172e-6, 150e-6, max_shape=(60, 80), orientation=orientation)
    return AzimuthalIntegrator(0.7, 0.03, 0.05, 0.1, -0.2, 0.3, wavelength=1.5e-10, detector=detector)


def test_q_and_the_beam_are_those_of_pyfai():
    pyfai = by_pyfai()
    geometry = from_poni(0.7, (0.03, 0.05), (0.172, 0.15), 0.15, (0.1, -0.2, 0.3), "x")
    q_y, q_x = geometry.q((60, 80))
    np.testing.assert_allclose(np.hypot(q_y, q_x), pyfai.array_from_unit((60, 80), "center", "q_nm^-1"), rtol=1e-12)
    # pyFAI's chi turns from columns to rows; ours from columns upwards.
    chi = pyfai.center_array((60, 80), unit="chi_rad")
    np.testing.assert_allclose(np.exp(1j * np.arctan2(-q_y, q_x)), np.exp(1j * chi), atol=1e-6)
    beam = pyfai.getFit2D()
    assert geometry.distance_mm == pytest.approx(beam["directDist"])
    assert geometry.beam_centre_px == pytest.approx((beam["centerY"] - 0.5, beam["centerX"] - 0.5))
    assert geometry.tilt_deg == pytest.approx(beam["tilt"])
    assert geometry.poni() == pytest.approx((0.7, 0.03, 0.05))


def test_a_pixel_is_found_again_from_its_q():
    geometry = from_poni(0.7, (0.03, 0.05), (0.172, 0.15), 0.15, (0.1, -0.2, 0.3), "x")
    rows, columns = np.array([3.2, 40.0]), np.array([70.1, 5.5])
    q_y, q_x = geometry.q_at(rows, columns)
    again = geometry.pixel_at(np.hypot(q_y, q_x), np.arctan2(q_y, q_x))
    np.testing.assert_allclose(again, [rows, columns], rtol=1e-9)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4])
def test_poni_files_of_every_orientation_give_the_stored_pixels_their_q(tmp_path, orientation):
    pyfai = by_pyfai(orientation)
    pyfai.save(str(tmp_path / "x.poni"))
    q = np.hypot(*read_poni(tmp_path / "x.poni", (60, 80)).q((60, 80)))
    np.testing.assert_allclose(q, pyfai.array_from_unit((60, 80), "center", "q_nm^-1"), rtol=1e-9)


def test_poni_files_go_out_and_in(tmp_path):
    geometry = Geometry(705.0, (318.5, 587.5), (0.172, 0.172), 0.15418, (0.01, -0.02, 0.0), "calibrant")
    write_poni(tmp_path / "x.poni", geometry)
    again = read_poni(tmp_path / "x.poni", (1043, 981))
    assert again.distance_mm == pytest.approx(705.0) and again.beam_centre_px == pytest.approx((318.5, 587.5))
    assert again.rotations_rad == pytest.approx((0.01, -0.02, 0.0)) and again.wavelength_nm == pytest.approx(0.15418)
    lines = [line for line in (tmp_path / "x.poni").read_text().splitlines() if not line.startswith("Wavelength")]
    (tmp_path / "y.poni").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"y.poni states no wavelength"):
        read_poni(tmp_path / "y.poni", (1043, 981))
    (tmp_path / "z.poni").write_text("not one\n")
    with pytest.raises(UserError, match=r"z.poni"):
        read_poni(tmp_path / "z.poni", (1043, 981))
    with pytest.raises(UserError, match=r"cannot read .*none.poni"):
        read_poni(tmp_path / "none.poni", (1043, 981))


def test_impossible_geometries_are_refused():
    with pytest.raises(UserError, match="distance_mm = -1"):
        Geometry(-1.0, (0.0, 0.0), SIZE, 0.1)
    with pytest.raises(UserError, match="behind it"):
        from_poni(1.0, (0.0, 0.0), SIZE, 0.1, (math.pi, 0.0, 0.0), "x")


@pytest.fixture(scope="module")
def tilted(tmp_path_factory):
    frame = simulated(rotations_rad=(0.02, -0.03, 0.0))
    return frame, read_simulated(frame, tmp_path_factory.mktemp("frame"))


def test_masks_are_what_is_broken_and_nothing_else(tilted):
    assert masks(*tilted) == {"gaps": 1, "dead": 1, "hot": 1, "overflow": 1, "marked": 1, "sound pixels masked": 0}


def test_a_known_geometry_is_recovered_no_worse_than_pyfai_refines_it_from_the_same_points(tilted):
    frame, read = tilted
    found = calibrate(read, WAVELENGTH_NM, SIZE, PERIOD_NM)
    off = against_truth(frame, found)
    assert abs(off["distance"]) < 1e-4 and off["centre_px"] < 0.05 and off["tilt_deg"] < 0.1 and off["worst_q"] < 1e-3
    assert found.other is None and [ring.order for ring in found.rings][:3] == [1, 2, 3]
    # The stated errors are of the size of the true ones.
    assert abs(off["distance"]) * frame.distance_mm < 5 * found.errors["distance_mm"] < 0.2
    points = crests(profiles(read, found.geometry, PERIOD_NM), None)
    table = np.stack([points.rows + 0.5, points.columns + 0.5, points.orders - 1], axis=1)
    made = Calibrant(dspacing=[10 * PERIOD_NM / order for order in range(1, 20)])
    made.wavelength = WAVELENGTH_NM * 1e-9
    refinement = GeometryRefinement(
        table,
        calibrant=made,
        dist=0.5,
        poni1=0.05,
        poni2=0.04,
        pixel1=PIXEL_MM * 1e-3,
        pixel2=PIXEL_MM * 1e-3,
        wavelength=WAVELENGTH_NM * 1e-9,
    )
    refinement.refine3(100000, fix=["wavelength", "rot3"])
    beam = refinement.getFit2D()
    assert len(table) > 100
    assert found.geometry.distance_mm == pytest.approx(beam["directDist"], rel=3e-4)
    # pyFAI weighs all points alike; ours has to be at least as near to the truth.
    theirs = math.dist((beam["centerY"] - 0.5, beam["centerX"] - 0.5), frame.beam_centre_px)
    assert off["centre_px"] <= theirs < 1.0


def test_rings_in_pairs_are_told_apart(tmp_path):
    frame = simulated(rotations_rad=(0.01, -0.01, 0.0), second=1.02)
    found = calibrate(read_simulated(frame, tmp_path), WAVELENGTH_NM, SIZE, PERIOD_NM, "odd")
    assert found.other is not None
    near, far = sorted((found.geometry.distance_mm, found.other.geometry.distance_mm))
    assert far / near == pytest.approx(1.02, abs=5e-4)
    even = [ring for ring in (*found.rings, *found.other.rings) if not ring.fitted]
    assert len(even) >= 2 and max(abs(ring.error) for ring in even) < 2e-3


def test_the_shadow_of_the_beam_stop_is_found_with_its_arm(tilted):
    frame, _ = tilted
    assert stop_found(frame)["share"] > 0.95 and stop_found(frame)["beside"] == 0
    geometry = Geometry(frame.distance_mm, frame.beam_centre_px, SIZE, WAVELENGTH_NM, frame.rotations_rad)
    mask = ~np.logical_or.reduce(list(frame.broken.values()))
    whole = Frame(np.where(mask, frame.counts, 0).astype(np.float32), mask, "counts", "x", geometry)
    # Nothing is found where there is none: not in the rings, not with the beam outside.
    rng = np.random.default_rng(0)
    open_beam = np.where(mask, rng.poisson(3000 / (1 + (frame.q_inv_nm / 0.3) ** 3) + 3), 0).astype(np.float32)
    assert not beam_stop(replace(whole, intensity=open_beam)).any()
    outside = replace(geometry, beam_centre_px=(-50.0, 100.0))
    assert not beam_stop(replace(whole, geometry=outside)).any()


def test_a_pattern_without_rings_is_no_calibrant():
    geometry = Geometry(700.0, (140.3, 188.1), SIZE, WAVELENGTH_NM)
    expected = 200 / (0.2 + np.hypot(*geometry.q((301, 361))) ** 2)
    counts = np.random.default_rng(0).poisson(expected).astype(np.float32)
    frame = Frame(counts, np.ones_like(counts, dtype=bool), "counts", "water.tif", geometry)
    with pytest.raises(UserError, match=r"water.tif shows (no )?rings of period 5.838 nm"):
        calibrate(frame, WAVELENGTH_NM, SIZE)


@pytest.mark.parametrize("name", ["autosaxs_AgBh700_96.9_calib.tif", "bioxtas_saxslab.tif"])
def test_odd_rings_of_a_real_calibrant_predict_the_even_ones(name):
    path = DATA / "transmission" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    found = calibrate(read_frame(path), WAVELENGTH_NM, SIZE, fit_orders="odd")
    even = [ring for ring in found.rings if not ring.fitted]
    assert len(even) >= 2
    assert max(abs(ring.error) for ring in even) < 5e-3
