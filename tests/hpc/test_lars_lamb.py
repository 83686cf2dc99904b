"""LARS and LAMB against their formulas written out, and their trust ratios under ZeRO."""

import pytest
import torch

from hpc.optimizers import OptimizerConfig, build_optimizer
from hpc.optimizers.lamb import LAMB
from hpc.optimizers.lars import LARS
from tests.hpc.engines import CONFIGS, build, inputs, loss_of, pass_over, small_net

RATES = [0.3, 0.1, 0.2]


def _gradients(net, step):
    net.zero_grad()
    loss_of(net(inputs(step, torch.float64))).backward()


def _is_weight(name):
    return name in ("0.weight", "3.weight")


def _written_out_lars(net, order):
    buffers = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for step, lr in enumerate(RATES):
        _gradients(net, step)
        with torch.no_grad():
            for name, p in net.named_parameters():
                g, ratio = p.grad, 1.0
                if _is_weight(name):
                    g = g + 0.1 * p
                    ratio = 0.02 * p.norm() / g.norm()
                if order == "lr_then_momentum":
                    buffers[name] = 0.9 * buffers[name] + lr * ratio * g
                    p -= buffers[name]
                else:
                    buffers[name] = 0.9 * buffers[name] + ratio * g
                    p -= lr * buffers[name]


def _written_out_lamb(net):
    m = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    v = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for step, lr in enumerate(RATES):
        _gradients(net, step)
        with torch.no_grad():
            for name, p in net.named_parameters():
                m[name] = 0.8 * m[name] + 0.2 * p.grad
                v[name] = 0.95 * v[name] + 0.05 * p.grad**2
                r = m[name] / (1 - 0.8 ** (step + 1)) / ((v[name] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-6)
                if _is_weight(name):
                    r = r + 0.1 * p
                    r = r * p.norm() / r.norm()
                p -= lr * r


@pytest.mark.parametrize("kind", ["lr_then_momentum", "momentum_then_lr", "lamb"])
def test_formulas(kind):
    ours, written = small_net(torch.float64), small_net(torch.float64)
    if kind == "lamb":
        _written_out_lamb(written)
        config = OptimizerConfig(name="lamb", weight_decay=0.1, betas=(0.8, 0.95))
    else:
        _written_out_lars(written, kind)
        config = OptimizerConfig(name="lars", weight_decay=0.1, trust_coefficient=0.02, momentum_order=kind)
    optimizer = build_optimizer(ours, config, 0.0)
    for step, lr in enumerate(RATES):
        _gradients(ours, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    for got, wanted in zip(ours.parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("make", [lambda p: LARS(p, 0.1, trust_coefficient=0.5), lambda p: LAMB(p, 0.1)])
def test_a_weight_of_zeros_moves(make):
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = make([weight])
    weight.grad = torch.ones(4)
    optimizer.step()
    assert bool((weight < 0).all())


def _step_and_ratios(rank, world_size, name, stage):
    """Weights before and after one step, and the ratio of each parameter by group and index."""
    seen = {}
    engine = build(rank, world_size, CONFIGS[name], stage)
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    real = type(base)._ratios

    def spy(self, group, pieces, updates):
        ratios = real(self, group, pieces, updates)
        seen.update({owner: float(ratio) for owner, ratio in zip(pieces.owners, ratios, strict=True)})
        return ratios

    type(base)._ratios = spy
    try:
        pass_over(engine, 0)
        engine.step(1.0)
    finally:
        type(base)._ratios = real
    from hpc.checkpoint.elastic import gather

    pieces = len(base.param_groups[0]["pieces"].segments) if stage else 2
    return seen, {k: v.clone() for k, v in gather(engine)["model"].items()}, pieces


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", ["lars", "lars2", "lamb"])
def test_ratios_and_step_under_zero_are_those_of_whole_parameters(ranks, stage, name):
    alone, after, _ = ranks.run(1, _step_and_ratios, name, 0)[0]
    assert sorted(alone) == [0, 1] and alone[0] != pytest.approx(alone[1], rel=0.01)
    start = small_net().state_dict()
    of_ranks = ranks.run(3, _step_and_ratios, name, stage)
    if stage:
        assert sum(pieces for _, _, pieces in of_ranks) > 2, "no parameter is cut, so this would show nothing"
    assert set().union(*(seen for seen, _, _ in of_ranks)) == {0, 1}
    for seen, got, _ in of_ranks:
        for index, ratio in seen.items():
            assert ratio == pytest.approx(alone[index], rel=1e-6)
        for key, wanted in after.items():
            update = wanted - start[key]
            assert ((got[key] - wanted).norm() / update.norm()) < 1e-6
