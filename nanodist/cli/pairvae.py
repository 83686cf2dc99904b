"""``nanodist pairvae train|generate|evaluate``: from scattering to micrographs and back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hpc.errors import UserError

if TYPE_CHECKING:
    from hpc.preemption import Preemption

_WAYS = ("train", "generate", "evaluate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; the first one says which of its three ways is taken."""
    from nanodist import recipes

    parser.epilog = (
        f"train RECIPE key=value ... (packaged: {', '.join(recipes.names('pairvae'))}; on several ranks under "
        "torchrun; the same command continues an unfinished run). generate RUN --from saxs|sem FILE... --out DIR. "
        "evaluate RUN --store STORE --out DIR, on the items that were never trained on (train does so at its end)."
    )
    parser.add_argument("way", choices=_WAYS, help="What to do.")
    parser.add_argument("source", help="train: a recipe; generate, evaluate: a run directory.")
    parser.add_argument("rest", nargs="*", metavar="FILE|key=value", help="generate: files; train: changes.")
    parser.add_argument("--print-recipe", action="store_true", help="train: print what would run, and stop.")
    parser.add_argument("--from", dest="given", choices=["saxs", "sem"], help="generate: what the files are.")
    parser.add_argument("--out", type=Path, help="generate, evaluate: new folder for the results.")
    parser.add_argument("--store", help="evaluate: the pair store; by default the one that was trained on.")
    parser.add_argument("--test-store", help="evaluate: pairs of other specimens, which are then the whole test.")
    parser.add_argument("--draws", type=int, help="generate, evaluate: images drawn from each pattern (recipe: draws).")
    parser.add_argument(
        "--draws-from",
        choices=["field", "prior"],
        help="generate, evaluate: what images drawn from a pattern begin with (recipe: draws_from).",
    )
    parser.add_argument("--poni", type=Path, help="generate --from saxs: geometry (PONI) of frames that state none.")
    parser.add_argument("--pixel-size-nm", type=float, help="generate --from sem: pixel of images that state none.")
    parser.add_argument("--seed", type=int, default=0, help="generate, evaluate: of the draws (default: 0).")


def run(options: argparse.Namespace) -> int:
    """Take one of the three ways."""
    if options.way == "train":
        from nanodist.cli.preemptible import preemptible

        trained: list[Path] = []
        code = preemptible("pairvae", lambda preemption: trained.extend(_train(options, preemption)))
        return code or _evaluate_trained(trained)
    if options.out is None:
        raise UserError(f"nanodist pairvae {options.way} needs --out FOLDER for what it writes")
    if options.draws is not None and options.draws < 1:
        raise UserError(f"--draws is {options.draws}; it must be at least 1")
    return _generate(options) if options.way == "generate" else _evaluate(options)


def _train(options: argparse.Namespace, preemption: Preemption) -> list[Path]:
    """Train, and give the run where it is to be evaluated by this rank."""
    from hpc.config import to_yaml
    from nanodist.pairvae.recipe import load_recipe

    recipe = load_recipe(options.source, options.rest)
    if options.print_recipe:
        print(to_yaml(recipe), end="")
        return []
    from hpc.topology import detect
    from nanodist.pairvae.run import train

    path, main = train(recipe, preemption), detect().is_main
    return [path] if main and recipe.evaluate and recipe.data.test_share else []


def _evaluate_trained(runs: list[Path]) -> int:
    """Score what was trained, once; signals end this as any command, and the same command does it anew."""
    from nanodist.pairvae.evaluate import EVALUATION, evaluate

    for path in runs:
        if not (path / EVALUATION).is_dir():
            print(f"evaluating on the specimens that no stage saw; {path / EVALUATION}", flush=True)
            try:
                print(evaluate(path, None, path / EVALUATION))
            except UserError as error:  # the training is whole all the same
                print(f"not evaluated: {error}", file=sys.stderr)
    return 0


def _generate(options: argparse.Namespace) -> int:
    from nanodist.pairvae.generate import Wanted, generate

    if options.given is None or not options.rest:
        raise UserError("nanodist pairvae generate needs --from saxs or --from sem, and files to begin with")
    pixel = options.pixel_size_nm
    wanted = Wanted(options.given, options.draws, options.seed, options.poni, pixel, options.draws_from)
    print(generate(Path(options.source), [Path(name) for name in options.rest], options.out, wanted))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from nanodist.pairvae.evaluate import evaluate

    if options.rest:
        raise UserError(f"nanodist pairvae evaluate takes no files; '{options.rest[0]}' is too much")
    store, test = options.store, options.test_store
    print(evaluate(Path(options.source), store, options.out, options.draws, options.seed, test, options.draws_from))
    return 0
