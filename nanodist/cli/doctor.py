"""``nanodist doctor``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from functools import partial

from hpc import environment
from hpc.environment import Finding, attempt, package
from hpc.errors import UserError
from hpc.topology import detect

# (distribution, what it is for, the extra that brings it, whether pretraining needs it)
_PACKAGES = (
    ("timm", "the trunks", "", True),
    ("kornia", "the augmented views", "train", True),
    ("webdataset", "reading stores with webdataset's own tools", "train", False),
    ("submitit", "python -m launch", "train", False),
    ("tifffile", "8- and 16-bit TIFF micrographs", "", False),
    ("imagecodecs", "compressed TIFF and microscope formats", "io", False),
    ("onnx", "nanodist export --format onnx", "export", False),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = "Exit code: 0 if pretraining can run here, else 1."
    parser.add_argument("--dir", default=".", help="Where runs are to be written: its free space is checked.")
    parser.add_argument("--json", action="store_true", help="Print JSON in place of the table.")


def run(options: argparse.Namespace) -> int:
    """Print what is there and what is missing for what; on rank 0 where a launcher started several."""
    findings = examine(options.dir)
    works = environment.can_train(findings)
    if not _speaks():
        return 0 if works else 1
    if options.json:
        print(json.dumps({"can_pretrain": works, "findings": [dataclasses.asdict(f) for f in findings]}, indent=1))
    else:
        print(table(findings))
    return 0 if works else 1


def _speaks() -> bool:
    """Whether this process is the one to print: all of them where the launcher cannot be made sense of."""
    try:
        return detect().is_main
    except UserError:
        return True


def examine(folder: str) -> list[Finding]:
    """All findings, with ``folder`` as the place of the runs."""
    # These two import large libraries in processes of their own, meanwhile torch is imported here.
    deepspeed = environment.deepspeed_probe() if package("deepspeed", "training").status == "ok" else None
    mpi = environment.mpi_probe() if package("mpi4py", "mpiexec").status == "ok" else None
    torch = attempt("torch", environment.torch_version)
    probes: list[tuple[str, Callable[[], Finding]]] = [
        ("python", environment.python),
        *([("gpu", environment.gpu)] if torch.status == "ok" else []),
        ("cpu", environment.cpu),
        ("deepspeed", partial(environment.deepspeed, deepspeed)),
        ("compiler", environment.compiler),
        ("launcher", environment.launcher),
        ("mpi", partial(environment.mpi, mpi)),
        ("slurm", environment.slurm),
        ("wandb", environment.tracking),
        ("disk", partial(environment.disk, folder)),
        ("shared memory", environment.shared_memory),
    ]
    machine = [attempt(name, probe) for name, probe in probes]
    packages = [package(name, purpose, extra, required=needed) for name, purpose, extra, needed in _PACKAGES]
    return [machine[0], torch, *machine[1:], *packages]


def table(findings: list[Finding]) -> str:
    """The findings as text: a line each, hints below the lines, and the verdict."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<8}{finding.name:<{width + 2}}{finding.value}")
        if finding.hint:
            lines.append(" " * (10 + width) + finding.hint)
    lacking = [f.name for f in findings if f.required and f.status == "missing"]
    verdict = f"Pretraining cannot run here: {', '.join(lacking)}." if lacking else "Pretraining can run here."
    return "\n".join([*lines, "", verdict])
