"""The planner's arithmetic, and the ledger that its numbers come from."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from hpc.planner import Job, Loss, Norms, Pass, Transfer, Weights, fits, held, memory, speed, traffic
from hpc.planner_buckets import PretendedBuckets
from hpc.planner_ledger import Ledger
from hpc.reduction import BUCKET_BYTES, IN_FLIGHT

WEIGHTS = Weights(((3_000_000, 1_000_000), (1_000,)), states=2.0)
PASS = Pass(50, 4, 110, 100, 150, 170, 160, 2)


def test_ledger_counts_storages_and_not_views():
    before = torch.ones(100)
    with Ledger() as ledger:
        a = before + 1
        view = a[:10].view(2, 5)
        assert ledger.live == 400
        a.add_(1)
        del a
        assert ledger.live == 400  # the view holds it
        del view
        assert (ledger.live, ledger.peak) == (0, 400)
        ledger.mark()
        _ = (before * 2) * 3
        assert ledger.peak == 800 and ledger.live == 400


def test_ledger_sees_what_backward_keeps_and_checkpointing_drops():
    def two(x):
        return x.exp().sin()

    x = torch.ones(1000, requires_grad=True)
    with Ledger() as ledger:
        plain = two(x).exp()
        assert ledger.live == 2 * 4000  # both results of exp; sin is not kept
        plain.sum().backward()
        del plain
        x.grad = None
        assert ledger.live == 0
        again = checkpoint(two, x, use_reentrant=False).exp()
        assert ledger.live == pytest.approx(4000, abs=100)  # and the state of the generator
        del again


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_copies_inside_convolutions_are_those_that_the_profiler_sees(layout):
    x = torch.rand(4, 128, 4, 4).contiguous(memory_format=torch.channels_last)
    weight = torch.rand(256, 128, 3, 3).contiguous(memory_format=layout)
    options = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    def forward():
        return torch.ops.aten.convolution(x, weight, None, *options)

    def backward():
        return torch.ops.aten.convolution_backward(y, x, weight, None, *options, [True, True, False])

    y = forward()
    for function in (forward, backward):
        function()
        with torch.profiler.profile(profile_memory=True) as profile:
            made = function()
        events = profile.profiler.kineto_results.events()
        now, most = 0, 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        with Ledger() as ledger:
            again = function()
        assert ledger.live == now
        assert ledger.peak == pytest.approx(most, rel=0.05)  # small workspaces differ between CPUs
        del made, again


def test_ledger_counts_shapes_without_values_alike():
    found = []
    for mode in (None, FakeTensorMode()):
        x = torch.ones(64, 3, 8, 8) if mode is None else mode.from_tensor(torch.ones(64, 3, 8, 8))
        with Ledger() as ledger:
            y = x.square().mean((2, 3)) @ x[:3, :, 0, 0]
            found.append((ledger.peak, ledger.live, y.shape))
    assert found[0] == found[1]


def _collectives(rank, world_size):
    with Ledger() as ledger:
        x = torch.ones(5)
        dist.all_reduce(x)
        dist.all_reduce(x.double())
        dist.all_gather_into_tensor(torch.empty(world_size * 3), torch.ones(3))
        dist.all_gather([torch.empty(7) for _ in range(world_size)], torch.ones(7))
        dist.broadcast(x, 0)
        dist.reduce(x, 1, async_op=True).wait()
    return ledger.sent


def test_ledger_counts_what_is_handed_to_collectives(ranks):
    for sent in ranks.run(2, _collectives):
        assert sent == {
            "allreduce_": [2, 20 + 40],
            "_allgather_base_": [1, 12],
            "allgather_": [1, 28],
            "broadcast_": [1, 20],
            "reduce_": [1, 20],
        }


def test_stages_shard_states_then_gradients():
    count = WEIGHTS.count * 4
    zero, one, two = (held(WEIGHTS, Job(8, 1, stage, 0)) for stage in (0, 1, 2))
    assert zero == {"weights": count, "optimizer states": 2 * count, "flat gradients": count}
    padded = 4 * (4_000_000 + 1_008)  # 1000 elements in partitions of an even number for 8 ranks
    assert one["weights"] == padded and one["flat gradients"] == padded
    assert one["optimizer states"] == 2 * padded // 8 and one["master copy of the partition"] == padded // 8
    assert two["flat gradients"] == padded // 8
    assert held(WEIGHTS, Job(1, 1, 2, 0))["flat gradients"] >= count  # one rank has nothing to share with


def test_peak_without_caching_is_pass_loss_or_step():
    job = Job(4, 1, 0, inputs=1000, inputs_peak=2.0)
    found = memory(WEIGHTS, PASS, Loss(peak=7, kept=3), job)
    base = sum(found.held.values()) + 1000
    assert found.phases == {
        "inputs": base + 1000,
        "forward": base + 110,
        "loss": base + 107,
        "backward": base + 153,
        "optimizer": base + 2,
    }
    assert found.peak_phase == "inputs" and found.peak == base + 1000


def test_caching_keeps_outputs_and_gradients_between_passes():
    found = memory(WEIGHTS, PASS, Loss(peak=7, kept=3), Job(4, 4, 0, inputs=0))
    base, own = sum(found.held.values()), WEIGHTS.count * 4
    assert found.phases["backward"] == base + 8 + 3 + own + 150
    assert found.phases["embedding"] == base + 3 * 4 + 50
    sharded = memory(WEIGHTS, PASS, Loss(peak=7, kept=3), Job(4, 4, 2, inputs=0))
    assert "embedding" in sharded.phases
    # ZeRO 2 hands the gradients of each pass over, so that only buckets stand beside its partition.
    assert sharded.phases["backward"] == sum(sharded.held.values()) + 8 + 3 + 160


def test_gradients_of_a_lone_rank_stay_on_its_parameters():
    one, several = (memory(WEIGHTS, PASS, Loss(peak=7, kept=3), Job(1, m, 0, inputs=0)) for m in (1, 4))
    own = WEIGHTS.count * 4
    for found in (one, several):
        assert found.held == {"weights": own, "optimizer states": 2 * own}
        assert found.phases["optimizer"] == 3 * own + own + (2 if found is one else 8)
    assert one.phases["backward"] == 3 * own + 3 + 170
    assert several.phases["backward"] == 3 * own + 8 + 3 + own + 150


def test_optimizer_temporaries_are_of_one_tensor_or_of_a_group():
    one = Weights(WEIGHTS.groups, step_copies=1.0)
    together = Weights(WEIGHTS.groups, step_copies=1.0, step_at_once=True)
    peaks = [memory(w, PASS, Loss(0, 0), Job(2, 1, stage, 0)) for w, stage in ((one, 0), (together, 0), (one, 1))]
    extra = [m.phases["optimizer"] - sum(m.held.values()) - 2 for m in peaks]
    assert extra == [4 * 3_000_000, 4 * 4_000_000, 4 * 2_000_000]


def test_buckets_come_with_their_first_gradient_and_go_when_reduced():
    width = math.isqrt(BUCKET_BYTES // 4) + 1  # a bucket each
    layers = [torch.nn.Linear(width, width, bias=number == 0) for number in range(5)]
    model = torch.nn.Sequential(*layers)
    for parameter in model.parameters():
        parameter.data = parameter.data[:1].expand_as(parameter)  # 5 weights of 25 MiB would be a waste
    parameters = list(model.parameters())
    buckets = PretendedBuckets(parameters, [0, 1, 0, 0, 0, 0])
    assert buckets.sizes() == [width * width] * 5 + [width]
    x = torch.ones(1, width)
    with Ledger() as ledger:
        y = model(x)
        ledger.mark()
        y.sum().backward()
        most = ledger.peak
    held = round(most / (4 * width * width), 1)
    # Two are being reduced and one is being filled; the gradient that goes into it is there as well.
    assert held == IN_FLIGHT + 2
    assert all(parameter.grad is None for parameter in parameters)
    buckets.close()


@pytest.mark.parametrize(("stage", "micro", "gradients"), [(0, 4, 1), (1, 4, 1), (2, 1, 1), (2, 4, 4)])
def test_gradients_move_once_but_at_zero_2_each_pass(stage, micro, gradients):
    moved = traffic(WEIGHTS, Loss(0, 0), Norms(), Job(8, micro, stage, 0))
    own = {t.purpose: t for t in moved}
    assert own["gradients"].handed == WEIGHTS.count * 4 * gradients
    assert ("weights" in own) == (stage > 0)
    assert own["gradients"].collective == ("reduce" if stage else "all_reduce")
    # Reducing to the owner and gathering weights is what all-reduce does, in two halves.
    if micro == 1:
        total = own["gradients"].sent + own["weights"].sent
        assert total == pytest.approx(2 * 7 / 8 * WEIGHTS.count * 4, rel=1e-3)


def test_one_rank_sends_nothing():
    assert traffic(WEIGHTS, Loss(0, 0, {"allreduce_": [1, 5]}), Norms((8,), 4), Job(1, 1, 2, 0)) == []


def test_spanning_norms_exchange_moments_each_forward():
    norms = Norms(channels=(16, 32), rows=4, parts=2, span=2)
    for micro, forwards, graphs in ((1, 1, 1), (3, 6, 3)):
        own = {t.purpose: t for t in traffic(WEIGHTS, Loss(0, 0), norms, Job(4, micro, 0, 0))}
        assert own["BatchNorm moments"].handed == forwards * 4 * 2 * 48 * 4
        assert own["BatchNorm moments"].ranks == 2 and own["BatchNorm moments"].calls == forwards * 2
        assert own["BatchNorm gradients"].handed == graphs * 2 * 2 * 48 * 4
        assert own["running statistics"].handed == 2 * 48 * 4 and own["running statistics"].ranks == 4


def test_sent_by_rings():
    for name, expected in (("all_reduce", 150), ("all_gather", 300), ("reduce", 75), ("all_to_all", 75)):
        assert Transfer("x", name, 100, 4).sent == expected


def test_speed_lies_between_no_and_full_overlap():
    moved = [Transfer("gradients", "all_reduce", 10**9, 2), Transfer("weights", "all_gather", 10**9, 2)]
    found = speed(100, 0.01, 0.03, False, moved, 1e9)
    assert found.slowest == pytest.approx(1 / 5) and found.fastest == pytest.approx(1 / 4)
    alone = speed(100, 0.01, 0.03, True, moved, math.inf)
    assert alone.slowest == alone.fastest == pytest.approx(1 / 4)


def test_reserve_stays_free():
    assert fits(90, 100, 0.1) and not fits(91, 100, 0.1)
