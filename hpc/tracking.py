"""What a run measures, written by rank 0 to ``metrics.jsonl`` and, where wanted, to Weights & Biases.

``metrics.jsonl`` is the record. W&B mirrors it under one run id for all starts; if W&B is missing or fails, one
warning is given and training goes on.
"""

from __future__ import annotations

import netrc
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlparse

from hpc.config import option
from hpc.errors import UserError
from hpc.lineage import Artifact
from hpc.run_dir import MetricsWriter, RunDir
from hpc.wandb_mirror import WandbMirror

MODES = ("auto", "online", "offline", "disabled")


def resolve_mode(mode: str, environ: Mapping[str, str] = os.environ) -> str:
    """``"online"``, ``"offline"`` or ``"disabled"`` for a recipe's ``mode``.

    ``auto`` follows WANDB_MODE if it is set, else goes online where there is an API key (WANDB_API_KEY or netrc) and
    offline where there is none. A mode that is named outright wins over WANDB_MODE.

    Raises:
        UserError: an unknown mode.
    """
    source = "tracking mode"
    if mode == "auto" and environ.get("WANDB_MODE"):
        mode, source = environ["WANDB_MODE"], "WANDB_MODE"
        mode = {"dryrun": "offline", "shared": "online"}.get(mode, mode)
    if mode not in MODES:
        raise UserError(f"{source} is '{mode}'; allowed: {', '.join(MODES)}")
    if mode == "auto":
        return "online" if has_api_key(environ) else "offline"
    return mode


def has_api_key(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether W&B could log in without asking."""
    if environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(environ.get("NETRC") or Path.home() / ("_netrc" if os.name == "nt" else ".netrc"))
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@dataclass(frozen=True)
class TrackingConfig:
    """The section ``tracking``; a *how*."""

    mode: Literal["auto", "online", "offline", "disabled"] = option("auto", "Weights & Biases; auto as its login says.")
    project: str = option("nanodist", "W&B project.")
    name: str = option("", "W&B name of the run; empty: the run directory's.")
    group: str = option("", "W&B group, such as a sweep's name.")
    job_type: str = option("", "W&B job type; empty: pretrain, finetune, ...")
    parent: str = option("", "Run directory of the run that this one follows, such as its pretraining's; W&B links it.")
    upload_checkpoints: bool = option(False, "Send the files of the last checkpoint of each start to W&B; else names.")


def parent_run(tracking: TrackingConfig) -> dict[str, str]:
    """What W&B shows of the run before this one: its folder and, where W&B has it too, its id there."""
    if not tracking.parent:
        return {}
    try:
        number = (RunDir(tracking.parent).wandb / "run_id").read_text().strip()
    except OSError:
        number = ""
    return {"parent.run_dir": tracking.parent, **({"parent.run_id": number} if number else {})}


class Tracker:
    """Writes metrics on rank 0; on all other ranks every call does nothing.

    Args:
        run_dir: the prepared run directory.
        is_main: whether this is rank 0.
        mode: one of :data:`MODES`.
        project: W&B project.
        name: W&B name of the run; the run directory's name if empty.
        group: W&B group, such as a sweep.
        job_type: W&B job type.
        first_step: steps that the checkpoint holds which this start goes on from.
        config: what W&B shows as the run's configuration.
        inputs: gives the artifacts that the run is made from, such as its store; called only where W&B is told.
        upload: send the files of the last checkpoint of each start, and not their names and hashes alone.
    """

    def __init__(
        self,
        run_dir: RunDir,
        *,
        is_main: bool,
        mode: str = "auto",
        project: str = "nanodist",
        name: str = "",
        group: str = "",
        job_type: str = "",
        first_step: int = 0,
        config: Mapping[str, Any] | None = None,
        inputs: Callable[[], Iterable[Artifact]] | None = None,
        upload: bool = False,
    ) -> None:
        self.mode = resolve_mode(mode)
        self._mirror: WandbMirror | None = None
        self._writer: MetricsWriter | None = None
        if not is_main:
            self.mode = "disabled"
            return
        self._writer = MetricsWriter(run_dir.metrics_path)
        if self.mode != "disabled":
            wanted: dict[str, Any] = {"project": project, "name": name, "group": group, "job_type": job_type}
            wanted |= {"config": config, "inputs": inputs, "upload": upload}
            self._start(run_dir, first_step, wanted)

    def _start(self, run_dir: RunDir, first_step: int, wanted: Mapping[str, Any]) -> None:
        if self.mode == "online" and not has_api_key():
            # wandb.init would wait for somebody to type the key.
            self._warn("no API key (WANDB_API_KEY or wandb login); recording offline")
            self.mode = "offline"
        for mode in dict.fromkeys((self.mode, "offline")):
            try:
                self._mirror = WandbMirror(run_dir, mode, first_step, wanted)
                self.mode = mode
                return
            except ImportError:
                self._warn("not installed (pip install nanodist[train])")
                break
            except Exception as error:  # W&B is no reason to lose a run
                self._warn(f"cannot start {mode} ({error})")
        self.mode = "disabled"

    def log(self, values: Mapping[str, Any]) -> None:
        """Record one step's ``values``, among them the whole number ``step``."""
        if self._writer is None:
            return
        self._writer.write(values)
        self._mirrored(lambda mirror: mirror.send(values))

    def cover(self, step: int) -> None:
        """A checkpoint holds ``step`` steps, which no start will train again."""
        self._mirrored(lambda mirror: mirror.cover(step))

    def _mirrored(self, do: Callable[[WandbMirror], None]) -> None:
        if self._mirror is None:
            return
        try:
            do(self._mirror)
        except Exception as error:  # W&B is no reason to lose a run
            self._warn(f"stopped ({error})")
            self._mirror = None

    def finish(self, exit_code: int = 0) -> None:
        """Close the files and W&B's run; calling it again does nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._mirror is not None:
            mirror, self._mirror = self._mirror, None
            try:
                mirror.finish(exit_code)
            except Exception as error:  # W&B is no reason to lose a run
                self._warn(f"did not finish ({error})")

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(exit_code=0 if kind is None else 1)

    @staticmethod
    def _warn(text: str) -> None:
        print(f"warning: W&B: {' '.join(text.split())}; metrics.jsonl goes on", file=sys.stderr)
