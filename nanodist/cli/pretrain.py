"""``nanodist pretrain``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpc.preemption import Preemption


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    from nanodist.pretrain.recipe import packaged_recipes

    parser.epilog = (
        f"Packaged recipes: {', '.join(packaged_recipes())}. Several ranks: put torchrun --nproc_per_node N -m, "
        "mpiexec -n N or srun before it. The same command started again continues an unfinished run."
    )
    parser.add_argument("recipe", help="A YAML file, or the name of a packaged recipe.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Changes, such as train.steps=20.")
    parser.add_argument(
        "--trust", action="store_true", help="Unpickle a DeepSpeed checkpoint of init_from; it may run code."
    )
    parser.add_argument("--print-recipe", action="store_true", help="Print what would run, and stop.")


def run(options: argparse.Namespace) -> int:
    """Train, or print the recipe."""
    from nanodist.cli.preemptible import preemptible

    return preemptible("pretrain", lambda preemption: _run(options, preemption))


def _run(options: argparse.Namespace, preemption: Preemption) -> None:
    from hpc.config import to_yaml
    from nanodist.pretrain.recipe import load_recipe

    recipe = load_recipe(options.recipe, [*options.overrides, *(["init_trust=true"] if options.trust else [])])
    if options.print_recipe:
        print(to_yaml(recipe), end="")
        return
    from functools import partial

    from nanodist.downstream.online import online_evaluation
    from nanodist.pretrain.run import pretrain

    pretrain(recipe, partial(online_evaluation, draw=_map), preemption)


def _map(features: Any, labels: Sequence[str]) -> bytes:
    # Matplotlib takes a second to import, and most ranks never draw.
    from nanodist.report.maps import quick_map

    return quick_map(features, labels)
