"""What is made of a run when it has ended (an export, a probe) is told to W&B under the run's own id.

Offline this is one more record beside those of the starts, which ``nanodist sync`` sends like them.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hpc.lineage import Artifact
from hpc.run_dir import RunDir, metric_lines
from hpc.tracking import has_api_key
from hpc.wandb_mirror import WANTED_FILE, begin, give


def has(path: Path) -> bool:
    """Whether W&B was told of the run in ``path`` (a run directory, or a checkpoint in one)."""
    return (_home(path).wandb / WANTED_FILE).is_file()


def _home(path: Path) -> RunDir:
    return RunDir(path.parent.parent if path.parent.name == "checkpoints" else path)


def tell(
    path: Path,
    outputs: Callable[[], Iterable[Artifact]] | None = None,
    figures: Mapping[str, Any] | None = None,
    pictures: Mapping[str, bytes] | None = None,
) -> bool:
    """Add to W&B's run of a run directory; whether it was added.

    Nothing happens where W&B does not have the run (or ``path`` is none), and one warning is given where W&B fails, or
    a start of the run is still going: two processes must not write one run.

    Args:
        path: run directory, or a checkpoint in one.
        outputs: gives the artifacts that were made of the run.
        figures: name -> number, for W&B's summary of the run.
        pictures: name -> PNG.
    """
    run_dir = _home(path)
    try:
        wanted = json.loads((run_dir.wandb / WANTED_FILE).read_text())
    except (OSError, ValueError):
        return False
    try:
        if any(start["reason"] is None for start in run_dir.record()["starts"][-1:]):
            _warn(f"{path} is still going, or was killed; this is not added to it")
            return False
        mode = "online" if wanted["mode"] == "online" and has_api_key() else "offline"
        run = begin(run_dir, mode, wanted)
        try:
            for one in outputs() if outputs is not None else ():
                give(run, one)
            if figures:
                run.summary.update(dict(figures))
            if pictures:
                _show(run, run_dir, pictures)
        finally:
            run.finish(exit_code=0)
    except Exception as error:  # whatever W&B says, what was made is there
        _warn(f"not told ({error})")
        return False
    return True


def _show(run: Any, run_dir: RunDir, pictures: Mapping[str, bytes]) -> None:
    import wandb

    last = max((line["step"] for line in metric_lines(run_dir.metrics_path)), default=0)
    drawn = {name: wandb.Image(_opened(data)) for name, data in pictures.items()}
    run.log({**drawn, "step": last}, step=max(last + 1, int(run.starting_step)))


def _opened(png: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(png))


def _warn(text: str) -> None:
    print(f"warning: W&B: {' '.join(text.split())}", file=sys.stderr)
