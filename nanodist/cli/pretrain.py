"""``nanodist pretrain``."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    from nanodist.pretrain.recipe import packaged_recipes

    parser.epilog = (
        f"Packaged recipes: {', '.join(packaged_recipes())}. Several ranks: put torchrun --nproc_per_node N -m, "
        "mpiexec -n N or srun before it. The same command started again continues an unfinished run."
    )
    parser.add_argument("recipe", help="A YAML file, or the name of a packaged recipe.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Changes, such as train.steps=20.")
    parser.add_argument("--print-recipe", action="store_true", help="Print what would run, and stop.")


def run(options: argparse.Namespace) -> int:
    """Train, or print the recipe."""
    from hpc.config import to_yaml
    from nanodist.pretrain.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.print_recipe:
        print(to_yaml(recipe), end="")
        return 0
    from nanodist.pretrain.run import pretrain

    pretrain(recipe)
    return 0
