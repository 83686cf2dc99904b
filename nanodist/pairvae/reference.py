"""What a PairVAE saw in its training, by which it says that an input is unlike it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hpc import atomic
from hpc.checkpoint.files import CheckpointError, read_tensors
from hpc.errors import UserError
from nanodist.pairvae.baselines import distance
from nanodist.pairvae.data import PairData
from nanodist.pairvae.images import tiling
from nanodist.pairvae.load import LEVELS, REFERENCE_FILE, Trained
from nanodist.pairvae.signature import FLOORS, WIDTHS, Signature, image_signature, pattern_signature
from nanodist.scattering.pattern import Pattern

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
MODALITIES: tuple[Literal["saxs", "sem"], ...] = ("saxs", "sem")
# Of the training items, that share is to be within the limits, each of them held against the others.
_USUAL = 0.95
# How much more wrong a reconstruction may be than the worst one of what was trained on.
_SLACK = 1.25
# Distances are kept of at most so many items, spread evenly over the training part.
_MOST = 2000
_CROPS = 4
_QUANTILES = 65


class Look(NamedTuple):
    """One input: its signature with the latent's mean, and the error of its reconstruction."""

    signature: Signature
    error: float


@dataclass(frozen=True)
class Known:
    """One modality of the training part.

    Attributes:
        rows: (n, d) of each part of the signature, and of the latent.
        limits: of the distance to the nearest row, for each part, and of the error (``reconstruction``).
        whole: whether signatures are known; runs of before have latents and errors alone.
    """

    rows: Mapping[str, F64]
    limits: Mapping[str, float]
    whole: bool = True

    def strangeness(self, look: Look) -> dict[str, float]:
        """Each distance, and the error of the reconstruction, over its limit; above 1 is unlike the training part."""
        found = {
            name: float(distances(look.signature[name][None], rows, FLOORS[name]).min()) / self.limits[name]
            for name, rows in self.rows.items()
        }
        return {**found, "reconstruction": look.error / self.limits["reconstruction"]}

    def look(self, trained: Trained, pattern: Pattern | None, crops: Sequence[F32] = ()) -> Look:
        """What :meth:`strangeness` asks of a pattern, or of the crops of a micrograph."""
        if self.whole:
            return look_at(trained, pattern, crops)
        error = _error_of_before(trained, pattern) if pattern is not None else image_error(trained, crops)
        return Look({"latent": trained.latent_of(pattern, None if pattern is not None else crops)}, error)


def distances(inputs: F64, rows: F64, floor: float) -> F64:
    """(m, n) root mean squared differences of ``inputs`` (m, d) and ``rows`` (n, d), over what both have measured.

    Each number counts by its standard deviation over the rows and by ``floor``. Infinite where nothing was measured
    in common.
    """
    measured = np.isfinite(rows)
    counts = np.maximum(measured.sum(0), 1)
    mean = np.where(measured, rows, 0.0).sum(0) / counts
    variance = np.where(measured, (rows - mean) ** 2, 0.0).sum(0) / counts
    scale = np.sqrt(variance + floor**2)
    found = np.empty((len(inputs), len(rows)))
    for number, row in enumerate(inputs):
        squares = ((rows - row) / scale) ** 2
        both = np.isfinite(squares)
        shared = both.sum(1)
        mean_square = np.where(both, squares, 0.0).sum(1) / np.maximum(shared, 1)
        found[number] = np.where(shared > 0, np.sqrt(mean_square), math.inf)
    return found


def limits_of(rows: Mapping[str, F64], specimens: Sequence[str]) -> dict[str, float]:
    """Limits of the distances to the nearest row of another specimen, within all of which 95 % of the items are.

    Each part's limit is that share of its own distances; all are then widened by one factor, so that the share holds
    for the largest distance over its limit. Where there are fewer than 19 items the farthest one is the limit, and
    with one specimen there is none.
    """
    names = np.asarray(specimens)
    same = names[:, None] == names[None, :]
    nearest, limits = {}, {}
    for part, values in rows.items():
        among = distances(values, values, FLOORS[part])
        among[same] = math.inf
        nearest[part] = among.min(1)
        limits[part] = max(_usual(nearest[part]), 1e-9)
    if not all(math.isfinite(limit) for limit in limits.values()):
        return dict.fromkeys(rows, math.inf)
    together = _usual(np.max([nearest[part] / limits[part] for part in rows], 0))
    return {part: limit * together for part, limit in limits.items()}


def _usual(values: F64) -> float:
    """The value that the share :data:`_USUAL` of further ones stays below (a conformal quantile)."""
    number = min(math.ceil(_USUAL * (len(values) + 1)), len(values))
    return float(np.sort(values)[number - 1])


def pattern_error(trained: Trained, pattern: Pattern) -> float:
    """How far the reconstruction of a pattern is from it: mean absolute difference of asinh(I / I0) over what was
    measured, after one common factor, over the pattern's own mean deviation from its median."""
    made = trained.saxs_again(pattern)
    counted, expected = (float(plane[pattern.mask].sum(dtype=np.float64)) for plane in (pattern.intensity, made))
    if counted > 0 and expected > 0:
        made = made * np.float32(counted / expected)
    reference = trained.geometry.reference
    again = Pattern(made, None, pattern.mask, pattern.grid, pattern.kind)
    values = np.arcsinh(pattern.intensity[pattern.mask].astype(np.float64) / reference)
    contrast = float(np.abs(values - np.median(values)).mean())
    return distance(pattern, again, reference) / max(contrast, 1e-9)


