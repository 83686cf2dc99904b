"""What the training samples of a classifier looked like, so that it can say where an image is like none of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from hpc import atomic
from hpc.errors import UserError
from nanodist.downstream.neighbours import unit_rows

F64 = npt.NDArray[np.float64]
FILE = "reference.safetensors"
NEIGHBOURS, USUAL = 3, 0.95


@dataclass(frozen=True)
class Reference:
    """Features (n, d) of the training samples, of length 1, and the distance that is usual among them."""

    rows: F64
    usual: float

    def unlikeness(self, features: npt.NDArray[np.floating]) -> F64:
        """(m,) how unlike the training samples each of ``features`` (m, d) is; above 1 is unlike anything there.

        The mean cosine distance to the three nearest training samples, over that which 95 % of these stay below to
        their own nearest others (deep nearest neighbours; Sun et al., ICML 2022).
        """
        if features.shape[1] != self.rows.shape[1]:
            raise UserError(
                f"{FILE} of the run holds {self.rows.shape[1]} features an image, and its model gives "
                f"{features.shape[1]}: start the fine-tuning again to write it"
            )
        return np.asarray(_distances(1.0 - unit_rows(features) @ self.rows.T) / self.usual)


def _distances(table: F64) -> F64:
    nearest = np.sort(table, axis=1)[:, : min(NEIGHBOURS, table.shape[1])]
    return np.asarray(np.clip(nearest.mean(1), 0.0, None))


def write_reference(folder: Path, features: F64) -> None:
    """Keep the features (n, d) of the training samples in a run directory; of one alone nothing is usual."""
    if len(features) < 2:
        (folder / FILE).unlink(missing_ok=True)
        return
    rows = unit_rows(features)
    among = 1.0 - rows @ rows.T
    # A sample is no neighbour of its own.
    others = among[~np.eye(len(rows), dtype=bool)].reshape(len(rows), -1)
    usual = float(np.quantile(_distances(others), USUAL))
    content = save({"rows": rows.astype(np.float32), "usual": np.asarray([max(usual, 1e-6)], np.float64)})
    atomic.write_bytes(folder / FILE, content)


def read_reference(folder: Path) -> Reference | None:
    """The reference of a run directory; ``None`` where it has none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = load_file(path)
        rows, usual = found["rows"].astype(np.float64), float(found["usual"][0])
        if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all() or not 0 < usual < np.inf:
            raise ValueError("rows or their usual distance are impossible")
        return Reference(rows, usual)
    except (OSError, SafetensorError, KeyError, IndexError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): start the fine-tuning again to write it") from None
