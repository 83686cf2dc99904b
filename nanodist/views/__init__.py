"""Two seeded views of every sample, made on the device.

What needs torch is imported when it is first asked for, so that recipes are read without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nanodist.views.config import ViewsConfig

if TYPE_CHECKING:
    from nanodist.views.make import make_view, make_views, render
    from nanodist.views.parameters import ViewParameters, draw

__all__ = ["ViewParameters", "ViewsConfig", "draw", "make_view", "make_views", "render"]
_PLACES = {"ViewParameters": "parameters", "draw": "parameters"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES.get(name, 'make')}"), name)
