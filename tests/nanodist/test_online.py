"""Accuracies while an encoder trains: the same on any number of ranks, and without a trace in the training."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hpc.batch_norm import Layout
from hpc.config import build
from hpc.errors import UserError
from nanodist.downstream.online import OnlineEvaluation, online_evaluation
from nanodist.pretrain.model import build_model
from nanodist.pretrain.recipe import PretrainRecipe
from nanodist.shards import Store
from tests.nanodist.test_probe import pack, write_textures


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    write_textures(folder / "images", 3, 4, 3)
    return str(pack(folder / "images", folder / "store"))


def _recipe(store, **more):
    return build(
        PretrainRecipe,
        {
            "encoder": {"trunk": "resnet10t", "normalise": "image", "looks": [[1.0, 0, 1]]},
            "projector": {"widths": [16, 8]},
            "evaluation": {"store": store, "labels_per_class": 2, "neighbours": 1, **more},
        },
    )


def _task(recipe, topology, group=None):
    spec = recipe.encoder_spec(0.5, 0.2)
    model, device = build_model(recipe, spec, Layout(4, 4)), torch.device("cpu")
    return SimpleNamespace(module=model, spec=spec, device=device, group=group, recipe=recipe, topology=topology)


def _measure(rank, world_size, store):
    recipe = _recipe(store)
    topology = SimpleNamespace(rank=rank, world_size=world_size, is_main=rank == 0)
    task = _task(recipe, topology, dist.group.WORLD if world_size > 1 else None)
    task.module.train()
    before = {name: t.clone() for name, t in task.module.state_dict().items()}
    state = torch.get_rng_state()
    figures = online_evaluation(task)(task)
    assert torch.equal(torch.get_rng_state(), state)
    assert task.module.training and all(p.requires_grad for p in task.module.parameters())
    assert all(torch.equal(before[name], t) for name, t in task.module.state_dict().items())
    return figures


def test_measures_the_same_on_any_number_of_ranks(ranks, store):
    alone = _measure(0, 1, store)
    assert set(alone) == {"eval_knn", "eval_linear", "score"} and alone["score"] == -alone["eval_linear"]
    # Grain tells the classes apart even through random weights; chance is 1/3.
    assert alone["eval_linear"] > 0.5
    first, *others = ranks.run(3, _measure, store)
    assert first == pytest.approx(alone) and others == [{}, {}]


def test_labels_and_test_share_no_micrograph(store):
    evaluation = OnlineEvaluation(_recipe(store).evaluation, Store.open(store), SimpleNamespace(rank=0))
    groups = np.asarray(Store.open(store).groups)
    test = set(groups[evaluation._samples[evaluation._test]])
    for draw in evaluation._draws:
        chosen = evaluation._samples[np.searchsorted(evaluation._used, draw)]
        assert not test & set(groups[chosen]) and len(chosen) == 6


def test_what_cannot_be_measured_is_refused(store, tmp_path):
    topology = SimpleNamespace(rank=0, world_size=1, is_main=True)
    assert online_evaluation(_task(_recipe(store, every_epochs=0), topology)) is None
    assert online_evaluation(_task(_recipe(""), topology)) is None
    write_textures(tmp_path / "images", 2, 1, 2)
    unlabelled = pack(tmp_path / "images", tmp_path / "plain", labels=False)
    with pytest.raises(UserError, match="has no labels; pack it with --labels"):
        online_evaluation(_task(_recipe(str(unlabelled)), topology))
    single = pack(tmp_path / "images", tmp_path / "single")
    with pytest.raises(UserError, match="no class has two micrographs"):
        online_evaluation(_task(_recipe(str(single)), topology))
    fixed = _recipe(store)
    fixed = replace(fixed, encoder=replace(fixed.encoder, trunk="vit_tiny_patch16_224"))
    with pytest.raises(UserError, match=r"does not take tiles of .* px .*dynamic_img_size: true"):
        online_evaluation(_task(fixed, topology))
