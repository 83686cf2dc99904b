"""Real files of every format, against a table checked by hand in their bytes and headers."""

from __future__ import annotations

import os
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from hpc.errors import UserError
from nanodist.micrographs import NotAMicrograph, read_micrograph, read_micrographs
from nanodist.shards import PackOptions, pack
from nanodist.shards.verify import verify

SAMPLES = (
    Path(os.environ.get("NANODIST_DATA", Path(__file__).resolve().parents[3] / "shared/data")) / "raw_format_samples"
)
if not SAMPLES.is_dir():
    pytest.skip(f"{SAMPLES} is not there", allow_module_level=True)
for module in ("rsciio", "h5py", "mrcfile"):
    pytest.importorskip(module, reason="the extra 'io' is not installed")

# name: (number of micrographs, (H, W), dtype, pixel size in nm as (y, x), words of where it comes from).
# By hand: SER from CalibrationDeltaY/X of the data element (struct "<ddiddi" at the first offset); Velox from
# BinaryResult.PixelSize of the frame's JSON (8.737e-08 m); Gatan from ImageData.Calibrations.Dimension (x 1 nm, y 2 A);
# the TIFF of DigitalMicrograph from its tags 65009 and 65010; JEOL: 1 inch / 93 / 150000; the cells of the MRC files
# are -80 x -40 angstrom for 8 x 4 pixels, and temp.mrc lacks the mark of an MRC file.
IMAGES = {
    "128x128-TEM_search_1.ser": (1, (128, 128), "int32", (5.261214205047081,) * 2, "SER"),
    "128x128_TEM_acquire-sum1_1.ser": (1, (128, 128), "int32", (21.479317511461325,) * 2, "SER"),
    "16x16_STEM_BF_DF_acquire_2.ser": (1, (16, 16), "uint16", (21.510044070327746,) * 2, "SER"),
    "16x16_STEM_BF_DF_search_1.ser": (1, (16, 16), "uint16", (22.026285128015613,) * 2, "SER"),
    "16x16_STEM_BF_DF_search_2.ser": (1, (16, 16), "uint16", (22.026285128015613,) * 2, "SER"),
    "20241021_00405_1_Virt_1_sum.mrc": (1, (4, 8), "float32", None, "-10 x -10 angstrom"),
    "20241021_00405_ext1_Ext_1.mrc": (1, (4, 8), "float32", None, "-10 x -10 angstrom"),
    "20241021_00405_final.mrc": (1, (4, 8), "float32", None, "-10 x -10 angstrom"),
    "temp.mrc": (3, (128, 128), "float32", None, "lacks the mark"),
    "JEOL-SightX-TEM-mag-dummy.tif.gz": (1, (556, 556), "uint16", (25.4e6 / 93 / 150000,) * 2, "JEOL"),
    "STEM_HAADF-DF4-DF2-BF_Diffraction_Micro.emd": (4, (128, 128), "uint16", (87.370796142255832,) * 2, "Velox"),
    "STEM_HAADF_Diffraction_Micro.emd": (1, (128, 128), "uint16", (87.370796142255832,) * 2, "Velox"),
    "dmTest_float32_nonSquare_diffPixelSize.dm3": (1, (64, 128), "float32", (0.2, 1.0), "y A, x nm"),
    "dmTest_float32_nonSquare_diffPixelSize.dm4": (1, (64, 128), "float32", (0.2, 1.0), "y A, x nm"),
    "example_image.emd": (1, (3, 3), "int32", None, "states none"),
    "optical_Zeiss_AxioVision_BW.tif": (1, (10, 13), "uint8", None, "150 dpi is a display's or printer's default"),
    "test-1.dm3": (1, (2, 2), "int16", None, "states none"),
    "test-6.dm4": (1, (2, 2), "uint8", None, "states none"),
    "test-8.dm3": (1, (2, 2), "uint8", None, "states none"),
    "test-9.dm4": (1, (2, 2), "int8", None, "states none"),
    "test-14.dm4": (1, (2, 2), "uint8", None, "states none"),
    "test-23.dm3": (1, (2, 2), "uint8", None, "states none"),
    "test_loading_image_saved_with_DM.tif": (1, (68, 68), "int32", (168.67469251155853,) * 2, "Gatan tags"),
}
REFUSED = {
    "08_carbon.dm3": "a spectrum (EELS)",
    "16x16-line_profile_horizontal_5x128x128_EDS_1.ser": "a spectrum (an axis in eV)",
    "16x16_STEM_BF_DF_search.emi": "the microscope's settings and no pixels",
    "16x16x5_STEM_BF_DF_preview.emi": "none of which lies beside it",
    "JEOL-SightX-Ronchigram-dummy.tif.gz": "a Ronchigram or a diffraction pattern",
    "JEOL-SightX-SAED-dummy.tif.gz": "a diffraction pattern (JEOL: mode DIFF, camera length 40cm)",
    "example_axis_len_1.emd": "a line of 25 values",
    "example_bytes_string_metadata.emd": "a line of 10 values",
    "example_object_dtype_data.emd": "a table of objects without pixels",
    "example_spectrum.emd": "a line of 3 values",
    "optical_Zeiss_AxioVision_RGB.tif": "a colour picture (its channels differ)",
}
TEXTS = {"PROVENANCE.md", "meta.csv"}


