"""MRC images, stacks and volumes through mrcfile, memory-mapped: every section is a micrograph."""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from hpc.extras import needs
from nanodist.micrographs.micrograph import MAX_MAPPED_PIXELS, Micrograph, NotAMicrograph, check_size, checked_pixels
from nanodist.micrographs.pixel_size import Calibration, from_unit

if TYPE_CHECKING:
    from mrcfile.mrcfile import MrcFile

HEADER_BYTES = 1024
_BYTES_PER_PIXEL = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 6: 2, 12: 2}
_COMPLEX = (3, 4)
_IMOD_STAMP = 1146047817


def is_mrc(head: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes that begins with ``head`` (1024 bytes) is MRC.

    Older files lack the mark ``MAP``; those are told by a header that fits the file's length to the byte.
    """
    if len(head) < 216:
        return False
    return head[208:211] == b"MAP" or any(_exact_size(head, order) == size for order in "<>")


def _exact_size(head: bytes, order: str) -> int | None:
    columns, rows, sections, mode = struct.unpack(f"{order}4i", head[:16])
    (extended,) = struct.unpack(f"{order}i", head[92:96])
    if mode not in _BYTES_PER_PIXEL or min(columns, rows, sections) < 1 or extended < 0:
        return None
    return int(HEADER_BYTES + extended + columns * rows * sections * _BYTES_PER_PIXEL[mode])


def count_mrc(path: Path) -> int:
    """How many sections an MRC file holds.

    Raises:
        UserError: damaged, truncated, or mrcfile is not installed.
        NotAMicrograph: a Fourier transform.
    """
    with _opened(path) as mrc:
        return int(mrc.header.nz)


def read_mrc(path: Path, page: int = 0) -> Micrograph:
    """Section number ``page`` of an MRC file; its pixels stay in the file until they are asked for.

    Raises:
        UserError: damaged, truncated, no such section, NaN or infinite pixels, or mrcfile is not installed.
        NotAMicrograph: a Fourier transform, or a diffraction pattern.
    """
    with _opened(path) as mrc:
        total = int(mrc.header.nz)
        if page >= total:
            raise UserError(f"{path} has {total} micrographs, so there is no number {page}")
        fei = _fei(mrc, page)
        if fei is not None and fei["Instrument mode"] == 1 and fei["Projection mode"] == 1:  # TEM, diffraction
            raise NotAMicrograph(f"{path} is a diffraction pattern (FEI's extended header), no micrograph")
        pixels = checked_pixels(_section(mrc, path, page), path)
        size_nm, source = _pixel_size(mrc, page)
        metadata = {"format": "MRC", "page": page, "pages": total, **_facts(mrc, page)}
    return Micrograph(pixels, size_nm, source, metadata)


def _section(mrc: MrcFile, path: Path, page: int) -> npt.NDArray[Any]:
    """(H, W) mapped pixels; not through mrcfile, which takes its map away as it closes the file."""
    from mrcfile import utils

    header = mrc.header
    dtype = utils.dtype_from_mode(header.mode).newbyteorder(header.mode.dtype.byteorder)
    if header.mode == 0 and _imod_unsigned(header):
        dtype = np.dtype(np.uint8)
    shape = (int(header.ny), int(header.nx))
    start = HEADER_BYTES + int(header.nsymbt) + page * math.prod(shape) * dtype.itemsize
    return np.memmap(path, dtype, "r", start, shape)


def _imod_unsigned(header: Any) -> bool:
    """IMOD's own way to say that bytes are 0 to 255, in two spare words of the header."""
    words = np.frombuffer(header.extra2.tobytes(), header.nx.dtype)
    return bool(words[10] == _IMOD_STAMP and not words[11] & 1)


def _pixel_size(mrc: MrcFile, page: int) -> Calibration:
    """From FEI's extended header, or from the cell, which says how many angstrom ``mx`` samples are long."""
    fei = _fei(mrc, page)
    if fei is not None and fei["Pixel size X"] > 0 and fei["Pixel size Y"] > 0:
        return from_unit(float(fei["Pixel size Y"]), float(fei["Pixel size X"]), "m", "FEI extended header")
    header = mrc.header
    x, y = (float(cell) / n if n > 0 else 0.0 for cell, n in ((header.cella.x, header.mx), (header.cella.y, header.my)))
    if bytes(header.map)[:3] != b"MAP":
        return None, (
            f"unknown: the header lacks the mark 'MAP', so that its cell ({y:.4g} x {x:.4g} angstrom a pixel) is not"
            " to be believed"
        )
    if not (x > 0 and y > 0):
        return None, f"unknown: the MRC cell gives a pixel of {y:g} x {x:g} angstrom"
    if x == 1 == y:
        # What programs write that know nothing of the size: the cell is as long as there are pixels.
        return None, "unknown: the MRC cell gives the default of 1 angstrom a pixel"
    return from_unit(y, x, "angstrom", "MRC cell")


def _fei(mrc: MrcFile, page: int) -> Any:
    """What FEI's extended header says about a section, or ``None``."""
    if bytes(mrc.header.exttyp) not in (b"FEI1", b"FEI2"):
        return None
    try:
        sections = mrc.indexed_extended_header
        return sections[page] if sections is not None and page < len(sections) else None
    except (ValueError, IndexError, TypeError):
        return None


def _facts(mrc: MrcFile, page: int) -> dict[str, Any]:
    fei = _fei(mrc, page)
    if fei is None:
        return {}
    facts: dict[str, Any] = {}
    if fei["HT"] > 0:
        facts["voltage_kv"] = round(float(fei["HT"]) / 1e3, 6)
    if fei["Magnification"] > 0:
        facts["magnification"] = float(fei["Magnification"])
    instrument = bytes(fei["Microscope type"]).split(b"\0")[0].decode("ascii", "replace").strip()
    return {**facts, "instrument": instrument} if instrument else facts


@contextmanager
def _opened(path: Path) -> Iterator[MrcFile]:
    """The header alone, and one sentence for whatever a damaged one makes mrcfile raise."""
    needs(path, "an MRC file", "io", "mrcfile")
    import mrcfile

    try:
        _check_header(path)
        with warnings.catch_warnings():
            # It warns of each oddity that permissive reading lets pass, such as a missing mark.
            warnings.simplefilter("ignore")
            with mrcfile.open(path, permissive=True, header_only=True) as mrc:
                yield mrc
    except UserError:
        raise
    except Exception as error:  # mrcfile and numpy raise nearly everything on damaged files
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is a damaged or truncated MRC file ({text}): copy or write it again") from None


def _check_header(path: Path) -> None:
    """What mrcfile would lay over the file must lie within it."""
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
        size = file.seek(0, 2)
    if len(head) < HEADER_BYTES:
        raise ValueError(f"{len(head)} bytes, and the header alone has {HEADER_BYTES}")
    orders = [order for order in "<>" if struct.unpack(f"{order}i", head[12:16])[0] in _BYTES_PER_PIXEL]
    if not orders:
        raise ValueError("its mode is none that MRC knows")
    # Mode 0 reads alike in both orders.
    fitting = [order for order in orders if (_exact_size(head, order) or size + 1) <= size]
    order = (fitting or orders)[0]
    columns, rows, sections, mode = struct.unpack(f"{order}4i", head[:16])
    if mode in _COMPLEX:
        raise NotAMicrograph(f"{path} holds complex numbers, such as a Fourier transform, and no micrograph")
    check_size(rows, columns, path, MAX_MAPPED_PIXELS)
    expected = _exact_size(head, order)
    if expected is None or expected > size:
        raise ValueError(f"{rows} x {columns} x {sections} pixels need more than its {size} bytes")
