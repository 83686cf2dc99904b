"""Files of every kind, as detectors and reductions write them: numbers, masks, headers, and what is refused."""

import os
import struct
from pathlib import Path

import fabio
import h5py
import numpy as np
import pytest
import tifffile

from hpc.errors import UserError
from nanodist.scattering import Given, QGrid, read_frame, regrid
from nanodist.scattering.hdf5 import read_hdf5

DATA = Path(os.environ.get("NANODIST_DATA", Path(__file__).resolve().parents[3] / "shared/data")) / "saxs2d"
DECTRIS = (
    "# Detector: PILATUS 100K, S/N 1-0001\n# Pixel_size 172e-6 m x 172e-6 m\n# Exposure_time 2.5 s\n"
    "# Count_cutoff 900000 counts\n# Wavelength 1.5418 A\n# Detector_distance 0.5 m\n# Beam_xy (200.5, 100.5) pixels\n"
    "# Flat_field: (nil)\n"
)


def counts(shape=(195, 487), dtype=np.int32):
    return np.random.default_rng(0).poisson(30, shape).astype(dtype)


def test_tiff_of_dectris_states_its_geometry_and_cut_off(tmp_path):
    pixels = counts()
    pixels[5, 7], pixels[50, 60], pixels[80, 90] = -2, 900_001, -1
    tifffile.imwrite(tmp_path / "a.tif", pixels, description=DECTRIS, compression="zlib")
    frame = read_frame(tmp_path / "a.tif")
    assert frame.kind == "counts" and frame.intensity.dtype == np.float32
    assert np.argwhere(~frame.mask).tolist() == [[5, 7], [50, 60], [80, 90]]
    assert frame.masked == {"overflow": 1, "sentinels": 2}
    assert frame.geometry.distance_mm == 500 and frame.geometry.wavelength_nm == pytest.approx(0.15418)
    assert frame.geometry.beam_centre_px == (100.0, 200.0) and frame.geometry.pixel_size_mm == pytest.approx(
        (0.172,) * 2
    )
    assert frame.metadata["exposure_s"] == 2.5 and frame.metadata["detector"].startswith("PILATUS 100K")
    assert frame.corrections["flat"] == "not done" and frame.corrections["background"] == "not done"
    assert np.array_equal(frame.intensity[frame.mask], pixels[frame.mask])


def test_given_values_stand_over_the_header_and_an_unfinished_geometry_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", counts(), description=DECTRIS)
    frame = read_frame(tmp_path / "a.tif", Given(distance_mm=800.0, corrections={"time": "done"}))
    assert frame.geometry.distance_mm == 800 and frame.geometry.wavelength_nm == pytest.approx(0.15418)
    assert frame.geometry.source == "detector, header, given" and frame.corrections["time"] == "done"
    tifffile.imwrite(tmp_path / "b.tif", counts((64, 64)))
    assert read_frame(tmp_path / "b.tif").geometry is None
    with pytest.raises(UserError, match=r"geometry of .*b.tif lacks beam_centre_px, pixel_size_mm, wavelength_nm"):
        read_frame(tmp_path / "b.tif", Given(distance_mm=800.0))
    with pytest.raises(UserError, match="correction 'colour'"):
        read_frame(tmp_path / "b.tif", Given(corrections={"colour": "done"}))


def test_edf_states_geometry_exposure_and_its_dummy(tmp_path):
    header = {
        "SampleDistance": "1.5", "WaveLength": "1e-10", "PSize_1": "1e-4", "PSize_2": "2e-4", "Center_1": "30.5",
        "Center_2": "20.5", "ExposureTime": "3.0", "Dummy": "-10",
    }  # fmt: skip
    pixels = counts((40, 64)).astype(np.float32) + 0.25
    pixels[3, 4] = -10
    fabio.edfimage.EdfImage(data=pixels, header=header).write(str(tmp_path / "a.edf"))
    frame = read_frame(tmp_path / "a.edf")
    assert frame.kind == "reduced" and np.argwhere(~frame.mask).tolist() == [[3, 4]]
    assert frame.geometry.pixel_size_mm == pytest.approx((0.2, 0.1)) and frame.geometry.beam_centre_px == (20.0, 30.0)
    assert frame.geometry.distance_mm == 1500 and frame.geometry.wavelength_nm == pytest.approx(0.1)
    assert frame.metadata["exposure_s"] == 3 and frame.corrections["dark"] == "unknown"


