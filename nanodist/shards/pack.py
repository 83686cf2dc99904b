"""``pack``: micrographs in, a store of shards out, whole or not at all, the same bytes for any number of workers."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
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
from nanodist.shards.codec import SUFFIX, sample_hash
from nanodist.shards.convert import Converted, PackOptions, Tile, convert, count_pages
from nanodist.shards.index import Sample
from nanodist.shards.manifest import INDEX_NAME, NAME, Manifest
from nanodist.shards.parts import Part, held_out
from nanodist.shards.sources import Source, find_sources, read_values
from nanodist.shards.store import Store
from nanodist.shards.tally import Tally, statistics
from nanodist.shards.tar import ShardWriter

UNLISTED = ("error", "keep", "skip")
# Starting a process costs more than converting a few small files.
_FILES_PER_WORKER = 32


@dataclass(frozen=True)
class _Job:
    """One micrograph to convert, with what its samples carry."""

    source: Source
    page: int
    label: str | None
    group: str


def pack(
    sources: Sequence[Path],
    out: Path,
    options: PackOptions,
    *,
    labels: str | None = None,
    groups: str = "file",
    unlisted: str = "error",
    exclude: Sequence[str] = (),
    part: Part | None = None,
    workers: int | None = 0,
) -> Store:
    """Pack micrographs into the store ``out``.

    Args:
        sources: folders (taken with all that is below) and files.
        out: folder of the store, new or empty; it appears once it is whole.
        options: tiles, depth, shard size.
        labels: ``folder`` or ``FILE.csv:COLUMN``.
        groups: ``file`` (every file is a group), ``folder`` or ``FILE.csv:COLUMN``.
        unlisted: what to do with files that a CSV does not list: ``error``, ``keep`` (no label, a group of its own)
            or ``skip``.
        exclude: patterns of names to leave out, such as ``*mask*``.
        part: take only the groups to train on, or only those that are held out; ``None`` takes all.
        workers: processes, 0 for this one alone; ``None`` takes one a core where there is work for them. They change
            nothing but the time. They are spawned, so that a script that asks for them needs a
            ``if __name__ == "__main__"``.

    Raises:
        UserError: no micrograph, an unreadable one, labels that do not fit, ``out`` in use, a full disk; nothing is
            left behind.
    """
    found, other = find_sources(sources, exclude)
    dropped: list[dict[str, str]] = []
    listed = _of_part(_listed(found, labels, groups, unlisted, dropped), part)
    made = _missing_parents(out)
    try:
        with atomic.directory(out) as folder, _executor(workers, len(listed)) as executor:
            jobs = _jobs(listed, options, dropped)
            samples, tally, shards = _write(folder, jobs, len(listed), options, executor, dropped)
            if not samples:
                raise UserError(_none_left(found, dropped))
            _write_manifest(folder, samples, tally, shards, options, dropped, other, part)
    except BaseException as error:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, FileExistsError):
            raise UserError(f"{out} exists and is not empty: choose another --out or remove it") from None
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full while packing to {out}: make room or choose another --out") from None
        if isinstance(error, BrokenProcessPool):
            raise UserError("a packing process was killed, most likely for memory: take fewer --workers") from None
        raise
    return Store.open(out)


def _listed(
    found: list[Source], labels: str | None, groups: str, unlisted: str, dropped: list[dict[str, str]]
) -> list[_Job]:
    """A job (of page 0) for each source that is kept."""
    if unlisted not in UNLISTED:
        raise UserError(f"--unlisted is '{unlisted}'; it must be one of {', '.join(UNLISTED)}")
    label_of = read_values(labels, found, "labels") if labels else [None] * len(found)
    group_of = read_values(groups, found, "groups")
    missing = [
        source
        for source, label, group in zip(found, label_of, group_of, strict=True)
        if (labels and label is None) or group is None
    ]
    if missing and unlisted == "error":
        raise UserError(
            f"{len(missing)} of {len(found)} micrographs (such as {missing[0].name}) have no row in the CSV of "
            "--labels or --groups: complete it, leave them out with --exclude, or say --unlisted keep or skip"
        )
    names = {source.name for source in missing} if unlisted == "skip" else set()
    dropped += [{"source": name, "reason": "not listed in the CSV"} for name in sorted(names)]
    if len(names) == len(found):
        raise UserError(f"none of the {len(found)} micrographs (such as {found[0].name}) is listed in the CSV")
    return [
        _Job(source, 0, label, group or source.name)
        for source, label, group in zip(found, label_of, group_of, strict=True)
        if source.name not in names
    ]


def _of_part(listed: list[_Job], part: Part | None) -> list[_Job]:
    if part is None:
        return listed
    test = held_out([job.label for job in listed], [job.group for job in listed], part)
    return [job for job in listed if (job.group in test) == (part.name == "test")]


def _jobs(listed: list[_Job], options: PackOptions, dropped: list[dict[str, str]]) -> Iterator[_Job]:
    """A job for each micrograph of each file."""
    for job in listed:
        pages = count_pages(job.source.path)
        if isinstance(pages, str):
            _set_aside(job, pages, True, options, dropped)
            continue
        for page in range(pages):
            yield _Job(job.source, page, job.label, job.group)


def _set_aside(job: _Job, reason: str, bad: bool, options: PackOptions, dropped: list[dict[str, str]]) -> None:
    if bad and not options.skip_bad:
        raise UserError(f"{reason} (--skip-bad sets such files aside and goes on)")
    # The path would make the manifest depend on where the files lie.
    dropped.append({"source": job.source.name, "reason": reason.replace(str(job.source.path), "the file")})


def _write(
    folder: Path,
    jobs: Iterator[_Job],
    files: int,
    options: PackOptions,
    executor: Executor | None,
    dropped: list[dict[str, str]],
) -> tuple[list[Sample], Tally, list[Any]]:
    samples: list[Sample] = []
    tally = Tally()
    bar = Progress(files, "packing", "micrographs")
    with ShardWriter(folder, round(options.shard_mb * 2**20)) as writer:
        for job, converted in _converted(jobs, options, executor):
            bar.total += job.page > 0
            if converted.reason is not None:
                _set_aside(job, converted.reason, converted.bad, options, dropped)
            for tile in converted.tiles:
                key = job.source.stem + tile.ending
                if tally.is_new(tile, key, job.source.name, job.label, dropped):
                    samples.append(_add(writer, key, tile, job))
            bar.update()
    bar.close()
    _check_keys(samples)
    return samples, tally, writer.shards


def _converted(
    jobs: Iterator[_Job], options: PackOptions, executor: Executor | None
) -> Iterator[tuple[_Job, Converted]]:
    """The jobs in their order with what became of them; a few are converted ahead, so that memory stays bounded."""
    if executor is None:
        for job in jobs:
            yield job, convert(job.source.path, job.page, options)
        return
    ahead: deque[tuple[_Job, Future[Converted]]] = deque()
    window = 4 * executor._max_workers  # type: ignore[attr-defined]
    while True:
        for job in itertools.islice(jobs, window - len(ahead)):
            ahead.append((job, executor.submit(convert, job.source.path, job.page, options)))
        if not ahead:
            return
        job, future = ahead.popleft()
        yield job, future.result()


def _add(writer: ShardWriter, key: str, tile: Tile, job: _Job) -> Sample:
    facts = {"key": key, "source": job.source.name, "label": job.label, "group": job.group, **tile.facts}
    place = writer.add(key, SUFFIX, tile.image, json.dumps(facts, ensure_ascii=False, allow_nan=False).encode())
    y_x = tile.facts["pixel_size_nm"]
    return Sample(
        key=key,
        shard=place.shard,
        offset=place.offset,
        size=place.size,
        suffix=SUFFIX,
        label=job.label,
        group=job.group,
        pixel_size_nm=(y_x[0], y_x[1]) if y_x else None,
        height=tile.height,
        width=tile.width,
        source=job.source.name,
        xxh3=sample_hash(tile.image),
    )


def _check_keys(samples: list[Sample]) -> None:
    counts = Counter(sample.key.lower() for sample in samples)
    key, count = counts.most_common(1)[0] if counts else ("", 0)
    if count > 1:
        sources = sorted({s.source for s in samples if s.key.lower() == key})
        raise UserError(f"the files {', '.join(sources)} would share the key {key}: rename one")


def _write_manifest(
    folder: Path,
    samples: list[Sample],
    tally: Tally,
    shards: list[Any],
    options: PackOptions,
    dropped: list[dict[str, str]],
    other: dict[str, int],
    part: Part | None,
) -> None:
    data = index.to_bytes(samples)
    atomic.write_bytes(folder / INDEX_NAME, data)
    manifest = Manifest(
        shards=shards,
        index={"file": INDEX_NAME, "bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)},
        samples=len(samples),
        depth=options.depth,
        statistics=statistics(samples, tally, options.depth),
        options={
            **{k: v for k, v in asdict(options).items() if k != "skip_bad"},
            **({"part": asdict(part)} if part else {}),
        },
        dropped=dropped,
        provenance={
            "nanodist": __version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "other_files": other,
        },
    )
    atomic.write_json(folder / NAME, manifest.to_dict())


def _none_left(found: list[Source], dropped: list[dict[str, str]]) -> str:
    reason, count = Counter(entry["reason"] for entry in dropped).most_common(1)[0]
    return (
        f"none of the {len(found)} files can be packed; {count} of them: {reason} (such as {dropped[0]['source']}): "
        "choose other files, another --tile, or --tile none"
    )


@contextmanager
def _executor(workers: int | None, files: int) -> Iterator[Executor | None]:
    """A pool of processes, or ``None`` where one process does it."""
    if workers is not None and workers < 0:
        raise UserError(f"--workers is {workers}; it must be at least 0")
    if workers is None:
        workers = min(_cores(), files // _FILES_PER_WORKER)
    if workers <= 1:
        yield None
        return
    # Spawned: forking a process that runs threads (torch, a notebook) can hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _missing_parents(out: Path) -> list[Path]:
    """The folders above ``out`` that packing will make, the innermost first."""
    return [parent for parent in Path(os.path.abspath(out)).parents if not parent.exists()]
