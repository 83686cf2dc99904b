"""What a microscope's maker writes into a TIFF: the pixel size, the instrument, and whether it is an image at all."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import tifffile

from nanodist.micrographs.micrograph import NotAMicrograph
from nanodist.micrographs.pixel_size import NM_PER_INCH, Calibration, from_unit, from_units, no_length

_LONGEST_XML = 16 * 2**20
# Gatan's DigitalMicrograph: units and scales, x first.
_GATAN_UNITS, _GATAN_SCALES = (65003, 65004), (65009, 65010)


@dataclass(frozen=True)
class Maker:
    """What a maker's own tags say: the calibration (``None``: nothing), its relative uncertainty, and plain facts."""

    calibration: Calibration | None = None
    uncertainty: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def read_maker(tif: tifffile.TiffFile, page: tifffile.TiffPage, series: int, path: Path) -> Maker:
    """What is in the maker's own tags, of the first maker that is recognised.

    Args:
        tif: the open file.
        page: the image's first page.
        series: number of the image among the file's series, which OME counts by.
        path: for errors.

    Raises:
        NotAMicrograph: the tags say that this is a diffraction pattern or a spectrum.
    """
    for reader in (_fei, _zeiss, _olympus, _tvips, _gatan, _jeol):
        found = reader(tif, page, path)
        if found is not None:
            return found
    return _ome(tif, series, path) or Maker()


def _fei(tif: tifffile.TiffFile, page: tifffile.TiffPage, path: Path) -> Maker | None:
    metadata = _metadata(tif, "fei_metadata")
    if not metadata:
        return None
    scan = metadata.get("Scan") or {}
    y, x = _number(scan.get("PixelHeight")), _number(scan.get("PixelWidth"))
    facts = _facts(
        instrument=(metadata.get("System") or {}).get("SystemType"),
        voltage_kv=_scaled((metadata.get("Beam") or {}).get("HV"), 1e-3),
        detector=(metadata.get("Detectors") or {}).get("Name"),
    )
    return Maker(from_unit(y, x, "m", "FEI tag") if y and x else None, None, facts)


def _zeiss(tif: tifffile.TiffFile, page: tifffile.TiffPage, path: Path) -> Maker | None:
    metadata = _metadata(tif, "sem_metadata")
    if not metadata:
        return None
    size: tuple[Any, ...] = metadata.get("ap_image_pixel_size") or metadata.get("ap_pixel_size") or ()
    calibration = None
    if len(size) == 3 and _number(size[1]):
        calibration = from_unit(float(size[1]), float(size[1]), str(size[2]), "Zeiss tag")
    voltage: tuple[Any, ...] = metadata.get("ap_actualkv") or ()
    facts = _facts(voltage_kv=_number(voltage[1]) if len(voltage) == 3 and voltage[2] == "kV" else None)
    return Maker(calibration, None, facts)


def _olympus(tif: tifffile.TiffFile, page: tifffile.TiffPage, path: Path) -> Maker | None:
    metadata = _metadata(tif, "sis_metadata")
    y, x = _number(metadata.get("pixelsizey")), _number(metadata.get("pixelsizex"))
    if not metadata or not (y and x):
        return None
    facts = _facts(magnification=_number(metadata.get("magnification")), detector=metadata.get("cameraname"))
    return Maker(from_unit(y, x, "m", "Olympus SIS tag"), None, facts)


def _tvips(tif: tifffile.TiffFile, page: tifffile.TiffPage, path: Path) -> Maker | None:
    metadata = _metadata(tif, "tvips_metadata")
    if not metadata:
        return None
    y, x = _number(metadata.get("PixelSizeY")), _number(metadata.get("PixelSizeX"))
    facts = _facts(
        instrument=metadata.get("TemName"),
        voltage_kv=_scaled(metadata.get("HighTension"), 1e-3),
        magnification=_number(metadata.get("Magnification")),
    )
    return Maker(from_unit(y, x, "nm", "TVIPS tag") if y and x else None, None, facts)


def _gatan(tif: tifffile.TiffFile, page: tifffile.TiffPage, path: Path) -> Maker | None:
    values = [_tag(page, name) for name in (*_GATAN_UNITS, *_GATAN_SCALES)]
    if any(value is None for value in values):
        return None
    x_unit, y_unit, x, y = values
    for unit in (y_unit, x_unit):
        why = no_length(str(unit))
        if why:
            raise NotAMicrograph(f"{path} is {why}, no micrograph (Gatan tags)")
    return Maker(from_units((float(y), str(y_unit)), (float(x), str(x_unit)), "Gatan tags"))


