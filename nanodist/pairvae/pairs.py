"""Pairs of a scattering pattern and micrographs, as ``nanodist pack --pairs`` wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nanodist.scattering.pattern import Pattern, QGrid


class PairStore:
    """Items of a pair store by number; safe to share between threads, cheap to send to another process.

    Attributes:
        path: folder of the store.
        keys: one of each item.
        samples: the specimen of each item; a split never parts one.
        grid: the q grid of all patterns.
        reference: I0 of asinh(I / I0), in the unit of the patterns, from all patterns of the store.
        manifest_hash: hex hash of the manifest's content, the identity of the data.
    """

    path: Path
    keys: tuple[str, ...]
    samples: tuple[str, ...]
    grid: QGrid
    reference: float
    manifest_hash: str

    @classmethod
    def open(cls, path: Path) -> PairStore:
        """Open the pair store in the folder ``path``.

        Raises:
            UserError: there is none, it is a store of micrographs, or it is damaged.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.keys)

    def pattern(self, i: int) -> Pattern | None:
        """The pattern of item ``i``, checked against its hash; ``None`` where the item has none."""
        raise NotImplementedError

    def micrograph(self, i: int) -> tuple[npt.NDArray[np.uint8], tuple[float, float]] | None:
        """(pixels (H, W), pixel size (y, x) in nm) of item ``i``, checked; ``None`` where the item has none."""
        raise NotImplementedError

    def truth(self, i: int) -> dict[str, Any]:
        """What is known of item ``i`` from its synthesis, {} for real data.

        ``morphology``, ``period_nm`` (2 pi / q*), ``centre_distance_nm`` (dots), ``orientation_deg`` (of the first
        peak; modulo 180, of dots modulo 60; None: not oriented), ``order_parameter``, ``area_fraction``.
        """
        raise NotImplementedError
