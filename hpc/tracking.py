"""What a run measures, written by rank 0 to ``metrics.jsonl`` and, where wanted, to Weights & Biases.

``metrics.jsonl`` is the record. W&B mirrors it under one run id for all starts; if W&B is missing or fails, one
warning is given and training goes on.
"""

from __future__ import annotations

import netrc
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlparse

from hpc import atomic
from hpc.config import option
from hpc.errors import UserError
from hpc.run_dir import MetricsWriter, RunDir, metric_lines, read_metrics

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
    group: str = option("", "W&B group.")


class Tracker:
    """Writes metrics on rank 0; on all other ranks every call does nothing.

    Args:
        run_dir: the prepared run directory.
        is_main: whether this is rank 0.
        mode: one of :data:`MODES`.
        project: W&B project.
        name: W&B name of the run; the run directory's name if empty.
        group: W&B group, such as a sweep.
        config: what W&B shows as the run's configuration.
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
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.mode = resolve_mode(mode)
        self._run: Any = None
        self._writer: MetricsWriter | None = None
        self._sent = -1
        if not is_main:
            self.mode = "disabled"
            return
        self._writer = MetricsWriter(run_dir.metrics_path)
        # The metrics file holds what every start logged, so W&B has, or is now given, all steps up to its last one;
        # a step that is trained again after a resume is not sent again.
        self._sent = max((line["step"] for line in metric_lines(run_dir.metrics_path)), default=-1)
        if self.mode != "disabled":
            self._start(run_dir, {"project": project, "name": name, "group": group, "config": config})

    def _start(self, run_dir: RunDir, wanted: Mapping[str, Any]) -> None:
        if self.mode == "online" and not has_api_key():
            # wandb.init would wait for somebody to type the key.
            self._warn("no API key (WANDB_API_KEY or wandb login); recording offline")
            self.mode = "offline"
        for mode in dict.fromkeys((self.mode, "offline")):
            try:
                self._run = _start_wandb(run_dir, mode, wanted)
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
        if self._run is None or values["step"] <= self._sent:
            return
        try:
            self._run.log(dict(values), step=values["step"])
        except Exception as error:  # W&B is no reason to lose a run
            self._warn(f"stopped ({error})")
            self._run = None

    def finish(self, exit_code: int = 0) -> None:
        """Close the files and W&B's run; calling it again does nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._run is not None:
            run, self._run = self._run, None
            try:
                run.finish(exit_code=exit_code)
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


def _start_wandb(run_dir: RunDir, mode: str, wanted: Mapping[str, Any]) -> Any:
    """W&B's one run of this run directory (its id is in ``wandb/run_id``), where a new one is given the history."""
    import wandb

    id_path = run_dir.wandb / "run_id"
    fresh = not id_path.exists()
    run_id = secrets.token_hex(8) if fresh else id_path.read_text().strip()
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
        config=dict(wanted["config"] or {}),
        settings=wandb.Settings(**quiet),
    )
    if fresh:
        try:
            # Without its id on the disk, the next start would begin another run.
            atomic.write_text(id_path, run_id + "\n")
        except OSError:
            run.finish(exit_code=1)
            raise
        for line in read_metrics(run_dir.metrics_path):
            run.log(line, step=line["step"])
    return run
