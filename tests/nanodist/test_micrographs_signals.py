"""hyperspy signals in and out."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from hpc.errors import UserError
from nanodist.micrographs import NotAMicrograph
from nanodist.micrographs.micrograph import Micrograph
from nanodist.micrographs.signals import from_signal, to_signal


def pixels(shape=(20, 30), dtype="uint16"):
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def test_without_hyperspy_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "hyperspy.signals", None)
    with pytest.raises(UserError, match="pip install hyperspy"):
        to_signal(Micrograph(pixels()))


class TestHyperspy:
    @pytest.fixture(autouse=True)
    def hs(self):
        self.hs = pytest.importorskip("hyperspy.api", reason="hyperspy is not installed")

    def test_there_and_back(self):
        facts = {"voltage_kv": 300.0, "magnification": 5e4, "instrument": "Titan"}
        micrograph = Micrograph(pixels(), (0.5, 0.25), "a test", facts)
        signal = to_signal(micrograph)
        assert signal.axes_manager["x"].scale == 0.25 and signal.axes_manager["y"].units == "nm"
        (back,) = from_signal(signal)
        np.testing.assert_array_equal(back.pixels, micrograph.pixels)
        assert back.pixel_size_nm == pytest.approx((0.5, 0.25))
        assert {key: back.metadata[key] for key in facts} == facts
        (unknown,) = from_signal(to_signal(Micrograph(pixels())))
        assert unknown.pixel_size_nm is None

    @pytest.mark.parametrize("lazy", [False, True])
    def test_stacks_of_stacks(self, lazy):
        data = pixels((2, 3, 8, 9), "float32")
        signal = self.hs.signals.Signal2D(data)
        for axis, scale in zip(signal.axes_manager.signal_axes, (3.0, 2.0), strict=True):  # x, y
            axis.scale, axis.units = scale, "Å"
        found = list(from_signal(signal.as_lazy() if lazy else signal))
        assert len(found) == 6 and found[0].pixel_size_nm == pytest.approx((0.2, 0.3))
        np.testing.assert_array_equal(np.stack([m.pixels for m in found]), data.reshape(6, 8, 9))

    def test_what_is_no_micrograph(self):
        with pytest.raises(NotAMicrograph, match="a signal with 1 axes, such as a spectrum"):
            list(from_signal(self.hs.signals.Signal1D(pixels())))
        pattern = self.hs.signals.Signal2D(pixels())
        for axis in pattern.axes_manager.signal_axes:
            axis.units = "1/nm"
        with pytest.raises(NotAMicrograph, match="the signal is a diffraction pattern"):
            list(from_signal(pattern))

    def test_what_hyperspy_saves_is_packed(self, tmp_path):
        """A stack of images, a spectrum and a signal in reciprocal units, written by hyperspy itself."""
        pytest.importorskip("h5py", reason="the extra 'io' is not installed")
        from nanodist.micrographs import read_micrographs
        from nanodist.shards import PackOptions, Store, pack

        stack = self.hs.signals.Signal2D(pixels((3, 40, 60)))
        for axis, scale in zip(stack.axes_manager.signal_axes, (0.25, 0.5), strict=True):  # x, y
            axis.scale, axis.units = scale, "nm"
        stack.metadata.set_item("Acquisition_instrument.TEM.beam_energy", 300.0)
        stack.metadata.set_item("Acquisition_instrument.TEM.microscope", "Titan")
        stack.metadata.set_item("General.authors", "someone")
        (tmp_path / "src").mkdir()
        stack.save(tmp_path / "src" / "stack.hspy")
        self.hs.signals.Signal1D(np.arange(12.0).reshape(3, 4)).save(tmp_path / "src" / "spectra.hspy")
        pattern = self.hs.signals.Signal2D(pixels())
        for axis in pattern.axes_manager.signal_axes:
            axis.units = "1/nm"
        pattern.save(tmp_path / "src" / "pattern.hspy")
        found = list(read_micrographs(tmp_path / "src" / "stack.hspy"))
        assert len(found) == 3 and found[1].pixel_size_nm == (0.5, 0.25)
        np.testing.assert_array_equal(found[1].pixels, pixels((3, 40, 60))[1])
        facts = found[2].metadata
        assert (facts["format"], facts["voltage_kv"], facts["instrument"]) == ("hyperspy", 300.0, "Titan")
        assert "someone" not in str(facts)
        store = pack([tmp_path / "src"], tmp_path / "store", PackOptions(tile=None))
        assert isinstance(store, Store) and store.keys == ["stack--p0", "stack--p1", "stack--p2"]
        reasons = {entry["source"]: entry["reason"] for entry in store.manifest.dropped}
        assert "such as a spectrum" in reasons["spectra.hspy"] and "1/nm" in reasons["pattern.hspy"]
