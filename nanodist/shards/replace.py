"""What stands in for a sample that cannot be read, where a recipe says that training goes on without it.

The choice is a function of (seed, epoch, sample) and of the global batch, never of ranks or of when the damage was
seen, so that a run with a damaged store is still the same on any machines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from hpc.seeding import key, uniforms
from nanodist.decoding.reading import I64, read_rows
from nanodist.shards.windows import Tiles

_TRIES = 64


def read_numbers(store: Tiles, numbers: I64, out: npt.NDArray[Any]) -> list[tuple[int, str]]:
    """Read the samples ``numbers`` into ``out`` (n, H, W); gives (place, fault) of those that cannot be."""
    return read_rows(store.rows(numbers), store.suffixes, store.files, out, range(len(numbers)))


def stand_in(store: Tiles, seed: int, epoch: int, bad: int, taken: set[int], out: npt.NDArray[Any], fault: str) -> int:
    """Read another sample of the same store into ``out`` (H, W); gives its number.

    Candidates are drawn by (seed, epoch, sample, try); the first that is readable and not in the global batch is taken.

    Raises:
        UserError: none of 64 candidates can be read; names the sample that it began with.
    """
    low, high = store.range_of(bad)
    words = [key(seed, "stand-in", epoch, store.keys[bad], number) for number in range(_TRIES)]
    for draw in uniforms(words, 1)[:, 0].tolist():
        number = low + int(draw * (high - low))
        if number not in taken and not read_numbers(store, np.asarray([number]), out[None]):
            return number
    raise UserError(f"{store.error(bad, fault)}; nor could any of {_TRIES} others be read in its place")
