"""nanodist: self-supervised pretraining for electron microscopy. Importing it loads no torch, DeepSpeed or MPI."""

from typing import TYPE_CHECKING, Any

from nanodist._version import __version__

if TYPE_CHECKING:
    from nanodist.morphology.measure import measure

__all__ = ["__version__", "measure"]


def __getattr__(name: str) -> Any:
    # What needs SciPy and scikit-image is imported when it is first asked for.
    if name == "measure":
        from nanodist.morphology.measure import measure

        return measure
    raise AttributeError(f"module 'nanodist' has no attribute {name!r}")
