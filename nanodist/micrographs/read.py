"""Which reader a file needs, told by its first bytes and not by its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hpc.errors import UserError
from nanodist.micrographs.micrograph import Micrograph
from nanodist.micrographs.raster import JPEG_MAGIC, PNG_MAGIC, read_jpeg, read_png
from nanodist.micrographs.tiff import TIFF_MAGIC, count_tiff, read_tiff

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
FORMATS = "PNG, JPEG and TIFF"


def count_micrographs(path: Path) -> int:
    """How many micrographs a file holds, without decoding pixels; :func:`read_micrograph` takes 0 to this less one.

    Raises:
        UserError: unreadable, or in no format that is read.
    """
    return count_tiff(path) if _format(path) == "TIFF" else 1


def read_micrograph(path: Path, page: int = 0) -> Micrograph:
    """Micrograph number ``page`` of a file.

    Raises:
        UserError: unreadable, in no format that is read, damaged, truncated, a colour picture, NaN or infinite pixels,
            zero size, a decompression bomb, or no such page.
    """
    kind = _format(path)
    if kind == "TIFF":
        return read_tiff(path, page)
    if page != 0:
        raise UserError(f"{path} has 1 micrograph, so there is no number {page}")
    return read_png(path) if kind == "PNG" else read_jpeg(path)


def read_micrographs(path: Path) -> Iterator[Micrograph]:
    """Every micrograph of a file, one at a time.

    Raises:
        UserError: see :func:`read_micrograph`.
    """
    for page in range(count_micrographs(path)):
        yield read_micrograph(path, page)


def _format(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if head.startswith(PNG_MAGIC):
        return "PNG"
    if head.startswith(JPEG_MAGIC):
        return "JPEG"
    if head.startswith(TIFF_MAGIC):
        return "TIFF"
    if not head:
        raise UserError(f"{path} is empty: copy or write it again, or leave it out")
    what = "is a text file" if _is_text(head) else "is no image"
    raise UserError(f"{path} {what}, whatever its name says; {FORMATS} files are read")


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        text = head[: error.start].decode() if error.start > len(head) - 4 else "\0"
    return all(c.isprintable() or c.isspace() for c in text)
