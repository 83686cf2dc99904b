"""``nanodist views``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("store", help="Folder of the store that the run was trained on.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Changes of the recipe.")
    parser.add_argument(
        "--sample", action="append", default=[], help="Key of a sample; may come several times (default: of the batch)."
    )
    parser.add_argument(
        "--recipe", default="simclr", help="A recipe (file or packaged name), or the recipe.yaml of a run."
    )
    parser.add_argument(
        "--step", type=int, help="Step, as metrics.jsonl counts them from 1 (default: the first that shows the sample)."
    )
    parser.add_argument(
        "--count", type=int, default=6, help="Samples of the step's batch without --sample (default 6)."
    )
    parser.add_argument("--out", default="views.png", help="PNG to write (default views.png).")


def run(options: argparse.Namespace) -> int:
    """Draw each sample's tile and, beside it, both views as they were at the step."""
    from hpc.errors import UserError
    from nanodist.pretrain.data import tiles_of
    from nanodist.pretrain.recipe import load_recipe
    from nanodist.shards import make_order
    from nanodist.views.replay import caption, replay, write_replays

    recipe = load_recipe(options.recipe, options.overrides)
    if recipe.data.mix:
        raise UserError(
            "data.mix: views are drawn again of one store; replay its sample with data.mix=[] and that store"
        )
    # The part and the manifest that the run was trained on.
    store = tiles_of(replace(recipe, data=replace(recipe.data, store=options.store)))
    order = make_order(store, recipe.seed, recipe.train.global_batch_size, recipe.data.window_mb)
    steps, positives = recipe.train.total_steps(len(store)), recipe.data.positives == "group"
    step, keys = options.step, options.sample
    if not keys:
        step = 1 if step is None else step
        if not 1 <= step <= steps:
            raise UserError(f"the recipe has no step {step}; its steps run from 1 to {steps}")
        _, indices = order.arrays(step - 1)
        keys = [store.keys[i] for i in indices[: max(1, options.count)]]
    replays = [replay(store, recipe.views, order, key, step, steps, positives) for key in keys]
    for one in replays:
        print(caption(one))
    write_replays(replays, Path(options.out))
    print(options.out)
    return 0
