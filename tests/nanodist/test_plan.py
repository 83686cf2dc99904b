"""``nanodist plan``: predictions against counted training steps, and proposals."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from hpc import batch_norm
from hpc.optimizers import OptimizerConfig
from hpc.world_sizes import legal_world_sizes
from nanodist.cli import main
from nanodist.pretrain.planning import Planner, as_written, propose, weigh, with_checkpointing
from nanodist.pretrain.recipe import load_recipe
from tests.benchmarks.bench_plan import cases, compare_all

TINY = [
    "encoder.trunk=resnet10t",
    "encoder.trunk_options={channels: [8, 16, 32, 64]}",
    "views.size_px=32",
    "train.global_batch_size=32",
    "train.bn_group_size=32",  # few groups: each is counted, operation by operation
]
BIG = ["encoder.trunk=resnet10t", "views.size_px=160", "train.precision=bf16", "train.bn_group_size=64"]


# Each stage, one and four micro-batches, groups that span ranks, one rank; all five are ``bench_plan --quick``.
CASES = cases(quick=True)[2:]


@pytest.fixture(scope="module")
def compared():
    # In processes of their own, since DeepSpeed keeps process groups beyond their end.
    return compare_all(CASES)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_prediction_is_what_a_real_step_takes(compared, number):
    row = compared[number]
    assert abs(row["memory_error"]) <= 0.1, row
    assert row["bytes_error"] <= 0.01, row
    assert (row["ranks"] == 1) == (not row["bytes"])


def test_large_batches_are_cut_and_small_memory_is_sharded():
    recipe = load_recipe("simclr", [*BIG, "train.global_batch_size=512"])
    planner = Planner(recipe, 8)
    written = as_written(planner)
    assert written.micro_batches == 1 and written.samples == 64
    roomy = propose(planner, 2 * written.memory.peak, 0.1)
    assert roomy is not None and roomy.overrides() == ["train.micro_batch_size=64", "engine.zero_stage=0"]
    limit = int(0.6 * written.memory.peak)
    tight = propose(planner, limit, 0.1)
    assert tight is not None and tight.micro_batches > 1
    assert tight.memory.peak <= 0.9 * limit
    # What is proposed is what pretrain then does.
    again = load_recipe("simclr", [*BIG, "train.global_batch_size=512", *tight.overrides()])
    assert again.train.micro_batches(8) == tight.micro_batches and again.engine.zero_stage == tight.zero_stage
    # Fewer micro-batches do not fit.
    fewer = planner.micro_batches()[planner.micro_batches().index(tight.micro_batches) - 1]
    assert all(planner.predict(fewer, stage).memory.peak > 0.9 * limit for stage in (0, 1, 2))


def test_a_gpu_holds_the_views_of_two_steps_at_the_optimizer():
    wide = [*TINY, "views.size_px=64"]
    gpu, cpu = (
        Planner(load_recipe("simclr", [*wide, f"engine.device={device}"]), 1).predict(1, 0).memory.phases
        for device in ("auto", "cpu")
    )
    views = 2 * 32 * 64 * 64 * 4
    assert gpu["optimizer"] - cpu["optimizer"] == views
    assert gpu["next inputs"] > gpu["inputs"] + 0.9 * views and "next inputs" not in cpu
    assert gpu["forward"] == cpu["forward"]


def test_the_first_piece_and_group_stand_for_all(monkeypatch):
    monkeypatch.setattr(batch_norm, "_CACHED", 2**10)
    recipe = load_recipe("simclr", [*TINY, "train.bn_group_size=8", "train.precision=bf16"])
    first = Planner(recipe, 2).predict(1, 0)
    never = property(lambda layout: False, lambda layout, value: None)
    monkeypatch.setattr(batch_norm.Layout, "counting", never, raising=False)
    assert Planner(recipe, 2).predict(1, 0) == first


def test_a_stage_is_raised_before_the_batch_is_cut():
    small = ["views.size_px=32", "train.global_batch_size=64", "train.bn_group_size=64"]
    planner = Planner(load_recipe("simclr", small), 8)
    peaks = [planner.predict(1, stage).memory.peak for stage in (0, 1, 2)]
    assert peaks[1] < peaks[0]
    found = propose(planner, peaks[1], 0.0)
    assert found is not None and (found.micro_batches, found.zero_stage) == (1, 1)


def test_micro_batches_keep_groups_whole():
    recipe = load_recipe("simclr", [*TINY, "train.global_batch_size=96", "train.bn_group_size=8"])
    planner = Planner(recipe, 3)
    assert planner.micro_batches() == [c for c in (1, 2, 4, 8, 16, 32) if 3 in legal_world_sizes(96, 8, 3, c)]
    assert planner.micro_batches() == [1, 2, 4]


def test_checkpointing_is_proposed_for_trunks_without_batch_norm():
    vit = ["encoder.trunk=vit_tiny_patch16_224", "views.size_px=224", "train.global_batch_size=16"]
    recipe = load_recipe("simclr", vit)
    other = with_checkpointing(recipe, 2)
    assert other is not None
    saved = other.predict(1, 0).memory.peak
    assert saved < 0.6 * Planner(recipe, 2).predict(1, 0).memory.peak
    assert "encoder.checkpointing=true" in other.predict(1, 0).overrides()
    assert with_checkpointing(load_recipe("simclr", TINY), 2) is None


@pytest.mark.parametrize(("name", "states"), [("adamw", 2), ("sgd", 1), ("lars", 1), ("lamb", 2)])
def test_optimizer_states_are_counted(name, states):
    weights = weigh(nn.Linear(10, 3), OptimizerConfig(name=name))
    assert weights.states == states and weights.groups == ((30,), (3,))
    assert (weights.norms > 0) == (name in ("lars", "lamb"))


def test_command_prints_a_proposal_that_can_be_pasted(capsys):
    arguments = ["plan", "simclr", *TINY, "train.global_batch_size=64", "--gpus", "4", "--gpu-memory", "16"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["proposed"]["fits"] and found["proposed"]["overrides"][0] == "train.micro_batch_size=16"
    assert {m["purpose"] for m in found["proposed"]["moved"]} >= {"gradients", "objective", "running statistics"}
    assert main([*arguments, "--images-per-s-per-gpu", "100", "--bandwidth-gb-s", "10"]) == 0
    text = capsys.readouterr().out
    assert "train.micro_batch_size=16 engine.zero_stage=0" in text and "given" in text
    rate = text.split("STEPS A SECOND")[1].split()[0]
    assert 5 < float(rate) < 6.25  # 16 samples at 100 a second, and the communication


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_no_speed_is_invented(capsys):
    assert main(["plan", "simclr", *TINY, "--gpus", "2", "--gpu-memory", "16"]) == 0
    text = capsys.readouterr().out
    assert "Speed is not predicted" in text and "--images-per-s-per-gpu" in text


def test_speed_is_measured_where_the_device_is(capsys):
    assert main(["plan", "simclr", *TINY, "engine.device=cpu", "--gpu-memory", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pace"]["source"].startswith("measured here")
    assert found["pace"]["forward_s"] > 0
    slow, fast = found["proposed"]["steps_per_s"]
    assert slow == fast == pytest.approx(1 / (32 * found["pace"]["forward_backward_s"]))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--gpus", "5", "--gpu-memory", "80"], "legal numbers of ranks"),
        (["--gpus", "0", "--gpu-memory", "80"], "--gpus is 0"),
        (["--gpus", "2", "--gpu-memory", "-1"], "--gpu-memory"),
        (["--gpu-memory", "80", "--reserve", "1.5"], "--reserve"),
        (["--gpu-memory", "80", "engine.zero_stage=3"], "plan stages 0 to 2"),
    ],
)
def test_mistakes_are_named(capsys, arguments, part):
    assert main(["plan", "simclr", *TINY, *arguments]) == 2
    assert part in capsys.readouterr().err


def test_what_does_not_fit_says_so(capsys):
    assert main(["plan", "simclr", *TINY, "--gpu-memory", "0.001"]) == 1
    assert "Nothing fits" in capsys.readouterr().out
