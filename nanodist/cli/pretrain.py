"""``nanodist pretrain``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

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
    from hpc.preemption import EXIT_CODE, Preemption

    # Before torch is imported, which takes seconds: a signal must not kill a process that has not begun.
    preemption = Preemption()
    preemption.install()
    code = 1
    try:
        code = _run(options, preemption)
    finally:
        # A process that ends since it was asked to keeps deaf until it is gone, so that its exit code is its own: srun
        # ends the ranks that are left as soon as the first one has returned with its code.
        if code == EXIT_CODE:
            preemption.ignore()
        else:
            preemption.uninstall()
    return code


def _run(options: argparse.Namespace, preemption: Preemption) -> int:
    from hpc.config import to_yaml
    from nanodist.pretrain.recipe import load_recipe

    recipe = load_recipe(options.recipe, [*options.overrides, *(["init_trust=true"] if options.trust else [])])
    if options.print_recipe:
        print(to_yaml(recipe), end="")
        return 0
    from hpc.loop import Preempted
    from hpc.preemption import EXIT_CODE
    from hpc.saving import NotSaved
    from nanodist.downstream.online import online_evaluation
    from nanodist.pretrain.run import pretrain

    try:
        pretrain(recipe, online_evaluation, preemption)
    except Preempted as stopped:
        # Ctrl-C is the user's own wish, and asks nobody to start again.
        return 130 if stopped.reason == "SIGINT" else EXIT_CODE
    except NotSaved as lost:
        # No checkpoint, so no code that says so; a start looks for room before it trains. Rank 0 has the sentence.
        if str(lost):
            print(f"nanodist pretrain: error: {lost}; once that is mended, the same command goes on", file=sys.stderr)
        return 1
    return 0
