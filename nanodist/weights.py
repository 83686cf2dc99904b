"""The identity of an encoder's weights; of an export from its files alone, for sweeps over thousands of recipes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CARD, TENSORS = "nanodist.json", "model.safetensors"
# Of nanodist.encoders.EncoderSpec; a card with others is left to what builds the encoder.
_FIELDS = {"trunk", "image_size", "mean", "std", "normalise", "pooling", "looks", "trunk_options"}
_PLAIN = ("F32", "I64")  # what an encoder holds; other types would be converted on loading
_MOST_BYTES = 16 << 20
FROM_TIMM = "timm:"


def named_by_timm(source: str) -> bool:
    """Whether ``source`` is ``timm:NAME``, whose name says what its weights are; ``timm:NAME@FILE`` is a path."""
    return source.startswith(FROM_TIMM) and "@" not in source


def digest_of(spec: Mapping[str, Any], tensors: Iterable[tuple[str, bytes]]) -> str:
    """Sixteen hex digits over a spec and all weights, by name."""
    digest = hashlib.blake2b(json.dumps(spec, sort_keys=True).encode(), digest_size=8)
    for name, data in tensors:
        digest.update(name.encode())
        digest.update(data)
    return digest.hexdigest()


def hash_of_export(folder: str | Path) -> str | None:
    """What :meth:`nanodist.encoders.Encoder.weights_hash` gives for an export folder.

    ``None`` where ``folder`` is none, or where only loading the encoder can tell.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    try:
        if (folder / CARD).stat().st_size > _MOST_BYTES:
            return None
        spec = _spec(json.loads((folder / CARD).read_text())["spec"])
        with safe_open(folder / TENSORS, framework="numpy") as file:
            names = sorted(file.keys())
            if any(file.get_slice(name).get_dtype() not in _PLAIN for name in names):
                return None
            return digest_of(spec, ((name, file.get_tensor(name).tobytes()) for name in names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None


def _spec(values: dict[str, Any]) -> dict[str, Any]:
    """The fields with the types that they have once they are read."""
    if set(values) != _FIELDS:
        raise KeyError("not a spec of this version")
    looks = [[float(scale), int(crop), int(count)] for scale, crop, count in values["looks"]]
    return {**values, "mean": float(values["mean"]), "std": float(values["std"]), "looks": looks}
