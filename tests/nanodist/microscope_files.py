"""Small files in microscopes' own formats for the tests of the readers, written from the formats' definitions."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np

_DM_TYPES = {"int16": (2, 1), "float32": (6, 2), "uint8": (8, 6), "uint16": (4, 10), "uint32": (5, 23)}
_SER_TYPES = {"uint8": 1, "uint16": 2, "uint32": 3, "int8": 4, "int16": 5, "int32": 6, "float32": 7, "float64": 8}


def write_dm3(
    path: Path, pixels: np.ndarray, scale: Sequence[float], units: Sequence[str], info: dict[str, Any]
) -> None:
    """A Gatan DM3 of one image or stack; ``scale`` and ``units`` in the order of the array's axes.

    As described at https://personal.ntu.edu.sg/cbb/info/dmformat (tags of big-endian headers, little-endian data).
    """
    _, data_type = _DM_TYPES[str(pixels.dtype)]
    order = range(pixels.ndim - 1, -1, -1)  # x first
    image = {
        "ImageData": {
            "Calibrations": {"Dimension": [{"Origin": 0.0, "Scale": scale[i], "Units": units[i]} for i in order]},
            "Data": pixels,
            "DataType": data_type,
            "Dimensions": [pixels.shape[i] for i in order],
            "PixelDepth": pixels.dtype.itemsize,
        },
        "ImageTags": {"Microscope Info": info},
        "Name": "test",
        "UniqueID": {"TagGroup0": 1},
    }
    root = {
        "DocumentObjectList": [{"AnnotationType": 20, "ImageSource": 0}],
        "ImageList": [image],
        "ImageSourceList": [{"ClassName": "ImageSource:Simple", "ImageRef": 0}],
    }
    body = _dm_group(root)
    path.write_bytes(struct.pack(">III", 3, len(body), 1) + body + bytes(8))


def _dm_group(values: dict[str, Any] | list[Any]) -> bytes:
    items = list(values.items()) if isinstance(values, dict) else [("", value) for value in values]
    return b"\1\0" + struct.pack(">I", len(items)) + b"".join(_dm_entry(name, value) for name, value in items)


def _dm_entry(name: str, value: Any) -> bytes:
    label = struct.pack(">H", len(name)) + name.encode("latin-1")
    if isinstance(value, (dict, list)):
        return b"\x14" + label + _dm_group(value)
    if isinstance(value, str):
        info, data = [20, 4, len(value)], value.encode("utf-16-le")
    elif isinstance(value, np.ndarray):
        info, data = (
            [20, _DM_TYPES[str(value.dtype)][0], value.size],
            value.astype(value.dtype.newbyteorder("<")).tobytes(),
        )
    elif isinstance(value, float):
        info, data = [6], struct.pack("<f", value)
    else:
        info, data = [5], struct.pack("<I", value)
    return b"\x15" + label + b"%%%%" + struct.pack(f">I{len(info)}I", len(info), *info) + data


def write_ser(path: Path, stack: np.ndarray, delta: float) -> None:
    """A TIA SER of (n, H, W) images with pixels of ``delta`` metres."""
    count, height, width = stack.shape
    description, unit = b"Number", b"" if count > 1 else b"meters"
    dimension = struct.pack("<IddII", count, 0.0, 1.0, 0, len(description)) + description
    dimension += struct.pack("<I", len(unit)) + unit
    header = struct.pack("<HHHIIII", 0x4949, 0x197, 0x210, 0x4122, 0x4152, count, count)
    offsets_at = len(header) + 8 + len(dimension)
    header += struct.pack("<II", offsets_at, 1) + dimension
    first = offsets_at + 8 * count
    element = 50 + height * width * stack.itemsize
    offsets = [first + i * (element + 8) for i in range(count)]
    body = b""
    for image in stack:
        kind = _SER_TYPES[str(image.dtype)]
        body += struct.pack("<ddiddihii", 0.0, delta, 0, 0.0, delta, 0, kind, width, height)
        body += image.tobytes() + struct.pack("<HHI", 0x4152, 0, 0)
    tags = [offset + element for offset in offsets]
    path.write_bytes(header + struct.pack(f"<{count}I", *offsets) + struct.pack(f"<{count}I", *tags) + body)


def write_emi(path: Path, objects: int, mode: str = "TEM uP SA Zoom Image", more: str = "") -> None:
    """The part of a TIA EMI that settings are read from, with an operator's name in it."""
    rows = {
        "Microscope": ("Microscope Tecnai F20", ""),
        "User": ("Jane Operator", ""),
        "High tension": ("200", "kV"),
        "Mode": (mode, ""),
        "Magnification": ("50000", "x"),
    }
    data = "".join(
        f"<Data><Label>{label}</Label><Value>{value}</Value><Unit>{unit}</Unit></Data>"
        for label, (value, unit) in rows.items()
    )
    text = f"<ObjectInfo><ExperimentalDescription><Root>{data}</Root></ExperimentalDescription>{more}</ObjectInfo>"
    path.write_bytes(b"JK\x00\x02" + bytes(20) + (b"\0" * 9).join([text.encode()] * objects) + bytes(4))


def write_velox(path: Path, images: Sequence[tuple[np.ndarray, float, str]], spectra: int = 0) -> None:
    """A Velox EMD of (H, W, frames) images with the pixel's side and its unit, and of spectra."""
    with h5py.File(path, "w") as file:
        for number, (pixels, side, unit) in enumerate(images):
            group = file.create_group(f"Data/Image/{number:032x}")
            group.create_dataset("Data", data=pixels, chunks=(*pixels.shape[:2], 1), compression="gzip")
            metadata = {
                "Instrument": {"InstrumentModel": "Talos"},
                "Optics": {"AccelerationVoltage": "200000"},
                "Acquisition": {"Operator": "Jane Operator"},
                "BinaryResult": {
                    "Detector": "HAADF",
                    "PixelSize": {"width": str(side), "height": str(side)},
                    "PixelUnitX": unit,
                    "PixelUnitY": unit,
                },
            }
            text = json.dumps(metadata).encode()
            group.create_dataset("Metadata", data=np.frombuffer(text, np.uint8).reshape(-1, 1))
        for number in range(spectra):
            file.create_dataset(f"Data/Spectrum/{number:032x}/Data", data=np.zeros((4096, 1), np.uint32))


def write_ncem(path: Path, stack: np.ndarray, side: float, unit: str) -> None:
    """An EMD as NCEM defines it, of (n, H, W) images."""
    with h5py.File(path, "w") as file:
        file.attrs["version_major"], file.attrs["version_minor"] = 0, 2
        group = file.create_group("data/stack")
        group.attrs["emd_group_type"] = 1
        group.create_dataset("data", data=stack)
        for axis, length in enumerate(stack.shape):
            values = np.arange(length) * (side if axis else 1.0)
            dimension = group.create_dataset(f"dim{axis + 1}", data=values)
            dimension.attrs["name"] = np.bytes_(("n", "y", "x")[axis])
            dimension.attrs["units"] = np.bytes_(unit if axis else "")


def write_mrc(path: Path, pixels: np.ndarray, side: float) -> None:
    """An MRC image, or a stack of (n, H, W), with pixels of ``side`` angstrom."""
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(pixels)
        mrc.voxel_size = side
