"""What hyperspy saves (``.hspy``) through h5py, one image at a time. Runs in the process of :mod:`child` alone.

Only numbers and plain texts are taken: hyperspy's own reader also makes objects of what a file says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nanodist.micrographs.planes import Axis, Images, refusal

if TYPE_CHECKING:
    import h5py

_FACTS = {"beam_energy": "voltage_kv", "magnification": "magnification", "microscope": "instrument"}


def is_hspy(file: h5py.File) -> bool:
    """Whether an open HDF5 file is what hyperspy writes."""
    import h5py

    return str(file.attrs.get("file_format", "")).lower() == "hyperspy" and isinstance(
        file.get("Experiments"), h5py.Group
    )


def read_hspy(file: h5py.File) -> tuple[list[Images], list[str]]:
    """The images of a hyperspy file, and what else is in it.

    Raises:
        Exception: whatever h5py raises on damaged files.
    """
    import h5py

    images: list[Images] = []
    others: list[str] = []
    for name in sorted(file["Experiments"]):
        group = file["Experiments"][name]
        data = group.get("data") if isinstance(group, h5py.Group) else None
        if not isinstance(data, h5py.Dataset):
            others.append("a signal without data")
            continue
        axes = [dict(group[f"axis-{i}"].attrs) for i in range(data.ndim) if f"axis-{i}" in group]
        why = _refusal(group, data, axes)
        if why is not None:
            others.append(why)
            continue
        y, x = (_axis(axis) for axis in axes[-2:])
        shape = tuple(int(length) for length in data.shape)
        images.append(Images(shape, data.dtype, y, x, _reader(data), _facts(group), "hyperspy axes"))
    return images, others


def _refusal(group: h5py.Group, data: h5py.Dataset, axes: list[dict[str, Any]]) -> str | None:
    if len(axes) != data.ndim:
        return "data whose axes are not those of its values"
    if [bool(axis.get("navigate")) for axis in axes[-2:]] != [False, False] or not all(
        bool(axis.get("navigate")) for axis in axes[:-2]
    ):
        return f"a signal with {sum(not axis.get('navigate') for axis in axes)} axes, such as a spectrum"
    kind = _attribute(group, "metadata/Signal", "signal_type")
    # The axes of a stack may be anything, as of an energy filter; those of the image must be lengths.
    units = tuple(_text(axis.get("units")) for axis in axes[-2:])
    return refusal(tuple(data.shape[-2:]), data.dtype, units, _text(kind))


def _reader(data: h5py.Dataset) -> Any:
    def read(index: tuple[int, ...]) -> npt.NDArray[Any]:
        return np.asarray(data[index])

    return read


def _axis(values: dict[str, Any]) -> Axis:
    try:
        return float(values.get("scale", 0.0)), _text(values.get("units"))
    except (TypeError, ValueError):
        return 0.0, ""


def _facts(group: h5py.Group) -> dict[str, Any]:
    facts: dict[str, Any] = {"format": "hyperspy"}
    for name, key in _FACTS.items():
        value = _attribute(group, "metadata/Acquisition_instrument/TEM", name)
        if isinstance(value, str) and _text(value):
            facts[key] = _text(value)
        elif isinstance(value, (int, float, np.number)) and np.isfinite(value) and value > 0:
            facts[key] = float(value)
    return facts


def _attribute(group: h5py.Group, path: str, name: str) -> Any:
    found = group.get(path)
    return None if found is None else found.attrs.get(name)


def _text(value: Any) -> str:
    """A text of hyperspy's, which writes ``_None_`` for nothing."""
    return value.strip() if isinstance(value, str) and value != "_None_" else ""
