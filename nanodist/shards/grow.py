"""A store that new micrographs are added to: its shards stay as they are, and a new manifest knows the new ones too."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpc.errors import UserError
from nanodist.shards.companions import find_companion
from nanodist.shards.convert import PackOptions
from nanodist.shards.index import Sample
from nanodist.shards.manifest import Manifest, load_manifest
from nanodist.shards.near import Nearness
from nanodist.shards.store import Store
from nanodist.shards.tally import Tally

# Options of the store that what is added has to share.
_SETTLED = (
    "tile", "overlap", "depth", "normalise", "encoding", "pixel_size_nm", "bars", "empty_tiles", "near_duplicates",
)  # fmt: skip
# What older stores were packed with, which had no choice.
_BEFORE_CHOICE = {
    "encoding": "png", "pixel_size_nm": None, "bars": "keep", "empty_tiles": "keep", "near_duplicates": "keep",
}  # fmt: skip
_LONGEST_JSON = 2**20


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
    for name in _SETTLED:
        if getattr(stored, name) != getattr(options, name):
            raise UserError(
                f"{path} was packed with --{name.replace('_', '-')} {getattr(stored, name)} and not "
                f"{getattr(options, name)}: leave that option out, or pack into a store of its own"
            )
    samples = list(store.samples)
    return Base(store, samples, _tally(store, samples))


def stored_options(path: Path) -> PackOptions:
    """The options with which the store at ``path`` was packed.

    Raises:
        UserError: no store, not packed by ``pack``, or holding one part of a collection.
    """
    values = {**_BEFORE_CHOICE, **load_manifest(path).options}
    if "part" in values:
        raise UserError(
            f"{path} holds the part '{values['part'].get('name')}' of a collection: adding to it could put a group on "
            "both sides; pack both parts again from the whole collection"
        )
    names = {field.name for field in fields(PackOptions)} - {"skip_bad"}
    if not names <= values.keys():
        raise UserError(f"{path} does not say how it was packed, so that nothing can be added: pack again")
    return PackOptions(**{name: values[name] for name in names})


def stored_hashes(store: Store) -> list[tuple[str, str, str]]:
    """Source, group and perceptual hash of each micrograph of a store, from the JSON of its first tile.

    Raises:
        UserError: a shard that cannot be read.
    """
    found: dict[tuple[str, str], tuple[str, str, str]] = {}
    last = ""
    for i, sample in enumerate(store.samples):
        micrograph = sample.key.rpartition("-y")[0] or sample.key
        if (sample.source, micrograph) in found or micrograph == last:
            continue
        last = micrograph
        bits = _json(store, i).get("perceptual_hash")
        if isinstance(bits, str) and re.fullmatch(r"[0-9a-f]{64}", bits):
            found[sample.source, micrograph] = (sample.source, sample.group, bits)
    return list(found.values())


def _json(store: Store, i: int) -> dict[str, Any]:
    """The JSON of a sample, which follows its image, or its mask after that; nothing where there is none."""
    try:
        place = find_companion(store, i, "json")
        if place is not None and place[1] <= _LONGEST_JSON:
            found = json.loads(bytes(store.files.read(store.samples[i].shard, *place)))
            return found if isinstance(found, dict) else {}
    except OSError as error:
        path = store.folder / store.manifest.shards[store.samples[i].shard].file
        raise UserError(f"{path} cannot be read ({error.strerror}): run 'nanodist verify {store.path}'") from None
    except (tarfile.HeaderError, ValueError):
        pass
    return {}


def regrouped(samples: Sequence[Sample], near: Nearness) -> list[Sample]:
    """Samples of a store with the groups that near duplicates among what is added bring together.

    The index says so; the JSON in the shards, which stay as they are, has the group that a sample was packed with.
    """
    return [
        replace(sample, group=near.group(sample.group)) if sample.group in near.group_of else sample
        for sample in samples
    ]


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
    # What brought groups together before does so still.
    before_near = old.statistics.get("near_duplicates", {})
    values["statistics"] = {
        **new.statistics, "near_duplicates": merged_groups(before_near, new.statistics["near_duplicates"]),
    }  # fmt: skip
    values |= {
        "shards": [*old.shards, *new.shards],
        "options": old.options,
        "dropped": dropped,
        "provenance": {**old.provenance, **new.provenance, "grown_from": history},
    }
    return Manifest(**values)


def merged_groups(old: dict[str, list[str]], new: dict[str, list[str]]) -> dict[str, list[str]]:
    """Groups that are part of others: as ``old`` has it, after ``new`` brought some of those together."""
    where = {name: group for group, names in new.items() for name in names}
    result: dict[str, set[str]] = {group: set(names) for group, names in new.items()}
    for group, names in old.items():
        result.setdefault(where.get(group, group), set()).update(names)
    return {group: sorted(names) for group, names in sorted(result.items())}
