"""Pieces in the order of their units, merged into the samples of a store and the plan of its shards.

Only records are read here, no pixels. Duplicates are found over all pieces and shards are filled in order, so that the
store is the same whichever rank made which piece.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hpc.errors import UserError
from nanodist.shards.index import Sample
from nanodist.shards.listing import Listed
from nanodist.shards.near import Nearness
from nanodist.shards.pieces import Piece, PieceTile, Seen, SetAside, bad_file
from nanodist.shards.tally import Tally
from nanodist.shards.tar import BLOCK, padded, shard_name
from nanodist.shards.units import Unit


@dataclass(frozen=True)
class Run:
    """``length`` bytes from ``start`` of a piece's data.

    With a ``group`` it is one sample, whose JSON (``json_bytes`` of its end) is to name that group instead.
    """

    piece: str
    start: int
    length: int
    group: str | None = None
    json_bytes: int = 0


@dataclass(frozen=True)
class ShardPlan:
    """A shard to be copied together.

    Attributes:
        file: its name.
        samples: how many it holds.
        runs: where its members lie, in order.
        frees: pieces that no other shard needs.
    """

    file: str
    samples: int
    runs: tuple[Run, ...]
    frees: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Names the content of the shard."""
        facts = [self.file, self.samples, [(run.piece, run.start, run.length, run.group) for run in self.runs]]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


@dataclass
class Merger:
    """Takes pieces in order; what it holds is then whole after :meth:`finish`.

    Attributes:
        shard_bytes: how long a shard may become; one with a single larger sample is longer.
        first_shard: number of the first shard.
        skip_bad: whether unreadable files are set aside.
        near: what becomes of near duplicates.
        names: of the micrographs that ``near`` counts, for its reports.
        files: names of the files to take; ``None`` takes all.
        tally: pixel sums and which pixels were there before.
        samples: in the order of the store.
        dropped: what is not in it, and why.
        shards: the plan.
    """

    shard_bytes: int
    first_shard: int = 0
    skip_bad: bool = False
    near: Nearness = field(default_factory=Nearness)
    names: Sequence[str] = ()
    files: frozenset[str] | None = None
    tally: Tally = field(default_factory=Tally)
    samples: list[Sample] = field(default_factory=list)
    dropped: list[dict[str, str]] = field(default_factory=list)
    shards: list[ShardPlan] = field(default_factory=list)
    _runs: list[Run] = field(default_factory=list)
    _length: int = 0
    _count: int = 0
    _micrograph: int = -1
    _of: int | None = None

    def add(self, unit: Unit, piece: Piece) -> None:
        """Take the next piece.

        Raises:
            UserError: it has a file that cannot be read, and such files are not set aside.
        """
        for entry in piece.entries:
            listed = unit.files[entry.file]
            if isinstance(entry, Seen):
                self._micrograph += 1
            if self.files is not None and listed.source.name not in self.files:
                continue
            if isinstance(entry, SetAside):
                self._set_aside(entry, listed)
            elif isinstance(entry, Seen):
                self._of = self.near.of.get(self._micrograph)
                if self._of is not None:
                    self.dropped.append(
                        {"source": listed.source.name, "reason": "near duplicate", "of": self.names[self._of]}
                    )
            elif self._of is None and self.tally.is_new(
                entry, entry.key, listed.source.name, entry.label, self.dropped
            ):
                self._place(piece.digest, entry, listed)

    def _set_aside(self, entry: SetAside, listed: Listed) -> None:
        if entry.bad and not self.skip_bad:
            raise bad_file(entry.reason.replace("the file", str(listed.source.path), 1))
        if entry.key == "" or self._of is None:
            key = {"key": entry.key} if entry.key else {}
            self.dropped.append({"source": listed.source.name, "reason": entry.reason, **key})

    def finish(self) -> None:
        """End the last shard, and check the keys.

        Raises:
            UserError: two samples of one key.
        """
        self._end_shard()
        uses: dict[str, set[int]] = {}
        for number, shard in enumerate(self.shards):
            for run in shard.runs:
                uses.setdefault(run.piece, set()).add(number)
        frees: list[list[str]] = [[] for _ in self.shards]
        for digest, numbers in uses.items():
            if len(numbers) == 1:
                frees[numbers.pop()].append(digest)
        self.shards = [replace(shard, frees=tuple(names)) for shard, names in zip(self.shards, frees, strict=True)]
        _check_keys(self.samples)

    def _place(self, digest: str, tile: PieceTile, listed: Listed) -> None:
        group = self.near.group(listed.group)
        other = group if group != listed.group else None
        length = tile.length if other is None else tile.length + _growth(tile.json_bytes, listed.group, group)
        if self._count and self._length + length > self.shard_bytes:
            self._end_shard()
        self.samples.append(
            Sample(
                key=tile.key,
                shard=self.first_shard + len(self.shards),
                offset=self._length + BLOCK,
                size=tile.size,
                suffix=tile.suffix,
                label=tile.label,
                group=group,
                pixel_size_nm=tile.pixel_size_nm,
                height=tile.height,
                width=tile.width,
                source=listed.source.name,
                xxh3=tile.xxh3,
            )
        )
        last = self._runs[-1] if self._runs else None
        if other is not None:
            self._runs.append(Run(digest, tile.start, tile.length, other, tile.json_bytes))
        elif last and (last.piece, last.start + last.length, last.group) == (digest, tile.start, None):
            self._runs[-1] = Run(digest, last.start, last.length + tile.length)
        else:
            self._runs.append(Run(digest, tile.start, tile.length))
        self._length += length
        self._count += 1

    def _end_shard(self) -> None:
        if self._count:
            name = shard_name(self.first_shard + len(self.shards))
            self.shards.append(ShardPlan(name, self._count, tuple(self._runs)))
        self._runs, self._length, self._count = [], 0, 0


def _growth(json_bytes: int, old: str, new: str) -> int:
    """By how much a sample's members become longer, in whole blocks, with another group in their JSON."""
    before, after = (len(json.dumps(name, ensure_ascii=False).encode()) for name in (old, new))
    return padded(json_bytes + after - before) - padded(json_bytes)


def _check_keys(samples: list[Sample]) -> None:
    """Refuse keys that are the same, or differ in case only (which some file systems do not tell apart).

    Raises:
        UserError: naming the files that would share a key.
    """
    counts = Counter(sample.key.lower() for sample in samples)
    key, count = counts.most_common(1)[0] if counts else ("", 0)
    if count > 1:
        sources = sorted({s.source for s in samples if s.key.lower() == key})
        raise UserError(f"the files {', '.join(sources)} would share the key {key}: rename one")
