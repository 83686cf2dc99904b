"""What Weights & Biases is given of a run: each step once, however often the run starts.

Offline, every start of a run makes a folder of its own, and nobody puts a step right that lies in two of them. So a
step is handed over only when a checkpoint covers it: no later start trains it again. Online, curves are live, and a
step that is trained again is left out. ``wandb/given`` in the run directory holds the last step that was handed over.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hpc import atomic, lineage
from hpc.lineage import Artifact
from hpc.run_dir import RunDir, metric_lines, read_metrics
from hpc.wandb_names import define_axes, renamed

WANTED_FILE = "wanted.json"


class WandbMirror:
    """W&B's one run of a run directory (its id is in ``wandb/run_id``); for rank 0.

    Args:
        run_dir: the run directory.
        mode: ``online`` or ``offline``.
        first_step: steps that the checkpoint holds which this start goes on from.
        wanted: ``project``, ``name``, ``group``, ``job_type`` and ``config`` of the run; ``inputs``, a function that
            gives the artifacts which it is made from; ``upload``, whether the files of checkpoints are sent.

    Raises:
        ImportError: W&B is not installed.
        Exception: whatever keeps W&B from starting.
    """

    def __init__(self, run_dir: RunDir, mode: str, first_step: int, wanted: Mapping[str, Any]) -> None:
        self._run_dir, self._live = run_dir, mode == "online"
        fresh = not _id_path(run_dir).exists()
        self._run = begin(run_dir, mode, wanted)
        _keep(run_dir, mode, wanted)
        self._given = -1 if fresh else self._given_before()
        self._remember(self._given)
        # What former starts drew, W&B has from them.
        self._shown: set[Path] = set() if fresh else self._pictures()
        history = read_metrics(run_dir.metrics_path)
        self._waiting = [line for line in history if self._given < line["step"] <= first_step]
        self._covered, self._upload = first_step, bool(wanted.get("upload"))
        self._traced(lambda: self._trace_back(wanted.get("inputs"), first_step))
        self.cover(first_step)

    def send(self, line: Mapping[str, Any]) -> None:
        """Hand one step's values over, now (online) or as soon as a checkpoint covers it."""
        if line["step"] <= self._given:
            return
        if self._live:
            self._run.log(renamed(line), step=line["step"])
            self._show(line["step"])
            self._remember(line["step"])
        else:
            self._waiting.append(dict(line))

    def cover(self, step: int) -> None:
        """No start will train the steps up to ``step`` again."""
        self._covered = max(self._covered, step)
        ready = [line for line in self._waiting if line["step"] <= step]
        if not ready:
            return
        self._waiting = self._waiting[len(ready) :]
        for line in ready:
            self._run.log(renamed(line), step=line["step"])
        self._show(ready[-1]["step"])
        self._given = ready[-1]["step"]
        self._remember(self._given)

    def finish(self, exit_code: int) -> None:
        """Name the last checkpoint and close W&B's run; what no checkpoint covers is not handed over."""
        if self._covered:
            self._traced(lambda: self._give_checkpoint(("final",) if exit_code == 0 else ()))
        self._run.finish(exit_code=exit_code)

    def _trace_back(self, inputs: Callable[[], Iterable[Artifact]] | None, first_step: int) -> None:
        for used in inputs() if inputs is not None else ():
            give(self._run, used, use=True)
        if first_step:
            self._give_checkpoint()  # the start that wrote it may have been killed before it told

    def _traced(self, tell: Callable[[], None]) -> None:
        """Curves matter more than where things come from."""
        try:
            tell()
        except Exception as error:  # W&B is no reason to lose a run
            print(f"warning: W&B: no lineage ({' '.join(str(error).split())}); the rest goes on", file=sys.stderr)

    def _give_checkpoint(self, aliases: Iterable[str] = ()) -> None:
        """Name the newest checkpoint that steps are covered by; its files are sent where that is wanted."""
        folder = self._run_dir.checkpoints / f"step-{self._covered:08d}"
        made = lineage.of_checkpoint(folder, self._run_dir.record()["fingerprint"])
        if made is not None:
            give(self._run, made, aliases=(f"step-{self._covered}", *aliases))
            if self._upload:
                give(self._run, made, files=folder, aliases=aliases)

    def _given_before(self) -> int:
        """The last step that former starts handed over."""
        if self._live:
            return int(self._run.starting_step) - 1
        try:
            return int(self._mark.read_text())
        except (OSError, ValueError):  # by a nanodist that kept no mark and handed every line over
            return max((line["step"] for line in metric_lines(self._run_dir.metrics_path)), default=-1)

    def _remember(self, step: int) -> None:
        if not self._live:
            atomic.write_text(self._mark, f"{step}\n")
            return
        # Online the server knows: this is for a later offline start, and worth no wait for a disk at every line.
        temporary = self._mark.with_name(".given.tmp")
        temporary.write_text(f"{step}\n")
        os.replace(temporary, self._mark)

    def _pictures(self) -> set[Path]:
        views = self._run_dir.report / "views.png"
        return {*self._run_dir.pictures.glob("*.png"), *([views] if views.is_file() else [])}

    @property
    def _mark(self) -> Path:
        return self._run_dir.wandb / "given"

    def _show(self, step: int) -> None:
        """Hand over the run directory's new pictures, ``NAME-STEP.png`` as ``NAME``."""
        new = sorted(self._pictures() - self._shown)
        if not new:
            return
        import wandb

        self._shown.update(new)
        named = {f"pictures/{path.stem.rpartition('-')[0] or path.stem}": path for path in new}
        self._run.log({name: wandb.Image(str(path)) for name, path in named.items()}, step=step)


