"""A store in a few lines: what was set aside and why, and what each folder of its sources gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from nanodist.shards.companions import read_mask_bytes
from nanodist.shards.manifest import Manifest
from nanodist.shards.store import SampleError, Store

_SHOWN = 30
_LOOKED_AT = 2000  # samples of a large store that are asked for their mask


def set_aside(manifest: Manifest) -> Iterator[str]:
    """A line a reason: how often, and an example."""
    counts = Counter(entry["reason"] for entry in manifest.dropped)
    files = {reason: {e["source"] for e in manifest.dropped if e["reason"] == reason} for reason in counts}
    for reason, count in counts.most_common():
        of = f" in {len(files[reason])} files" if len(files[reason]) < count else ""
        yield f"{count}{of}: {reason} (such as {min(files[reason])})"


def folders(store: Store) -> Iterator[tuple[str, str]]:
    """A row a folder that lies directly in what was packed; none where there is but one."""
    samples = Counter(_folder(source) for source in store.samples.column("source"))
    if len(samples) < 2:
        return
    files = Counter(_folder(source) for source in set(store.samples.column("source")))
    pairs = zip(store.samples.column("source"), store.groups, strict=True)
    groups = Counter(_folder(source) for source, _ in {_folder(s) + "\0" + g: (s, g) for s, g in pairs}.values())
    left_out = Counter(_folder(entry["source"]) for entry in store.manifest.dropped)
    for name, count in sorted(samples.items())[:_SHOWN]:
        out = f", {left_out[name]} set aside" if left_out[name] else ""
        yield f"folder {name}", f"{count} samples of {files[name]} files in {groups[name]} groups{out}"
    if len(samples) > _SHOWN:
        yield "", f"and {len(samples) - _SHOWN} folders more"


def masks(store: Store) -> str:
    """How many samples have a mask; empty where none has, or where a shard is damaged, which ``verify`` tells."""
    looked = np.unique(np.linspace(0, len(store) - 1, min(len(store), _LOOKED_AT)).astype(np.int64)).tolist()
    try:
        having = sum(read_mask_bytes(store, i) is not None for i in looked)
    except SampleError:
        return ""
    said = "samples" if len(looked) == len(store) else "samples that were looked at"
    return f"{having} of {len(looked)} {said} have one" if having else ""


def _folder(source: str) -> str:
    return source.partition("/")[0] if "/" in source else "."
