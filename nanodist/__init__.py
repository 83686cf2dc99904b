"""nanodist: self-supervised pretraining for electron microscopy. Importing it loads no torch, DeepSpeed or MPI."""

from nanodist._version import __version__

__all__ = ["__version__"]
