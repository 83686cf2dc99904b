"""The process in which foreign libraries parse microscopes' files, so that a crash, a hang or a hunger for memory of
theirs costs one file and no packing.

One JSON line in, ``{"path", "kind", "page"}``; one JSON line out, followed by ``bytes`` bytes of pixels. It ends when
its standard input does.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hpc.errors import UserError
from nanodist.micrographs.emi import companion
from nanodist.micrographs.micrograph import NotAMicrograph, check_size, collapse_channels
from nanodist.micrographs.planes import Images

# Parsing takes little, and pixels are read a plane at a time; compressed planes are larger than their file.
_MEMORY = 6 * 2**30
_PER_BYTE = 8


def serve() -> None:
    """Answer requests until there are no more."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What a library prints must not land among the answers.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    logging.disable(logging.CRITICAL)
    keep = _Kept()
    for line in requests:
        _answer(json.loads(line), keep, answers)
        answers.flush()


class _Kept:
    """The file that was read last: the pages of a stack are asked for one after the other."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.images: list[Images] = []
        self.others: list[str] = []

    def open(self, path: Path, kind: str) -> None:
        """Parse ``path`` unless that is done."""
        stat = path.stat()
        key = (path, kind, stat.st_size, stat.st_mtime_ns, companion(path))
        if key != self.key:
            self.key, self.images, self.others = (), [], []
            _limit_memory(stat.st_size)
            self.images, self.others = _parsed(path, kind)
            self.key = key


def _answer(request: dict[str, Any], keep: _Kept, out: BinaryIO) -> None:
    path, page = Path(request["path"]), request["page"]
    pixels = None
    try:
        keep.open(path, request["kind"])
        total = sum(images.count for images in keep.images)
        header: dict[str, Any] = {"pages": total, "others": keep.others[:8]}
        if page is not None and page < total:
            pixels, facts = _page(keep.images, page, path)
            header |= facts
    except NotAMicrograph as error:
        header = {"error": "none", "text": str(error)}
    except UserError as error:
        header = {"error": "user", "text": str(error)}
    except MemoryError:
        header = {"error": "memory", "text": ""}
    except Exception as error:  # the libraries raise nearly everything on damaged files
        text = " ".join(str(error).split())[:300]
        header = {"error": "damaged", "text": text if " " in text else f"{type(error).__name__} {text}".strip()}
    if pixels is not None:
        header |= {"dtype": pixels.dtype.str, "shape": pixels.shape, "bytes": pixels.nbytes}
    out.write(json.dumps(header).encode() + b"\n")
    if pixels is not None:
        out.write(memoryview(pixels.view(np.uint8).reshape(-1)))  # type: ignore[arg-type]


def _parsed(path: Path, kind: str) -> tuple[list[Images], list[str]]:
    from nanodist.micrographs import scope

    if kind == "DM":
        return scope.read_dm(path)
    if kind == "SER":
        return scope.read_ser(path)
    import h5py

    from nanodist.micrographs import hspy, velox

    file = h5py.File(path, "r")
    velox.check_links(file)
    if hspy.is_hspy(file):
        return hspy.read_hspy(file)
    if velox.is_velox(file):
        return velox.read_velox(file)  # its images read from the open file
    file.close()
    return scope.read_ncem(path)


def _page(images: list[Images], page: int, path: Path) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    left = page
    for found in images:
        if left < found.count:
            break
        left -= found.count
    check_size(found.shape[-2], found.shape[-1], path)
    pixels = found.plane(left)
    if pixels.dtype.names:
        colours = [name for name in "RGB" if name in pixels.dtype.names]
        pixels = collapse_channels(np.stack([pixels[name] for name in colours], axis=-1), path, alpha=False)
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    facts = {"y": list(found.y), "x": list(found.x), "source": found.source, "facts": found.facts}
    return np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("=")), facts


def _limit_memory(length: int) -> None:
    """A size that a damaged file claims must end in an error and not in the whole machine's memory."""
    with suppress(ImportError, ValueError, OSError):  # Windows has none
        import resource

        limit = _MEMORY + _PER_BYTE * length
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    sys.path[:] = json.loads(os.environ.get("NANODIST_CHILD_PATH", "null")) or sys.path
    serve()
