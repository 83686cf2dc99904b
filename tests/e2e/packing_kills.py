"""``python -m tests.e2e.packing_kills``: packing gives the same bytes on any ranks, and after any kill.

A collection is packed by one process; then by ``mpiexec -n 1, 2, 3``; then again and again with SIGKILL at random
moments spread over the whole run: one process with workers or two ranks (of which one or both are killed), each time
started again with one or two ranks. Every store must be byte for byte the first one, nothing that is no whole store may
ever stand under its name, and no staging folder may be left. Exit code 1 where anything differs; the last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.nanodist.packing import ROOT, clean_environment, command, finish, micrographs, start_ranks, tree

_LONGEST_S = 900.0
OPTIONS = ["--tile", "32", "--shard-mb", "0.2", "--labels", "folder", "--skip-bad", "--bars", "cut"]


def main() -> int:
    """Run it all; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="how many packings are killed")
    parser.add_argument("--files", type=int, default=400, help="micrographs in the collection")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--sizes", default="1,2,3", help="ranks that mpiexec starts; empty for none")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = [int(size) for size in arguments.sizes.split(",") if size]
        result = check(Path(folder), arguments.kills, arguments.files, arguments.seed, sizes)
    print(json.dumps(result))
    return 0 if result["different"] == 0 else 1


def check(folder: Path, kills: int, files: int, seed: int, sizes: list[int], most: int = 2) -> dict[str, object]:
    """Pack, kill and compare in ``folder``, with up to ``most`` ranks; of the counts, ``different`` must be 0."""
    source = collection(folder / "source", files)
    first = folder / "first"
    processes = start_ranks(1, source, "--out", first, *OPTIONS)
    until(lambda: at_work(first))
    began = time.monotonic()
    if any(finish(processes, _LONGEST_S)[0]):
        raise RuntimeError("packing failed without any kill")
    seconds = time.monotonic() - began
    whole = tree(first)
    print(
        f"one process: {len(whole)} files, {sum(map(len, whole.values()))} bytes, {seconds:.1f} s at work", flush=True
    )
    different = 0
    for size in sizes:
        out = folder / f"mpi-{size}"
        line = [str(Path(sys.executable).parent / "mpiexec"), "-n", str(size), *command(source, "--out", out, *OPTIONS)]
        subprocess.run(line, env=clean_environment(), cwd=ROOT, check=True, capture_output=True)
        same = tree(out) == whole
        different += not same
        print(f"mpiexec -n {size}: {'the same bytes' if same else 'OTHER BYTES'}", flush=True)
    rng = random.Random(seed)
    stages: Counter[str] = Counter()
    for number in range(kills):
        # One in ten before it has begun to write.
        moment = -1.0 if number % 10 == 9 else seconds * (number + rng.random()) / kills
        stage, fault = killed(source, folder / f"killed-{number}", whole, moment, rng, most)
        stages[stage] += 1
        different += fault is not None
        when = f"after {moment:.2f} s" if moment >= 0 else "before it writes"
        print(f"killed {when}, {stage}: {fault or 'ends in the same bytes'}", flush=True)
    return {"kills": kills, "mpiexec": sizes, "stages": dict(stages), "different": different}


def collection(folder: Path, files: int) -> Path:
    """Micrographs of several sizes, a stack, a duplicate, a broken file, and near duplicates, which change groups."""
    micrographs(folder, files)
    for number in range(0, files, 7):
        path = folder / ("wires", "rods")[number % 2] / f"m{number:03d}.png"
        darker = (np.asarray(Image.open(path)) * 0.8).astype(np.uint8)
        Image.fromarray(darker).save(path.with_name(f"n{number:03d}.png"))
    return folder


def at_work(out: Path) -> bool:
    """Whether a packing to ``out`` has begun to write, or is done."""
    return out.exists() or out.with_name(f".{out.name}.packing").exists()


def until(happened: Callable[[], bool]) -> None:
    """Wait for something that is to happen."""
    deadline = time.monotonic() + _LONGEST_S
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.002)


def killed(
    source: Path, out: Path, whole: dict[str, bytes], moment: float, rng: random.Random, most: int
) -> tuple[str, str | None]:
    """Start, kill ``moment`` seconds after it began to write (while it starts, if negative), and start again.

    Gives how far it had come, and what was wrong, if anything.
    """
    arguments = [source, "--out", out, *OPTIONS]
    alone = rng.random() < 0.7 or most == 1
    processes = start_ranks(1 if alone else 2, *arguments, *(["--workers", "2"] if alone else []))
    if moment < 0:
        time.sleep(2 * rng.random())
    else:
        until(lambda: at_work(out))
        time.sleep(moment)
    victims = processes if alone or rng.random() < 0.5 else [rng.choice(processes)]
    for process in victims:
        process.kill()
    # A rank whose partner dies before they have met waits for it; launchers kill it then, as is done here.
    deadline = time.monotonic() + 30
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        process.kill()
    finish(processes, _LONGEST_S)
    stage, fault = found(out, whole)
    if stage != "done":
        codes, _, err = finish(start_ranks(min(most, rng.choice((1, 1, 2))), *arguments), _LONGEST_S)
        if any(codes):
            return stage, f"started again, it failed: {err.strip()}"
    if fault is None and tree(out) != whole:
        fault = "OTHER BYTES"
    if fault is None and out.with_name(f".{out.name}.packing").exists():
        fault = "a staging folder is left"
    return stage, fault


def found(out: Path, whole: dict[str, bytes]) -> tuple[str, str | None]:
    """How far a killed packing had come, and whether something that is no whole store has its name."""
    staging = out.with_name(f".{out.name}.packing")
    if out.exists():
        fault = None if tree(out) == whole else "half a store stood under its name"
        return ("published" if staging.exists() else "done"), fault
    if any(staging.glob("store/*.tar")):
        return "writing shards", None
    return ("converting" if any(staging.glob("pieces/*.json")) else "starting"), None


if __name__ == "__main__":
    raise SystemExit(main())
