"""Microscopes' own formats, parsed by a process of their own that may die, hang or run out of memory."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from hpc.extras import needs
from nanodist.micrographs.micrograph import MAX_PIXELS, Micrograph, NotAMicrograph, checked_pixels
from nanodist.micrographs.pixel_size import from_units

# The formats, by kind: what they are called, and the modules that read them.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "DM": ("a Gatan DM file", ("rsciio",)),
    "SER": ("a TIA SER file", ("rsciio",)),
    "EMD": ("an EMD file", ("h5py", "rsciio")),
}
# A file is given up after so long, plus what a slow disk takes for its bytes.
SECONDS = 120.0
_BYTES_PER_SECOND = 5e6
_LONGEST_HEADER = 2**20


def count_isolated(path: Path, kind: str) -> int:
    """How many micrographs a file holds.

    Raises:
        UserError: damaged, truncated, a library that is not installed.
        NotAMicrograph: nothing in it is one.
    """
    return _pages(path, _ask(path, kind, None)[0])


def read_isolated(path: Path, kind: str, page: int) -> Micrograph:
    """Micrograph number ``page`` of a file, counted over its signals and their leading axes.

    Raises:
        UserError: damaged, truncated, no such page, too large, a library that is not installed.
        NotAMicrograph: nothing in it is one.
    """
    header, pixels = _ask(path, kind, page)
    pages = _pages(path, header)
    if pixels is None:
        raise UserError(f"{path} has {pages} micrographs, so there is no number {page}")
    y, x = ((float(scale), str(unit)) for scale, unit in (header["y"], header["x"]))
    size_nm, source = from_units(y, x, header["source"])
    metadata = {"format": kind, "page": page, "pages": pages, **header["facts"]}
    if header["others"]:
        metadata["left_out"] = header["others"]
    return Micrograph(checked_pixels(pixels, path), size_nm, source, metadata)


def _pages(path: Path, header: dict[str, Any]) -> int:
    pages = int(header["pages"])
    if pages == 0:
        what = header["others"][0] if header["others"] else "no image"
        raise NotAMicrograph(f"{path} holds {what}, no micrograph")
    return pages


def _ask(path: Path, kind: str, page: int | None) -> tuple[dict[str, Any], npt.NDArray[Any] | None]:
    """The answer of the reading process, as one error where there is none."""
    what, modules = KINDS[kind]
    needs(path, what, "io", *modules)
    limit = SECONDS + path.stat().st_size / _BYTES_PER_SECOND
    header, pixels = _reader.ask({"path": os.path.abspath(path), "kind": kind, "page": page}, limit)
    error = header.get("error")
    if error is None:
        return header, pixels
    text = str(header["text"]).replace(os.path.abspath(path), str(path))
    if error == "none":
        raise NotAMicrograph(text)
    if error == "user":
        raise UserError(text)
    if error == "memory":
        raise UserError(f"{path} asks for more memory than its length explains: it is damaged; copy or write it again")
    raise UserError(f"{path} is a damaged or truncated {what.split(' ', 1)[1]} ({text}): copy or write it again")


class _Reader:
    """The reading process of this process, started when it is needed and again when it died."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0
        self.lock = threading.Lock()

    def ask(self, request: dict[str, Any], limit_s: float) -> tuple[dict[str, Any], npt.NDArray[Any] | None]:
        """One request and its answer; an answer of the kind ``error`` where the process dies or takes too long."""
        with self.lock:
            process = self._running()
            late = threading.Event()

            def give_up() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(limit_s, give_up)
            timer.start()
            try:
                return _exchange(process, request)
            except (OSError, ValueError, EOFError):
                self.stop()
                text = f"nothing came of it in {limit_s:.0f} s" if late.is_set() else "its reader crashed on it"
                return {"error": "damaged", "text": text}, None
            except BaseException:
                self.stop()  # an answer half read would be taken for the next one's
                raise
            finally:
                timer.cancel()

    def _running(self) -> subprocess.Popen[bytes]:
        # After a fork, the pipes belong to the parent.
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            environment = {**os.environ, "NANODIST_CHILD_PATH": json.dumps(sys.path)}
            code = "import json, os, sys; sys.path[:] = json.loads(os.environ['NANODIST_CHILD_PATH']); " + (
                "from nanodist.micrographs.child import serve; serve()"
            )
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
            self.owner = os.getpid()
        return self.process

    def stop(self) -> None:
        """End the process, if it is this process's own."""
        process, self.process = self.process, None
        if process is None or self.owner != os.getpid():
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        process.wait()


def _exchange(
    process: subprocess.Popen[bytes], request: dict[str, Any]
) -> tuple[dict[str, Any], npt.NDArray[Any] | None]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    header = json.loads(process.stdout.readline(_LONGEST_HEADER))
    if "bytes" not in header:
        return header, None
    dtype, (height, width) = np.dtype(header["dtype"]), header["shape"]
    if dtype.kind not in "iuf" or not 0 < height * width <= MAX_PIXELS:
        raise ValueError("the reading process answered with something else")
    pixels = np.empty((height, width), dtype)
    view = memoryview(pixels.view(np.uint8).reshape(-1))  # type: ignore[arg-type]
    while view:
        read = process.stdout.readinto(view)  # type: ignore[attr-defined]
        if not read:
            raise EOFError("the reading process ended")
        view = view[read:]
    return header, pixels


_reader = _Reader()
atexit.register(_reader.stop)
