"""The identity of an export's weights, from its files alone: without torch, for sweeps over thousands of recipes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CARD, TENSORS = "nanodist.json", "model.safetensors"
# Of nanodist.encoders.EncoderSpec; a card with others is left to what builds the encoder.
_FIELDS = {"trunk", "image_size", "mean", "std", "normalise", "pooling", "looks", "trunk_options"}
_PLAIN = ("F32", "I64")  # what an encoder holds; other types would be converted on loading
_MOST_BYTES = 16 << 20


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
        digest = hashlib.blake2b(json.dumps(spec, sort_keys=True).encode(), digest_size=8)
        with safe_open(folder / TENSORS, framework="numpy") as file:
            names = sorted(file.keys())
            if any(file.get_slice(name).get_dtype() not in _PLAIN for name in names):
                return None
            for name in names:
                digest.update(name.encode())
                digest.update(file.get_tensor(name).tobytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None
    return digest.hexdigest()


def _spec(values: dict[str, Any]) -> dict[str, Any]:
    """The fields with the types that they have once they are read."""
    if set(values) != _FIELDS:
        raise KeyError("not a spec of this version")
    looks = [[float(scale), int(crop), int(count)] for scale, crop, count in values["looks"]]
    return {**values, "mean": float(values["mean"]), "std": float(values["std"]), "looks": looks}
