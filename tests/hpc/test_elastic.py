"""Training state from any ZeRO stage and number of ranks to any other."""

import itertools

import pytest
import torch
from torch import nn

from hpc.checkpoint.files import CheckpointError
from tests.hpc.engines import CONFIGS, alone, build, check_close, small_net, train, weights_of


def _first_half(rank, world_size, name, stage):
    from hpc.checkpoint.elastic import gather, optimizer_steps

    engine = build(rank, world_size, CONFIGS[name], stage)
    train(engine, [0, 1])
    whole = {kind: {k: v.clone() for k, v in tensors.items()} for kind, tensors in gather(engine).items()}
    _gathers_the_same_on_main(engine, whole)
    return whole, optimizer_steps(engine)


def _gathers_the_same_on_main(engine, whole):
    """What a checkpoint is made of, directly and in pieces of 3 numbers through memory of a GPU."""
    from hpc.checkpoint import elastic, partitions
    from hpc.checkpoint.writer import HostCopy

    memory, to_main = HostCopy(), partitions.to_main
    try:
        for staged in (False, True):
            partitions.PIECE_BYTES = 12
            partitions.to_main = lambda zero, slots, room, staged, now=staged: to_main(zero, slots, room, now)
            room = memory.room if engine.topology.is_main else None
            got = elastic.gather_on_main(engine, room)
            if not engine.topology.is_main:
                continue
            held, _ = memory.take(got)
            for kind, tensors in whole.items():
                assert held[kind].keys() == tensors.keys()
                assert all(torch.equal(held[kind][key], value) for key, value in tensors.items()), (kind, staged)
            for flat in memory._rooms.values():
                flat.fill_(float("nan"))
    finally:
        partitions.to_main, partitions.PIECE_BYTES = to_main, 32 * 2**20


def _second_half(rank, world_size, name, stage, whole, steps):
    from hpc.checkpoint.elastic import gather, scatter

    engine = build(rank, world_size, CONFIGS[name], stage)
    with torch.no_grad():
        for parameter in engine.module.parameters() if stage < 3 else []:
            parameter.fill_(7.0)
    scatter(engine, whole["model"], whole["optimizer"], steps)
    again = gather(engine)
    for kind, tensors in whole.items():
        assert again[kind].keys() == tensors.keys()
        assert all(torch.equal(again[kind][key], value) for key, value in tensors.items()), kind
    train(engine, [2])
    return weights_of(engine)


STAGES = {"adamw": [0, 1, 2, 3], "sgd": [0, 2, 3], "lars": [0, 1, 2], "lamb": [0, 1, 2]}
SLOTS = {"adamw": {"exp_avg", "exp_avg_sq"}, "lamb": {"exp_avg", "exp_avg_sq"}}


def _first_halves(rank, world_size, name):
    return [_first_half(rank, world_size, name, stage) for stage in STAGES[name]]


def _second_halves(rank, world_size, name, halves):
    return [_second_half(rank, world_size, name, stage, *half) for half in halves for stage in STAGES[name]]


@pytest.mark.parametrize("name", list(STAGES))
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 1)])
def test_goes_on_at_any_stage_and_number_of_ranks(ranks, name, before, after):
    _, weights = alone(CONFIGS[name])
    of_ranks = ranks.run(before, _first_halves, name)
    trained = {key for key, _ in small_net().named_parameters()}
    for (whole, steps), (reference, _) in zip(of_ranks[0], of_ranks[-1], strict=True):
        slots = SLOTS.get(name, {"momentum_buffer"})
        assert set(whole["optimizer"]) == {f"{slot}/{key}" for slot, key in itertools.product(slots, trained)}
        assert steps == (2.0 if name in SLOTS else 0.0)
        assert all(torch.equal(reference["model"][key], value) for key, value in whole["model"].items())
    for answers in ranks.run(after, _second_halves, name, of_ranks[0]):
        for got in answers:
            check_close(got, weights, 1e-5)


def _wrong(rank, world_size, stage):
    from hpc.checkpoint.elastic import gather, scatter

    engine = build(rank, world_size, CONFIGS["sgd"], stage)
    whole = gather(engine)["model"]
    said = []
    for model in (
        {key: value for key, value in whole.items() if key != "0.bias"},
        {**whole, "0.bias": torch.zeros(3)},
        {**whole, "more": torch.zeros(3)},
    ):
        try:
            scatter(engine, model, {}, 0.0)
        except CheckpointError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_another_model_is_refused(ranks, stage):
    for said in ranks.run(2, _wrong, stage):
        assert said == [
            "'0.bias' is missing in the checkpoint",
            "'0.bias' has shape (3,), not (13,)",
            "'more' is missing in the model",
        ]


def _frozen(rank, world_size, stages):
    """A frozen weight and a buffer travel as well."""
    import tests.hpc.engines as engines
    from hpc.checkpoint.elastic import gather, scatter

    usual = engines.small_net

    def net(dtype=torch.float32):
        made = usual(dtype)
        made[0].weight.requires_grad_(False)
        made.register_buffer("count", torch.zeros(2))
        return made

    engines.small_net = net
    try:
        first = build(rank, world_size, CONFIGS["adamw"], stages[0])
        train(first, [0])
        first.module.count += 5
        whole = {kind: {k: v.clone() for k, v in tensors.items()} for kind, tensors in gather(first).items()}
        whole["model"]["0.weight"] += 1
        second = build(rank, world_size, CONFIGS["adamw"], stages[1])
        scatter(second, whole["model"], whole["optimizer"], 1.0)
        after = gather(second)
        assert all(torch.equal(after["model"][key], value) for key, value in whole["model"].items())
        return after["model"]["0.weight"], after["model"]["count"], usual()[0].weight
    finally:
        engines.small_net = usual


@pytest.mark.parametrize("stages", [(0, 3), (3, 1), (2, 3)])
def test_frozen_weights_and_buffers(ranks, stages):
    for weight, count, original in ranks.run(2, _frozen, stages):
        torch.testing.assert_close(weight, (original + 1).detach())
        assert count.tolist() == [5.0, 5.0]
        assert isinstance(weight, torch.Tensor) and not isinstance(weight, nn.Parameter)
