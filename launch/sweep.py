"""Sweeps: many jobs written as one grid, each known by its fingerprint, so that only what is missing is run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from hpc import atomic, config
from hpc.config import read_yaml
from hpc.errors import UserError
from launch import grid as grids
from launch.kinds import Inputs, Kind, Place, kind_of
from launch.reader import Reader
from launch.records import Job, SweepFolder
from launch.resources import SlurmResources

if TYPE_CHECKING:
    import pandas

    from launch.queue import How

_KEYS = ("job", "recipe", "name", "folder", "overrides", "grid", "zip", "list", "random", "where")
_EXAMPLES = 3


@dataclass(frozen=True)
class Preview:
    """What a submission would do.

    Attributes:
        jobs: all of the sweep.
        missing: those that would run; the others are done, or in the queue.
        allocations: entries of the queue that they would make.
        gpu_hours: by what finished jobs of this sweep took; ``None`` where none is done.
        gpu_hours_most: if every allocation took the whole of its time limit.
        examples: full recipes of a few.
    """

    jobs: int
    missing: int
    allocations: int
    gpu_hours: float | None
    gpu_hours_most: float
    examples: list[str]

    def text(self) -> str:
        """For people."""
        hours = "not known before one is done" if self.gpu_hours is None else f"about {self.gpu_hours:.1f}"
        lines = [f"{self.jobs} jobs, of which {self.missing} would run, in {self.allocations} allocations"]
        lines.append(f"GPU hours: {hours}; at most {self.gpu_hours_most:.1f} by the time limit")
        return "\n".join([*lines, *(f"\n--- example {i + 1}\n{text}" for i, text in enumerate(self.examples))])


class Sweep:
    """Many jobs of one kind.

    Args:
        kind: the command of nanodist: pretrain, finetune, probe, or pairvae (trained, then evaluated).
        recipe: a YAML file, or the name of a packaged recipe.
        grid, zip, list, random, where: see :func:`launch.grid.points`. A name is a key of the recipe (``data.store``),
            the last part of one where that is unique (``labels_per_class``), or ``encoder`` and ``store``.
        overrides: values that all jobs share, as a mapping by name or as ``key=value`` texts.
        name: of the sweep, and of its folder.
        folder: where sweeps live.
        columns: more of what the table says of each job, the same for all.

    Raises:
        UserError: anything in it that cannot be; the recipes themselves are read by :meth:`jobs`.
    """

    def __init__(
        self,
        kind: str,
        recipe: str = "",
        grid: Mapping[str, Sequence[Any]] | None = None,
        zip: Mapping[str, Sequence[Any]] | None = None,
        list: Sequence[Mapping[str, Any]] | None = None,
        random: Mapping[str, Any] | None = None,
        where: Sequence[str | Callable[[grids.Point], bool]] = (),
        overrides: Mapping[str, Any] | Sequence[str] = (),
        name: str = "sweep",
        folder: str | Path = "sweeps",
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(f"sweep: name is '{name}'; letters, digits, '.', '_' and '-' only")
        self.kind: Kind = kind_of(kind)
        self.recipe, self.shared = recipe, overrides
        # A file is copied when it is submitted, since jobs in the queue should not follow its edits.
        self._text = Path(recipe).read_bytes() if recipe and Path(recipe).is_file() else None
        self.points = grids.points(grid, zip, list, random, where)
        self.folder = SweepFolder(Path(folder) / name)
        self.columns = dict(columns or {})
        self.group, self.parent = "", ""  # in W&B: another name than the sweep's, and the run that its jobs follow
        self._jobs: Sequence[Job] | None = None
        self._helpers: dict[str, Job] = {}
        self._keys: dict[str, str] = {}
        self._read: Reader | None = None
        self._inputs = Inputs()

    @classmethod
    def from_yaml(cls, path: str | Path) -> Sweep:
        """A sweep from a file whose keys are ``job``, ``recipe`` and the arguments of the class.

        Raises:
            UserError: no such file, or a key or value that cannot be.
        """
        values = read_yaml(path, "sweep")
        unknown = [key for key in values if key not in _KEYS]
        if unknown or "job" not in values:
            what = f"key '{unknown[0]}' does not exist" if unknown else "key 'job' is missing"
            raise UserError(f"sweep {path}: {what}; allowed: {', '.join(_KEYS)}")
        return cls(values.pop("job"), **{"name": Path(path).stem, **values})

    def jobs(self) -> Sequence[Job]:
        """All jobs, in the order of the points; two points with one recipe are one job.

        Raises:
            UserError: a recipe that cannot be, a store or an encoder that is not there; the point is named.
        """
        if self._jobs is None:
            known = self._known()
            found: dict[str, Job] = {}
            for point in self.points:
                job = self._job(point, known)
                found.setdefault(job.fingerprint, job)
            self._jobs = [*found.values()]
        return self._jobs

    def helpers(self) -> Sequence[Job]:
        """What jobs of the sweep need to be done before them; errors as for :meth:`jobs`."""
        self.jobs()
        return [*self._helpers.values()]

    def check(self) -> None:
        """Read all recipes, without a look at stores and encoders, which may not be there yet.

        Raises:
            UserError: a recipe that cannot be; the point is named.
        """
        known = self._known()
        for point in self.points:
            try:
                self._reader.read(self._overrides(point, known))
            except UserError as error:
                raise self._at(point, error) from None

    def helper_count(self) -> int:
        """How many helpers there will be at most, before the encoder is there that they are for."""
        known = self._known()
        recipes = (self._reader.read(self._overrides(point, known)) for point in self.points)
        return len({store for recipe in recipes for store in self.kind.embedded(recipe)})

    def plan(self, part: str) -> None:
        """Write all jobs as a part of the sweep's list, for allocations that were submitted before; see there."""
        self.folder.make()
        self.keep_recipe()
        self.folder.write_part(part, self.jobs(), self.helpers())

    def _known(self) -> Mapping[str, Any]:
        """All keys of a recipe of the kind, by their dotted names."""
        cls, _ = self.kind.parts(self.recipe)
        return _keys(cls)

    @property
    def _reader(self) -> Reader:
        if self._read is None:
            self._read = Reader(*self.kind.parts(self.recipe))
        return self._read

    def _shared(self, known: Mapping[str, Any]) -> list[str]:
        if isinstance(self.shared, Mapping):
            return [f"{self.kind.key(name, known)}={_text(value)}" for name, value in self.shared.items()]
        return [*self.shared]

    def _overrides(self, point: grids.Point, known: Mapping[str, Any]) -> list[str]:
        return [
            *self._shared(known),
            *(f"{self.kind.key(name, known)}={_text(value)}" for name, value in point.items()),
        ]

    def _at(self, point: grids.Point, error: UserError) -> UserError:
        said = ", ".join(f"{name}={value}" for name, value in point.items())
        return UserError(f"sweep {self.folder.name}: at {said or 'its only point'}: {error}")

    def _job(self, point: grids.Point, known: Mapping[str, Any]) -> Job:
        overrides = self._overrides(point, known)
        try:
            recipe = self._reader.read(overrides)
            fingerprint = self.kind.identity(recipe, self._inputs)
            helpers = self.kind.helpers(recipe, self.folder.path, self._inputs)
        except UserError as error:
            raise self._at(point, error) from None
        self._helpers |= {helper.fingerprint: helper for helper in helpers}
        place = Place(self.group or self.folder.name, self.folder.path, self.folder.run_dir(fingerprint), self.parent)
        arguments = self.kind.arguments(recipe, self._source(), overrides, place)
        told = {name: _plain(value) for name, value in {**self.columns, **point}.items()}
        needs, then = [helper.fingerprint for helper in helpers], self.kind.then(place.run_dir)
        return Job(fingerprint, told, arguments, needs, then)

    def _source(self) -> str:
        """The recipe that jobs read: a packaged name, or the copy of a file."""
        if self._text is None:
            return self.recipe
        return str(self.folder.path / f"recipe-{hashlib.sha256(self._text).hexdigest()[:12]}.yaml")

    def missing(self, active: frozenset[str] = frozenset()) -> Sequence[Job]:
        """Jobs that are not done and not among the ``active`` ones: new, failed, cancelled or lost."""
        return [
            job
            for job in self.jobs()
            if job.fingerprint not in active and self.folder.record(job.fingerprint).state != "done"
        ]

    def preview(self, resources: SlurmResources | None = None, pack: int = 1, side_by_side: int = 1) -> Preview:
        """What :meth:`submit` would do, without doing it (a *dry run*)."""
        from launch.queue import active_jobs

        resources = resources or SlurmResources()
        missing = self.missing(active_jobs(self.folder))
        allocations = -(-len(missing) // max(1, pack))
        gpus = resources.gpus_per_node * resources.nodes
        done = [r.seconds for job in self.jobs() if (r := self.folder.record(job.fingerprint)).state == "done"]
        each = sum(done) / len(done) if done else None
        return Preview(
            jobs=len(self.jobs()),
            missing=len(missing),
            allocations=allocations,
            gpu_hours=None if each is None else each * len(missing) * gpus / max(1, side_by_side) / 3600,
            gpu_hours_most=allocations * gpus * resources.time_min / 60,
            examples=[self._example(job) for job in missing[:_EXAMPLES]],
        )

    def _example(self, job: Job) -> str:
        overrides = [text for text in job.arguments if "=" in text and not text.startswith("-")]
        if self.kind.name == "probe":
            return "nanodist " + " ".join(job.arguments)
        return config.to_yaml(self._reader.read(overrides))

    def submit(
        self,
        cluster: str = "slurm",
        resources: SlurmResources | None = None,
        max_parallel: int = 64,
        pack: int = 1,
        side_by_side: int = 1,
    ) -> Sequence[Any]:
        """Run what is missing.

        Args:
            cluster: ``"slurm"``, ``"local"`` (processes of this machine) or ``"debug"`` (this process; returns when all
                is done).
            resources: of each allocation.
            max_parallel: allocations at a time.
            pack: jobs an allocation.
            side_by_side: of these, how many run at once, sharing the allocation's cores and GPUs.

        Returns:
            submitit's jobs, one an allocation.

        Raises:
            UserError: as :meth:`jobs`, or the cluster takes none.
        """
        from launch.queue import How, active_jobs

        how = How(cluster, resources or SlurmResources(), max_parallel, pack, side_by_side)
        return self._submit(self.missing(active_jobs(self.folder)), how)

    def retry(
        self,
        fingerprints: Sequence[str] = (),
        cluster: str = "slurm",
        resources: SlurmResources | None = None,
        max_parallel: int = 64,
        pack: int = 1,
        side_by_side: int = 1,
    ) -> Sequence[str]:
        """Submit jobs that failed, were cancelled or are lost again; the other arguments as for :meth:`submit`.

        Args:
            fingerprints: of the jobs; none: all of these.
            cluster, resources, max_parallel, pack, side_by_side: see there.

        Returns:
            The fingerprints of those that were submitted.

        Raises:
            UserError: a fingerprint that the sweep has not; otherwise as :meth:`submit`.
        """
        from launch.queue import How, active_jobs

        known = {job.fingerprint: job for job in self.jobs()}
        for name in fingerprints:
            if name not in known:
                raise UserError(f"sweep {self.folder.name} has no job {name}; collect names them")
        active = active_jobs(self.folder)
        jobs = [
            job
            for name, job in known.items()
            if name not in active
            and (not fingerprints or name in fingerprints)
            and self.folder.record(name).state not in ("done", "queued")
        ]
        self._submit(jobs, How(cluster, resources or SlurmResources(), max_parallel, pack, side_by_side))
        return [job.fingerprint for job in jobs]

    def _submit(self, jobs: Sequence[Job], how: How) -> Sequence[Any]:
        from launch.queue import submit_jobs

        self.folder.make()
        self.keep_recipe()
        self.folder.add_helpers(self.helpers())
        self.folder.add_jobs(jobs)
        for job in jobs:
            self.folder.cancel_mark(job.fingerprint).unlink(missing_ok=True)
            self.folder.write(job.fingerprint, self.folder.record(job.fingerprint).anew())
        return submit_jobs(self.folder, jobs, how)

    def keep_recipe(self) -> str:
        """Copy a recipe that is a file into the sweep's folder; the source that jobs read, copy or packaged name."""
        if self._text is not None:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            atomic.write_bytes(Path(self._source()), self._text)
        return self._source()

    def collect(self) -> pandas.DataFrame:
        """One tidy table of all jobs, also of those that are not done; see :func:`launch.collect.collect`."""
        from launch.collect import collect

        return collect(self.folder, self.jobs(), self.kind)


def _keys(cls: Any, prefix: str = "") -> dict[str, None]:
    """The dotted keys of a class of recipes, without its sections themselves."""
    found: dict[str, None] = {}
    hints = get_type_hints(cls)
    for one in dataclasses.fields(cls):
        inner = hints[one.name]
        found |= _keys(inner, f"{prefix}{one.name}.") if dataclasses.is_dataclass(inner) else {prefix + one.name: None}
    return found


def _plain(value: Any) -> Any:
    """A value as JSON has it: paths as text, numbers of numpy as Python's."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _text(value: Any) -> str:
    """A value as the right side of an override, which is read as YAML."""
    # JSON is YAML, and quotes whatever could be read as something else.
    return json.dumps(_plain(value))
