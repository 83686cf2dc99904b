import itertools

import pytest
import torch
from torch import nn

from hpc.optimizers import OptimizerConfig, build_optimizer, parameter_groups
from hpc.optimizers.schedule import factor
from hpc.sections import GuardConfig, SavingConfig
from hpc.task import Plan


def test_warm_up_then_cosine():
    values = [factor(step, 110, 9, "cosine", 0.1) for step in range(110)]
    assert values[0] == pytest.approx(0.1) and values[8] == pytest.approx(0.9) and values[9] == 1.0
    assert values[-1] == pytest.approx(0.1) and all(a >= b for a, b in itertools.pairwise(values[9:]))
    assert values[59] == pytest.approx(0.55, abs=0.01)


def test_a_cosine_that_ends_before_the_run_stays_where_it_ends():
    optimizer = OptimizerConfig(lr=1.0, warmup_steps=2, decay_steps=20, final_lr_factor=0.0)
    rates = [Plan(50, 4, 10, optimizer, SavingConfig(), GuardConfig()).learning_rate(step) for step in range(50)]
    assert rates[:20] == [factor(step, 20, 2, "cosine", 0.0) for step in range(20)]
    assert rates[18] > rates[19] == pytest.approx(0.0, abs=1e-12) and set(rates[19:]) == {rates[19]}


def test_constant_and_a_run_of_one_step():
    assert factor(50, 100, 0, "constant", 0.0) == 1.0
    assert factor(0, 1, 0, "cosine", 0.0) == 1.0


def test_biases_and_norms_do_not_decay():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    decayed, free = parameter_groups(net, 0.1)
    assert len(decayed["params"]) == 2 and len(free["params"]) == 4
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0


def test_what_is_frozen_is_left_out_and_a_part_may_learn_more_slowly():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    optimizer = build_optimizer(net, OptimizerConfig(name="sgd"), 0.5, {"1.weight": 0.1, "1.bias": 0.1})
    found = [(len(g["params"]), g["lr"], g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(1, 0.5, 1.0, 0.05), (1, 0.05, 0.1, 0.05), (1, 0.5, 1.0, 0.0), (1, 0.05, 0.1, 0.0)]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimizer_is_torchs(name):
    nets = []
    for kind in ("ours", "torch"):
        torch.manual_seed(0)
        net = nn.Linear(4, 3, bias=False)
        if kind == "ours":
            optimizer = build_optimizer(net, OptimizerConfig(name=name, weight_decay=0.1), 0.05)
        elif name == "adamw":
            optimizer = torch.optim.AdamW(net.parameters(), 0.05, weight_decay=0.1)
        else:
            optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.ones(2, 4)).pow(2).sum().backward()
            optimizer.step()
        nets.append(net.weight)
    torch.testing.assert_close(nets[0], nets[1])


def test_linear_scaling_rule():
    assert OptimizerConfig(lr=0.3, lr_batch_size=256).peak_lr(1024) == pytest.approx(1.2)
    assert OptimizerConfig(lr=0.3).peak_lr(1024) == 0.3
