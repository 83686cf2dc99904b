"""The data of a pretraining: one store or several, as the recipe says, the same on all ranks and at every start."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from hpc import config as recipes
from hpc.checkpoint.foreign import model_states
from hpc.checkpoint.layout import file_facts
from hpc.errors import UserError
from hpc.run_dir import RunDir
from hpc.topology import Topology
from nanodist.decoding.remote import Cache, default_cache
from nanodist.encoders import load_encoder
from nanodist.pretrain.model import DEEPSPEED
from nanodist.pretrain.recipe import DataConfig, PretrainRecipe
from nanodist.shards import Mixture, Store
from nanodist.shards.local import stage
from nanodist.shards.remote import open_remote
from nanodist.shards.splits import split
from nanodist.shards.windows import Tiles
from nanodist.weights import named_by_timm


def open_data(recipe: PretrainRecipe, hashes: list[str] | None = None) -> Tiles:
    """What :func:`tiles_of` gives, where it is enough to be trained on.

    Raises:
        UserError: no store, one without the manifest that the run began with, or fewer samples than a batch.
    """
    store = tiles_of(recipe, hashes)
    batch = recipe.train.global_batch_size
    if len(store) < batch:
        raise UserError(
            f"{store.path} holds {len(store)} samples, fewer than train.global_batch_size={batch}; "
            "lower it, as no sample may come twice in one batch"
        )
    return store


def tiles_of(recipe: PretrainRecipe, hashes: list[str] | None = None) -> Tiles:
    """The store of ``data.store``, or the mixture of ``data.mix``, at the manifests that the run began with.

    Args:
        recipe: what to train.
        hashes: of the manifests to open, one a store; ``None`` asks the run directory, and takes the newest for a new
            run.

    Raises:
        UserError: no store, or one without the manifest that the run began with.
    """
    data = recipe.data
    pairs: list[tuple[str, float]] = data.mix or ([(data.store, 1.0)] if data.store else [])
    if not pairs:
        raise UserError("data.store is not set; give data.store=FOLDER, a store that nanodist pack wrote")
    pins = hashes or _begun_with(recipe, len(pairs))
    stores = [_open(path, pin, data) for (path, _), pin in zip(pairs, pins, strict=True)]
    if data.mix and data.split != "all":
        raise UserError("data.split is for one store; data.mix takes stores that 'nanodist pack --part' wrote")
    if data.split != "all":
        stores = [stores[0].subset(split(stores[0], data.test_share)[data.split])]
    return Mixture(stores, [weight for _, weight in pairs]) if data.mix else stores[0]


def manifest_hashes(store: Tiles) -> list[str]:
    """Of the stores that there are, without what was taken of them: what :func:`open_data` opens them by."""
    stores = store.stores if isinstance(store, Mixture) else [store]
    return [one.manifest.content_hash for one in stores if isinstance(one, Store)]


def inputs_of(store: Tiles) -> dict[str, str]:
    """The hashes that stand for the data in a run's fingerprint; ``store`` is over all of it."""
    inputs = {"store": store.manifest_hash}
    hashes = manifest_hashes(store)
    if hashes != [store.manifest_hash]:
        inputs |= {f"manifest_{k}": value for k, value in enumerate(hashes)}
    return inputs


def _weights_hash(source: str) -> str:
    return load_encoder(source).weights_hash()


def identity(
    recipe: PretrainRecipe, store: Tiles, weights_hash: Callable[[str], str] = _weights_hash
) -> tuple[str, dict[str, Any]]:
    """Fingerprint of a run, and the *what* that it is made of: recipe, store, and weights of a warm start.

    Args:
        recipe: what to train.
        store: what :func:`open_data` gave.
        weights_hash: of a run or an export folder; who asks for many recipes may remember it.
    """
    inputs = inputs_of(store)
    if recipe.init_from and recipe.init_from.startswith(DEEPSPEED):
        source = model_states(Path(recipe.init_from.removeprefix(DEEPSPEED)))
        inputs["init_from"] = file_facts(source).xxh3_128
    elif recipe.init_from and not named_by_timm(recipe.init_from):
        inputs["init_from"] = weights_hash(recipe.init_from)
    what = recipes.to_dict(recipe, what_only=True)
    if "init_from" in inputs:  # the weights count, not where they lie
        what["init_from"] = ""
    return recipes.identity_hash(what, inputs), {**what, "inputs": inputs}


def _begun_with(recipe: PretrainRecipe, count: int) -> list[str]:
    if recipe.data.manifest:
        if count > 1:
            raise UserError("data.manifest is for one store; a mixture goes on with the manifests that it began with")
        return [recipe.data.manifest]
    if not recipe.run_dir or not (Path(recipe.run_dir) / "run.json").is_file():
        return [""] * count
    what = RunDir(Path(recipe.run_dir)).record().get("what") or {}
    inputs = what.get("inputs", {})
    several = [inputs.get(f"manifest_{k}", "") for k in range(count)]
    return several if any(several) else [inputs.get("store", "")] if count == 1 else [""] * count


def _open(path: str, pin: str, data: DataConfig) -> Store:
    if "://" not in path:
        return Store.open(path, pin)
    known = default_cache()
    return open_remote(path, pin, Cache(data.remote_cache or known.folder, data.remote_cache_mb << 20))


def on_all_ranks(recipe: PretrainRecipe, store: Tiles, topology: Topology) -> Tiles:
    """``store`` as rank 0 opened it, should it have grown between two looks; collective."""
    box = [manifest_hashes(store)]
    if topology.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    return store if box[0] == manifest_hashes(store) else open_data(recipe, box[0])


def staged(recipe: PretrainRecipe, store: Tiles, topology: Topology, say: Callable[[str], None]) -> Tiles:
    """``store`` with its shards on a disk of the node, where ``data.stage_to`` names one; every rank calls it."""
    if not recipe.data.stage_to:
        return store
    folder, rank = Path(recipe.data.stage_to), topology.local_rank
    if isinstance(store, Mixture):
        return Mixture([stage(one, folder, rank, say) for one in store.stores], store.weights)
    assert isinstance(store, Store)
    return stage(store, folder, rank, say)


def pinned_for(device: torch.device) -> Callable[[tuple[int, ...], np.dtype[Any]], npt.NDArray[Any]] | None:
    """Makes arrays in memory that is copied to a GPU while the processor goes on; ``None`` where there is no GPU."""
    if device.type != "cuda":
        return None

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        made = torch.empty(shape, dtype=getattr(torch, dtype.name), pin_memory=True)
        array: npt.NDArray[Any] = made.numpy()
        return array

    return allocate


def tell_replaced(replaced: list[tuple[str, str, str]], begin: int) -> None:
    """Say on standard error which samples others stand in for, from number ``begin`` on."""
    for bad, other, fault in replaced[begin:]:
        print(f"warning: sample {bad} cannot be read ({fault}); {other} stands in for it", file=sys.stderr, flush=True)
