"""Facts in the headers of detectors: geometry, exposure, full pixels, corrections, incidence."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from nanodist.scattering.raw import Raw

_NUMBER = r"([-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)"
_LENGTHS_MM = {"m": 1e3, "cm": 10.0, "mm": 1.0, "um": 1e-3, "micron": 1e-3, "nm": 1e-6, "a": 1e-7, "angstrom": 1e-7}
_Q_INV_NM = {"1/nm": 1.0, "nm^-1": 1.0, "1/a": 10.0, "1/angstrom": 10.0, "a^-1": 10.0, "1/m": 1e-9, "1/cm": 1e-7}
_GRAZING = ("grazing_angle", "incident_angle", "incidence_angle", "alpha_i", "alphai")


def length_mm(value: float, unit: str, default: str = "m") -> float | None:
    """A length in mm; None for a unit that is none of length."""
    factor = _LENGTHS_MM.get((unit or default).strip().lower().replace("å", "a").replace("angstroms", "angstrom"))
    return None if factor is None else value * factor


def q_factor(unit: str) -> float | None:
    """What turns q of this unit into 1/nm; None for a unit that is none of q."""
    return _Q_INV_NM.get(unit.strip().lower().replace(" ", "").replace("å", "a").replace("angstroms", "angstrom"))


def from_dectris_text(text: str, raw: Raw) -> None:
    """Put into ``raw`` what the text header of Pilatus and Eiger detectors states (CBF, TIFF).

    Beam_xy is taken from the corner of the first pixel.
    """
    pixel = re.search(rf"Pixel_size\s+{_NUMBER}\s*m\s*x\s*{_NUMBER}\s*m", text)
    if pixel:
        # x comes first.
        raw.geometry["pixel_size_mm"] = (float(pixel[2]) * 1e3, float(pixel[1]) * 1e3)
    for name, key, factor in (
        ("Detector_distance", "distance_mm", 1e3),
        ("Wavelength", "wavelength_nm", 0.1),
    ):
        found = re.search(rf"{name}\s+{_NUMBER}", text)
        if found and float(found[1]) > 0:
            raw.geometry[key] = float(found[1]) * factor
    beam = re.search(rf"Beam_xy\s+\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)", text)
    if beam and (float(beam[1]), float(beam[2])) != (0.0, 0.0):
        raw.geometry["beam_centre_px"] = (float(beam[2]) - 0.5, float(beam[1]) - 0.5)
    cutoff = re.search(rf"Count_cutoff\s+{_NUMBER}", text)
    if cutoff:
        raw.saturation = float(cutoff[1])
    exposure = re.search(rf"Exposure_time\s+{_NUMBER}", text)
    if exposure:
        raw.metadata["exposure_s"] = float(exposure[1])
    detector = re.search(r"Detector:\s*([^\r\n,]+)", text)
    if detector:
        raw.metadata["detector"] = detector[1].strip()
    flat = re.search(r"Flat_field:?\s+(\S+)", text)
    if flat:
        raw.corrections["flat"] = "not done" if flat[1] in ("(nil)", "nil", "none") else "done"
    incidence = re.search(rf"(?:Grazing_angle|Incident_angle)\s+{_NUMBER}", text, re.IGNORECASE)
    if incidence and float(incidence[1]) > 0:
        raw.setup = "grazing"


def from_edf(header: Mapping[str, Any], raw: Raw) -> None:
    """Put into ``raw`` what the keys of ESRF's SAXS convention state (Boesecke, J. Appl. Cryst. 40, s423, 2007).

    Center counts from the corner of the first pixel, and axis 1 runs along a row.
    """
    values = {key.lower(): value for key, value in header.items()}
    sizes = [_plain(values.get(f"psize_{axis}")) for axis in (2, 1)]
    if all(size and size > 0 for size in sizes):
        raw.geometry["pixel_size_mm"] = tuple(size * 1e3 for size in sizes if size)
    centre = [_plain(values.get(f"center_{axis}")) for axis in (2, 1)]
    if None not in centre:
        raw.geometry["beam_centre_px"] = tuple(value - 0.5 for value in centre if value is not None)
    for key, name, factor in (("sampledistance", "distance_mm", 1e3), ("wavelength", "wavelength_nm", 1e9)):
        value = _plain(values.get(key))
        if value and value > 0:
            raw.geometry[name] = value * factor
    exposure = _plain(values.get("exposuretime", values.get("count_time")))
    if exposure and exposure > 0:
        raw.metadata["exposure_s"] = exposure
    dummy = _plain(values.get("dummy"))
    if dummy is not None:
        raw.sentinels = (dummy,)
    for key, correction in (("darkcorrection", "dark"), ("flatfieldcorrection", "flat")):
        if str(values.get(key, "")).strip().lower() in ("done", "true", "yes", "1"):
            raw.corrections[correction] = "done"
    if any((_plain(values.get(key)) or 0.0) > 0 for key in _GRAZING):
        raw.setup = "grazing"


def from_mar(header: Mapping[str, Any], raw: Raw) -> None:
    """Put into ``raw`` what the binary header of a MarCCD states: 1000 px, 1000 mm, nm and fm as integers."""
    numbers = {key: _plain(header.get(key)) or 0.0 for key in _MAR_KEYS}
    if min(numbers["pixelsize_x"], numbers["pixelsize_y"]) > 0:
        raw.geometry["pixel_size_mm"] = (numbers["pixelsize_y"] * 1e-6, numbers["pixelsize_x"] * 1e-6)
    if min(numbers["beam_x"], numbers["beam_y"]) > 0:
        raw.geometry["beam_centre_px"] = (numbers["beam_y"] * 1e-3 - 0.5, numbers["beam_x"] * 1e-3 - 0.5)
    if numbers["xtal_to_detector"] > 0:
        raw.geometry["distance_mm"] = numbers["xtal_to_detector"] * 1e-3
    if numbers["source_wavelength"] > 0:
        raw.geometry["wavelength_nm"] = numbers["source_wavelength"] * 1e-6
    if numbers["exposure_time"] > 0:
        raw.metadata["exposure_s"] = numbers["exposure_time"] * 1e-3
    if numbers["saturated_value"] > 0:
        raw.saturation = numbers["saturated_value"]


_MAR_KEYS = (
    "pixelsize_x",
    "pixelsize_y",
    "beam_x",
    "beam_y",
    "xtal_to_detector",
    "source_wavelength",
    "exposure_time",
    "saturated_value",
)


def _plain(value: Any) -> float | None:
    """The number at the start of a header's value, which may carry a unit behind it."""
    if value is None:
        return None
    match = re.match(rf"\s*{_NUMBER}", str(value))
    if match is None or not math.isfinite(float(match[1])):
        return None
    return float(match[1])
