"""PNG and JPEG, through Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin

from hpc.errors import UserError
from nanodist.micrographs.micrograph import Micrograph, check_size, checked_pixels, collapse_channels
from nanodist.micrographs.pixel_size import UNKNOWN, Calibration, from_dpi

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8\xff"


def read_png(path: Path) -> Micrograph:
    """A PNG of 1, 8 or 16 bits: grayscale, or colour with equal channels.

    Raises:
        UserError: damaged, truncated, transparent, a colour picture, or 16-bit colour (which Pillow would cut to 8).
    """
    with open(path, "rb") as file:
        header = file.read(26)
    if len(header) == 26 and header[24] == 16 and header[25] != 0:
        raise UserError(f"{path} is a PNG with 16-bit colour channels: save it as 16-bit grayscale")
    return _read(path, PngImagePlugin.PngImageFile, "PNG")


def read_jpeg(path: Path) -> Micrograph:
    """A JPEG: grayscale, or colour with equal channels.

    Raises:
        UserError: damaged, truncated, or a colour picture.
    """
    return _read(path, JpegImagePlugin.JpegImageFile, "JPEG")


def _read(path: Path, plugin: type[ImageFile.ImageFile], name: str) -> Micrograph:
    # The plugin itself, not Image.open: that one asks every plugin, and has its own process-wide limit of pixels.
    try:
        with plugin(str(path)) as image:
            check_size(image.height, image.width, path)
            image.load()
            pixels = checked_pixels(_gray(image, path), path)
            size_nm, source = _pixel_size(image, name)
            metadata: dict[str, Any] = {"format": name, "mode": image.mode, "page": 0, "pages": 1}
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise UserError(
            f"{path} is a damaged or truncated {name} file ({_words(error)}): copy or write it again"
        ) from None
    return Micrograph(pixels, size_nm, source, metadata)


def _gray(image: Image.Image, path: Path) -> npt.NDArray[Any]:
    if image.mode in ("L", "1") or image.mode.startswith("I;16"):
        return np.asarray(image)
    if image.mode == "I":  # how older Pillow gives a 16-bit PNG
        return np.asarray(image).astype(np.uint16)
    if image.mode == "LA":
        return collapse_channels(np.asarray(image), path, alpha=True)
    if image.mode in ("P", "PA", "RGB", "RGBA"):
        full = image.convert("RGBA" if image.mode in ("PA", "RGBA") or "transparency" in image.info else "RGB")
        return collapse_channels(np.asarray(full), path, alpha=full.mode == "RGBA")
    raise UserError(f"{path} is a {image.mode} picture, no micrograph: save it as grayscale or leave it out")


def _pixel_size(image: Image.Image, name: str) -> Calibration:
    dpi = image.info.get("dpi")
    if dpi is None:
        return UNKNOWN
    x, y = (float(value) for value in dpi)
    return from_dpi(y, x, f"{name} resolution")


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
