"""What is written is read back, by nanodist and by SasView's own loaders; the command line."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile

from hpc.errors import UserError
from nanodist.cli import main
from nanodist.scattering import Frame, Geometry, Given, Pattern, QGrid, azimuthal, read_frame, regrid
from nanodist.scattering.curve import Curve, integrate, read_curve, write_curve
from nanodist.scattering.nxcansas import read_nxcansas_curves, write_frame, write_nxcansas_curve
from nanodist.scattering.write import as_frame, write_pattern
from tests.nanodist.scattering_frames import simulated

GEOMETRY = Geometry(700.0, (40.3, 58.1), (0.172, 0.15), 0.15418, (0.02, -0.01, 0.0))


@pytest.fixture(scope="module")
def frame():
    q = np.hypot(*GEOMETRY.q((101, 121)))
    counts = np.random.default_rng(0).poisson(40 * np.exp(-q * q) + 0.5).astype(np.float32)
    mask = np.random.default_rng(1).random(counts.shape) > 0.05
    corrections = dict.fromkeys(("dark", "flat", "solid_angle", "transmission", "time", "background"), "not done")
    corrections["flat"] = "done"
    return Frame(np.where(mask, counts, 0), mask, "counts", "film.tif", GEOMETRY, corrections=corrections)


@pytest.fixture(scope="module")
def sasview():
    """SasView's loader."""
    return pytest.importorskip("sasdata.dataloader.loader", reason="sasdata is not installed").Loader()


def test_curves_go_out_and_in_and_sasview_opens_them(tmp_path, frame, sasview):
    curve = integrate(frame, 40)
    write_curve(tmp_path / "a.txt", curve)
    write_nxcansas_curve(tmp_path / "a.h5", curve, "film")
    for again in (read_curve(tmp_path / "a.txt"), *read_nxcansas_curves(tmp_path / "a.h5")):
        np.testing.assert_allclose(again.q_inv_nm, curve.q_inv_nm, rtol=1e-8)
        np.testing.assert_allclose(again.intensity, curve.intensity, rtol=1e-8)
        np.testing.assert_allclose(again.sigma, curve.sigma, rtol=1e-8)
    for name in ("a.txt", "a.h5"):
        (data,) = sasview.load(str(tmp_path / name))
        assert type(data).__name__ == "Data1D" and not data.errors
        np.testing.assert_allclose(data.x, curve.q_inv_nm / 10, rtol=1e-8)
        np.testing.assert_allclose(data.y, curve.intensity, rtol=1e-8)
        np.testing.assert_allclose(data.dy, curve.sigma, rtol=1e-8)


def test_patterns_go_out_as_nxcansas_and_in_and_sasview_opens_them(tmp_path, frame, sasview):
    write_frame(tmp_path / "a.h5", frame, "film")
    again = read_frame(tmp_path / "a.h5")
    assert again.kind == "counts" and again.sigma is None and dict(again.corrections) == dict(frame.corrections)
    # Rows are written from below.
    assert np.array_equal(again.intensity[::-1], frame.intensity) and np.array_equal(again.mask[::-1], frame.mask)
    grid = QGrid(48, 0.4)
    assert np.array_equal(regrid(again, grid).intensity, regrid(frame, grid).intensity)
    (data,) = sasview.load(str(tmp_path / "a.h5"))
    assert type(data).__name__ == "Data2D" and not data.errors
    assert np.array_equal(data.mask.reshape(frame.shape)[::-1], frame.mask)
    np.testing.assert_allclose(data.qx_data.reshape(frame.shape)[::-1], frame.q()[1] / 10)
    np.testing.assert_allclose(data.err_data.reshape(frame.shape)[::-1], np.sqrt(np.maximum(frame.intensity, 1)))
    assert data.detector[0].distance == 700 and data.detector[0].distance_unit == "mm"
    assert data.source.wavelength == pytest.approx(1.5418)


@pytest.mark.parametrize("kind", ["counts", "reduced"])
def test_patterns_on_the_grid_go_out_as_float_tiff_and_in(tmp_path, frame, kind):
    pattern = regrid(frame, QGrid(48, 0.4))
    if kind == "reduced":
        lower, sigma = (
            (pattern.intensity - 300 * pattern.mask).astype(np.float32),
            (1 + pattern.intensity) * pattern.mask,
        )
        pattern = Pattern(lower, sigma.astype(np.float32), pattern.mask, pattern.grid, "reduced")
    states = {"background": "done", "dark": "nonsense"}
    write_pattern(tmp_path / "a.tif", pattern, exposure_s=2.0, corrections=states)
    again = read_frame(tmp_path / "a.tif")
    assert again.kind == kind and again.setup == "transmission" and again.metadata["exposure_s"] == 2.0
    assert again.corrections["background"] == "done" and again.corrections["dark"] != "nonsense"
    back = regrid(again, pattern.grid)
    for name in ("intensity", "mask", "sigma"):
        assert np.array_equal(getattr(back, name), getattr(pattern, name)), name
    direct = regrid(as_frame(pattern, "a"), pattern.grid)
    np.testing.assert_array_equal(azimuthal(direct)[1], azimuthal(pattern)[1])
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        page = tif.pages[0]
        assert np.isnan(page.asarray()[~pattern.mask]).all()
        pixels, unit = page.tags["XResolution"].value
        assert pixels / unit == pytest.approx(1 / pattern.grid.q_step_inv_nm, rel=1e-4)


