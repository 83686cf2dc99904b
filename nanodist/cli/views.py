"""``nanodist views``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("recipe", help="A recipe (file or packaged name), or the recipe.yaml of a run.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Changes; data.store=FOLDER at least.")
    parser.add_argument("--sample", action="append", default=[], help="Key of a sample; may come several times.")
    parser.add_argument("--epoch", type=int, default=0, help="Epoch whose views are drawn (default 0).")
    parser.add_argument("--out", default="views.png", help="PNG to write (default views.png).")


def run(options: argparse.Namespace) -> int:
    """Draw the tile and both views of each sample, exactly as training sees them."""
    from hpc.errors import UserError
    from nanodist.pretrain.recipe import load_recipe
    from nanodist.shards import Store
    from nanodist.views.sheet import write_view_sheet

    recipe = load_recipe(options.recipe, options.overrides)
    if not recipe.data.store:
        raise UserError("data.store is not set; give data.store=FOLDER")
    store = Store.open(recipe.data.store)
    places = {key: i for i, key in enumerate(store.keys)}
    for key in options.sample:
        if key not in places:
            raise UserError(f"{recipe.data.store} holds no sample '{key}'; nanodist inspect lists them")
    samples = [places[key] for key in options.sample] or None
    write_view_sheet(store, recipe.views, recipe.seed, Path(options.out), samples, options.epoch)
    print(options.out)
    return 0
