"""The engine on real ranks against one process without it: gradients, norm, clipping, micro-batches, dtypes."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hpc.errors import UserError
from tests.hpc.engines import (
    CONFIGS,
    alone,
    build,
    check_close,
    inputs,
    loss_of,
    pass_over,
    rate,
    small_net,
    train,
    weights_of,
)

SETTINGS = [(name, clip, micro_batches) for name in CONFIGS for clip, micro_batches in ((0.0, 1), (0.5, 2))]


def _settings(stage):
    return [setting for setting in SETTINGS if stage < 3 or setting[0] in ("sgd", "adamw")]


def _train_all(rank, world_size, stage):
    answers = []
    for name, clip, micro_batches in _settings(stage):
        engine = build(rank, world_size, CONFIGS[name], stage, clip, micro_batches)
        answers.append((train(engine, range(3), micro_batches), weights_of(engine)))
    return answers


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_norms_and_weights_are_those_of_one_process(ranks, stage, world_size):
    of_ranks = ranks.run(world_size, _train_all, stage)
    for number, (name, clip, _) in enumerate(_settings(stage)):
        norms, weights = alone(CONFIGS[name], clip)
        assert min(norms) > 0.5, "the clip has to bite"
        for answers in of_ranks:
            assert answers[number][0] == of_ranks[0][number][0]
            assert answers[number][0] == pytest.approx(norms, rel=1e-5), name
            check_close(answers[number][1], weights, 1e-5)


def _train64(rank, world_size, micro_batches):
    engine = build(rank, world_size, CONFIGS["sgd"], 0, 0.5, micro_batches, torch.float64)
    return train(engine, range(3), micro_batches, torch.float64), weights_of(engine)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_float64_is_exact(ranks, micro_batches):
    norms, weights = alone(CONFIGS["sgd"], 0.5, torch.float64)
    for got_norms, got in ranks.run(2, _train64, micro_batches):
        assert got_norms == pytest.approx(norms, rel=1e-12)
        check_close(got, weights, 1e-12)


KINDS = ["nan", "whole", "half", "forward only"]


def _dropped_step(engine, kind):
    """Part of a step, and what is wrong with it."""
    place = engine.topology
    own = list(inputs(9).chunk(place.world_size)[place.rank].chunk(2))
    if kind == "nan" and place.is_main:
        own[1] = own[1] * math.nan
    if kind == "forward only":
        engine.forward(own[0])
    elif kind == "half":
        engine.backward(loss_of(engine.forward(own[0])), last=False)
    else:
        for number, part in enumerate(own):
            engine.backward(loss_of(engine.forward(part)), last=number == 1)
        assert math.isfinite(engine.gradient_norm()) == (kind != "nan")


def _discard(rank, world_size, stage):
    plain = build(rank, world_size, CONFIGS["adamw"], stage, 0.5, 2)
    train(plain, range(3), 2)
    answers = {"nothing": weights_of(plain)}
    for kind in KINDS:
        engine = build(rank, world_size, CONFIGS["adamw"], stage, 0.5, 2)
        train(engine, [0], 2)
        before = weights_of(engine)
        _dropped_step(engine, kind)
        engine.discard()
        assert all(torch.equal(before[name], value) for name, value in weights_of(engine).items())
        train(engine, [1, 2], 2)
        answers[kind] = weights_of(engine)
    return answers


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_discarded_step_leaves_no_trace(ranks, stage):
    start = small_net().state_dict()
    for answers in ranks.run(2, _discard, stage):
        for kind in KINDS:
            assert all(torch.equal(answers[kind][name], value) for name, value in answers["nothing"].items()), kind
        assert not torch.equal(answers["nothing"]["0.weight"], start["0.weight"])


def _partly_used(net, x, with_last):
    loss = net[0](x).sum() / 12
    return loss + net[3].weight.sum() if with_last else loss


def _leave_out(rank, world_size, stage):
    engine = build(rank, world_size, CONFIGS["sgd"], stage)
    engine.backward(_partly_used(engine.module, inputs(0).chunk(world_size)[rank], rank == 0))
    norm = engine.gradient_norm()
    engine.step(0.1)
    return norm, weights_of(engine)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_that_no_rank_or_only_some_have(ranks, stage, world_size):
    net = small_net()
    _partly_used(net, inputs(0), True).backward()
    norm = float(nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]))
    for got, weights in ranks.run(world_size, _leave_out, stage):
        assert got == pytest.approx(norm, rel=1e-5)
        wanted = net[3].weight - 0.1 * (net[3].weight.grad + 0.1 * net[3].weight)
        torch.testing.assert_close(weights["3.weight"], wanted.detach())


def _train_with_small_buckets(rank, world_size, stage):
    from hpc import reduction

    usual, reduction.BUCKET_BYTES = reduction.BUCKET_BYTES, 64
    try:
        engine = build(rank, world_size, CONFIGS["lars"], stage, 0.5, 2)
    finally:
        reduction.BUCKET_BYTES = usual
    return len(engine._gradients._order), train(engine, range(3), 2), weights_of(engine)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_many_buckets_are_as_good_as_one(ranks, stage):
    norms, weights = alone(CONFIGS["lars"], 0.5)
    for buckets, got_norms, got in ranks.run(3, _train_with_small_buckets, stage):
        assert buckets >= 3
        assert got_norms == pytest.approx(norms, rel=1e-5)
        check_close(got, weights, 1e-5)


def _refusals(rank, world_size):
    said = []
    normed = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    for name, arguments in (
        ("sgd", {"stage": 1, "dtype": torch.float64}),
        ("sgd", {"stage": 0, "micro_batches": 5}),
        ("lars", {"stage": 3}),
        ("sgd", {"stage": 3, "net": normed}),
    ):
        try:
            build(rank, world_size, CONFIGS[name], **arguments)
        except UserError as error:
            said.append(str(error))
    return said


def test_what_cannot_be_is_refused(ranks):
    for said in ranks.run(2, _refusals):
        assert "float64 runs at engine.zero_stage=0 only" in said[0]
        assert "a global batch of 12 cannot be shared by 2 ranks in 5 micro-batches each" in said[1]
        assert "LARS needs the norms of whole parameters, which engine.zero_stage=3 cuts; use 0, 1 or 2" in said[2]
        assert "models without BatchNorm, and '1' is one" in said[3]


def _dtypes(rank, world_size, stage):
    """What goes over the wire, and what the optimizer steps on, under a bf16 forward."""
    seen, real = set(), dist.all_reduce
    engine = build(rank, world_size, CONFIGS["adamw"], stage, 0.5)

    def spy(tensor, *args, **kwargs):
        if tensor.numel() > 1:
            seen.add(tensor.dtype)
        return real(tensor, *args, **kwargs)

    dist.all_reduce = spy
    try:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = engine.forward(inputs(0).chunk(world_size)[rank])
        assert outputs.dtype == torch.bfloat16
        engine.backward(loss_of(outputs.float()))
    finally:
        dist.all_reduce = real
    held = {g.dtype for g in engine._gradients.tensors()}
    norm = engine.gradient_norm()
    engine.step(rate(0))
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = {value.dtype for state in base.state.values() for value in state.values()}
    return seen, held, states, {p.dtype for p in engine.module.parameters()}, norm, weights_of(engine)


def test_bf16_accumulates_reduces_and_steps_in_float32_at_every_stage(ranks):
    answers = [ranks.run(2, _dtypes, stage)[0] for stage in (0, 1, 2)]
    for seen, held, states, weights, norm, after in answers:
        assert seen == held == states == weights == {torch.float32}
        assert norm == pytest.approx(answers[0][4], rel=1e-6)
        check_close(after, answers[0][5], 1e-6)


def _hold(rank, world_size, stage):
    """Elements of gradients that live on this rank between two passes of a step, beside buckets."""
    engine = build(rank, world_size, CONFIGS["sgd"], stage, micro_batches=2)
    own = inputs(0).chunk(world_size)[rank].chunk(2)
    engine.backward(loss_of(engine.forward(own[0])), last=False)
    loose = sum(p.grad.numel() for p in engine.module.parameters() if p.grad is not None)
    flat = sum(t.numel() for t in engine._gradients._flat)
    pass_over(engine, 0, 2)
    return loose + flat, sum(p.numel() for p in engine.module.parameters())


def test_zero_2_never_holds_all_gradients_between_passes(ranks):
    for held, everything in ranks.run(2, _hold, 2):
        assert held <= everything / 2 + 4


def _train_wide(rank, world_size, stage):
    from tests.hpc.engines import wide_net

    engine = build(rank, world_size, CONFIGS["adamw"], stage, 0.5, 2, net=wide_net())
    shares = sum(p.numel() for p in engine.module.parameters())
    with torch.no_grad():
        # As gradient caching does before each step.
        engine.forward(inputs(0).chunk(world_size)[rank])
    return shares, train(engine, range(3), 2), weights_of(engine)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_weights_that_are_gathered_for_their_use(ranks, stage, world_size):
    from tests.hpc.engines import wide_net

    net = wide_net()
    whole = sum(p.numel() for p in net.parameters())
    norms, weights = alone(CONFIGS["adamw"], 0.5, net=net)
    for shares, got_norms, got in ranks.run(world_size, _train_wide, stage):
        assert (shares < whole / 10) == (stage == 3)
        assert got_norms == pytest.approx(norms, rel=1e-5)
        check_close(got, weights, 2e-5)


def _channels_last(rank, world_size, stage):
    """Weights that do not lie in memory in the order of their indices."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(6, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(12, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    engine = build(rank, world_size, CONFIGS["adamw"], stage, net=net)
    for step in range(3):
        engine.backward(loss_of(engine.forward(x.chunk(world_size)[rank])))
        engine.step(rate(step))
    return weights_of(engine)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_channels_last(ranks, stage):
    one, two = ranks.run(1, _channels_last, 1)[0], ranks.run(2, _channels_last, stage)[0]
    check_close(two, one, 1e-5)
    if stage == 0:
        check_close(ranks.run(1, _channels_last, 0)[0], one, 1e-5)


def _train_vit(rank, world_size, stage):
    import timm

    torch.manual_seed(5)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, in_chans=1, num_classes=0, depth=2, global_pool="avg", class_token=False
    )
    engine = build(rank, world_size, CONFIGS["sgd"], stage, 0.5, 2, net=net)
    x = torch.randn(12, 1, 32, 32, generator=torch.Generator().manual_seed(1)) + torch.arange(12).view(-1, 1, 1, 1) / 6
    norms = []
    for step in range(2):
        for number, part in enumerate(x.chunk(world_size)[rank].chunk(2)):
            engine.backward(engine.forward(part)[:, :9].square().sum() / 12, last=number == 1)
        norms.append(engine.gradient_norm())
        engine.step(rate(step))
    return norms, weights_of(engine)


def test_a_vision_transformer_under_zero_3(ranks):
    norms, weights = ranks.run(1, _train_vit, 0)[0]
    assert norms[0] != norms[1]
    for got_norms, got in ranks.run(2, _train_vit, 3):
        assert got_norms == pytest.approx(norms, rel=1e-5)
        check_close(got, weights, 1e-4)
