"""Readers: a micrograph file in, pixels of native depth and their size in nanometres out."""

from nanodist.micrographs.emi import companion
from nanodist.micrographs.micrograph import Micrograph, NotAMicrograph
from nanodist.micrographs.read import (
    FORMATS,
    SUFFIXES,
    count_micrographs,
    is_named_like_one,
    read_micrograph,
    read_micrographs,
)

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "Micrograph",
    "NotAMicrograph",
    "companion",
    "count_micrographs",
    "is_named_like_one",
    "read_micrograph",
    "read_micrographs",
]
