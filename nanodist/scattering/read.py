"""A file in, a `Frame` out: intensity, mask, geometry, sigma, and what was corrected."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpc.errors import UserError
from nanodist.scattering.ascii2d import read_ascii
from nanodist.scattering.detectors import Detector, by_name, by_shape
from nanodist.scattering.files import read_detector_file, read_tiff
from nanodist.scattering.frame import CORRECTIONS, STATES, Frame, Setup, State
from nanodist.scattering.geometry import Geometry
from nanodist.scattering.hdf5 import read_hdf5
from nanodist.scattering.masks import check_polarity, counted, decided_kind, reasons
from nanodist.scattering.pattern import Kind
from nanodist.scattering.poni import read_poni
from nanodist.scattering.raw import Raw

TIFF_SUFFIXES = (".tif", ".tiff")
HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".nxs", ".nx5", ".cxi")
TEXT_SUFFIXES = (".dat", ".txt", ".asc")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_GRAZING_WORDS = re.compile(r"(?<![a-z])(gisaxs|giwaxs|gisans|gixs|grazing)(?![a-z])")


@dataclass(frozen=True)
class Given:
    """What the user states about a file, over what the file says.

    Attributes:
        poni: a PONI file of pyFAI.
        distance_mm: from the sample to the detector, along the beam.
        beam_centre_px: (row, column) of the beam, from the centre of the first pixel.
        pixel_size_mm: (height, width) of a pixel.
        wavelength_nm: of the radiation.
        mask: a file whose pixels that are not 0 are left out.
        mask_marks: ``masked``, or ``measured`` for a mask whose pixels that are not 0 are kept.
        beam_stop: ``find`` to mask the shadow of the beam stop where it is seen; ``kept`` to leave it to the mask.
        sigma: a file with the standard deviation of reduced data.
        kind: ``counts`` or ``reduced``.
        setup: ``transmission`` or ``grazing``.
        detector: a detector that pyFAI knows, for its pixel size and gaps.
        saturation: the count from which a pixel is full.
        frame: which frame of a file with several.
        dataset: where the numbers are in an HDF5 file with several.
        corrections: for some of dark, flat, solid_angle, transmission, time, background: ``done`` or ``not done``.
    """

    poni: Path | None = None
    distance_mm: float | None = None
    beam_centre_px: tuple[float, float] | None = None
    pixel_size_mm: tuple[float, float] | None = None
    wavelength_nm: float | None = None
    mask: Path | None = None
    mask_marks: str = "masked"
    beam_stop: str = "kept"
    sigma: Path | None = None
    kind: Kind | None = None
    setup: Setup | None = None
    detector: str | None = None
    saturation: float | None = None
    frame: int | None = None
    dataset: str | None = None
    corrections: Mapping[str, State] = field(default_factory=dict)


def read_frame(path: Path, given: Given | None = None) -> Frame:
    """A pattern with its mask, and its geometry where that is known.

    Geometry comes from ``given`` first, then its PONI file, then the header, then (pixel size alone) the detector.

    Raises:
        UserError: the file, its mask, sigma or PONI file is missing, damaged, of another kind or shape.
    """
    given = given or Given()
    raw = read_raw(path, given.frame, given.dataset)
    if raw.values.dtype.kind not in "iufb":
        raise UserError(f"{path} holds {raw.values.dtype} numbers, no intensities: write real numbers")
    shape = (raw.values.shape[0], raw.values.shape[1])
    if given.sigma is not None:
        raw.sigma = _companion(given.sigma, shape, path, "sigma").astype(np.float64)
    kind = given.kind or decided_kind(raw)
    detector = by_name(given.detector, shape) if given.detector else by_shape(shape)
    found = reasons(raw, kind, detector, _given_mask(given, raw, path), given.saturation)
    if raw.q_planes is not None:
        found["no q"] = ~np.isfinite(raw.q_planes[0] + raw.q_planes[1])
    mask = ~np.logical_or.reduce(list(found.values()))
    intensity = np.where(mask, raw.values, 0).astype(np.float32)
    sigma = None
    metadata = {key: value for key, value in raw.metadata.items() if value is not None}
    if kind == "reduced" and raw.sigma is not None:
        sigma = np.where(mask, raw.sigma, 0).astype(np.float32)
        unsure = mask & (sigma == 0)
        if unsure.any() and not unsure[mask].all():
            # Nothing was counted there, which is as uncertain as one count.
            sigma[unsure] = sigma[mask & (sigma > 0)].min()
            metadata["sigma_filled"] = int(unsure.sum())
    if detector is not None:
        metadata.setdefault("detector", detector.name)
    metadata["frames"] = raw.frames
    frame = Frame(
        intensity=intensity,
        mask=mask,
        kind=kind,
        name=str(path),
        geometry=_geometry(path, given, raw, detector, shape),
        q_planes=raw.q_planes,
        sigma=sigma,
        setup=given.setup or raw.setup or _setup_by_name(path),
        corrections=_corrections(given, raw, kind),
        masked=counted(found),
        metadata=metadata,
    )
    if given.beam_stop not in ("kept", "find"):
        raise UserError(f"beam_stop is {given.beam_stop!r}: choose kept or find")
    return _without_beam_stop(frame) if given.beam_stop == "find" else frame


def _without_beam_stop(frame: Frame) -> Frame:
    from nanodist.scattering.beam_stop import beam_stop

    shadow = beam_stop(frame)
    mask = frame.mask & ~shadow
    sigma = None if frame.sigma is None else np.where(mask, frame.sigma, 0)
    masked = {**frame.masked, "beam stop": int(shadow.sum())}
    return replace(frame, intensity=np.where(mask, frame.intensity, 0), sigma=sigma, mask=mask, masked=masked)


def read_raw(path: Path, frame: int | None = None, dataset: str | None = None) -> Raw:
    """The numbers and the header of a file of any format.

    Raises:
        UserError: as `read_frame`.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check its name and rights") from error
    suffix = path.suffix.lower()
    if suffix in PICTURE_SUFFIXES:
        raise UserError(
            f"{path} is a picture of 8 bits, no intensities of a detector: give the file that it was made from"
        )
    if start == _HDF5_MAGIC:
        return read_hdf5(path, frame, dataset)
    if suffix in TIFF_SUFFIXES and start[:4] in _TIFF_MAGIC:
        return read_tiff(path, frame)
    if suffix in HDF5_SUFFIXES:
        raise UserError(f"{path} is named like HDF5 and is none: it is damaged, or has another format; copy it again")
    if suffix in TEXT_SUFFIXES:
        return read_ascii(path)
    return read_detector_file(path, frame)


