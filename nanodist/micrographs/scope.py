"""Gatan DM3 and DM4, TIA SER and NCEM EMD through RosettaSciIO. Runs in the process of :mod:`child` alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nanodist.micrographs.emi import read_settings
from nanodist.micrographs.planes import Images, refusal

Found = tuple[list[Images], list[str]]
# A pixel of a real image in metres; those of a diffraction pattern are 1e5 to 1e10 per metre.
_LONGEST_M = 1.0


def read_dm(path: Path) -> Found:
    """The images of a Gatan file, and what else is in it.

    Raises:
        Exception: whatever RosettaSciIO raises on damaged files.
    """
    from rsciio.digitalmicrograph import file_reader

    images: list[Images] = []
    others: list[str] = []
    for signal in _signals(file_reader, path):
        facts = _dm_facts(signal.get("original_metadata") or {})
        if facts.pop("diffraction", False) and not _lengths(signal):
            others.append("a diffraction pattern (the microscope was in diffraction mode)")
            continue
        _sort(signal, "Gatan calibration", facts, images, others)
    return images, others


def read_ser(path: Path) -> Found:
    """The images of a SER file, with what the EMI file beside it says of the microscope.

    Raises:
        Exception: whatever RosettaSciIO raises on damaged files.
    """
    from rsciio.tia import file_reader

    images: list[Images] = []
    others: list[str] = []
    settings = read_settings(path)
    diffraction = settings.pop("diffraction", False)
    for signal in _signals(file_reader, path):
        nm = [float(axis["scale"]) for axis in signal["axes"][-2:] if axis.get("units") == "nm"]
        # RosettaSciIO takes every SER for metres where it does not get the EMI.
        if diffraction or any(abs(scale) > _LONGEST_M * 1e9 for scale in nm):
            others.append("a diffraction pattern (pixels in 1/m)")
            continue
        _sort(signal, "SER calibration", settings, images, others)
    return images, others


def read_ncem(path: Path) -> Found:
    """The images of an EMD file as Berkeley's NCEM defines it, and what else is in it.

    Raises:
        Exception: whatever RosettaSciIO and h5py raise on damaged files.
    """
    from rsciio.emd import file_reader

    images: list[Images] = []
    others: list[str] = []
    for signal in _signals(file_reader, path):
        _sort(_y_x_last(signal), "EMD axes", {}, images, others)
    return images, others


def _y_x_last(signal: dict[str, Any]) -> dict[str, Any]:
    """With the axes named y and x as the last two: some programs write them first, as RosettaSciIO expects, some last.

    Where they have other names, the order stays as RosettaSciIO has it.
    """
    names = [str(axis.get("name") or "").strip().lower() for axis in signal["axes"]]
    if len(names) != signal["data"].ndim or names.count("x") != 1 or names.count("y") != 1:
        return signal
    last = [names.index("y"), names.index("x")]
    order = [i for i in range(len(names)) if i not in last] + last
    return {**signal, "data": signal["data"].transpose(order), "axes": [signal["axes"][i] for i in order]}


def _signals(file_reader: Any, path: Path) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return list(file_reader(str(path), lazy=True))
        except (NotImplementedError, ValueError) as error:
            # Colours and tables of objects are not read lazily.
            if "lazy" not in str(error).lower() and "rechunk" not in str(error).lower():
                raise
            return list(file_reader(str(path), lazy=False))


def _sort(signal: dict[str, Any], source: str, facts: dict[str, Any], images: list[Images], others: list[str]) -> None:
    """Put a signal with the images, or what it is instead with the others."""
    data, axes = signal["data"], signal["axes"]
    units = tuple(_unit(axis) for axis in axes)
    kind = str(((signal.get("metadata") or {}).get("Signal") or {}).get("signal_type") or "")
    why = refusal(tuple(data.shape), data.dtype, units, kind)
    if why is None and len(axes) != len(data.shape):
        why = "data whose axes are not those of its values"
    if why is not None:
        others.append(why)
        return
    y, x = ((float(axis.get("scale") or 0), _unit(axis)) for axis in axes[-2:])
    images.append(Images(tuple(map(int, data.shape)), data.dtype, y, x, _reader(data), facts, source))


def _reader(data: Any) -> Any:
    """Gives planes of a lazy or a whole array."""
    if not hasattr(data, "compute"):
        return lambda index: np.asarray(data[index])
    if data.ndim == 3:
        return _Blocks(data)
    return lambda index: np.asarray(data[index].compute(scheduler="synchronous"))


class _Blocks:
    """Planes of a lazy stack, by the blocks that are read as one: a block a plane would read a stack many times."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.starts = np.cumsum([0, *data.chunks[0]])
        self.block, self.number = np.empty(0), -1

    def __call__(self, index: tuple[int, ...]) -> npt.NDArray[Any]:
        number = int(np.searchsorted(self.starts, index[0], side="right")) - 1
        if number != self.number:
            self.block = np.empty(0)  # before the next one comes in
            low, high = (int(start) for start in self.starts[number : number + 2])
            self.block, self.number = np.asarray(self.data[low:high].compute(scheduler="synchronous")), number
        plane: npt.NDArray[Any] = self.block[index[0] - int(self.starts[number])]
        return plane


def _unit(axis: dict[str, Any]) -> str:
    unit = axis.get("units")
    return unit.strip() if isinstance(unit, str) else ""


def _lengths(signal: dict[str, Any]) -> bool:
    from nanodist.micrographs.pixel_size import NM_PER_UNIT

    return all(_unit(axis).lower() in NM_PER_UNIT for axis in signal["axes"][-2:])


def _dm_facts(tags: Any) -> dict[str, Any]:
    """What Gatan's tags say of the microscope, by a list of what to take, so that no name of an operator is in it."""
    facts: dict[str, Any] = {}
    for entry in (tags.get("ImageList") or {}).values():
        info = ((entry or {}).get("ImageTags") or {}).get("Microscope Info") or {}
        voltage, magnification = _number(info.get("Voltage")), _number(info.get("Indicated Magnification"))
        if voltage:
            facts["voltage_kv"] = voltage / 1e3
        if magnification:
            facts["magnification"] = magnification
        for name, key in (("Name", "instrument"), ("Microscope", "instrument"), ("Illumination Mode", "mode")):
            if isinstance(info.get(name), str) and info[name].strip():
                facts[key] = info[name].strip()
        tem = "STEM" not in str(facts.get("mode", "")).upper()
        facts["diffraction"] = tem and str(info.get("Operation Mode", "")).upper().startswith("DIFFRACTION")
    return facts


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < 1e12 else None
