"""Numbers and headers of TIFF (tifffile) and of detectors' own formats (fabio)."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hpc.errors import UserError
from hpc.extras import needs
from nanodist.scattering.frame import CORRECTIONS, STATES
from nanodist.scattering.headers import from_dectris_text, from_edf, from_mar
from nanodist.scattering.pattern import QGrid
from nanodist.scattering.raw import Raw, check_plane, one_frame

# fabio says on standard error what it tries; errors reach the user as one sentence.
logging.getLogger("fabio").addHandler(logging.NullHandler())
logging.getLogger("tifffile").addHandler(logging.NullHandler())
MARKER = "nanodist_pattern"


def read_tiff(path: Path, frame: int | None) -> Raw:
    """A page of a TIFF of any compression, with the text header of Dectris detectors or the q of `write_pattern`.

    Raises:
        UserError: damaged, a colour picture, several pages and none chosen.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as tif:
            text = str(getattr(tif.pages[0], "description", "") or "")
            own = text.startswith("{") and MARKER in text
            number = 0 if own else one_frame(len(tif.pages), frame, path)
            page = tif.pages[number]
            check_plane(page.shape, path)
            values = page.asarray()
            raw = Raw(values, 1 if own else len(tif.pages), metadata={"format": "TIFF"})
            if own and len(tif.pages) == 2:
                check_plane(tif.pages[1].shape, path)
                raw.sigma = tif.pages[1].asarray()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is a damaged or truncated TIFF ({short(error)}): copy or write it again") from error
    if own:
        _from_own(text, raw, path)
    else:
        from_dectris_text(text, raw)
        from_mar(mar_header(path), raw)
    return raw


def mar_header(path: Path) -> dict[str, Any]:
    """The binary header that MarCCD and Rayonix put between the tags and the pixels of a TIFF; empty where none is."""
    with open(path, "rb") as file:
        file.seek(1024)
        header = file.read(3072)
    if len(header) < 3072 or header[28:32] not in (b"\xd2\x04\0\0", b"\0\0\x04\xd2") or find_spec("fabio") is None:
        return {}
    # fabio parses it, and then puts the tags of the TIFF in its place.
    from fabio.marccdimage import HEADER_FORMAT, HEADER_NAMES, interpret_header

    order = "<" if header[28:32] == b"\xd2\x04\0\0" else ">"
    return dict(interpret_header(header, order + HEADER_FORMAT, HEADER_NAMES))


def _from_own(text: str, raw: Raw, path: Path) -> None:
    """What `nanodist.scattering.write.write_pattern` states."""
    try:
        facts = json.loads(text)[MARKER]
        grid = QGrid(int(facts["grid"]["size"]), float(facts["grid"]["q_max_inv_nm"]))
        kind = facts["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} has a damaged description ({short(error)}): write it again") from error
    if raw.values.shape != (grid.size, grid.size) or kind not in ("counts", "reduced"):
        raise UserError(
            f"{path} has a description of another pattern ({grid.size} pixels a side, {kind}): write it again"
        )
    raw.q_planes = grid.q()
    raw.kind = kind
    raw.setup = "transmission"
    states = facts.get("corrections", {})
    raw.corrections = {name: state for name, state in states.items() if name in CORRECTIONS and state in STATES}
    raw.metadata["exposure_s"] = facts.get("exposure_s")


def read_detector_file(path: Path, frame: int | None) -> Raw:
    """A frame of any file that fabio reads: EDF, CBF, MarCCD, Mar345, ADSC, Bruker, Fit2D, numpy, ...

    Raises:
        UserError: fabio is not installed or cannot read it; several frames and none chosen.
    """
    needs(path, "a detector's file", "scattering", "fabio")
    import fabio

    logging.getLogger("fabio").setLevel(logging.CRITICAL)
    try:
        with fabio.open(str(path)) as image:
            number = one_frame(int(image.nframes), frame, path)
            chosen: Any = image.getframe(number) if number else image
            check_plane(tuple(chosen.shape or chosen.data.shape), path)
            values, header = np.array(chosen.data), dict(chosen.header)
            kind, frames = type(image).__name__, int(image.nframes)
            # fabio fills up what is missing of an EDF file with zeros.
            cut = bool(image.incomplete_file)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} is no pattern that fabio reads, or a damaged one ({short(error)}): write it as TIFF, EDF, CBF or "
            "NXcanSAS, or copy it again"
        ) from error
    if cut:
        raise UserError(f"{path} is truncated: copy it again")
    raw = Raw(values, frames, metadata={"format": kind.removesuffix("Image")})
    if "_array_data.header_contents" in header:
        from_dectris_text(str(header["_array_data.header_contents"]), raw)
    elif kind == "MarccdImage":
        from_mar(mar_header(path), raw)
    else:
        from_edf(header, raw)
    return raw


def short(error: BaseException) -> str:
    """The first line of what a library said."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
