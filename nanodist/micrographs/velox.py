"""Velox EMD through h5py, one frame at a time. Runs in the process of :mod:`child` alone.

RosettaSciIO reads it too, but only with a library for sparse arrays where the file holds spectra beside its images.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nanodist.micrographs.planes import Images, refusal

if TYPE_CHECKING:
    import h5py

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_LONGEST_METADATA = 16 * 2**20
_MOST_OBJECTS = 100_000


def is_velox(file: h5py.File) -> bool:
    """Whether an open HDF5 file is what Velox writes."""
    import h5py

    data = file.get("Data")
    return isinstance(data, h5py.Group) and any(name in data for name in ("Image", "Spectrum", "SpectrumStream"))


def check_links(file: h5py.File) -> None:
    """Refuse a file that would have other files read, or that holds more objects than any measurement does.

    Raises:
        ValueError: links or data that lie in other files.
    """
    import h5py

    groups, seen = [file["/"]], 0
    visited = set()
    while groups:
        group = groups.pop()
        for name in group:
            seen += 1
            if seen > _MOST_OBJECTS:
                raise ValueError(f"more than {_MOST_OBJECTS} objects in it")
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise ValueError(f"'{name}' lies in another file")
            entry = group.get(name)
            if isinstance(entry, h5py.Dataset) and (entry.external or entry.is_virtual):
                raise ValueError(f"the data of '{name}' lie in another file")
            if isinstance(entry, h5py.Group) and entry.id not in visited:
                visited.add(entry.id)
                groups.append(entry)


def read_velox(file: h5py.File) -> tuple[list[Images], list[str]]:
    """The images of a Velox file, and what else is in it.

    Raises:
        Exception: whatever h5py raises on damaged files.
    """
    import h5py

    images: list[Images] = []
    others: list[str] = []
    for name in sorted(file["Data"].get("Image", {})):
        group = file["Data/Image"][name]
        data = group.get("Data") if isinstance(group, h5py.Group) else None
        if not isinstance(data, h5py.Dataset) or data.ndim != 3:
            others.append("an image without pixels")
            continue
        metadata = _metadata(group)
        size, units = _pixel(metadata)
        height, width, frames = data.shape
        why = refusal((frames, height, width), data.dtype, ("", *units))
        if data.dtype.names:
            why = "an image of complex numbers, such as a Fourier transform"
        if why is not None:
            others.append(why)
            continue
        y, x = zip(size, units, strict=True)
        shape = (frames, height, width) if frames > 1 else (height, width)
        images.append(Images(shape, data.dtype, y, x, _reader(data), _facts(metadata), "Velox calibration"))
    others += [
        f"{len(file['Data'][kind])} x {kind}"
        for kind in ("Spectrum", "SpectrumStream", "SpectrumImage")
        if kind in file["Data"]
    ]
    return images, others


def _reader(data: h5py.Dataset) -> Any:
    def read(index: tuple[int, ...]) -> npt.NDArray[Any]:
        return np.asarray(data[:, :, index[0] if index else 0])

    return read


def _metadata(group: h5py.Group) -> dict[str, Any]:
    """The JSON of the first frame; nothing where it cannot be read."""
    data = group.get("Metadata")
    if data is None or data.ndim != 2 or data.shape[0] > _LONGEST_METADATA or data.dtype != np.uint8:
        return {}
    try:
        found = json.loads(bytes(data[:, 0]).rstrip(b"\0").decode("utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _pixel(metadata: dict[str, Any]) -> tuple[tuple[float, float], tuple[str, str]]:
    binary = _part(metadata, "BinaryResult")
    size = _part(binary, "PixelSize")
    units = (str(binary.get("PixelUnitY") or ""), str(binary.get("PixelUnitX") or ""))
    return (_number(size.get("height")) or 0.0, _number(size.get("width")) or 0.0), units


def _facts(metadata: dict[str, Any]) -> dict[str, Any]:
    instrument, optics = _part(metadata, "Instrument"), _part(metadata, "Optics")
    facts: dict[str, Any] = {}
    model = str(instrument.get("InstrumentModel") or instrument.get("InstrumentClass") or "").strip()
    if model:
        facts["instrument"] = model
    voltage, magnification = _number(optics.get("AccelerationVoltage")), _number(optics.get("NominalMagnification"))
    if voltage:
        facts["voltage_kv"] = voltage / 1e3
    if magnification:
        facts["magnification"] = magnification
    detector = str(_part(metadata, "BinaryResult").get("Detector") or "").strip()
    return {**facts, "detector": detector} if detector else facts


def _part(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < 1e12 else None
