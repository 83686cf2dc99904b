"""hyperspy signals in and out, without importing hyperspy until one is to be made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hpc.errors import UserError
from nanodist.micrographs.micrograph import Micrograph, NotAMicrograph, checked_pixels
from nanodist.micrographs.pixel_size import from_units
from nanodist.micrographs.planes import Images, refusal

# What to_signal() writes and from_signal() finds again.
_INSTRUMENT = {"voltage_kv": "beam_energy", "magnification": "magnification", "instrument": "microscope"}


def from_signal(signal: Any, name: str = "the signal") -> Iterator[Micrograph]:
    """The images of a hyperspy signal; of a stack, one after the other (lazy ones are read so).

    Args:
        signal: a ``Signal2D``, of any number of navigation axes.
        name: what errors call it.

    Raises:
        NotAMicrograph: a spectrum, a diffraction pattern, complex values.
        UserError: NaN or infinite pixels, zero size.
    """
    manager = signal.axes_manager
    axes = sorted([*manager.navigation_axes, *manager.signal_axes], key=lambda axis: axis.index_in_array)
    units = tuple(axis.units if isinstance(axis.units, str) else "" for axis in axes)
    data = signal.data
    kind = str(signal.metadata.get_item("Signal.signal_type", ""))
    why = refusal(tuple(data.shape[-2:]), data.dtype, units, kind)
    if len(manager.signal_axes) != 2:
        why = why or f"a signal with {len(manager.signal_axes)} axes, such as a spectrum"
    if why is not None:
        raise NotAMicrograph(f"{name} is {why}, no micrograph")

    def read(index: tuple[int, ...]) -> Any:
        part = data[index]
        return np.asarray(part.compute() if hasattr(part, "compute") else part)

    y, x = ((float(axis.scale), unit) for axis, unit in zip(axes[-2:], units[-2:], strict=True))
    images = Images(tuple(data.shape), data.dtype, y, x, read, _facts(signal), "hyperspy axes")
    size_nm, source = from_units(y, x, images.source)
    for page in range(images.count):
        pixels = checked_pixels(images.plane(page), Path(name))
        yield Micrograph(
            pixels, size_nm, source, {"format": "hyperspy", "page": page, "pages": images.count, **images.facts}
        )


def to_signal(micrograph: Micrograph) -> Any:
    """A hyperspy ``Signal2D`` of a micrograph: pixels, axes in nm, and what is known of the microscope.

    Raises:
        UserError: hyperspy is not installed.
    """
    try:
        from hyperspy.signals import Signal2D
    except ImportError:
        raise UserError("hyperspy, to make a signal of a micrograph, is not installed: pip install hyperspy") from None

    size_nm = micrograph.pixel_size_nm
    axes = [
        {"name": name, "size": length, "scale": size_nm[i] if size_nm else 1.0, "units": "nm" if size_nm else ""}
        for i, (name, length) in enumerate(zip("yx", micrograph.pixels.shape, strict=True))
    ]
    signal = Signal2D(np.array(micrograph.pixels), axes=axes)
    for key, item in _INSTRUMENT.items():
        if key in micrograph.metadata:
            signal.metadata.set_item(f"Acquisition_instrument.TEM.{item}", micrograph.metadata[key])
    signal.metadata.set_item("nanodist.pixel_size_source", micrograph.pixel_size_source)
    return signal


def _facts(signal: Any) -> dict[str, Any]:
    found = {
        key: signal.metadata.get_item(f"Acquisition_instrument.TEM.{item}", None) for key, item in _INSTRUMENT.items()
    }
    return {key: value for key, value in found.items() if isinstance(value, (str, int, float))}