def test_cbf_carries_the_header_of_dectris(tmp_path):
    pixels = counts()
    pixels[10, 10] = -1
    image = fabio.cbfimage.CbfImage(data=pixels, header={"_array_data.header_contents": DECTRIS})
    image.write(str(tmp_path / "a.cbf"))
    frame = read_frame(tmp_path / "a.cbf")
    assert np.array_equal(frame.intensity[frame.mask], pixels[frame.mask]) and (~frame.mask).sum() == 1
    assert frame.geometry.distance_mm == 500 and frame.geometry.beam_centre_px == (100.0, 200.0)


@pytest.mark.parametrize("name", ["a.mccd", "a.tif"])
def test_marccd_states_its_geometry_in_integers(tmp_path, name):
    (tmp_path / name).write_bytes(_marccd(counts((64, 64), np.uint16)))
    frame = read_frame(tmp_path / name)
    assert frame.kind == "counts" and np.array_equal(frame.intensity, counts((64, 64), np.uint16))
    assert frame.geometry.distance_mm == 250 and frame.geometry.beam_centre_px == (31.5, 32.5)
    assert frame.geometry.pixel_size_mm == pytest.approx((0.079, 0.08))
    assert frame.geometry.wavelength_nm == pytest.approx(0.12398)


def _marccd(pixels):
    """A TIFF of one strip with the header of MarCCD between tags and pixels, after its description."""
    tags = ((256, 64), (257, 64), (258, 16), (259, 1), (262, 1), (273, 4096), (277, 1), (278, 64), (279, 64 * 64 * 2))
    start = b"II*\0" + struct.pack("<IH", 8, len(tags))
    start += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + struct.pack("<I", 0)
    header = bytearray(3072)
    header[4:20] = b"MARCCD".ljust(16, b"\0")
    places = {80: 64, 84: 64, 88: 2, 640: 250_000, 644: 33_000, 648: 32_000, 772: 80_000, 776: 79_000, 908: 123_980}
    for place, value in {**places, 28: 1234}.items():
        header[place : place + 4] = struct.pack("<I", value)
    return start.ljust(1024, b"\0") + bytes(header) + pixels.tobytes()


def test_nexus_frames_state_geometry_masks_and_full_pixels(tmp_path):
    stack = counts((3, 96, 128), np.uint32)
    stack[1, 4, 5], stack[1, 6, 7], stack[1, 8, 9] = 2**32 - 1, 2**32 - 2, 70_000
    with h5py.File(tmp_path / "a.h5", "w") as file:
        detector = file.create_group("entry/instrument/detector")
        detector.attrs["NX_class"] = "NXdetector"
        detector["data"] = stack
        detector["pixel_mask"] = (np.arange(96 * 128) == 130).reshape(96, 128).astype(np.uint32)
        detector["saturation_value"] = 65_000
        detector["count_time"] = 0.5
        for name, value, unit in (
            ("detector_distance", 1.2, "m"), ("x_pixel_size", 75.0, "um"), ("y_pixel_size", 75.0, "um"),
            ("beam_center_x", 64.5, "pixel"), ("beam_center_y", 48.5, "pixel"),
        ):  # fmt: skip
            detector[name] = value
            detector[name].attrs["units"] = unit
        file["entry/instrument/beam/incident_wavelength"] = 1.0
        file["entry/instrument/beam/incident_wavelength"].attrs["units"] = "angstrom"
        file["entry/data/data"] = h5py.SoftLink("/entry/instrument/detector/data")
        file["entry/data/gone"] = h5py.ExternalLink("nowhere.h5", "/data")
    with pytest.raises(UserError, match=r"a.h5 holds 3 frames: choose one \(frame=0 to 2\)"):
        read_frame(tmp_path / "a.h5")
    frame = read_frame(tmp_path / "a.h5", Given(frame=1))
    assert sorted(map(tuple, np.argwhere(~frame.mask).tolist())) == [(1, 2), (4, 5), (6, 7), (8, 9)]
    assert frame.masked == {"the file's mask": 1, "overflow": 3}
    assert frame.geometry.distance_mm == 1200 and frame.geometry.beam_centre_px == (48.0, 64.0)
    assert frame.geometry.wavelength_nm == pytest.approx(0.1) and frame.geometry.pixel_size_mm == (0.075, 0.075)
    with pytest.raises(UserError, match="there is no frame 3"):
        read_frame(tmp_path / "a.h5", Given(frame=3))
    with pytest.raises(UserError, match="has no dataset 'entry/x': choose one of /entry/"):
        read_frame(tmp_path / "a.h5", Given(dataset="entry/x"))


