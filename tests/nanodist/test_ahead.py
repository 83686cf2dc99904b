"""Views that are made a step ahead, as on GPUs, are those of the step that trains on them."""

import pytest
import torch

from hpc.batch_norm import make_layout
from hpc.config import build
from hpc.engine import Engine, running
from hpc.optimizers import build_optimizer
from hpc.step import train_step
from hpc.topology import detect
from nanodist.pretrain.recipe import PretrainRecipe
from nanodist.pretrain.task import PretrainTask
from nanodist.shards import PackOptions, Store, pack
from nanodist.synth import MORPHOLOGIES, Settings, write_dataset


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ahead")
    write_dataset(folder / "synth", 1, 3, MORPHOLOGIES, Settings(size_px=96))
    pack([folder / "synth" / "images"], folder / "store", PackOptions(tile=96))
    return Store.open(folder / "store")


def _train(store, hurries, steps=4):
    recipe = build(
        PretrainRecipe,
        {
            "data": {"store": str(store.path), "workers": 0},
            "views": {"size_px": 32, "crop_px": [60, 96]},
            "encoder": {"trunk": "resnet10t", "trunk_options": {"channels": [8, 8, 8, 8]}},
            "projector": {"widths": [16, 8]},
            "train": {"steps": steps, "global_batch_size": 4},
            "engine": {"device": "cpu", "threads": 1},
        },
    )
    topology, made = detect(), []
    with running(recipe.engine, topology) as device:
        task = PretrainTask(recipe, store, topology, device, make_layout(4, 4, 0, 1), None)
        task.hurries, plain = hurries, task.views
        task.views = lambda batch: made.append((batch.step, task.step)) or plain(batch)
        optimizer = build_optimizer(task.module, recipe.optimizer, 1e-2)
        engine = Engine(task.module, optimizer, recipe.engine, topology, device, 4)
        losses = []
        for batch in task.batches(0):
            assert task.step == batch.step + 1
            losses.append(train_step(task, engine, batch, 1e-2).loss)
            if len(losses) == steps:
                break
        weights = torch.cat([p.detach().flatten() for p in task.module.parameters()])
    return losses, weights, made


def test_a_step_ahead_is_the_same_training(store):
    losses, weights, made = _train(store, hurries=False)
    assert made == [(0, 1), (1, 2), (2, 3), (3, 4)]
    other_losses, other_weights, ahead = _train(store, hurries=True)
    assert ahead == [(0, 1), (1, 1), (2, 2), (3, 3)]  # each once, while the step before trains, and none too many
    assert losses == other_losses and torch.equal(weights, other_weights)
