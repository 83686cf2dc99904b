"""PONI files, pyFAI's geometry: read and written by pyFAI."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from hpc.atomic import write_text
from hpc.errors import UserError
from hpc.extras import needs
from nanodist.scattering.geometry import Geometry, from_poni

_LONGEST = 2**20


def read_poni(path: Path, shape: tuple[int, int]) -> Geometry:
    """The geometry of a PONI file, for frames of (H, W) pixels as they are stored.

    Detectors that pyFAI looks at from behind or upside down (their orientation) are turned to the rows and columns of
    the file. Distortions are not known to nanodist: pixels are taken as a regular lattice.

    Raises:
        UserError: no such file, no PONI file, or one without wavelength or pixel size.
    """
    needs(path, "a PONI file", "scattering", "pyFAI")
    from pyFAI.io.ponifile import PoniFile

    try:
        if path.stat().st_size > _LONGEST:
            raise UserError(f"{path} is too long for a PONI file: give the one that pyFAI-calib2 wrote")
        poni = PoniFile(str(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check its name and rights") from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is no PONI file ({error}): give the one that pyFAI-calib2 wrote") from error
    detector = poni.detector
    if detector is None or not detector.pixel1 or not detector.pixel2 or poni.dist is None:
        raise UserError(f"{path} states no distance or pixel size, so it is no whole PONI file: calibrate again")
    if not poni.wavelength:
        raise UserError(f"{path} states no wavelength: add its line 'Wavelength:' in metres")
    feet, turns = [poni.poni1 or 0.0, poni.poni2 or 0.0], [poni.rot1 or 0.0, poni.rot2 or 0.0, poni.rot3 or 0.0]
    orientation = int(getattr(detector, "orientation", 0) or 3)
    # pyFAI counts rows from the end at 1 and 2, and columns from the end at 1 and 4.
    if orientation in (1, 2):
        feet[0], turns[1], turns[2] = shape[0] * detector.pixel1 - feet[0], -turns[1], -turns[2]
    if orientation in (1, 4):
        feet[1], turns[0], turns[2] = shape[1] * detector.pixel2 - feet[1], -turns[0], -turns[2]
    size = (float(detector.pixel1) * 1e3, float(detector.pixel2) * 1e3)
    turned = (float(turns[0]), float(turns[1]), float(turns[2]))
    return from_poni(
        float(poni.dist), (float(feet[0]), float(feet[1])), size, float(poni.wavelength) * 1e9, turned, str(path)
    )


def write_poni(path: Path, geometry: Geometry) -> None:
    """A PONI file that pyFAI and its relatives read."""
    handle, name = tempfile.mkstemp(suffix=".poni")
    os.close(handle)
    try:
        integrator(geometry).save(name)
        text = Path(name).read_text()
    finally:
        os.unlink(name)
    # pyFAI appends to what is there; only the geometry is kept.
    write_text(path, text.lstrip())


def integrator(geometry: Geometry) -> Any:
    """PyFAI's AzimuthalIntegrator of a geometry.

    Raises:
        UserError: pyFAI is not installed.
    """
    needs(Path(geometry.source), "a geometry for pyFAI", "scattering", "pyFAI")
    from pyFAI.detectors import Detector
    from pyFAI.integrator.azimuthal import AzimuthalIntegrator

    distance, poni1, poni2 = geometry.poni()
    height, width = geometry.pixel_size_mm
    rot1, rot2, rot3 = geometry.rotations_rad
    return AzimuthalIntegrator(
        dist=distance,
        poni1=poni1,
        poni2=poni2,
        rot1=rot1,
        rot2=rot2,
        rot3=rot3,
        detector=Detector(pixel1=height * 1e-3, pixel2=width * 1e-3),
        wavelength=geometry.wavelength_nm * 1e-9,
    )