def test_an_angle_of_incidence_makes_a_frame_grazing(tmp_path):
    with h5py.File(tmp_path / "a.nxs", "w") as file:
        file["entry/data/data"] = counts((64, 64))
        file["entry/sample/incident_angle"] = 0.2
    assert read_frame(tmp_path / "a.nxs").setup == "grazing"
    assert read_frame(tmp_path / "a.nxs", Given(setup="transmission")).setup == "transmission"
    tifffile.imwrite(tmp_path / "film_GISAXS_01.tif", counts((64, 64)))
    assert read_frame(tmp_path / "film_GISAXS_01.tif").setup == "grazing"
    tifffile.imwrite(tmp_path / "legisaxson.tif", counts((64, 64)))
    assert read_frame(tmp_path / "legisaxson.tif").setup == "unknown"


def test_markers_of_reduced_data_are_masked_and_negative_values_kept(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(0.0, 1.0, (80, 80)).astype(np.float32)
    values[:, 10] = -1.0  # a marker: the same whole number in 80 pixels
    values[40:44, 40:44] = 0.0  # a patch of zeros: a beam stop
    values[60, 60], values[70, 70] = 0.0, np.nan
    tifffile.imwrite(tmp_path / "a.tif", values)
    sigma = np.full((80, 80), 0.5, dtype=np.float32)
    sigma[20, 20] = np.nan
    tifffile.imwrite(tmp_path / "sigma.tif", sigma)
    frame = read_frame(tmp_path / "a.tif", Given(sigma=tmp_path / "sigma.tif"))
    masked = np.zeros((80, 80), dtype=bool)
    masked[:, 10] = masked[40:44, 40:44] = masked[70, 70] = masked[20, 20] = True
    assert frame.kind == "reduced" and np.array_equal(~frame.mask, masked)
    assert (frame.intensity < 0).sum() > 2500 and frame.sigma[0, 0] == 0.5
    # Whole numbers in a float file are counts.
    tifffile.imwrite(tmp_path / "b.tif", np.where(masked, -1, counts((80, 80))).astype(np.float32))
    whole = read_frame(tmp_path / "b.tif")
    assert whole.kind == "counts" and np.array_equal(~whole.mask, masked)


def test_a_pixel_of_subtracted_data_that_counted_nothing_is_kept(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file.create_group("sasentry01/sasdata01")
        group.attrs.update({"canSAS_class": "SASdata", "signal": "I"})
        values, sigma = np.full((20, 20), 3.0), np.full((20, 20), 0.5)
        values[0, 0], sigma[0, 0] = -2.5, 0.0  # zero counts less the background
        values[1, 1], sigma[1, 1] = 0.0, 0.0  # never measured
        for name, plane in {"I": values, "Idev": sigma, "Qx": np.eye(20), "Qy": np.eye(20)}.items():
            group[name] = plane
        group["Qy"].attrs["units"] = "1/A"
    frame = read_frame(tmp_path / "a.h5")
    assert np.argwhere(~frame.mask).tolist() == [[1, 1]]
    assert frame.sigma[0, 0] == 0.5 and frame.metadata["sigma_filled"] == 1
    assert frame.q()[0][3, 3] == 10.0


def test_masks_of_the_wrong_kind_are_refused(tmp_path):
    pixels = counts((64, 64))
    pixels[:, :3] = -1
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    masked = np.zeros((64, 64), dtype=np.uint8)
    masked[30:40, 30:40] = 255
    tifffile.imwrite(tmp_path / "mask.tif", masked)
    frame = read_frame(tmp_path / "a.tif", Given(mask=tmp_path / "mask.tif"))
    assert frame.masked == {"the given mask": 100, "sentinels": 192} and not frame.mask[35, 35]
    kept = np.where(pixels >= 0, 1, 0).astype(np.uint8)
    tifffile.imwrite(tmp_path / "kept.tif", kept)
    with pytest.raises(UserError, match=r"kept.tif masks .*mask_marks=measured"):
        read_frame(tmp_path / "a.tif", Given(mask=tmp_path / "kept.tif"))
    frame = read_frame(tmp_path / "a.tif", Given(mask=tmp_path / "kept.tif", mask_marks="measured"))
    assert np.array_equal(frame.mask, pixels >= 0)
    tifffile.imwrite(tmp_path / "small.tif", masked[:32])
    with pytest.raises(UserError, match=r"mask .*small.tif has 32 x 64 pixels and .*a.tif has 64 x 64"):
        read_frame(tmp_path / "a.tif", Given(mask=tmp_path / "small.tif"))


def test_the_largest_numbers_of_a_type_are_no_counts(tmp_path):
    for dtype, full in ((np.uint16, [65_534, 65_535]), (np.uint32, [2**32 - 2, 2**32 - 1]), (np.int32, [2**31 - 1])):
        pixels = counts((64, 64), dtype)
        pixels[10, 10 : 10 + len(full)] = full
        tifffile.imwrite(tmp_path / "a.tif", pixels)
        frame = read_frame(tmp_path / "a.tif")
        assert frame.masked == {"overflow": len(full)} and not frame.mask[10, 10 : 10 + len(full)].any()


def test_detectors_by_name_and_what_is_none(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", counts((516, 516), np.uint16))
    frame = read_frame(tmp_path / "a.tif", Given(detector="Lambda 250k"))
    assert frame.masked["gaps"] > 1000 and frame.metadata["detector"] == "Lambda 250k"
    with pytest.raises(UserError, match="a Pilatus1M has frames of 1043 x 981 pixels, and this one has 516 x 516"):
        read_frame(tmp_path / "a.tif", Given(detector="Pilatus1M"))
    with pytest.raises(UserError, match="pyFAI knows no detector 'Camera'"):
        read_frame(tmp_path / "a.tif", Given(detector="Camera"))


def test_text_of_sasview_has_rows_from_top_to_bottom(tmp_path):
    q_x, q_y = np.meshgrid(np.linspace(-0.1, 0.1, 5), np.linspace(-0.2, 0.2, 9))
    intensity = 10 + q_x + 3 * q_y
    table = np.stack([q_x, q_y, intensity, 0 * q_x + 0.3], axis=-1).reshape(-1, 4)
    lines = [" ".join(f"{value:.6g}" for value in row) for row in table]
    (tmp_path / "a.dat").write_text("Data columns Qx - Qy - I(Qx,Qy) - err(I)\nASCII data\n" + "\n".join(lines))
    frame = read_frame(tmp_path / "a.dat")
    assert frame.shape == (9, 5) and frame.kind == "reduced" and (frame.sigma == np.float32(0.3)).all()
    rows, columns = frame.q()
    assert rows[0, 0] == pytest.approx(2.0) and columns[0, 0] == pytest.approx(-1.0)
    np.testing.assert_allclose(frame.intensity, 10 + columns / 10 + 3 * rows / 10, rtol=1e-5)
    (tmp_path / "b.dat").write_text("\n".join(lines[:-2]))
    with pytest.raises(UserError, match=r"b.dat has 43 points in rows of different lengths"):
        read_frame(tmp_path / "b.dat")
    (tmp_path / "c.dat").write_text("nothing here\n")
    with pytest.raises(UserError, match=r"c.dat has no table of Qx, Qy, I"):
        read_frame(tmp_path / "c.dat")


@pytest.mark.parametrize("name", ["a.tif", "a.cbf", "a.h5", "a.edf"])
def test_damaged_files_give_one_sentence(tmp_path, name):
    path = tmp_path / name
    if name.endswith("tif"):
        tifffile.imwrite(path, counts(), compression="zlib")
    elif name.endswith("cbf"):
        fabio.cbfimage.CbfImage(data=counts()).write(str(path))
    elif name.endswith("edf"):
        fabio.edfimage.EdfImage(data=counts()).write(str(path))
    else:
        with h5py.File(path, "w") as file:
            file["data"] = counts()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])
    with pytest.raises(UserError) as caught:
        read_frame(path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_what_holds_no_pattern_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((64, 64, 3), dtype=np.uint8), photometric="rgb")
    with pytest.raises(UserError, match=r"rgb.tif holds numbers of shape \(64, 64, 3\)"):
        read_frame(tmp_path / "rgb.tif")
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"a.jpg is a picture of 8 bits"):
        read_frame(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"cannot read .*none.tif: No such file"):
        read_frame(tmp_path / "none.tif")
    (tmp_path / "a.nxs").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"a.nxs is named like HDF5 and is none"):
        read_frame(tmp_path / "a.nxs")
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["entry/a"], file["entry/b"] = counts((64, 64)), counts((64, 64))
    with pytest.raises(UserError, match=r"two.h5 holds several patterns: choose one"):
        read_frame(tmp_path / "two.h5")
    assert read_frame(tmp_path / "two.h5", Given(dataset="entry/b")).shape == (64, 64)
    with pytest.raises(UserError, match="holds no two-dimensional pattern"):
        with h5py.File(tmp_path / "none.h5", "w") as file:
            file["x"] = np.zeros(10)
        read_hdf5(tmp_path / "none.h5", None, None)
    # Pickles in numpy files are never opened.
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"objects.npy is no pattern"):
        read_frame(tmp_path / "objects.npy")