def test_the_table_has_every_file():
    assert {path.name for path in SAMPLES.iterdir()} == set(IMAGES) | set(REFUSED) | TEXTS


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    count, shape, dtype, size_nm, source = IMAGES[name]
    found = list(read_micrographs(SAMPLES / name))
    assert len(found) == count
    for micrograph in found:
        assert micrograph.pixels.shape == shape and micrograph.pixels.dtype == dtype
        assert micrograph.pixel_size_nm == (None if size_nm is None else pytest.approx(size_nm, rel=1e-9))
        assert source in micrograph.pixel_size_source
        assert micrograph.pixel_size_source.startswith("unknown: ") == (size_nm is None)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_micrograph(name):
    with pytest.raises(UserError) as error:
        list(read_micrographs(SAMPLES / name))
    assert REFUSED[name] in str(error.value) and name in str(error.value)
    assert isinstance(error.value, NotAMicrograph) == ("colour" not in REFUSED[name])


def test_metadata_without_operators():
    facts = read_micrograph(SAMPLES / "16x16_STEM_BF_DF_search_1.ser").metadata
    assert facts["voltage_kv"] == 200 and facts["magnification"] == 10000
    assert facts["instrument"] == "Tecnai 200 kV D2267 SuperTwin" and "ERIC" not in str(facts)
    jeol = read_micrograph(SAMPLES / "JEOL-SightX-TEM-mag-dummy.tif.gz")
    assert jeol.metadata["instrument"] == "JEM-ARM200F" and "Operator" not in str(jeol.metadata)
    # 93 dpi is rounded: the file's own XML has 3642 pixels a metre, 0.53 % off, about two standard uncertainties.
    assert jeol.pixel_size_uncertainty == pytest.approx(0.5 / 93 / 3**0.5)


def test_pixels_against_the_bytes_of_the_files():
    ser = SAMPLES / "128x128-TEM_search_1.ser"
    data = ser.read_bytes()
    (table,) = struct.unpack("<Q", data[22:30])
    (element,) = struct.unpack("<Q", data[table : table + 8])
    bottom_row_first = np.frombuffer(data, "<i4", 128 * 128, element + 50).reshape(128, 128)
    np.testing.assert_array_equal(read_micrograph(ser).pixels, bottom_row_first[::-1])
    mrc = SAMPLES / "temp.mrc"
    expected = np.fromfile(mrc, "<f4", offset=1024).reshape(3, 128, 128)
    for page in range(3):
        np.testing.assert_array_equal(read_micrograph(mrc, page).pixels, expected[page])


def test_all_samples_pack_into_one_store(tmp_path):
    store = pack([SAMPLES], tmp_path / "store", PackOptions(tile=None, skip_bad=True))
    sources = {sample.source for sample in store.samples}
    dropped = {entry["source"]: entry["reason"] for entry in store.manifest.dropped}
    assert sources | set(dropped) == set(IMAGES) | set(REFUSED)
    for name, words in REFUSED.items():
        assert words in dropped[name]
    by_name = {sample.source: sample for sample in store.samples}
    assert by_name["dmTest_float32_nonSquare_diffPixelSize.dm3"].pixel_size_nm == pytest.approx((0.2, 1.0))
    assert verify(tmp_path / "store") == []


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Cut at a random place, or with some bytes changed."""
    if rng.random() < 0.4:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3, 20))):
        changed[rng.randrange(min(len(data), rng.choice((256, 2048, len(data)))))] = rng.choice((0, 255, 127, 1, 90))
    return bytes(changed)


FUZZED = (
    "test-6.dm4",
    "dmTest_float32_nonSquare_diffPixelSize.dm3",
    "16x16_STEM_BF_DF_search_1.ser",
    "16x16-line_profile_horizontal_5x128x128_EDS_1.ser",
    "STEM_HAADF_Diffraction_Micro.emd",
    "example_image.emd",
    "20241021_00405_final.mrc",
    "temp.mrc",
    "test_loading_image_saved_with_DM.tif",
    "JEOL-SightX-TEM-mag-dummy.tif.gz",
)


@pytest.mark.parametrize("name", FUZZED)
def test_damaged_files_give_one_sentence(tmp_path, monkeypatch, name):
    monkeypatch.setattr("nanodist.micrographs.isolated.SECONDS", 20.0)
    data, rng, path = (SAMPLES / name).read_bytes(), random.Random(name), tmp_path / name
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged or truncated"):
        read_micrograph(path)
    refused = 0
    for _ in range(25):
        path.write_bytes(mutated(data, rng))
        began = time.monotonic()
        try:
            for micrograph in read_micrographs(path):
                assert micrograph.pixels.ndim == 2
        except UserError as error:
            assert name in str(error) and "\n" not in str(error)
            refused += 1
        assert time.monotonic() - began < 40
    assert refused >= 3