def give(
    run: Any, artifact: Artifact, use: bool = False, aliases: Iterable[str] = (), files: Path | None = None
) -> None:
    """Name an artifact in W&B's run as one that it made, or one that it uses.

    The same files are the same version, so that each start may name it again. Nothing waits for the server.

    Args:
        run: W&B's.
        artifact: what to name.
        use: whether the run uses it.
        aliases: of this version.
        files: folder whose files are sent; ``None``: the artifact is a list of references.
    """
    import wandb

    name, kind = (
        (artifact.name, artifact.kind) if files is None else (f"{artifact.name}-files", f"{artifact.kind}-files")
    )
    made = wandb.Artifact(name, kind, description=artifact.said or None, metadata=dict(artifact.facts))
    if files is None:
        _refer(made, artifact)
    else:
        for one in artifact.files:
            made.add_file(str(files / one.name), name=one.name)
    if use:
        # What ``use_artifact`` does online with a new artifact; offline it refuses, though the record can hold it.
        run._log_artifact(made, aliases=list(aliases), is_user_created=True, use_after_commit=True)
    else:
        run.log_artifact(made, aliases=list(aliases))


def _refer(made: Any, artifact: Artifact) -> None:
    """Put references into W&B's artifact; its own way warns of every one, and leaves sizes out."""
    try:
        from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry
    except ImportError:  # moved by another W&B
        for name, address in artifact.references().items():
            made.add_reference(address, name=name, checksum=False)
        return
    for one, address in zip(artifact.files, artifact.references().values(), strict=True):
        told: dict[str, Any] = {"path": one.name, "ref": address, "digest": address, "size": one.size}
        made.manifest.add_entry(ArtifactManifestEntry(**told))


def _id_path(run_dir: RunDir) -> Path:
    return run_dir.wandb / "run_id"


def _keep(run_dir: RunDir, mode: str, wanted: Mapping[str, Any]) -> None:
    """For what is told of the run when it has ended."""
    names = ("project", "name", "group", "job_type", "config")
    kept = {"mode": mode, **{name: wanted[name] for name in names}}
    atomic.write_text(run_dir.wandb / WANTED_FILE, json.dumps(kept, default=str))


def begin(run_dir: RunDir, mode: str, wanted: Mapping[str, Any]) -> Any:
    """Start W&B's run of a run directory, the same one at every call.

    Args:
        run_dir, mode, wanted: see :class:`WandbMirror`.
    """
    import wandb

    path = _id_path(run_dir)
    fresh = not path.exists()
    run_id = secrets.token_hex(8) if fresh else path.read_text().strip()
    quiet: dict[str, Any] = {"silent": True, "console": "off", "init_timeout": 60.0}
    if "finish_timeout" in wandb.Settings.model_fields:  # younger than the oldest W&B that is supported
        quiet["finish_timeout"] = 120.0
    run = wandb.init(
        id=run_id,
        resume="allow",
        mode=mode,  # type: ignore[arg-type]
        dir=str(run_dir.path),
        project=wanted["project"],
        name=wanted["name"] or run_dir.path.resolve().name,
        group=wanted["group"] or None,
        job_type=wanted["job_type"] or None,
        config=dict(wanted["config"] or {}),
        settings=wandb.Settings(**quiet),
    )
    parent = (wanted["config"] or {}).get("parent.run_id")
    if parent and mode == "online":  # W&B warns of an address that an offline run has not
        # An address in the configuration can be clicked; runs of one project differ in their last word.
        run.config.update({"parent.url": f"{str(run.url).rpartition('/')[0]}/{parent}"}, allow_val_change=True)
    define_axes(run)
    if fresh:
        try:
            # Without its id on the disk, the next start would begin another run.
            atomic.write_text(path, run_id + "\n")
        except OSError:
            run.finish(exit_code=1)
            raise
    return run
