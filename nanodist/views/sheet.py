"""A picture of what the views of a store look like."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hpc import atomic
from hpc.errors import UserError
from hpc.seeding import permutation
from nanodist.pixels import to_unit
from nanodist.shards.windows import Tiles
from nanodist.views import ViewsConfig, make_view


def write_view_sheet(
    store: Tiles,
    config: ViewsConfig,
    seed: int,
    path: Path,
    samples: Sequence[int] | None = None,
    epoch: int = 0,
    count: int = 8,
) -> None:
    """Write a PNG with one column a sample: the tile, then its two views of ``epoch``, as training sees them.

    Args:
        store: where the tiles are.
        config: what a view may look like.
        seed: of the run.
        path: of the PNG; written atomically.
        samples: places in the store; a seeded choice of ``count`` where ``None``.
        epoch: of which the views are drawn.
        count: number of columns where ``samples`` is ``None``.
    """
    from PIL import Image

    chosen = list(samples) if samples is not None else permutation(len(store), seed, "sheet")[:count].tolist()
    columns = []
    for i in chosen:
        try:
            tile = store.read(i)
        except UserError:
            if samples is not None:
                raise
            # Whether a damaged tile ends a run is for its loader to say, which may put another in its place.
            continue
        known = store.pixel_size_nm[[i]]
        pixels = torch.tensor(tile[None])
        both = (make_view(pixels, config, seed, [epoch], [store.keys[i]], view, known) for view in (0, 1))
        cells = [_resized(to_unit(tile), config.size_px), *(view[0, 0].numpy() for view in both)]
        columns.append(np.concatenate([np.pad(cell, 2, constant_values=1.0) for cell in cells]))
    if not columns:
        return
    sheet = (np.concatenate(columns, axis=1) * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG")
    atomic.write_bytes(path, buffer.getvalue())


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    tensor = torch.from_numpy(image)[None, None]
    return torch.nn.functional.interpolate(tensor, (side, side), mode="bilinear", antialias=True)[0, 0].numpy()
