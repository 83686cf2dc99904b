"""Micrographs for the tests of packing, and packings as processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--tile", "32", "--shard-mb", "0.05", "--labels", "folder", "--skip-bad"]
# What a launcher above this test would tell the processes below.
_LAUNCHERS = ("SLURM", "PMI", "MPI", "OMPI", "RANK", "LOCAL_", "WORLD_", "MASTER_", "NANODIST_EXPORTED", "TORCHELASTIC")


def clean_environment(**more: str) -> dict[str, str]:
    """The variables of this process without those of any launcher."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def micrographs(folder: Path, count: int = 40, seed: int = 0) -> Path:
    """``count`` small micrographs in two folders: several sizes, a stack, an exact duplicate, a broken file."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        path = folder / ("wires", "rods")[number % 2] / f"m{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (32 + 24 * (number % 3), 32 + 40 * (number % 2))
        Image.fromarray(rng.integers(0, 200 + number, shape).astype(np.uint8)).save(path)
    stack = rng.integers(0, 60000, (5, 40, 40)).astype(np.uint16)
    tifffile.imwrite(folder / "rods" / "stack.tif", stack, photometric="minisblack")
    (folder / "wires" / "z-again.png").write_bytes((folder / "wires" / "m000.png").read_bytes())
    (folder / "rods" / "bad.png").write_text("text")
    return folder


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a store."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def command(*arguments: object) -> list[str]:
    """``nanodist pack`` as a process of its own."""
    return [sys.executable, "-m", "nanodist", "pack", *map(str, arguments)]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(size: int, *arguments: object) -> list[subprocess.Popen[str]]:
    """``size`` processes that share one packing, told apart as torchrun does."""
    port = str(free_port())
    return [
        subprocess.Popen(
            command(*arguments),
            env=clean_environment(
                RANK=str(rank),
                WORLD_SIZE=str(size),
                LOCAL_RANK=str(rank),
                LOCAL_WORLD_SIZE=str(size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout_s: float = 120.0) -> tuple[list[int], str, str]:
    """Exit codes, and what all said on standard output and standard error."""
    said = [process.communicate(timeout=timeout_s) for process in processes]
    codes = [process.returncode for process in processes]
    return codes, "".join(out for out, _ in said), "".join(err for _, err in said)
