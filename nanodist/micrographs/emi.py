"""EMI: the microscope's settings for the SER files beside it, which hold the pixels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

EMI_MAGIC = b"JK\x00\x02"
_LONGEST = 64 * 2**20
_NUMBERED = re.compile(r"(?P<name>.+)_(?P<number>[0-9]+)\.ser$", re.IGNORECASE)


def series_of(emi: Path) -> list[str]:
    """The names of the SER files that belong to an EMI file and lie beside it."""
    found = []
    for path in sorted(emi.parent.iterdir()):
        match = _NUMBERED.fullmatch(path.name)
        if match and match["name"] == emi.stem:
            found.append(path.name)
    return found


def emi_of(ser: Path) -> Path | None:
    """The EMI file beside a SER file, if it is there."""
    match = _NUMBERED.fullmatch(ser.name)
    emi = ser.with_name(f"{match['name']}.emi") if match else None
    return emi if emi is not None and emi.is_file() else None


def companion(path: Path) -> tuple[int, int] | None:
    """Length and time of change of the file beside ``path`` that :func:`read_settings` reads, if there is one."""
    emi = emi_of(path)
    stat = emi.stat() if emi else None
    return (stat.st_size, stat.st_mtime_ns) if stat else None


def read_settings(ser: Path) -> dict[str, Any]:
    """What the EMI file says of a SER file's image; nothing where there is none that can be read.

    Returns:
        some of ``instrument``, ``voltage_kv``, ``magnification``, ``mode``, ``diffraction``. Never the operator.
    """
    emi, match = emi_of(ser), _NUMBERED.fullmatch(ser.name)
    if emi is None or match is None or emi.stat().st_size > _LONGEST:
        return {}
    objects = re.findall(rb"<ObjectInfo>.*?</ObjectInfo>", emi.read_bytes(), re.DOTALL)
    number = int(match["number"])
    if not 1 <= number <= len(objects):
        return {}
    try:
        tree = ElementTree.fromstring(objects[number - 1].decode("utf-8"))
    except (ElementTree.ParseError, UnicodeDecodeError):
        return {}
    return _facts(tree)


def _facts(tree: ElementTree.Element) -> dict[str, Any]:
    values = {
        (data.findtext("Label") or "").strip(): ((data.findtext("Value") or "").strip(), data.findtext("Unit") or "")
        for data in tree.iter("Data")
    }
    facts: dict[str, Any] = {}
    if values.get("Microscope", ("", ""))[0]:
        facts["instrument"] = values["Microscope"][0].removeprefix("Microscope ")
    for label, key, unit in (("High tension", "voltage_kv", "kV"), ("Magnification", "magnification", "x")):
        text, found = values.get(label, ("", ""))
        if found.strip() == unit and re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
            facts[key] = float(text)
    mode = values.get("Mode", ("", ""))[0]
    if mode:
        facts["mode"] = mode
        camera = tree.find("AcquireInfo/CameraNamePath") is not None
        # As RosettaSciIO has it: a camera sees the diffraction pattern of a scanning beam.
        facts["diffraction"] = camera if "STEM" in mode else "Diffraction" in mode
    return facts
