"""``pack``: micrographs in, a store of shards out, whole or not at all, the same bytes for any ranks and workers.

Every rank converts units of micrographs into pieces in a staging folder; rank 0 merges their records into the plan of
the shards; every rank copies shards together; rank 0 writes the manifest and the store appears. Each step is done only
where its result is not there yet, so that the same command takes up a packing that was killed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import xxhash

from hpc import atomic
from hpc.errors import UserError
from hpc.progress import Progress
from nanodist._version import __version__
from nanodist.shards import index
from nanodist.shards.assemble import assemble, whole_shard
from nanodist.shards.convert import PackOptions
from nanodist.shards.grow import check_new_keys, grown, no_base, open_base, regrouped, stored_hashes, sums
from nanodist.shards.index import Sample
from nanodist.shards.listing import Specs, list_files, of_part, specs_of
from nanodist.shards.make import make_pieces, worker_count
from nanodist.shards.manifest import INDEX_NAME, NAME, Manifest, ShardEntry, kept_name
from nanodist.shards.merge import Merger, ShardPlan
from nanodist.shards.near import Nearness, find_near
from nanodist.shards.pack_ranks import OtherRankFailed, Ranks, cores
from nanodist.shards.parts import Part
from nanodist.shards.pieces import Piece, Seen, has_data, load_piece
from nanodist.shards.sources import find_sources
from nanodist.shards.staging import Staging
from nanodist.shards.store import Store
from nanodist.shards.tally import statistics
from nanodist.shards.units import Unit, plan_units


@dataclass(frozen=True)
class _Request:
    """What :func:`pack` was asked for, the same on every rank."""

    sources: tuple[Path, ...]
    out: Path
    options: PackOptions
    labels: tuple[str, ...]
    groups: tuple[str, ...]
    unlisted: str
    exclude: tuple[str, ...]
    part: Part | None
    calibration: Path | None
    masks: tuple[str, ...]
    append: bool


def pack(
    sources: Sequence[Path],
    out: Path,
    options: PackOptions,
    *,
    labels: Specs = None,
    groups: Specs = "file",
    unlisted: str = "error",
    exclude: Sequence[str] = (),
    part: Part | None = None,
    calibration: Path | None = None,
    masks: Sequence[str] = (),
    workers: int | None = 0,
    append: bool = False,
    ranks: Ranks | None = None,
) -> Store:
    """Pack micrographs into the store ``out``.

    Args:
        sources: folders (taken with all that is below) and files.
        out: folder of the store, new or empty; it appears once it is whole.
        options: tiles, depth, shard size.
        labels: ``folder``, ``FILE.csv:COLUMN``, or ``masks`` (the class that fills most of a tile); or
            several of these, of which the first that says something about a file counts.
        groups: ``file`` (every file is a group), ``folder`` or ``FILE.csv:COLUMN``, or several of these.
        unlisted: what to do with files that a CSV does not list: ``error``, ``keep`` (no label, a group of its own)
            or ``skip``.
        exclude: patterns of names to leave out, such as ``*mask*``.
        part: take only the groups to train on, or only those that are held out; ``None`` takes all.
        calibration: a CSV of pixel sizes that take the place of the files' own, with the columns ``file``,
            ``pixel_size_nm`` (or ``pixel_size_nm_y`` and ``pixel_size_nm_x``) and, if known, ``uncertainty``.
        masks: where the masks of micrographs are, as ``FOLDER=MASKS`` or ``FILE.csv:COLUMN``; they go into the shards
            with the tiles, and are no micrographs of their own.
        workers: processes a rank, 0 for this one alone; ``None`` takes one a core where there is work for them. They
            change nothing but the time. They are spawned, so that a script that asks for them needs a
            ``if __name__ == "__main__"``.
        append: add to the store that is at ``out``, whose shards stay as they are.
        ranks: who shares the work; every rank calls this with the same arguments. ``None`` is this process alone.

    Raises:
        UserError: no micrograph, an unreadable one, labels that do not fit, ``out`` in use, a full disk. ``out`` is
            then as it was; what is converted stays in ``.STORE.packing`` beside it, for the same call to go on from.
        OtherRankFailed: another rank raised.
    """
    request = _Request(
        tuple(Path(os.path.abspath(source)) for source in sources),
        Path(os.path.abspath(out)),
        options,
        specs_of(labels),
        specs_of(groups),
        unlisted,
        tuple(exclude),
        part,
        Path(os.path.abspath(calibration)) if calibration else None,
        tuple(masks),
        append,
    )
    work = _Packing(request, sources, ranks or Ranks(), workers)
    try:
        work.run()
    except BaseException as error:
        kept = work.staging.close(keep=not work.pointless)
        told = _told(error, out, work.staging.folder if kept else None)
        if told is error:
            raise
        raise told from None
    return Store.open(out)


class _Packing:
    """The steps of one packing, on one rank."""

    def __init__(self, request: _Request, sources: Sequence[Path], ranks: Ranks, workers: int | None) -> None:
        self.request, self.sources, self.ranks, self.workers = request, sources, ranks, workers
        self.staging = Staging(request.out, request.append)
        self.pointless = False  # whether the same call would fail again
        # Of rank 0 alone:
        self.base = no_base()
        self.units: list[Unit] = []
        self.found = 0
        self.command = ""
        self.dropped: list[dict[str, str]] = []
        self.other: dict[str, int] = {}
        self.merger = Merger(0)

    def run(self) -> None:
        """All steps; on return the store is there."""
        staging, ranks = self.staging, self.ranks
        asked = ranks.each(lambda: self.request)
        ranks.first(lambda: _agree(asked))
        begun = ranks.first(self._begin)
        if begun is None:
            return
        token, missing = begun
        ranks.each(lambda: staging.check(token))
        self._make(missing)
        plans, missing = ranks.first(self._plan)
        self._make(missing)
        ranks.each(lambda: self._assemble(plans[ranks.rank :: ranks.size]))
        ranks.first(self._finish)

    def _begin(self) -> tuple[str, list[Unit]] | None:
        """Find what there is to do: the folder's token, and the units without a piece; ``None`` if nothing is."""
        request, staging = self.request, self.staging
        found, self.other = find_sources(self.sources, request.exclude)
        self.found = len(found)
        # Near duplicates must be known before a split, so that it does not part them.
        early = request.part if request.options.near_duplicates == "keep" else None
        listing = list_files(
            found, request.labels, request.groups, request.unlisted, early, request.calibration, request.masks
        )
        self.dropped = listing.dropped
        self.units = plan_units(listing.files, request.options)
        self.command = _digest([asdict(request.options), self.dropped, [unit.digest for unit in self.units]])
        if staging.was_published(self.command):
            staging.open()
            staging.remove()
            return None
        if request.append:
            self.base = open_base(request.out, request.options)
        elif request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
            raise UserError(
                f"{request.out} exists and is not empty: choose another --out, add to it with --append, or remove it"
            )
        token = staging.open()
        return token, [unit for unit in self.units if load_piece(staging.pieces, unit.digest) is None]

    def _make(self, units: list[Unit]) -> None:
        """Every rank makes its share of the pieces of ``units``."""
        mine = units[self.ranks.rank :: self.ranks.size]
        count = worker_count(self.workers, mine, lambda: cores(self.ranks))
        bar = Progress(sum(len(u.files) for u in mine), "packing", "micrographs", self.ranks.rank == 0)
        self.ranks.each(lambda: make_pieces(mine, self.request.options, self.staging, count, bar))
        bar.close()

    def _plan(self) -> tuple[list[ShardPlan], list[Unit]]:
        """The shards that are not whole yet, and the units whose pieces they need and lack."""
        options, staging = self.request.options, self.staging
        old = self.base.manifest
        self.pointless = True  # what the pieces say will not change
        near, names = self._near()
        merger = Merger(
            round(options.shard_mb * 2**20),
            len(old.shards) if old else 0,
            options.skip_bad,
            near,
            names,
            self._part(near),
            self.base.tally,
        )
        merger.dropped += self.dropped
        lacking = []
        for unit, piece in self._pieces():
            merger.add(unit, piece)
            if not has_data(staging.pieces, piece):
                lacking.append(unit)
        merger.finish()
        if old:
            check_new_keys(self.base.samples, merger.samples, self.request.out)
        elif not merger.samples:
            raise UserError(_none_left(self.found, merger.dropped))
        self.pointless = False
        self.merger = merger
        left = [plan for plan in merger.shards if whole_shard(plan, staging.shards, staging.records) is None]
        needed = {run.piece for plan in left for run in plan.runs}
        return left, [unit for unit in lacking if unit.digest in needed]

    def _pieces(self) -> Iterator[tuple[Unit, Piece]]:
        for unit in self.units:
            piece = load_piece(self.staging.pieces, unit.digest)
            if piece is None:
                raise RuntimeError(f"the piece {unit.digest} vanished from {self.staging.pieces}")
            yield unit, piece

    def _near(self) -> tuple[Nearness, list[str]]:
        """What becomes of near duplicates, and the names of the micrographs that were compared."""
        mode = self.request.options.near_duplicates
        if mode == "keep":
            return Nearness(), []
        old = stored_hashes(self.base.store) if self.base.store else []
        new = [
            (unit.files[entry.file], entry.near)
            for unit, piece in self._pieces()
            for entry in piece.entries
            if isinstance(entry, Seen)
        ]
        near = find_near(mode, [(group, bits) for _, group, bits in old], [(file.group, bits) for file, bits in new])
        return near, [*(name for name, _, _ in old), *(file.source.name for file, _ in new)]

    def _part(self, near: Nearness) -> frozenset[str] | None:
        """Names of the files of the part that is asked for, where near duplicates had to be known first."""
        part = self.request.part
        if part is None or self.request.options.near_duplicates == "keep":
            return None
        files = [file for unit in self.units if unit.slice[0] == 0 for file in unit.files]
        return frozenset(file.source.name for file in of_part(files, part, near.group))

    def _assemble(self, plans: list[ShardPlan]) -> None:
        bar = Progress(len(plans), "writing", "shards", self.ranks.rank == 0)
        for plan in plans:
            assemble(plan, self.staging.pieces, self.staging.shards, self.staging.records)
            bar.update()
        bar.close()

    def _finish(self) -> None:
        """Write index and manifest, and let the store appear."""
        staging, merger, old = self.staging, self.merger, self.base.manifest
        if old and not merger.samples:
            staging.remove()
            return
        entries = [whole_shard(plan, staging.shards, staging.records) for plan in merger.shards]
        shards = [entry for entry in entries if entry is not None]
        if len(shards) < len(entries):
            raise RuntimeError(f"a shard vanished from {staging.shards}")
        samples = [*(regrouped(self.base.samples, merger.near)), *merger.samples]
        data = index.to_bytes(samples)
        manifest = _manifest(self, samples, data, shards)
        if old:
            # A run that began with the store as it was goes on with it.
            kept = staging.out / kept_name(old.content_hash)
            atomic.write_bytes(kept, (staging.out / NAME).read_bytes())
        atomic.write_bytes(staging.shards / manifest.index["file"], data)
        staging.announce(self.command, manifest.content_hash)
        atomic.write_json(staging.shards / NAME, manifest.to_dict())
        staging.publish()
        staging.remove()


