"""HDF5: NXcanSAS of two dimensions, and raw frames of detectors in NeXus files (Eiger, Lambda, beamlines)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hpc.errors import UserError
from hpc.extras import needs
from nanodist.scattering.files import short
from nanodist.scattering.frame import CORRECTIONS, STATES
from nanodist.scattering.headers import length_mm, q_factor
from nanodist.scattering.raw import Raw, check_plane, one_frame

_DEEPEST = 12


def read_hdf5(path: Path, frame: int | None, dataset: str | None) -> Raw:
    """The pattern of an HDF5 file: an NXcanSAS SASdata of two dimensions, else the data of a detector.

    Args:
        path: the file.
        frame: which frame of a stack.
        dataset: where the numbers are, for files that hold several.

    Raises:
        UserError: no pattern, several and none chosen, damaged, h5py not installed.
    """
    needs(path, "an HDF5 file", "scattering", "h5py")
    import h5py

    with suppress(ImportError):
        import hdf5plugin  # noqa: F401  # the compressions of Eiger and Lambda
    try:
        with h5py.File(path, "r") as file:
            for group in groups(file):
                if dataset is None and class_of(group) == "SASdata" and _signal(group) is not None:
                    return _reduced(group, path, frame)
            return _detector(file, path, frame, dataset)
    except UserError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{path} is a damaged HDF5 file, or one of another kind ({short(error)}): copy it again"
        ) from error


def groups(node: Any, depth: int = 0) -> Iterator[Any]:
    """All groups, a parent before its children; links that lead nowhere are passed over."""
    import h5py

    yield node
    if depth == _DEEPEST:
        return
    for name in node:
        child = node.get(name)
        if isinstance(child, h5py.Group):
            yield from groups(child, depth + 1)


def class_of(node: Any) -> str:
    """The class of a group, canSAS's before NeXus's."""
    return text_of(node.attrs.get("canSAS_class", node.attrs.get("NX_class", "")))


def text_of(value: Any) -> str:
    """An attribute or a scalar as text, from bytes or an array of one."""
    if isinstance(value, np.ndarray):
        value = value.ravel()[0] if value.size else ""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def unit_of(node: Any) -> str:
    """The unit of a dataset, empty where none is stated."""
    return text_of(node.attrs.get("units", node.attrs.get("unit", "")))


def _signal(group: Any) -> Any | None:
    """The intensity of a SASdata, where it has two dimensions (or is a stack of such)."""
    data = group.get(text_of(group.attrs.get("signal", "I")))
    if data is None or len(data.shape) < 2:
        return None
    q = group.get("Q")
    # A stack of curves has one q for all of them.
    return None if q is not None and len(q.shape) == 1 else data


def _plane(node: Any, path: Path, frame: int | None) -> tuple[np.ndarray, int]:
    """One frame of a dataset, and how many it has."""
    if len(node.shape) == 2:
        one_frame(1, frame, path)
        check_plane(node.shape, path)
        return np.asarray(node[()]), 1
    check_plane(node.shape[-2:], path)
    number = int(np.prod(node.shape[:-2]))
    index = np.unravel_index(one_frame(number, frame, path), node.shape[:-2])
    return np.asarray(node[tuple(int(i) for i in index)]), number


def _reduced(group: Any, path: Path, frame: int | None) -> Raw:
    """An NXcanSAS SASdata (https://manual.nexusformat.org/classes/contributed_definitions/NXcanSAS.html)."""
    data = _signal(group)
    assert data is not None
    values, frames = _plane(data, path, frame)
    raw = Raw(
        values.astype(np.float64), frames, kind="reduced", metadata={"format": "NXcanSAS", "units": unit_of(data)}
    )
    name = next((data.attrs[key] for key in ("uncertainties", "uncertainty") if key in data.attrs), "Idev")
    deviation = group.get(text_of(name))
    if deviation is not None:
        if deviation.shape != data.shape:
            raise UserError(
                f"{path} has errors of shape {deviation.shape} for intensities of {data.shape}: write it again"
            )
        raw.sigma = _plane(deviation, path, frame)[0].astype(np.float64)
    mask = group.get(text_of(group.attrs.get("mask", "Imask")))
    if mask is not None and mask.shape in (data.shape, values.shape):
        # True is what is left out.
        raw.measured = _plane(mask, path, frame if mask.shape == data.shape else None)[0] == 0
    planes = _q_planes(group, values.shape, path)
    if planes is not None:
        raw.q_planes = planes
    for node in groups(group.parent):
        if class_of(node) in ("SASprocess", "NXprocess"):
            _processes(node, raw)
    return raw


def _q_planes(group: Any, shape: tuple[int, ...], path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """(q_y, q_x) in 1/nm; from Qx and Qy, or from one Q of (2 or 3, H, W)."""
    if "Qx" in group and "Qy" in group:
        nodes = (group["Qy"], group["Qx"])
        lines = tuple(node.shape for node in nodes) == tuple((side,) for side in shape)
        if not lines and any(node.shape != shape for node in nodes):
            raise UserError(f"{path} has q of shape {nodes[0].shape} for intensities of {shape}: write it again")
        planes = [np.asarray(node[()], np.float64) for node in nodes]
        unit = unit_of(nodes[0])
    elif "Q" in group and group["Q"].shape in ((2, *shape), (3, *shape)):
        unit = unit_of(group["Q"])
        planes = [np.asarray(group["Q"][axis], np.float64) for axis in (1, 0)]
    else:
        return None
    factor = q_factor(unit or "1/A")
    if factor is None:
        raise UserError(f"{path} states q in {unit!r}: write it with 1/nm or 1/A")
    if len(planes[0].shape) == 1:
        planes = list(np.meshgrid(planes[0], planes[1], indexing="ij"))
    return planes[0] * factor, planes[1] * factor


def _processes(node: Any, raw: Raw) -> None:
    """Corrections and kind as `nanodist.scattering.nxcansas` states them: a term a correction."""
    if "kind" in node and text_of(node["kind"][()]) == "counts":
        # Their sigma was written for others only.
        raw.kind, raw.sigma = "counts", None
    for name in CORRECTIONS:
        term = node.get(f"correction_{name}")
        state = text_of(term[()]) if term is not None else ""
        if state in STATES:
            raw.corrections[name] = state  # type: ignore[assignment]


def _detector(file: Any, path: Path, frame: int | None, dataset: str | None) -> Raw:
    """The data of an NXdetector, of the file's default NXdata, or of the only large dataset."""
    import h5py

    if dataset is not None:
        node = file.get(dataset)
        if not isinstance(node, h5py.Dataset):
            raise UserError(f"{path} has no dataset {dataset!r}: choose one of {', '.join(_planes(file)) or 'none'}")
    else:
        places = _planes(file)
        preferred = [place for place in places if class_of(file[place].parent) == "NXdetector"] or places
        if not preferred:
            raise UserError(f"{path} holds no two-dimensional pattern: choose another file")
        # The same numbers are often linked from several places.
        if len({_address(file[place]) for place in preferred}) > 1:
            raise UserError(f"{path} holds several patterns: choose one (dataset=) of {', '.join(preferred[:8])}")
        node = file[preferred[0]]
    values, frames = _plane(node, path, frame)
    raw = Raw(values, frames, metadata={"format": "HDF5", "dataset": node.name, "units": unit_of(node)})
    _nexus_facts(file, node, raw)
    return raw


def _address(node: Any) -> tuple[int, int]:
    import h5py

    info = h5py.h5o.get_info(node.id)
    return info.fileno, info.addr


def _planes(file: Any) -> list[str]:
    """Where there are numbers of two dimensions or more, the pixel masks and flat fields of detectors left out."""
    import h5py

    places = []
    for group in groups(file):
        for name in group:
            node = group.get(name)
            if isinstance(node, h5py.Dataset) and len(node.shape) >= 2 and node.dtype.kind in "iuf":
                aside = any(word in name.lower() for word in ("mask", "flat", "dark", "error", "dev", "qx", "qy"))
                if min(node.shape[-2:]) >= 32 and not aside:
                    places.append(f"{group.name.rstrip('/')}/{name}")
    return places


def _number(node: Any) -> float | None:
    if node.size is None or not 0 < node.size <= 2**16:
        return None
    try:
        value = float(np.asarray(node[()]).ravel()[0])
    except (ValueError, TypeError, IndexError):
        return None
    return value if np.isfinite(value) else None


def _nexus_facts(file: Any, node: Any, raw: Raw) -> None:
    """Geometry, exposure and masks as NXdetector and its neighbours state them; beam_center from the corner."""
    import h5py

    found: dict[str, Any] = {}
    # The detector that holds the data comes first.
    for group in (node.parent, *groups(file)):
        for name in group:
            if name in _NEXUS and name not in found and isinstance(group.get(name), h5py.Dataset):
                found[name] = group[name]
    _nexus_geometry(found, raw)
    exposure = _value(found, "count_time") or _value(found, "exposure_time")
    if exposure:
        raw.metadata["exposure_s"] = exposure
    raw.saturation = _value(found, "saturation_value")
    mask = found.get("pixel_mask")
    if mask is not None and mask.shape[-2:] == raw.values.shape:
        raw.measured = np.asarray(mask[(0,) * (len(mask.shape) - 2)]) == 0
    if any((_value(found, name) or 0.0) > 0 for name in _ANGLES):
        raw.setup = "grazing"


def _nexus_geometry(found: dict[str, Any], raw: Raw) -> None:
    lengths = {name: length_mm(value, unit_of(found[name])) for name in _LENGTHS if (value := _value(found, name))}
    distance = next((lengths[name] for name in ("detector_distance", "distance", "SDD") if lengths.get(name)), None)
    if distance:
        raw.geometry["distance_mm"] = abs(distance)
    height, width = lengths.get("y_pixel_size"), lengths.get("x_pixel_size")
    if height and width:
        raw.geometry["pixel_size_mm"] = (height, width)
    x, y = _value(found, "beam_center_x"), _value(found, "beam_center_y")
    if x is not None and y is not None and (x, y) != (0.0, 0.0):
        raw.geometry["beam_centre_px"] = (y - 0.5, x - 0.5)
    name = next((name for name in ("incident_wavelength", "wavelength") if _value(found, name)), None)
    if name is not None:
        length = length_mm(_value(found, name) or 0.0, unit_of(found[name]) or "A")
        if length:
            raw.geometry["wavelength_nm"] = length * 1e6


def _value(found: dict[str, Any], name: str) -> float | None:
    return _number(found[name]) if name in found else None


_LENGTHS = ("detector_distance", "distance", "SDD", "x_pixel_size", "y_pixel_size")
_ANGLES = ("grazing_angle", "incident_angle", "incidence_angle")
_NEXUS = (
    *_LENGTHS,
    "beam_center_x",
    "beam_center_y",
    "incident_wavelength",
    "wavelength",
    "count_time",
    "exposure_time",
    "saturation_value",
    "pixel_mask",
    *_ANGLES,
)
