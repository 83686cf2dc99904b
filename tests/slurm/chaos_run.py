"""One training job on the test cluster, and what its ranks say about themselves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.run_dir import metric_lines, read_metrics
from tests.slurm.cluster import ENDED, Cluster
from tests.slurm.namespaces import ClusterError, until

ROOT = Path(__file__).resolve().parents[2]
EVERY_STEPS = 20
# BatchNorm over the whole batch, since this is what 1, 2, 3 and 4 ranks can all do.
RECIPE = {
    "encoder": {"trunk": "resnet10t", "normalise": "image"},
    "projector": {"widths": [128, 64]},
    "views": {"size_px": 32, "crop_px": [64, 112], "exposure": "image"},
    "train": {"global_batch_size": 48, "bn_group_size": 48, "log_every_steps": 1},
    "optimizer": {"warmup_steps": 3},
    "engine": {"device": "cpu", "threads": 1},
    "checkpoint": {"every_steps": EVERY_STEPS},
    "tracking": {"mode": "disabled"},
}
CLASSES, CROPS = ("Adenovirus", "Astrovirus", "CCHF", "Cowpox", "Ebola", "Influenza", "Lassa", "Marburg"), 12
_RANK = r"^\S*python\S* -m tests\.slurm\.chaos_rank pretrain"


def micrographs() -> Path:
    """The folder of real micrographs.

    Raises:
        ClusterError: it is not here.
    """
    folder = Path(os.environ.get("NANODIST_DATA", ROOT.parent / "shared" / "data")) / "tem_virus"
    if not folder.is_dir():
        raise ClusterError(f"no real micrographs in {folder}; NANODIST_DATA names the folder that holds tem_virus")
    return folder


def prepare(out: Path, crops: int = CROPS) -> None:
    """Recipe, batch scripts and a store of real micrographs in ``out``, unless they are there."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(json.dumps(RECIPE))
    if not (out / "slurm").exists():
        (out / "slurm").symlink_to(ROOT / "slurm")
    (out / "env.sh").write_text(
        f"NANODIST=({sys.executable} -m tests.slurm.chaos_rank)\nNANODIST_MPI=pmi2\nexport NANODIST_MAX_RESTARTS=200\n"
    )
    if (out / "store").exists():
        return
    for name in CLASSES:
        (out / "images" / name).mkdir(parents=True, exist_ok=True)
        for crop in sorted((micrographs() / name).glob("*.png"))[:crops]:
            shutil.copyfile(crop, out / "images" / name / crop.name)
    nanodist(out, "pack", "images", "--labels", "folder", "--tile", "128", "--out", "store", "--workers", "1")


def nanodist(out: Path, *arguments: str, ranks: int = 1, codes: Sequence[int] = (0,), observed: str = "") -> str:
    """Run nanodist in ``out`` without Slurm, on ``ranks`` processes of this machine; what it said.

    Raises:
        ClusterError: its exit code is none of ``codes``.
    """
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"] if ranks > 1 else []
    module = "tests.slurm.chaos_rank" if observed else "nanodist"
    line = [sys.executable, "-m", *launcher, module, *arguments]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CHAOS_LOG": observed}
    done = subprocess.run(line, cwd=out, env=environ, capture_output=True, text=True, timeout=900)
    if done.returncode not in codes:
        raise ClusterError(f"{' '.join(line)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


@contextmanager
def undisturbed(cluster: Cluster, out: Path, name: str, *overrides: str) -> Iterator[tuple[Run, Callable[[], None]]]:
    """A run of two ranks without Slurm, which trains meanwhile; and what waits for its end.

    Raises:
        ClusterError: by the function: it failed.
    """
    run = Run(cluster, out, name, *overrides)
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tests.slurm.chaos_rank"]
    arguments = ["pretrain", "recipe.yaml", "data.store=store", f"run_dir={name}", *overrides]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CHAOS_LOG": str(run.logs)}
    with open(out / f"{name}.out", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *launcher, *arguments], cwd=out, env=environ, stdout=log, stderr=log
        )

    def finish() -> None:
        if process.wait(timeout=1800):
            raise ClusterError(f"{name} failed:\n{(out / f'{name}.out').read_text()[-3000:]}")

    try:
        yield run, finish
    finally:
        process.terminate()
        process.wait()


@dataclass
class Start:
    """One start of a job, as its ranks saw it. Times in seconds since 1970."""

    restart: int
    began: float
    hosts: dict[int, str]
    steps: dict[int, dict[int, dict[str, Any]]]
    writes: list[dict[str, Any]]

    @property
    def world(self) -> int:
        return len(self.steps) or len(self.hosts)

    def first_step(self) -> int | None:
        """The first step that rank 0 finished."""
        return min(self.steps.get(0, {}), default=None)

    def last_step(self) -> int | None:
        return max(self.steps.get(0, {}), default=None)

    def in_flight(self) -> int | None:
        """The step of the checkpoint whose write began and did not end."""
        ended = {line["of"] for line in self.writes if line["write"] == "end"}
        begun = [line["of"] for line in self.writes if line["write"] == "begin" and line["of"] not in ended]
        return begun[-1] if begun else None

    def keys(self, step: int) -> list[str]:
        """Sample ids of the global batch, in the order of ranks."""
        return [key for rank in sorted(self.steps) for key in self.steps[rank].get(step, {}).get("keys", [])]