def _manifest(work: _Packing, samples: list[Sample], data: bytes, shards: list[ShardEntry]) -> Manifest:
    """Of the store with all ``samples``, whose index is ``data``, after the new ``shards`` were written."""
    old, tally = work.base.manifest, work.merger.tally
    options, part = work.request.options, work.request.part
    # Another name, so that the old manifest and its index stay a pair until the new manifest is there.
    name = f"index-{len(old.shards) + len(shards):06d}.npz" if old else INDEX_NAME
    manifest = Manifest(
        shards=shards,
        index={"file": name, "bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)},
        samples=len(samples),
        depth=options.depth,
        statistics=statistics(samples, tally, options.depth, work.merger.near),
        options={
            **{k: v for k, v in asdict(options).items() if k != "skip_bad"},
            **({"part": asdict(part)} if part else {}),
        },
        dropped=work.merger.dropped,
        provenance={
            "nanodist": __version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "other_files": work.other,
            "sums": sums(tally),
        },
    )
    return grown(old, manifest) if old else manifest


def _agree(requests: list[_Request]) -> None:
    """Refuse ranks that were asked for different things: they are not ranks of one packing."""
    for rank, request in enumerate(requests):
        for name, value in vars(requests[0]).items():
            if getattr(request, name) != value:
                raise UserError(
                    f"rank {rank} was asked for {name} {getattr(request, name)} and rank 0 for {value}: the ranks of a "
                    "packing share one command; start several packings as jobs of their own"
                )


def _digest(facts: Any) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _none_left(found: int, dropped: list[dict[str, str]]) -> str:
    reason, count = Counter(entry["reason"] for entry in dropped).most_common(1)[0]
    return (
        f"none of the {found} files can be packed; {count} of them: {reason} (such as {dropped[0]['source']}): "
        "choose other files, another --tile, or --tile none"
    )


def _told(error: BaseException, out: Path, kept: Path | None) -> BaseException:
    """The error as the user is to read it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error = UserError(f"the disk is full while packing to {out}: make room or choose another --out")
    if isinstance(error, BrokenProcessPool):
        error = UserError("a packing process was killed, most likely for memory: take fewer --workers")
    if kept and isinstance(error, (UserError, OtherRankFailed)):
        note = f"what is packed so far is kept in {kept}, and the same command goes on from there"
        kind = UserError if isinstance(error, UserError) else OtherRankFailed
        return kind(f"{error}; {note}")
    return error
