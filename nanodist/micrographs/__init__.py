"""Readers: a micrograph file in, pixels of native depth and their size in nanometres out."""

from nanodist.micrographs.micrograph import Micrograph
from nanodist.micrographs.read import FORMATS, SUFFIXES, count_micrographs, read_micrograph, read_micrographs

__all__ = ["FORMATS", "SUFFIXES", "Micrograph", "count_micrographs", "read_micrograph", "read_micrographs"]
