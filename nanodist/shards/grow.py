"""A store that new micrographs are added to: its shards stay as they are, and a new manifest knows the new ones too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from hpc.errors import UserError
from nanodist.shards.convert import PackOptions
from nanodist.shards.index import Sample
from nanodist.shards.manifest import Manifest, load_manifest
from nanodist.shards.store import Store
from nanodist.shards.tally import Tally


@dataclass
class Base:
    """What is there before new micrographs come in: nothing, or a store.

    Attributes:
        store: the store that grows, if any.
        samples: its samples.
        tally: exact sums over its pixels.
    """

    store: Store | None
    samples: list[Sample]
    tally: Tally

    @property
    def manifest(self) -> Manifest | None:
        """The store's manifest."""
        return self.store.manifest if self.store else None


def no_base() -> Base:
    """Where a store is new."""
    return Base(None, [], Tally())


def open_base(path: Path, options: PackOptions) -> Base:
    """The store at ``path``, to be added to with ``options``.

    Raises:
        UserError: no store, packed with other options, or one of two parts.
    """
    store = Store.open(path)
    stored = stored_options(path)
    for name in ("tile", "overlap", "depth", "normalise", "encoding"):
        if getattr(stored, name) != getattr(options, name):
            raise UserError(
                f"{path} was packed with --{name} {getattr(stored, name)} and not {getattr(options, name)}: leave "
                "that option out, or pack into a store of its own"
            )
    samples = list(store.samples)
    return Base(store, samples, _tally(store, samples))


def stored_options(path: Path) -> PackOptions:
    """The options with which the store at ``path`` was packed.

    Raises:
        UserError: no store, not packed by ``pack``, or holding one part of a collection.
    """
    values = {"encoding": "png", **load_manifest(path).options}  # older stores had no choice
    if "part" in values:
        raise UserError(
            f"{path} holds the part '{values['part'].get('name')}' of a collection: adding to it could put a group on "
            "both sides; pack both parts again from the whole collection"
        )
    names = {field.name for field in fields(PackOptions)} - {"skip_bad"}
    if not names <= values.keys():
        raise UserError(f"{path} does not say how it was packed, so that nothing can be added: pack again")
    return PackOptions(**{name: values[name] for name in names})


def sums(tally: Tally) -> dict[str, int]:
    """The exact sums, for the manifest's provenance."""
    return {"pixels": tally.pixels, "total": tally.total, "total_of_squares": tally.total_of_squares}


def _tally(store: Store, samples: list[Sample]) -> Tally:
    """The sums that the store was written with; read from its pixels where it does not tell, or tells others."""
    tally = Tally()
    stated = store.manifest.provenance.get("sums", {})
    found = store.manifest.statistics
    try:
        tally.pixels, tally.total, tally.total_of_squares = (int(stated[name]) for name in sums(tally))
        good = tally.mean_and_std(store.manifest.depth) == (found["mean"], found["std"])
    except (TypeError, KeyError, ValueError, ZeroDivisionError):
        good = False
    if not good:
        tally = _counted(store)
    for sample in samples:
        tally.know(sample)
    return tally


def _counted(store: Store) -> Tally:
    tally = Tally()
    for i in range(len(store)):
        wide = store.read(i).astype(np.uint64)
        tally.pixels += wide.size
        tally.total += int(wide.sum())
        tally.total_of_squares += int(np.vdot(wide, wide))
    return tally


def check_new_keys(base: Iterable[Sample], new: Iterable[Sample], path: Path) -> None:
    """Refuse keys that the store has already, with other pixels.

    Raises:
        UserError: naming the file.
    """
    known = {sample.key.lower() for sample in base}
    for sample in new:
        if sample.key.lower() in known:
            raise UserError(
                f"{path} has a sample {sample.key} already, and {sample.source} gives one of that name with other "
                "pixels: rename the file, or name a folder further up, so that its name differs"
            )


def grown(old: Manifest, new: Manifest) -> Manifest:
    """The manifest ``new``, of the added shards and of all samples, together with what ``old`` says."""
    before = {tuple(sorted(entry.items())) for entry in old.dropped}
    dropped = old.dropped + [entry for entry in new.dropped if tuple(sorted(entry.items())) not in before]
    history = [*old.provenance.get("grown_from", []), old.content_hash]
    values = {field.name: getattr(new, field.name) for field in fields(Manifest)}
    values |= {
        "shards": [*old.shards, *new.shards],
        "options": old.options,
        "dropped": dropped,
        "provenance": {**old.provenance, **new.provenance, "grown_from": history},
    }
    return Manifest(**values)
