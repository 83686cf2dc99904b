"""What a PairVAE saw in its training, by which it says that an input is unlike it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hpc import atomic
from hpc.checkpoint.files import CheckpointError, read_tensors
from hpc.errors import UserError
from nanodist.pairvae.baselines import distance
from nanodist.pairvae.data import PairData
from nanodist.pairvae.images import tiling
from nanodist.pairvae.load import Trained
from nanodist.scattering.pattern import Pattern

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
REFERENCE_FILE = "reference.safetensors"
# How much farther than the farthest training item from its neighbour an input may be.
_SLACK = 1.25


@dataclass(frozen=True)
class Known:
    """One modality of the training part.

    Attributes:
        latents: (n, d) means of the shared latent.
        errors: (n,) how far each reconstruction is from what was given.
    """

    latents: F64
    errors: F64

    def strangeness(self, latent: F64, error: float) -> tuple[float, float]:
        """Distance to the nearest training item over the farthest one of those, and the error over the largest one.

        Both are at most 1 for what was trained on; an input is out of distribution where one is above 1.25.
        """
        scale = self.latents.std(0) + 1e-6
        among = np.linalg.norm((self.latents[:, None] - self.latents[None]) / scale, axis=2)
        np.fill_diagonal(among, np.inf)
        farthest = float(among.min(1).max()) if len(among) > 1 else 1.0
        own = float(np.linalg.norm((self.latents - latent) / scale, axis=1).min())
        return own / max(farthest, 1e-9), error / max(float(self.errors.max()), 1e-9)


def is_strange(strangeness: tuple[float, float]) -> bool:
    """Whether an input is out of distribution."""
    return max(strangeness) > _SLACK


def pattern_error(trained: Trained, pattern: Pattern) -> float:
    """How far the reconstruction of a pattern is from it, over asinh(I / I0) and what was measured."""
    made = Pattern(trained.saxs_again(pattern), None, pattern.mask, pattern.grid, pattern.kind)
    return distance(pattern, made, trained.geometry.reference)


def image_error(trained: Trained, crops: list[F32]) -> float:
    """Mean absolute error of the reconstructions of crops."""
    return float(np.abs(trained.sem_again(crops) - np.stack(crops)).mean())


def write_reference(trained: Trained, data: PairData, path: Path) -> None:
    """Remember the training part of ``data`` beside the run."""
    from safetensors.numpy import save

    tensors: dict[str, F64] = {}
    for name, look in (("saxs", _patterns), ("sem", _crops)):
        latents, errors = zip(*look(trained, data), strict=True)
        tensors[f"{name}.latents"], tensors[f"{name}.errors"] = np.stack(latents), np.array(errors)
    atomic.write_bytes(path / REFERENCE_FILE, save(tensors))


def _patterns(trained: Trained, data: PairData) -> Iterator[tuple[F64, float]]:
    for number in data.train.tolist():
        pattern = data.pattern(number)
        if pattern is not None:
            yield trained.latent_of(pattern, None), pattern_error(trained, pattern)


def _crops(trained: Trained, data: PairData) -> Iterator[tuple[F64, float]]:
    for number in data.train.tolist():
        image = data.image(number)
        if image is not None:
            crops = tiling(image, trained.geometry.size_px, 4)
            yield trained.latent_of(None, crops), image_error(trained, crops)


def read_reference(run_dir: Path) -> Callable[[str], Known]:
    """``saxs`` or ``sem`` -> what was seen of it.

    Raises:
        UserError: the run did not get so far.
    """
    try:
        tensors = read_tensors(run_dir / REFERENCE_FILE)
    except (CheckpointError, OSError):
        raise UserError(f"{run_dir} has no {REFERENCE_FILE}: its training did not end; start it again") from None

    def known(name: str) -> Known:
        return Known(tensors[f"{name}.latents"].numpy(), tensors[f"{name}.errors"].numpy())

    return known