class Run:
    """A training under ``slurm/pretrain.sbatch``.

    Args:
        cluster: where it runs.
        out: the folder of :func:`prepare`.
        name: of the run directory, the log folder and the job's output, in ``out``.
        overrides: of the recipe.
    """

    def __init__(self, cluster: Cluster, out: Path, name: str, *overrides: str) -> None:
        self.cluster, self.out, self.name, self.overrides = cluster, out, name, overrides
        self.path, self.logs = out / name, out / f"{name}-ranks"
        self.job = 0

    def submit(self, *size: str, environ: dict[str, str] | None = None) -> int:
        """Submit it; ``size`` are options of sbatch."""
        variables = {"NANODIST_ENV": str(self.out / "env.sh"), "CHAOS_LOG": str(self.logs), "PYTHONPATH": str(ROOT)}
        options = ["--cpus-per-task=1", "--mem=3450", "--time=300", f"--output={self.name}.out", *size]
        arguments = ["data.store=store", f"run_dir={self.name}", *self.overrides]
        line = [*options, "slurm/pretrain.sbatch", "recipe.yaml", *arguments]
        self.job = self.cluster.sbatch(*line, folder=self.out, environ={**variables, **(environ or {})})
        return self.job

    def train(self, *size: str, timeout_s: float = 1200) -> None:
        """Submit it and wait for its end; at once where it is complete."""
        self.submit(*size)
        self.cluster.wait(self.job, timeout_s=timeout_s)

    def restarts(self) -> int:
        return int(self.cluster.job(self.job)["Restarts"])

    def starts(self) -> list[Start]:
        """All starts that had a rank 0, in their order."""
        lines: dict[int, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for path in self.logs.glob("rank-*.jsonl"):
            rank = int(path.stem.split("-")[1])
            for text in path.read_text().splitlines():
                line = json.loads(text)
                lines[line["restart"]][rank].append(line)
        return [_start(restart, lines[restart]) for restart in sorted(lines)]

    def start(self, restart: int) -> Start | None:
        """A start, or ``None`` as long as no rank of it runs."""
        return next((start for start in self.starts() if start.restart == restart), None)

    def progress(self) -> tuple[int, int]:
        """Newest start of rank 0, and the last step that it finished (0: none yet); reads the end of its log only."""
        try:
            with open(self.logs / "rank-0.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
                tail = file.read().split(b"\n")[1 if file.tell() > 65536 else 0 : -1]
        except OSError:
            return -1, 0
        lines = [json.loads(line) for line in tail]
        restart = max((line["restart"] for line in lines), default=-1)
        return restart, max((line.get("step", 0) for line in lines if line["restart"] == restart), default=0)

    def wait_step(self, restart: int, step: int) -> None:
        """Wait until start ``restart`` finished ``step``."""
        self.wait_for(lambda: self.progress()[0] > restart or self.progress() >= (restart, step), f"step {step}")

    def wait_for(
        self, condition: Callable[[], object], what: str, timeout_s: float = 300, every_s: float = 0.05
    ) -> None:
        """Wait until ``condition()`` holds.

        Raises:
            ClusterError: the job ended, or it took too long.
        """
        looked = [time.monotonic()]

        def held() -> bool:
            if condition():
                return True
            if time.monotonic() - looked[0] > 2:
                looked[0] = time.monotonic()
                state = self.cluster.job(self.job)
                if state["JobState"] in ENDED:
                    log = self.cluster.log(state)[-3000:]
                    raise ClusterError(f"{self.name} is {state['JobState']} before {what}:\n{log}")
            return False

        if not until(held, timeout_s, every_s):
            log = self.cluster.log(self.cluster.job(self.job))[-3000:]
            raise ClusterError(f"{self.name}: {what} did not come in {timeout_s} s:\n{log}")

    def kill_rank(self, start: Start, rank: int) -> float:
        """SIGKILL a rank; when."""
        at = time.time()
        for pid in self.cluster.pids(start.hosts[rank], _RANK):
            os.kill(pid, signal.SIGKILL)
        return at

    def curve(self) -> list[tuple[Any, ...]]:
        """What the surviving history measured, a tuple a step."""
        measured = ("step", "loss", "lr", "epoch", "embedding_std", "effective_rank", "alignment", "uniformity")
        return [tuple(line.get(name) for name in measured) for line in read_metrics(self.path / "metrics.jsonl")]

    def logged_steps(self) -> list[int]:
        """The steps as they were logged, those of dead starts too."""
        return [line["step"] for line in metric_lines(self.path / "metrics.jsonl")]

    def samples(self) -> dict[int, list[str]]:
        """Sample ids by step, as the surviving history trained them."""
        found: dict[int, list[str]] = {}
        for start in self.starts():
            for step in sorted(start.steps.get(0, {})):
                found[step] = start.keys(step)
        return found

    def record(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.path / "run.json").read_text())
        return loaded


def _start(restart: int, ranks: dict[int, list[dict[str, Any]]]) -> Start:
    hosts = {rank: line["host"] for rank, lines in ranks.items() for line in lines if "process" in line}
    began = min(line["time"] for lines in ranks.values() for line in lines)
    steps = {rank: {line["step"]: line for line in lines if "step" in line} for rank, lines in ranks.items()}
    writes = [line for line in ranks.get(0, []) if "write" in line]
    return Start(restart, began, hosts, {rank: s for rank, s in steps.items() if s}, writes)
