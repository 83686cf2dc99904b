"""Scattering patterns: readers of 2D detector images, their geometry, masks, I(q), and the fixed q grid of training."""

from nanodist.scattering.azimuthal import azimuthal
from nanodist.scattering.frame import Frame
from nanodist.scattering.geometry import Geometry
from nanodist.scattering.pattern import Kind, Pattern, QGrid, compressed, decompressed
from nanodist.scattering.read import Given, read_frame
from nanodist.scattering.regrid import regrid

__all__ = [
    "Frame",
    "Geometry",
    "Given",
    "Kind",
    "Pattern",
    "QGrid",
    "azimuthal",
    "compressed",
    "decompressed",
    "read_frame",
    "regrid",
]
