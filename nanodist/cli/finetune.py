"""``nanodist finetune``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpc.preemption import Preemption


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    from nanodist import recipes

    parser.epilog = (
        f"Packaged recipes: {', '.join(recipes.names('finetune'))}. Several ranks: put torchrun --nproc_per_node N -m, "
        "mpiexec -n N or srun before it. The same command started again continues an unfinished run."
    )
    parser.add_argument("recipe", help="A YAML file, or the name of a packaged recipe.")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="Changes, such as encoder.source=runs/a data.store=STORE."
    )
    parser.add_argument("--print-recipe", action="store_true", help="Print what would run, and stop.")


def run(options: argparse.Namespace) -> int:
    """Fine-tune and test, or print the recipe."""
    from nanodist.cli.preemptible import preemptible

    return preemptible("finetune", lambda preemption: _run(options, preemption))


def _run(options: argparse.Namespace, preemption: Preemption) -> None:
    from hpc.config import to_yaml
    from nanodist.downstream.finetune.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.print_recipe:
        print(to_yaml(recipe), end="")
        return
    from nanodist.downstream.finetune.run import finetune

    finetune(recipe, preemption)