def _jeol(tif: tifffile.TiffFile, page: tifffile.TiffPage, path: Path) -> Maker | None:
    """JEOL's SightX: the resolution tag is that of the camera, and the magnification is in an XML description.

    The tag is rounded to whole pixels per inch, so that the size is only as good as that.
    """
    tree = _xml(page.description or "", "TemReporter")
    if tree is None:
        return None
    imaging = tree.find("ImageFormingSystem")
    mode = tree.findtext("ImageFormingSystem/ModeString") or ""
    if mode == "DIFF":
        length = tree.findtext("ImageFormingSystem/SelectorString") or "unknown"
        raise NotAMicrograph(
            f"{path} is a diffraction pattern (JEOL: mode DIFF, camera length {length}), no micrograph"
        )
    if tree.findtext("Eos/EosMode") == "eosASID" and tree.find(".//JemBaumerCamera") is not None:
        raise NotAMicrograph(
            f"{path} is a camera's picture of a scanning beam (JEOL: mode ASID), that is a Ronchigram or a diffraction "
            "pattern, no micrograph"
        )
    voltage = _scaled(tree.findtext("ElectronGun/AccelerationVoltage"), 1e-3)
    magnification = _number(imaging.findtext("SelectorValue")) if imaging is not None else None
    facts = _facts(instrument=tree.findtext("Instruments"), voltage_kv=voltage, magnification=magnification, mode=mode)
    dpi = [_tag(page, name) or (0, 1) for name in ("YResolution", "XResolution")]
    if magnification is None or mode != "MAG" or _tag(page, "ResolutionUnit") != 2 or not (dpi[0][0] and dpi[1][0]):
        return Maker(None, None, facts)
    y, x = (NM_PER_INCH * bottom / top for top, bottom in dpi)
    source = f"JEOL camera pixel / magnification of {magnification:g}"
    rounded = dpi[1][1] == 1
    return Maker(
        from_unit(y / magnification, x / magnification, "nm", source),
        # Half a step is where a rounded value may lie; its standard deviation is that over the root of 3.
        0.5 / dpi[1][0] / math.sqrt(3) if rounded else None,
        facts,
    )


def _ome(tif: tifffile.TiffFile, series: int, path: Path) -> Maker | None:
    tree = _xml(tif.ome_metadata or "", "OME") if tif.is_ome else None
    if tree is None:
        return None
    pixels = tree.findall("./{*}Image/{*}Pixels")
    if not pixels:
        return None
    found = pixels[series if series < len(pixels) else 0].attrib
    y, x = _number(found.get("PhysicalSizeY")), _number(found.get("PhysicalSizeX"))
    if not (y and x):
        return None
    units = [found.get(f"PhysicalSize{axis}Unit", "µm") for axis in "YX"]
    for unit in units:
        why = no_length(unit)
        if why:
            raise NotAMicrograph(f"{path} is {why}, no micrograph (OME)")
    return Maker(from_units((y, units[0]), (x, units[1]), "OME"))


def _xml(text: str, root: str) -> ElementTree.Element | None:
    """The tree of a description that is XML with the element ``root`` at its top."""
    plain = text.strip(" \r\n\t\0\x01")
    # No document type: it is how XML makes much of little.
    if not plain.startswith("<") or f"<{root}" not in plain[:2000] or len(plain) > _LONGEST_XML or "<!DOCTYPE" in plain:
        return None
    with suppress(ElementTree.ParseError, ValueError):
        tree = ElementTree.fromstring(plain.encode() if "encoding" in plain[:100] else plain)
        if re.sub(r"^\{.*\}", "", tree.tag) == root:
            return tree
    return None


def _tag(page: tifffile.TiffPage, name: int | str) -> Any:
    tag = page.tags.get(name)
    return None if tag is None else tag.value


def _metadata(tif: tifffile.TiffFile, name: str) -> dict[str, Any]:
    found = getattr(tif, name, None)
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> float | None:
    with suppress(TypeError, ValueError):
        number = float(value)
        return number if 0 < number < 1e12 else None
    return None


def _scaled(value: Any, factor: float) -> float | None:
    number = _number(value)
    return None if number is None else round(number * factor, 6)


def _facts(**values: Any) -> dict[str, Any]:
    """Without what is unknown; text cleaned of what makers fill fixed fields with."""
    cleaned = {k: v.strip(" \0") if isinstance(v, str) else v for k, v in values.items()}
    return {name: value for name, value in cleaned.items() if isinstance(value, (str, float)) and value}