def test_curves_of_others_are_read_in_their_units(tmp_path):
    (tmp_path / "a.dat").write_text("# q (nm^-1), I, sigma\n0.1, 5, 0.5\n0.2, 4, 0.4\n0.3, 3, 0.3\n")
    curve = read_curve(tmp_path / "a.dat")
    assert curve.q_inv_nm.tolist() == [0.1, 0.2, 0.3] and curve.sigma.tolist() == [0.5, 0.4, 0.3]
    assert read_curve(tmp_path / "a.dat", "1/A").q_inv_nm[0] == 1.0
    (tmp_path / "b.dat").write_text("0.1 5\n0.2 4\n")
    assert (
        read_curve(tmp_path / "b.dat").q_inv_nm.tolist() == [1.0, 2.0] and read_curve(tmp_path / "b.dat").sigma is None
    )
    (tmp_path / "c.dat").write_text("0.2 5\n0.1 4\n")
    with pytest.raises(UserError, match=r"c.dat has a q that does not increase"):
        read_curve(tmp_path / "c.dat")
    (tmp_path / "d.dat").write_text("words\n")
    with pytest.raises(UserError, match=r"d.dat has no columns q and I"):
        read_curve(tmp_path / "d.dat")
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(UserError, match=r"e.h5 holds no curve"):
        read_nxcansas_curves(tmp_path / "e.h5")
    with pytest.raises(ValueError, match="one length"):
        Curve(np.ones(3), np.ones(2))


def test_example_files_of_sasview_are_read(sasview):
    """Real reduced patterns: NXcanSAS of three facilities and 2D text, against SasView's own reading of them."""
    import sasdata

    folder = Path(sasdata.__file__).parent / "example_data" / "2d_data"
    for name, kind in (
        ("33837rear_2D_1.75_16.5_NXcanSAS_v3.h5", "reduced"),
        ("14250_2D_NoDetInfo_NXcanSAS_v3.h5", "reduced"),
        ("P123_D2O_10_percent.dat", "reduced"),
        ("SILIC010.DAT", "counts"),
    ):
        frame = read_frame(folder / name)
        (theirs,) = sasview.load(str(folder / name))
        q_y, q_x = frame.q()
        order = np.lexsort((np.round(theirs.qx_data, 9), np.round(theirs.qy_data, 9)))
        ours = np.lexsort((np.round(q_x.ravel() / 10, 9), np.round(q_y.ravel() / 10, 9)))
        np.testing.assert_allclose(q_x.ravel()[ours] / 10, theirs.qx_data[order], atol=1e-8)
        measured = frame.mask.ravel()[ours]
        values = np.asarray(theirs.data)[order][measured]
        np.testing.assert_allclose(frame.intensity.ravel()[ours][measured], values, rtol=1e-6)
        assert frame.kind == kind and measured.mean() > 0.65
        if frame.sigma is not None:
            sigma = np.asarray(theirs.err_data)[order][measured]
            known = sigma > 0
            np.testing.assert_allclose(frame.sigma.ravel()[ours][measured][known], sigma[known], rtol=1e-6)


def test_the_command_line_inspects_calibrates_and_integrates(tmp_path, capsys):
    made = simulated((407, 487), foot_px=(190.2, 212.4), rotations_rad=(0.0, 0.0, 0.0))
    tifffile.imwrite(tmp_path / "agbh.tif", made.counts)
    tifffile.imwrite(tmp_path / "stop.tif", made.beam_stop.astype(np.uint8))
    files = [str(tmp_path / "agbh.tif"), "--mask", str(tmp_path / "stop.tif"), "--out", str(tmp_path / "out")]
    assert main(["scattering", "inspect", *files]) == 0
    shown = capsys.readouterr().out
    assert "407 x 487 counts" in shown and "overflow 5" in shown and "geometry    unknown" in shown
    assert (tmp_path / "out" / "agbh.tif.png").stat().st_size > 1000
    assert main(["scattering", "integrate", *files]) == 2
    assert "has no geometry" in capsys.readouterr().err
    assert main(["scattering", "calibrate", *files]) == 2
    assert "needs --wavelength-nm" in capsys.readouterr().err
    assert main(["scattering", "calibrate", *files, "--wavelength-nm", "0.15418", "--no-tilt"]) == 0
    assert "ring  1 fitted" in capsys.readouterr().out
    poni = tmp_path / "out" / "agbh.poni"
    frame = read_frame(tmp_path / "agbh.tif", Given(poni=poni))
    assert frame.geometry.distance_mm == pytest.approx(made.distance_mm, rel=1e-4)
    both = [
        str(tmp_path / "agbh.tif"),
        str(tmp_path / "none.tif"),
        "--poni",
        str(poni),
        "--out",
        str(tmp_path / "curves"),
    ]
    assert main(["scattering", "integrate", *both]) == 1
    assert "none.tif" in capsys.readouterr().err
    curve = read_curve(tmp_path / "curves" / "agbh.txt")
    ring = (curve.q_inv_nm > 0.9) & (curve.q_inv_nm < 1.25)
    crest = curve.q_inv_nm[ring][curve.intensity[ring].argmax()]
    assert crest == pytest.approx(2 * np.pi / 5.838, rel=0.01)
    assert sorted(path.name for path in (tmp_path / "curves").iterdir()) == ["agbh.h5", "agbh.png", "agbh.txt"]