# File, kind, setup, smallest share of measured pixels, whether values below zero are kept.
REAL = [
    ("transmission/autosaxs_AgBh700_96.9_calib.tif", "counts", "unknown", 0.92, False),
    ("transmission/autosaxs_ihs27_buffer.tif", "counts", "unknown", 0.92, False),
    ("transmission/autosaxs_ihs27_sample.tif", "counts", "unknown", 0.92, False),
    ("transmission/pysaxs_2018-01-31-OT_0_13459.tif", "counts", "unknown", 0.92, False),
    ("transmission/bioxtas_saxslab.tif", "counts", "unknown", 0.93, False),
    ("transmission/bioxtas_GI2_A9_19_001_0000.tif", "counts", "unknown", 0.99, False),
    ("transmission/sasview_BAM_2D_I.tif", "reduced", "unknown", 0.96, True),
    ("sans2d/33837rear_2D_1p75_16p5_NXcanSAS.tif", "reduced", "unknown", 0.99, False),
    ("sans2d/14250_2D_NoDetInfo_NXcanSAS_v3.tif", "reduced", "unknown", 0.70, True),
    ("gisaxs/4nm_insitu_00005.tif", "counts", "grazing", 0.91, False),
    ("gisaxs/4nm_insitu_00045.tif", "counts", "grazing", 0.91, False),
    ("gisaxs/12nm_lambda_module01.tif", "counts", "grazing", 0.99, False),
]


