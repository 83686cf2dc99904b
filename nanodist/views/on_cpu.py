"""Apply drawn parameters tile by tile: what is in work stays in the processor's cache, and nothing else is kept.

What is computed is what :mod:`nanodist.views.on_device` computes in batch through kornia; the tests hold the two
together. As each view is made by itself, no other sample of the batch can change a bit of it, nor can the threads that
share the batch.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpc.errors import UserError
from nanodist.views.config import ViewsConfig
from nanodist.views.parameters import ViewParameters

Records = npt.NDArray[np.void]
# Pixels of views that are worth a thread: about a millisecond.
_PIXELS_A_THREAD = 2**18
_SLOW_S = 3.0


def apply(tiles: Tensor, parameters: ViewParameters, config: ViewsConfig, out: Tensor) -> Tensor:
    """Views (n, 1, size_px, size_px) float32 in [0, 1] of ``tiles`` (n, H, W) uint8 or uint16, written to ``out``.

    Raises:
        UserError: numba is not installed.
    """
    make, size = compiled(), config.size_px
    height, width = tiles.shape[-2:]
    records = _records(parameters, size, height, width)
    rows, columns = records["bottom"] - records["top"], records["right"] - records["left"]
    options = (
        int((rows * columns).max(initial=1)),
        int((columns * records["halved"]).max(initial=1)),
        config.blur_reach(),
        config.exposure == "image",
        config.noise_stage == "linear",
        float(config.noise_signal_share),
    )
    views = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    pixels, made = tiles.contiguous().numpy(), views[:, 0].numpy()

    def run(part: slice) -> None:
        make(*_by_depth(pixels[part]), records[part], *options, made[part])

    count = len(tiles)
    threads = max(1, min(torch.get_num_threads(), count * size**2 // _PIXELS_A_THREAD))
    if threads == 1:
        run(slice(0, count))
    else:
        # Four parts a thread, as some views take twice as long as others. A pool that is kept would not survive a fork.
        bounds = np.linspace(0, count, min(4 * threads, count) + 1).astype(int).tolist()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, map(slice, bounds, bounds[1:])))
    return out if views is out else out.copy_(views)


def _by_depth(tiles: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
    """The tiles as what they are, and none of the other depth: both in one compiled function."""
    if tiles.dtype == np.uint8:
        return tiles, np.empty((0, 0, 0), np.uint16)
    if tiles.dtype == np.uint16:
        return np.empty((0, 0, 0), np.uint8), tiles
    raise ValueError(f"tiles must be uint8 or uint16, not {tiles.dtype}")


def _records(parameters: ViewParameters, size: int, height: int, width: int) -> Records:
    """The parameters and where each crop lies, as the compiled function takes them (n,)."""
    from nanodist.views.cpu_kernels import RECORD

    records = np.zeros(len(parameters.level), RECORD)
    halved = 2**parameters.level
    # From centres of the view's pixels to those of the halved tile's.
    matrix = parameters.matrix / halved[:, None, None]
    matrix[..., 2] += (0.5 / halved - 0.5)[:, None]
    first, stop, inside = _windows(matrix, size, np.array([width, height]) // halved[:, None])
    matrix[..., 2] -= first
    records["matrix"], records["halved"], records["inside"] = matrix, halved, inside
    records["left"], records["top"] = first.T
    records["right"], records["bottom"] = stop.T
    for name in set(RECORD.names or ()) & set(vars(parameters)) - {"matrix"}:
        records[name] = getattr(parameters, name)
    return records


def _windows(
    matrix: npt.NDArray[np.float64], size: int, extent: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """First pixel and end (n, 2) in x and y of what the crops reach within ``extent``, and (n,) whether that is all.

    Where a crop reaches over an edge, what is mirrored there lies inside its window, since the crop's middle does.
    """
    reach = (size - 1) * matrix[..., :2]
    low = matrix[..., 2] + np.minimum(reach, 0).sum(-1)
    high = matrix[..., 2] + np.maximum(reach, 0).sum(-1)
    first = np.clip(np.floor(low).astype(np.int64), 0, extent - 2)
    stop = np.maximum(np.minimum(extent, np.ceil(high).astype(np.int64) + 2), first + 2)
    return first, stop, ((low >= 0) & (high <= extent - 1)).all(1)


@lru_cache(maxsize=1)
def compiled() -> Callable[..., None]:
    """The function :func:`nanodist.views.cpu_kernels.make`, compiled for this processor or found in numba's cache.

    The cache is ``__pycache__`` beside the source, or the user's folder for caches where that cannot be written, or the
    folder that ``NUMBA_CACHE_DIR`` names. It is read and written once a process, when the first view is made.

    Raises:
        UserError: numba is not installed.
    """
    try:
        from llvmlite import binding
        from numba import njit
    except ImportError as error:
        raise UserError(f"views on the CPU need numba ({error}): pip install 'nanodist[train]'") from None
    logging.getLogger("numba").setLevel(logging.WARNING)
    from nanodist.views.cpu_kernels import RECORD, make

    # numba keeps what it compiles for several types of processors in one index, in which nodes of two types that start
    # at once on a shared file system can take each other's code for their own. So each type has files of its own.
    processor = f"{binding.get_host_cpu_name()} {binding.get_host_cpu_features().flatten()}"
    make.__qualname__ = f"make_{hashlib.sha256(processor.encode()).hexdigest()[:12]}"
    nothing = (*_by_depth(np.empty((0, 0, 0), np.uint8)), np.empty(0, RECORD), 1, 1, 1, False, False, 0.0)
    with _said_if_slow():
        try:
            function: Callable[..., None] = njit(nogil=True, error_model="numpy", cache=True)(make)
            function(*nothing, np.empty((0, 8, 8), np.float32))
        except Exception:  # no folder that can be written, a full disk, a damaged file: views need no cache
            function = njit(nogil=True, error_model="numpy")(make)
            function(*nothing, np.empty((0, 8, 8), np.float32))
    return function


@contextmanager
def _said_if_slow() -> Iterator[None]:
    """A line on rank 0 if what is done takes seconds."""

    def say() -> None:
        print("compiling what makes views, once for this type of processor", file=sys.stderr, flush=True)

    timer = threading.Timer(_SLOW_S, say)
    timer.daemon = True
    if os.environ.get("RANK", "0") == "0":  # set by every launcher of several ranks, or by Topology.export
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
