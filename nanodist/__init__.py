"""nanodist: self-supervised pretraining for electron microscopy. Importing it loads no torch, DeepSpeed or MPI."""

import importlib
from typing import TYPE_CHECKING, Any

from nanodist._version import __version__

if TYPE_CHECKING:
    from nanodist.encoders import load_encoder
    from nanodist.micrographs.read import read_micrograph
    from nanodist.morphology.measure import measure

__all__ = ["__version__", "load_encoder", "measure", "read_micrograph"]

# What needs torch, SciPy or scikit-image is imported when it is first asked for.
_HOMES = {
    "load_encoder": "nanodist.encoders",
    "measure": "nanodist.morphology.measure",
    "read_micrograph": "nanodist.micrographs.read",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nanodist' has no attribute {name!r}")
