"""From the calibrations that files carry to nanometres, and when they are not to be believed."""

from __future__ import annotations

import math
import re

NM_PER_UNIT = {
    "pm": 1e-3,
    "å": 0.1,
    "\u212b": 0.1,
    "angstrom": 0.1,
    "angstroms": 0.1,
    "ångström": 0.1,
    "a": 0.1,
    "nm": 1.0,
    "nanometer": 1.0,
    "nanometers": 1.0,
    "µm": 1e3,
    "μm": 1e3,
    "um": 1e3,
    "\\u00b5m": 1e3,
    "micron": 1e3,
    "microns": 1e3,
    "micrometer": 1e3,
    "micrometers": 1e3,
    "mm": 1e6,
    "cm": 1e7,
    "inch": 2.54e7,
    "m": 1e9,
    "meter": 1e9,
    "meters": 1e9,
}
NM_PER_INCH = 2.54e7

# Resolution tags also hold what printers and displays default to (72, 96, 300, 1200 dpi: 353 to 21 um a pixel). No
# electron micrograph has pixels of 10 um, so that anything coarser is such a default.
COARSEST_NM = 1e4
FINEST_NM = 1e-4

_RECIPROCAL = re.compile(r"^1\s*/|^/|(\^\s*-\s*1|⁻¹|\*\*\s*-\s*1|(?<=[a-zåµμ])-1)$")
_ANGLES = {"rad", "mrad", "urad", "µrad", "μrad", "deg", "°", "degree", "degrees"}
_ENERGIES = {"ev", "kev", "mev"}

Calibration = tuple[tuple[float, float] | None, str]
UNKNOWN: Calibration = (None, "unknown: the file states none")


def no_length(unit: str) -> str | None:
    """What an axis in ``unit`` makes of a file where it is no image of an object: a sentence's end, else ``None``."""
    plain = unit.strip().lower()
    if plain in _ENERGIES:
        return f"a spectrum (an axis in {unit.strip()})"
    if _RECIPROCAL.search(plain) or plain in _ANGLES:
        return f"a diffraction pattern or another image in reciprocal space (pixels in {unit.strip()})"
    return None


def from_unit(y: float, x: float, unit: str, source: str) -> Calibration:
    """A pixel of ``y`` by ``x`` of ``unit``, as ((y, x) in nm or ``None``, where it comes from or why not)."""
    factor = NM_PER_UNIT.get(unit.strip().lower())
    if factor is None and unit.strip().lower() in ("", "none", "[]", "px", "pixel", "pixels"):
        return UNKNOWN
    if factor is None:
        return None, f"unknown: the unit '{unit}' is no length"
    return _believed(y * factor, x * factor, f"{source} ({unit.strip()})")


def from_units(y: tuple[float, str], x: tuple[float, str], source: str) -> Calibration:
    """As :func:`from_unit`, for a file whose axes have units of their own."""
    if y[1].strip() == x[1].strip():
        return from_unit(y[0], x[0], x[1], source)
    factors = [NM_PER_UNIT.get(unit.strip().lower()) for _, unit in (y, x)]
    if factors[0] is None or factors[1] is None:
        return None, f"unknown: of the units '{y[1]}' (y) and '{x[1]}' (x), one is no length"
    return _believed(y[0] * factors[0], x[0] * factors[1], f"{source} (y {y[1].strip()}, x {x[1].strip()})")


def from_dpi(y_dpi: float, x_dpi: float, source: str) -> Calibration:
    """A resolution in pixels per inch, as ((y, x) in nm or ``None``, where it comes from or why not)."""
    if not (y_dpi > 0 and x_dpi > 0 and math.isfinite(y_dpi) and math.isfinite(x_dpi)):
        return None, f"unknown: the {source} is {x_dpi:g} x {y_dpi:g}"
    y, x = NM_PER_INCH / y_dpi, NM_PER_INCH / x_dpi
    if max(x, y) > COARSEST_NM:
        return None, f"unknown: the {source} of {x_dpi:.4g} dpi is a display's or printer's default"
    return _believed(y, x, source)


def _believed(y: float, x: float, source: str) -> Calibration:
    if not (math.isfinite(y) and math.isfinite(x) and min(y, x) > 0):
        return None, f"unknown: the {source} gives a pixel of {y:g} x {x:g} nm"
    if min(y, x) < FINEST_NM or max(y, x) > 1e3 * COARSEST_NM:
        return None, f"unknown: the {source} gives an impossible pixel of {y:g} x {x:g} nm"
    return (float(y), float(x)), source