def _error_of_before(trained: Trained, pattern: Pattern) -> float:
    """The error that references without signatures hold: with the exposure, and over no contrast."""
    made = Pattern(trained.saxs_again(pattern), None, pattern.mask, pattern.grid, pattern.kind)
    return distance(pattern, made, trained.geometry.reference)


def image_error(trained: Trained, crops: Sequence[F32]) -> float:
    """Mean absolute error of the reconstructions of crops."""
    return float(np.abs(trained.sem_again(crops) - np.stack(crops)).mean())


def look_at(trained: Trained, pattern: Pattern | None, crops: Sequence[F32] = (), fewer: Sequence[F32] = ()) -> Look:
    """A pattern, or the crops of a micrograph, as the reference compares them.

    Args:
        fewer: crops that the model is asked about; all of them unless given.
    """
    if pattern is not None:
        signature = {**pattern_signature(pattern), "latent": trained.latent_of(pattern, None)}
        return Look(signature, pattern_error(trained, pattern))
    asked = fewer or crops
    signature = image_signature(crops, trained.geometry.pixel_size_nm)
    return Look({**signature, "latent": trained.latent_of(None, asked)}, image_error(trained, asked))


def write_reference(trained: Trained, data: PairData, path: Path) -> None:
    """Remember the training part of ``data`` beside the run; a function of the run and the store alone."""
    from safetensors.numpy import save

    tensors: dict[str, F64] = {LEVELS: _mean_levels(trained, data)}
    for modality in MODALITIES:
        specimens, looks = zip(*_looks(trained, data, modality), strict=True)
        rows = {name: np.stack([look.signature[name] for look in looks]) for name in looks[0].signature}
        limits = limits_of(rows, specimens)
        limits["reconstruction"] = max(_SLACK * max(look.error for look in looks), 1e-9)
        tensors |= {f"{modality}.rows.{name}": values for name, values in rows.items()}
        tensors |= {f"{modality}.limits.{name}": np.array([limit]) for name, limit in limits.items()}
    atomic.write_bytes(path / REFERENCE_FILE, save(tensors))


def _looks(trained: Trained, data: PairData, modality: str) -> Iterator[tuple[str, Look]]:
    """Specimen and look of the training items, of at most :data:`_MOST`."""
    for number in _numbers(data, modality):
        specimen = data.store.samples[number]
        if modality == "saxs":
            yield specimen, look_at(trained, data.pattern(number))
            continue
        image, size = data.image(number), trained.geometry.size_px
        assert image is not None
        yield specimen, look_at(trained, None, tiling(image, size), tiling(image, size, _CROPS))


def _numbers(data: PairData, modality: str) -> list[int]:
    """Training items that have the member, at most :data:`_MOST` of them, evenly."""
    member = data.pattern if modality == "saxs" else data.image
    numbers = [number for number in data.train.tolist() if member(number) is not None]
    places = np.linspace(0, len(numbers) - 1, min(len(numbers), _MOST)).round().astype(int)
    return [numbers[place] for place in np.unique(places)]


def _mean_levels(trained: Trained, data: PairData) -> F64:
    """Quantiles of the grey levels of each training image, evenly from 0 to 1, averaged: what draws begin with."""
    size, shares = trained.geometry.size_px, np.linspace(0, 1, _QUANTILES)
    images = (data.image(number) for number in _numbers(data, "sem"))
    levels = [np.quantile(np.stack(tiling(image, size)), shares) for image in images if image is not None]
    return np.asarray(np.mean(levels, 0))


def read_reference(run_dir: Path) -> Mapping[str, Known]:
    """What was seen of ``saxs`` and of ``sem``.

    Raises:
        UserError: the run did not get so far, or the file is none of a reference.
    """
    path = run_dir / REFERENCE_FILE
    try:
        tensors = {name: tensor.double().numpy() for name, tensor in read_tensors(path).items()}
        return {modality: _known(tensors, modality) for modality in MODALITIES}
    except (CheckpointError, OSError):
        raise UserError(f"{run_dir} has no {REFERENCE_FILE}: its training did not end; start it again") from None
    except (KeyError, IndexError, ValueError):
        raise UserError(f"{path} is damaged; start the training again to write it") from None


def _known(tensors: Mapping[str, F64], modality: str) -> Known:
    if f"{modality}.latents" in tensors:
        return _of_before(tensors[f"{modality}.latents"], tensors[f"{modality}.errors"])
    parts: dict[str, dict[str, F64]] = {
        kind: {name[len(start) :]: values for name, values in tensors.items() if name.startswith(start)}
        for kind in ("rows", "limits")
        for start in (f"{modality}.{kind}.",)
    }
    limits = {name: float(values[0]) for name, values in parts["limits"].items()}
    if {*parts["rows"], "reconstruction"} != set(limits) or not set(parts["rows"]) <= set(FLOORS):
        raise KeyError(modality)
    for name, rows in parts["rows"].items():
        if rows.ndim != 2 or not len(rows) or rows.shape[1] != WIDTHS.get(name, rows.shape[1]):
            raise ValueError(f"{name} has the shape {rows.shape}")
    return Known(parts["rows"], limits)


def _of_before(latents: F64, errors: F64) -> Known:
    """References before signatures: a limit at 1.25 times the farthest training item from its neighbour."""
    among = distances(latents, latents, FLOORS["latent"])
    np.fill_diagonal(among, math.inf)
    farthest = float(among.min(1).max()) if len(among) > 1 else math.inf
    limits = {"latent": max(_SLACK * farthest, 1e-9), "reconstruction": max(_SLACK * float(errors.max()), 1e-9)}
    return Known({"latent": latents}, limits, whole=False)
