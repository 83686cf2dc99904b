"""NXcanSAS files: patterns and curves that SasView opens, and curves read back.

https://manual.nexusformat.org/classes/contributed_definitions/NXcanSAS.html;
q is written in 1/A, which SasView assumes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpc.atomic import write_bytes
from hpc.errors import UserError
from hpc.extras import needs
from nanodist._version import __version__
from nanodist.scattering.curve import Curve
from nanodist.scattering.files import short
from nanodist.scattering.frame import CORRECTIONS, Frame
from nanodist.scattering.hdf5 import class_of, groups, text_of, unit_of
from nanodist.scattering.headers import q_factor


def write_frame(path: Path, frame: Frame, title: str = "") -> None:
    """A pattern with q for each pixel, its mask, sigma and the state of its corrections.

    Rows are written from the smallest q_y to the largest, as SasView has them.

    Raises:
        UserError: the frame has no q, or h5py is not installed.
    """
    q_y, q_x = frame.q()
    upwards = slice(None, None, 1 if q_y[0].mean() < q_y[-1].mean() else -1)
    data: dict[str, tuple[np.ndarray, str]] = {
        "I": (frame.intensity[upwards].astype(np.float64), str(frame.metadata.get("units") or frame.kind)),
        "Qx": (q_x[upwards] / 10, "1/A"),
        "Qy": (q_y[upwards] / 10, "1/A"),
        "Imask": (~frame.mask[upwards], ""),
    }
    sigma = np.sqrt(np.maximum(frame.intensity, 1)) if frame.kind == "counts" else frame.sigma
    if sigma is not None:
        data["Idev"] = (sigma[upwards].astype(np.float64), data["I"][1])
    attributes = {"I_axes": "Qx,Qy", "Q_indices": [0, 1], "mask": "Imask", "Mask_indices": [0, 1]}
    process: dict[str, str] = {f"correction_{name}": frame.corrections.get(name, "unknown") for name in CORRECTIONS}
    process["kind"] = frame.kind
    _write(path, data, attributes, process, title or Path(frame.name).stem, frame.geometry)


def write_nxcansas_curve(path: Path, curve: Curve, title: str = "") -> None:
    """A curve I(q).

    Raises:
        UserError: h5py is not installed.
    """
    data = {"I": (curve.intensity, curve.units), "Q": (curve.q_inv_nm / 10, "1/A")}
    if curve.sigma is not None:
        data["Idev"] = (curve.sigma, curve.units)
    states = curve.facts.get("corrections", {})
    process = {f"correction_{name}": str(states.get(name, "unknown")) for name in CORRECTIONS}
    _write(path, data, {"I_axes": "Q", "Q_indices": [0]}, process, title or str(curve.facts.get("source", "")), None)


def _write(
    path: Path,
    data: Mapping[str, tuple[np.ndarray, str]],
    attributes: Mapping[str, Any],
    process: Mapping[str, str],
    title: str,
    geometry: Any,
) -> None:
    needs(path, "an HDF5 file", "scattering", "h5py")
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["default"] = "sasentry01"
        entry = _group(file, "sasentry01", "NXentry", "SASentry")
        entry.attrs.update({"version": "1.1", "default": "sasdata01"})
        for name, text in (("definition", "NXcanSAS"), ("title", title), ("run", "1")):
            entry[name] = text
        group = _group(entry, "sasdata01", "NXdata", "SASdata")
        group.attrs.update({"signal": "I", **attributes})
        for name, (values, unit) in data.items():
            dataset = group.create_dataset(name, data=values, compression="gzip" if values.ndim > 1 else None)
            if unit:
                dataset.attrs["units"] = unit
        if "Idev" in data:
            group["I"].attrs.update({"uncertainties": "Idev", "uncertainty": "Idev"})
        notes = _group(entry, "sasprocess01", "NXprocess", "SASprocess")
        for name, text in {"name": f"nanodist {__version__}", **process}.items():
            notes[name] = text
        if geometry is not None:
            _write_geometry(_group(entry, "sasinstrument01", "NXinstrument", "SASinstrument"), geometry)
    write_bytes(path, buffer.getvalue())


def _group(parent: Any, name: str, nexus: str, cansas: str) -> Any:
    group = parent.create_group(name)
    group.attrs.update({"NX_class": nexus, "canSAS_class": cansas})
    return group


def _write_geometry(instrument: Any, geometry: Any) -> None:
    instrument["name"] = "unknown"
    detector = _group(instrument, "sasdetector01", "NXdetector", "SASdetector")
    detector["name"] = "detector"
    values = (
        ("SDD", geometry.distance_mm, "mm"),
        ("x_pixel_size", geometry.pixel_size_mm[1], "mm"),
        ("y_pixel_size", geometry.pixel_size_mm[0], "mm"),
        # From the corner of the first pixel, in mm as SasView has it.
        ("beam_center_x", (geometry.beam_centre_px[1] + 0.5) * geometry.pixel_size_mm[1], "mm"),
        ("beam_center_y", (geometry.beam_centre_px[0] + 0.5) * geometry.pixel_size_mm[0], "mm"),
    )
    for name, value, unit in values:
        detector[name] = value
        detector[name].attrs["units"] = unit
    source = _group(instrument, "sassource01", "NXsource", "SASsource")
    source["incident_wavelength"] = geometry.wavelength_nm * 10
    source["incident_wavelength"].attrs["units"] = "A"


def read_nxcansas_curves(path: Path) -> list[Curve]:
    """All curves I(q) of an NXcanSAS file.

    Raises:
        UserError: no such file, none in it, damaged, or h5py is not installed.
    """
    needs(path, "an HDF5 file", "scattering", "h5py")
    import h5py

    try:
        with h5py.File(path, "r") as file:
            curves = [
                curve
                for group in groups(file)
                if class_of(group) == "SASdata" and (curve := _curve(group, path)) is not None
            ]
    except UserError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is no HDF5 file, or a damaged one ({short(error)}): check its name") from error
    if not curves:
        raise UserError(f"{path} holds no curve I(q) of NXcanSAS: patterns are read by read_frame")
    return curves


def _curve(group: Any, path: Path) -> Curve | None:
    data, q = group.get(text_of(group.attrs.get("signal", "I"))), group.get("Q")
    if data is None or q is None or len(data.shape) != 1 or data.shape != q.shape:
        return None
    factor = q_factor(unit_of(q) or "1/A")
    if factor is None:
        raise UserError(f"{path} states q in {unit_of(q)!r}: write it with 1/nm or 1/A")
    name = next((data.attrs[key] for key in ("uncertainties", "uncertainty") if key in data.attrs), "Idev")
    deviation = group.get(text_of(name))
    sigma = None if deviation is None or deviation.shape != data.shape else np.asarray(deviation[()], np.float64)
    facts = {"source": path.name}
    return Curve(np.asarray(q[()], np.float64) * factor, np.asarray(data[()], np.float64), sigma, unit_of(data), facts)
