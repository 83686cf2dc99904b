"""Which reader a file needs, told by its first bytes and not by its name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import xxhash

from hpc.errors import UserError
from nanodist.micrographs.emi import EMI_MAGIC, series_of
from nanodist.micrographs.isolated import KINDS, count_isolated, read_isolated
from nanodist.micrographs.micrograph import Micrograph, NotAMicrograph
from nanodist.micrographs.mrc import HEADER_BYTES, count_mrc, is_mrc, read_mrc
from nanodist.micrographs.raster import JPEG_MAGIC, PNG_MAGIC, read_jpeg, read_png
from nanodist.micrographs.tiff import GZIP_MAGIC, TIFF_MAGIC, count_tiff, read_tiff

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".tif.gz", ".tiff.gz",
    ".dm3", ".dm4", ".mrc", ".mrcs", ".st", ".ali", ".rec", ".emd", ".ser", ".emi", ".hspy",
)  # fmt: skip
FORMATS = "PNG, JPEG, TIFF, Gatan DM3 and DM4, MRC, EMD (Velox and NCEM), SER and hyperspy"

_MAGIC = {
    "PNG": (PNG_MAGIC,),
    "JPEG": (JPEG_MAGIC,),
    "TIFF": (*TIFF_MAGIC, GZIP_MAGIC),
    "SER": (b"II\x97\x01",),
    "EMI": (EMI_MAGIC,),
    "EMD": (b"\x89HDF\r\n\x1a\n",),
}
_HASH_BYTES = 2**22


def is_named_like_one(path: Path) -> bool:
    """Whether the ending of a file's name is that of a micrograph."""
    return path.name.lower().endswith(SUFFIXES)


def count_micrographs(path: Path) -> int:
    """How many micrographs a file holds, without decoding pixels; :func:`read_micrograph` takes 0 to this less one.

    Raises:
        UserError: unreadable, or in no format that is read.
        NotAMicrograph: readable, and no image of an object.
    """
    kind = _format(path)
    if kind in KINDS:
        return count_isolated(path, kind)
    if kind == "MRC":
        return count_mrc(path)
    return count_tiff(path) if kind == "TIFF" else 1


def read_micrograph(path: str | Path, page: int = 0) -> Micrograph:
    """Micrograph number ``page`` of a file.

    Its metadata has ``file_xxh3``, the hash (128 bits) of the file's bytes.

    Raises:
        UserError: unreadable, in no format that is read, damaged, truncated, a colour picture, NaN or infinite pixels,
            zero size, a decompression bomb, or no such page.
        NotAMicrograph: readable, and no image of an object: a spectrum, a diffraction pattern.
    """
    path = Path(path)
    kind = _format(path)
    if page < 0 or (page > 0 and kind in ("PNG", "JPEG")):
        raise UserError(f"{path} has {count_micrographs(path)} micrographs, so there is no number {page}")
    micrograph = _read(path, kind, page)
    stat = path.stat()
    return replace(
        micrograph, metadata={**micrograph.metadata, "file_xxh3": _hash(path, stat.st_size, stat.st_mtime_ns)}
    )


def read_micrographs(path: Path) -> Iterator[Micrograph]:
    """Every micrograph of a file, one at a time.

    Raises:
        UserError: see :func:`read_micrograph`.
    """
    for page in range(count_micrographs(path)):
        yield read_micrograph(path, page)


def _read(path: Path, kind: str, page: int) -> Micrograph:
    if kind in KINDS:
        return read_isolated(path, kind, page)
    if kind == "MRC":
        return read_mrc(path, page)
    if kind == "TIFF":
        return read_tiff(path, page)
    return read_png(path) if kind == "PNG" else read_jpeg(path)


@lru_cache(maxsize=8)
def _hash(path: Path, size: int, changed: int) -> str:
    """Of the whole file, once for all pages of a stack; ``size`` and ``changed`` tell one file from its successor."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while part := file.read(_HASH_BYTES):
            state.update(part)
    return state.hexdigest()


def _format(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
            size = file.seek(0, 2)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    kind = next((kind for kind, starts in _MAGIC.items() if head.startswith(starts)), None)
    if kind == "EMI":
        raise NotAMicrograph(_settings_only(path))
    if kind:
        return kind
    # Their beginnings are short, so that more of the header has to fit.
    if head[:4] in (b"\0\0\0\3", b"\0\0\0\4") and head[11 + 4 * (head[3] - 3) :][:1] in (b"\0", b"\1"):
        return "DM"
    if is_mrc(head, size):
        return "MRC"
    raise UserError(_unknown(path, head, size))


def _settings_only(path: Path) -> str:
    series = series_of(path)
    where = f"which lie beside it ({', '.join(series[:3])}{', ...' if len(series) > 3 else ''}) and are read with them"
    return (
        f"{path} holds the microscope's settings and no pixels; those are in its SER files, "
        f"{where if series else 'none of which lies beside it'}"
    )


def _unknown(path: Path, head: bytes, size: int) -> str:
    if not head:
        return f"{path} is empty: copy or write it again, or leave it out"
    kind = path.suffix[1:].upper()
    if kind in ("DM3", "DM4", "MRC", "MRCS", "ST", "ALI", "REC", "EMD", "SER", "HSPY"):
        return f"{path} is damaged or truncated, or no {kind} file at all ({size} bytes): copy or write it again"
    what = "is a text file" if _is_text(head[:64]) else "is no image"
    return f"{path} {what}, whatever its name says; {FORMATS} files are read"


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        text = head[: error.start].decode() if error.start > len(head) - 4 else "\0"
    return all(c.isprintable() or c.isspace() for c in text)