def _companion(other: Path, shape: tuple[int, int], path: Path, what: str) -> np.ndarray:
    """The numbers of a file beside the pattern, of the same shape."""
    values = read_raw(other).values
    if values.shape != shape:
        raise UserError(
            f"the {what} {other} has {values.shape[0]} x {values.shape[1]} pixels and {path} has {shape[0]} x "
            f"{shape[1]}: give the one that belongs to it"
        )
    return values


def _given_mask(given: Given, raw: Raw, path: Path) -> np.ndarray | None:
    if given.mask is None:
        return None
    if given.mask_marks not in ("masked", "measured"):
        raise UserError(f"mask_marks is {given.mask_marks!r}: choose masked or measured")
    masked = _companion(given.mask, (raw.values.shape[0], raw.values.shape[1]), path, "mask") != 0
    if given.mask_marks == "measured":
        return ~masked
    check_polarity(masked, raw, given.mask)
    return masked


def _geometry(path: Path, given: Given, raw: Raw, detector: Detector | None, shape: tuple[int, int]) -> Geometry | None:
    """The geometry where all of it is known; None, where not."""
    values: dict[str, Any] = {"pixel_size_mm": detector.pixel_size_mm} if detector else {}
    sources = ["detector"] if detector else []
    if raw.geometry:
        values.update(raw.geometry)
        sources.append("header")
    if given.poni is not None:
        known = read_poni(given.poni, shape)
        names = ("distance_mm", "beam_centre_px", "pixel_size_mm", "wavelength_nm", "rotations_rad")
        values.update({name: getattr(known, name) for name in names})
        sources.append(str(given.poni))
    stated = {name: getattr(given, name) for name in _GEOMETRY if getattr(given, name) is not None}
    if stated:
        values.update(stated)
        sources.append("given")
    missing = [name for name in _GEOMETRY if name not in values]
    if not missing:
        return Geometry(**values, source=", ".join(sources))
    if stated and raw.q_planes is None:
        raise UserError(f"the geometry of {path} lacks {', '.join(missing)}: give these too, or a PONI file")
    return None


_GEOMETRY = ("distance_mm", "beam_centre_px", "pixel_size_mm", "wavelength_nm")


def _setup_by_name(path: Path) -> Setup:
    """Grazing where the file or its folder is called so."""
    named = any(_GRAZING_WORDS.search(part.lower()) for part in (path.name, path.absolute().parent.name))
    return "grazing" if named else "unknown"


def _corrections(given: Given, raw: Raw, kind: Kind) -> dict[str, State]:
    """Raw counts are uncorrected where nothing else is said; of reduced data nothing is known."""
    states: dict[str, State] = dict.fromkeys(CORRECTIONS, "not done" if kind == "counts" else "unknown")
    for name, state in {**raw.corrections, **given.corrections}.items():
        if name not in CORRECTIONS or state not in STATES:
            raise UserError(
                f"correction {name!r} = {state!r} is none: choose {', '.join(CORRECTIONS)}, done or not done"
            )
        states[name] = state
    return states
