"""``nanodist doctor``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hpc import environment
from hpc.environment import Finding, attempt, package
from hpc.errors import UserError
from hpc.topology import detect

if TYPE_CHECKING:  # it imports torch, which may be what is missing here
    from hpc import preflight

# (distribution, what it is for, the extra that brings it, whether pretraining needs it)
_PACKAGES = (
    ("timm", "the trunks", "", True),
    ("kornia", "the augmented views, on GPUs", "train", True),
    ("numba", "the augmented views, on CPUs", "train", True),
    ("webdataset", "reading stores with webdataset's own tools", "train", False),
    ("submitit", "python -m launch", "train", False),
    ("tifffile", "8- and 16-bit TIFF micrographs", "", False),
    ("imagecodecs", "tiles in shards, compressed TIFF", "", True),
    ("onnx", "nanodist export --format onnx", "export", False),
    ("pyFAI", "scattering patterns: nanodist scattering, pairvae", "scattering", False),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = (
        "Exit code: 0 if pretraining can run here, and --recipe on what is asked for; else 1. A run checks itself at "
        "its start as well; this is for in front of the queue."
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Changes to the recipe.")
    parser.add_argument("--dir", default=".", help="Where runs are to be written: its free space is checked.")
    parser.add_argument("--recipe", help="Check this recipe (a YAML file or a packaged name) as well.")
    parser.add_argument("--nodes", type=_count, default=1, metavar="N", help="Nodes that the recipe is to run on.")
    parser.add_argument("--gpus-per-node", type=_count, metavar="N", help="GPUs a node, one rank each.")
    parser.add_argument(
        "--tasks-per-node", type=_count, metavar="N", help="Ranks a node; default: one per GPU, or one."
    )
    parser.add_argument("--time-min", type=_count, metavar="N", help="Time limit of the job in minutes.")
    parser.add_argument(
        "--memory-gb", type=float, metavar="X", help="Memory a rank: of its GPU, or its share of a node."
    )
    parser.add_argument("--images-per-s", type=float, metavar="X", help="Speed of all ranks, for the predicted end.")
    parser.add_argument("--json", action="store_true", help="Print JSON in place of the table.")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 1")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Print what is there and what is missing for what; on rank 0 where a launcher started several."""
    if options.overrides and not options.recipe:
        raise UserError(f"'{options.overrides[0]}' changes a recipe, and --recipe names none")
    findings = examine(options.dir)
    planned = plan(options) if options.recipe else []
    works = environment.can_train(findings) and not _errors(planned)
    if not _speaks():
        return 0 if works else 1
    if options.json:
        print(json.dumps({"can_pretrain": works, **_as_json(findings, planned)}, indent=1))
    else:
        print("\n".join([table(findings), *(["", recipe_table(planned)] if options.recipe else [])]))
    return 0 if works else 1


def _errors(planned: list[preflight.Finding]) -> list[str]:
    return [finding.what for finding in planned if finding.level == "error"]


def _as_json(findings: list[Finding], planned: list[preflight.Finding]) -> dict[str, list[dict[str, object]]]:
    return {
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "recipe": [dataclasses.asdict(finding) for finding in planned],
    }


def plan(options: argparse.Namespace) -> list[preflight.Finding]:
    """What is to be said about the recipe on the ranks that are asked for.

    Raises:
        UserError: the recipe cannot be read.
    """
    from hpc import preflight
    from hpc.preflight_limits import fits
    from nanodist.pretrain.data import open_data
    from nanodist.pretrain.preflight import forecast
    from nanodist.pretrain.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    world_size = options.nodes * (options.tasks_per_node or options.gpus_per_node or 1)
    found: list[preflight.Finding] = []
    store = None
    if not recipe.data.store and not recipe.data.mix:
        found.append(preflight.Finding("warning", "data.store is not set, so the data are not checked"))
    else:
        try:
            store = open_data(recipe)
        except UserError as error:
            found.append(preflight.Finding("error", str(error)))
    # An unnamed run directory is runs/FINGERPRINT; its place is what counts here.
    path = Path(recipe.run_dir) if recipe.run_dir else Path(options.dir) / "runs"
    seconds = None if options.time_min is None else 60.0 * options.time_min
    seen = forecast(recipe, store, world_size, path, seconds, options.images_per_s)
    found += seen.findings
    if seen.memory is None:
        return found
    if options.memory_gb:
        where = "of its GPU" if options.gpus_per_node else "of its share of a node"
        return [*found, *fits(seen.memory.states, seen.memory.activations, round(options.memory_gb * 2**30), where)]
    need = preflight.size_text(seen.memory.total)
    return [
        *found,
        preflight.Finding("ok", f"predicted memory: {need} a rank; --memory-gb compares it with what it has"),
    ]


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


def recipe_table(findings: list[preflight.Finding]) -> str:
    """The findings about the recipe, a line each, and the verdict."""
    lines = [f"{finding.level:<8}{finding.what}" for finding in findings]
    bad = _errors(findings)
    return "\n".join([*lines, "", f"The recipe cannot run: {bad[0]}." if bad else "The recipe can run."])