@pytest.mark.skipif(not DATA.exists(), reason=f"no real patterns at {DATA}")
@pytest.mark.parametrize(("name", "kind", "setup", "share", "negative"), REAL)
def test_real_patterns_are_read(name, kind, setup, share, negative):
    raw, frame = tifffile.imread(DATA / name), read_frame(DATA / name)
    assert (frame.kind, frame.setup) == (kind, setup)
    assert share < frame.mask.mean() < 1
    assert np.array_equal(frame.intensity[frame.mask], raw[frame.mask].astype(np.float32))
    assert bool((frame.intensity < 0).any()) == negative
    if kind == "counts":
        assert not frame.mask[raw < 0].any() and not frame.mask[raw > 2**20].any()
        # Of what is no marker and no full counter, hardly anything is masked.
        assert (~frame.mask & (raw >= 0) & (raw <= 2**20)).mean() < 5e-4
    if setup == "grazing":
        with pytest.raises(UserError, match="grazing incidence"):
            regrid(frame, QGrid(64, 1.0))


@pytest.mark.skipif(not DATA.exists(), reason=f"no real patterns at {DATA}")
def test_real_masks_cover_the_gaps():
    for name, mask in (
        ("transmission/pysaxs_2018-01-31-OT_0_13459.tif", "masks/pysaxs_mask.tif"),
        ("transmission/sasview_BAM_2D_I.tif", "masks/sasview_BAM_2D_mask.tif"),
    ):
        frame = read_frame(DATA / name, Given(mask=DATA / mask))
        given = tifffile.imread(DATA / mask) != 0
        assert not frame.mask[given].any()
        assert frame.masked["the given mask"] == given.sum() > frame.masked["gaps"]
