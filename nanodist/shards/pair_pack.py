"""``pack --pairs``: patterns on one q grid and micrographs, into a store that appears once it is whole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import xxhash

from hpc import atomic
from hpc.errors import UserError
from hpc.progress import track
from nanodist._version import __version__
from nanodist.micrographs import count_micrographs
from nanodist.scattering.frame import Frame
from nanodist.scattering.pattern import Pattern, QGrid
from nanodist.scattering.read import read_frame
from nanodist.scattering.regrid import regrid
from nanodist.shards.convert import PackOptions, convert
from nanodist.shards.manifest import NAME, ShardEntry
from nanodist.shards.pair_manifest import Item, Member, PairManifest
from nanodist.shards.pair_store import npy_header
from nanodist.shards.pair_table import Row, read_table
from nanodist.shards.parallel import results
from nanodist.shards.tar import BLOCK, member, shard_name, write_shard

GRID_SIZE = 192
_DIGITS = 3


@dataclass(frozen=True)
class PairOptions:
    """How pairs become items; stored in the manifest.

    Attributes:
        grid_size: pixels a side of the q grid.
        q_max_inv_nm: |q_x| at the edge of the grid; None takes the largest that every pattern reaches on both axes.
        unpaired: what to do with rows that have one half only: ``error``, ``keep`` or ``skip``.
        bars: ``keep``, ``cut`` off or ``mask`` (paint over) the information bars of micrographs.
        pixel_size_nm: bring every micrograph to pixels of this size; None leaves each its own.
        normalise: of micrographs, as in :class:`~nanodist.shards.convert.PackOptions`.
        shard_mb: size of a shard in MiB.
        skip_bad: set rows that cannot be read aside instead of stopping at the first.

    Raises:
        UserError: an impossible value.
    """

    grid_size: int = GRID_SIZE
    q_max_inv_nm: float | None = None
    unpaired: str = "error"
    bars: str = "keep"
    pixel_size_nm: float | None = None
    normalise: str = "auto"
    shard_mb: float = 128.0
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if not 16 <= self.grid_size <= 4096:
            raise UserError(f"--grid-size is {self.grid_size}; it must be 16 to 4096 pixels")
        if self.q_max_inv_nm is not None and not (self.q_max_inv_nm > 0 and math.isfinite(self.q_max_inv_nm)):
            raise UserError(f"--q-max-inv-nm is {self.q_max_inv_nm}; it must be a number of 1/nm above 0")
        self.of_micrographs()

    def of_micrographs(self) -> PackOptions:
        """The options by which micrographs are read, whole and at 8 bits."""
        return PackOptions(
            tile=None,
            encoding="png",
            empty_tiles="keep",
            near_duplicates="keep",
            bars=self.bars,
            pixel_size_nm=self.pixel_size_nm,
            normalise=self.normalise,
            shard_mb=self.shard_mb,
        )


@dataclass(frozen=True)
class _Made:
    """The members of one item, and what the manifest says of it; or why there is none."""

    row: Row
    reason: str | None = None
    saxs: bytes | None = None
    sem: bytes | None = None
    facts: bytes = b""
    kind: str | None = None
    middle: float | None = None
    size_px: tuple[int, int] | None = None
    pixel_size_nm: tuple[float, float] | None = None


def pack_pairs(table: Path, out: Path, options: PairOptions, workers: int = 1) -> tuple[PairManifest, list[str]]:
    """Pack the pairs of ``table`` into the store ``out``; gives its manifest, and columns that were not used.

    Args:
        table: see :func:`nanodist.shards.pair_table.read_table`.
        out: folder of the store, new or empty; it appears once it is whole.
        options: grid, and how micrographs are read.
        workers: processes; they change the time and no byte.

    Raises:
        UserError: a table or a file that cannot be used, a pattern without geometry or of grazing incidence, patterns
            of counts and of reduced data together, ``out`` in use, a full disk.
    """
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: choose another --out, or remove it")
    listed = read_table(table, options.unpaired)
    groups = [list(rows) for _, rows in groupby(listed.rows, key=lambda row: row.sample)]
    grid = QGrid(options.grid_size, options.q_max_inv_nm or _common_q_max(groups, options, workers))
    work = partial(_make_sample, grid=grid, options=options)
    try:
        with atomic.directory(out) as root:
            made = track(results(work, groups, workers), len(groups), "packing", "specimens")
            writer = _Writer(root, round(options.shard_mb * 2**20))
            for item in (one for some in made for one in some):
                writer.add(item)
            manifest = writer.finish(grid, options, listed.dropped)
            atomic.write_json(root / NAME, manifest.to_dict())
    except OSError as error:
        raise UserError(
            f"cannot write the store {out} ({error.strerror or error}): choose a place with room that you may write to"
        ) from error
    return manifest, listed.unused


def _common_q_max(groups: Sequence[list[Row]], options: PairOptions, workers: int) -> float:
    """The largest q that every pattern reaches along both axes, in three digits."""
    reached = [q for some in results(partial(_reach, skip=options.skip_bad), groups, workers) for q in some]
    if not reached:
        return 1.0  # no pattern at all: no pixel of this grid is ever used
    lowest = min(reached)
    step = 10.0 ** (math.floor(math.log10(lowest)) + 1 - _DIGITS)
    return float(f"{math.floor(lowest / step * (1 + 1e-12)) * step:.{_DIGITS}g}")


def _reach(rows: list[Row], skip: bool) -> list[float]:
    reached = []
    for row in _once(rows):
        try:
            frame = _frame(row)
            q_y, q_x = frame.q()
            reached.append(float(min(np.abs(q_y[frame.mask]).max(), np.abs(q_x[frame.mask]).max())))
        except UserError:
            if not skip:
                raise
    return reached


def _once(rows: list[Row]) -> Iterator[Row]:
    """A row of each pattern."""
    seen = set()
    for row in rows:
        if row.saxs is not None and (row.saxs, row.given.frame) not in seen:
            seen.add((row.saxs, row.given.frame))
            yield row


def _frame(row: Row) -> Frame:
    assert row.saxs is not None
    frame = read_frame(row.saxs, row.given)
    frame.require_measured()
    return frame


def _make_sample(rows: list[Row], grid: QGrid, options: PairOptions) -> list[_Made]:
    """The items of one specimen, whose pattern is put on the grid once."""
    patterns: dict[Any, tuple[Frame, Pattern]] = {}
    made = []
    for row in rows:
        try:
            made.append(_make(row, grid, options, patterns))
        except UserError as error:
            if not options.skip_bad:
                raise
            made.append(_Made(row, str(error)))
    return made


def _make(row: Row, grid: QGrid, options: PairOptions, patterns: dict[Any, tuple[Frame, Pattern]]) -> _Made:
    facts: dict[str, Any] = {"key": row.key, "sample": row.sample, "truth": row.truth, "saxs": None, "sem": None}
    values: dict[str, Any] = {}
    if row.saxs is not None:
        place = (row.saxs, row.given.frame)
        if place not in patterns:
            frame = _frame(row)
            patterns[place] = frame, regrid(frame, grid)
        frame, pattern = patterns[place]
        facts["saxs"] = _saxs_facts(row, frame, pattern)
        values |= {"saxs": pattern_bytes(pattern), "kind": pattern.kind, "middle": _middle(pattern)}
    if row.sem is not None:
        values |= _sem(row, options, facts)
    text = json.dumps(facts, indent=1, sort_keys=True, allow_nan=False, default=str) + "\n"
    return _Made(row, facts=text.encode(), **values)


def pattern_bytes(pattern: Pattern) -> bytes:
    """An NPY file, float32 (1 or 2, size, size): intensity and, of reduced data, sigma; NaN where not measured."""
    planes = [pattern.intensity] if pattern.kind == "counts" else [pattern.intensity, pattern.sigma]
    values = np.where(pattern.mask, np.stack([np.asarray(plane, "<f4") for plane in planes]), np.float32(np.nan))
    return npy_header(values.shape) + values.astype("<f4").tobytes()


def _middle(pattern: Pattern) -> float:
    """The median of what was measured; of the positive part, where most of it is not positive."""
    measured = pattern.intensity[pattern.mask].astype(np.float64)
    middle = float(np.median(measured))
    above = measured[measured > 0]
    return middle if middle > 0 else float(np.median(above)) if above.size else math.nan


def _saxs_facts(row: Row, frame: Frame, pattern: Pattern) -> dict[str, Any]:
    return {
        "source": row.saxs_name,
        "file_xxh3": _file_hash(row.saxs),
        "kind": pattern.kind,
        "setup": frame.setup,
        "geometry": frame.geometry.as_dict() if frame.geometry else None,
        "corrections": dict(frame.corrections),
        "masked_px": dict(frame.masked),
        "measured_share": round(float(pattern.mask.mean()), 6),
        "file": {key: value for key, value in frame.metadata.items() if isinstance(value, str | int | float | bool)},
    }


def _sem(row: Row, options: PairOptions, facts: dict[str, Any]) -> dict[str, Any]:
    """The micrograph, whole, with its bars and its pixel size as ``pack`` handles them."""
    assert row.sem is not None
    pages = count_micrographs(row.sem)
    if pages != 1:
        raise UserError(f"{row.sem} holds {pages} images, and a pair has one: save the one that is meant as a file")
    converted = convert(row.sem, 0, options.of_micrographs(), row.pixel_size)
    if converted.reason is not None:
        raise UserError(converted.reason if str(row.sem) in converted.reason else f"{row.sem}: {converted.reason}")
    tile = next(iter(converted.tiles))
    if tile.height * tile.width * tile.total_of_squares == tile.total**2:  # type: ignore[union-attr]
        raise UserError(f"{row.sem} is without contrast, all its pixels have one value: leave it out")
    size = tile.facts["pixel_size_nm"]  # type: ignore[union-attr]
    if size is None:
        raise UserError(
            f"{row.sem} states no pixel size, so its structure has no length: add a column pixel_size_nm to the table"
        )
    kept = ("pixel_size_nm", "pixel_size_source", "bars", "cut_to_px", "resampled_from_nm", "scaling", "file")
    own = tile.facts  # type: ignore[union-attr]
    facts["sem"] = {"source": row.sem_name, **{name: own[name] for name in kept if own.get(name) is not None}}
    return {"sem": tile.image, "size_px": (tile.height, tile.width), "pixel_size_nm": (size[0], size[1])}  # type: ignore[union-attr]


def _file_hash(path: Path | None) -> str:
    assert path is not None
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


class _Writer:
    """Items to shards, in their order."""

    def __init__(self, root: Path, shard_bytes: int) -> None:
        self.root, self.shard_bytes = root, shard_bytes
        self.shards: list[ShardEntry] = []
        self.items: list[Item] = []
        self.dropped: list[dict[str, str]] = []
        self.kinds: dict[str, str] = {}
        self.middles: list[float] = []
        self._blocks: list[bytes] = []
        self._length = 0
        self._count = 0

    def add(self, made: _Made) -> None:
        """The next item."""
        row = made.row
        if made.reason is not None:
            self.dropped.append({"source": row.name, "reason": made.reason})
            return
        if made.kind is not None:
            self._check_kind(made.kind, row)
            if made.middle is not None and math.isfinite(made.middle):
                self.middles.append(made.middle)
        data = {"saxs.npy": made.saxs, "sem.png": made.sem, "json": made.facts}
        whole = sum(len(part) + 2 * BLOCK for part in data.values() if part is not None)
        if self._blocks and self._length + whole > self.shard_bytes:
            self._flush()
        places = {name: self._member(f"{row.key}.{name}", part) for name, part in data.items()}
        height, width = made.size_px or (None, None)
        stated = places["json"]
        assert stated is not None
        self.items.append(
            Item(row.key, row.sample, len(self.shards), places["saxs.npy"], places["sem.png"], stated, height, width,
                 made.pixel_size_nm)
        )  # fmt: skip
        self._count += 1

    def finish(self, grid: QGrid, options: PairOptions, dropped: list[dict[str, str]]) -> PairManifest:
        """The manifest, once all is written."""
        if not self.items:
            example = self.dropped[0]["reason"] if self.dropped else "the table is empty"
            raise UserError(f"no pair is left to pack; the first was set aside since {example}")
        self._flush()
        return PairManifest(
            grid=grid,
            kind=next(iter(self.kinds), "counts"),
            reference=float(np.median(self.middles)) if self.middles else 1.0,
            shards=self.shards,
            items=self.items,
            options={**{k: v for k, v in asdict(options).items() if k != "skip_bad"}},
            dropped=[*dropped, *self.dropped],
            provenance={"nanodist": __version__, "numpy": np.__version__, "pillow": PIL.__version__},
        )

    def _check_kind(self, kind: str, row: Row) -> None:
        first = self.kinds.setdefault(kind, row.saxs_name)
        if len(self.kinds) > 1:
            (one, its), (other, others) = self.kinds.items()
            raise UserError(
                f"{its} holds {one} and {others} {other}, which have no common scale: pack them into stores of their "
                "own, or state the column kind"
            )
        assert first

    def _member(self, name: str, data: bytes | None) -> Member | None:
        if data is None:
            return None
        block = member(name, data)
        place = Member(self._length + BLOCK, len(data), xxhash.xxh3_64_hexdigest(data))
        self._blocks.append(block)
        self._length += len(block)
        return place

    def _flush(self) -> None:
        if self._blocks:
            path = self.root / shard_name(len(self.shards))
            self.shards.append(write_shard(path, self._count, self._blocks))
        self._blocks, self._length, self._count = [], 0, 0
