import copy

import pytest
import torch
from torch import nn

from hpc.batch_norm import Layout, convert, make_layout
from hpc.errors import UserError
from hpc.world_sizes import legal_world_sizes

BATCH = 16


def _net(dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5), nn.BatchNorm1d(5)
    )
    for norm in (net[1], net[5]):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    return net.to(dtype)


def _images():
    x = torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # Every sample has a mean of its own: statistics of a part are not those of the whole.
    return x + torch.arange(BATCH, dtype=torch.float64).view(-1, 1, 1, 1)


def _reference(group_size):
    """torch's own BatchNorm, applied group by group, running statistics averaged over the groups."""
    net, x = _net(), _images()
    parts, running = [], []
    for part in x.split(group_size):
        buffers = {k: v.clone() for k, v in net.named_buffers()}
        parts.append(torch.func.functional_call(net, buffers, (part,)))
        running.append({k: v for k, v in buffers.items() if "running" in k})
    y = torch.cat(parts)
    y.pow(3).sum().backward()
    mean = {k: torch.stack([r[k] for r in running]).mean(0) for k in running[0]}
    return y.detach(), {k: p.grad for k, p in net.named_parameters()}, mean


def _ours(rank, world_size, group_size):
    layout = make_layout(BATCH, group_size, rank, world_size)
    net = convert(_net(), layout)
    n = BATCH // world_size
    y = net(_images()[rank * n : (rank + 1) * n])
    y.pow(3).sum().backward()
    layout.update_running_statistics()
    running = {k: v for k, v in net.state_dict().items() if "running" in k}
    return y.detach(), {k: p.grad for k, p in net.named_parameters()}, running


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("group_size", [2, 4, 8, 16])
def test_same_as_torch_group_by_group(ranks, world_size, group_size):
    y, gradients, running = _reference(group_size)
    answers = ranks.run(world_size, _ours, group_size)
    torch.testing.assert_close(torch.cat([a[0] for a in answers]), y, rtol=1e-11, atol=1e-11)
    for name, gradient in gradients.items():
        total = sum(a[1][name] for a in answers)
        torch.testing.assert_close(total, gradient, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for answer in answers:
        for name, value in running.items():
            torch.testing.assert_close(answer[2][name], value, rtol=1e-11, atol=1e-12)


def test_per_rank_statistics_would_differ():
    whole, _, _ = _reference(16)
    halves, _, _ = _reference(8)
    assert (whole - halves).norm() / whole.norm() > 0.1


def test_running_statistics_move_once_over_both_views():
    layout = Layout(8, 8)
    net = convert(_net(), layout)
    x = _images()
    net(x[:8])
    net(x[8:])
    layout.update_running_statistics()
    _, _, running = _reference(8)
    torch.testing.assert_close(net.state_dict()["1.running_mean"], running["1.running_mean"])
    assert int(net.state_dict()["1.num_batches_tracked"]) == 1
    assert not layout.layers[0].seen


def test_evaluation_uses_running_statistics_and_names_stay():
    net = _net()
    names = list(net.state_dict())
    ours = convert(copy.deepcopy(net), Layout(4, 4)).eval()
    assert list(ours.state_dict()) == names
    x = _images()[:3]
    torch.testing.assert_close(ours(x), net.eval()(x))


def test_activation_of_timm_layers_is_kept():
    timm = pytest.importorskip("timm")
    net = timm.create_model("regnetx_002", in_chans=1, num_classes=0).double().train()
    ours = convert(copy.deepcopy(net), Layout(4, 4))
    x = torch.randn(4, 1, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), net(x))


def test_illegal_world_sizes_name_the_legal_ones(ranks):
    assert legal_world_sizes(32, 8) == [1, 2, 4, 8, 16, 32]
    assert legal_world_sizes(24, 8) == [1, 3, 6, 12, 24]
    with pytest.raises(UserError, match="legal numbers of ranks: 1, 3, 6, 12, 24"):
        make_layout(24, 8, 0, 2)
    with pytest.raises(UserError, match="do not divide each other"):
        Layout(6, 8)


def _forward_bits(rank, world_size, dtype, group_size):
    """Two views, one below the other, in channels_last; what one layer makes of them, view by view."""
    layout = make_layout(BATCH, group_size, rank, world_size)
    norm = convert(nn.Sequential(nn.BatchNorm2d(24)), layout)
    views = torch.randn(2, BATCH, 24, 9, 9, generator=torch.Generator().manual_seed(2))
    views = views + torch.arange(BATCH).view(-1, 1, 1, 1) * torch.tensor([1.0, -2.0]).view(2, 1, 1, 1, 1)
    n = BATCH // world_size
    own = views[:, rank * n : (rank + 1) * n].flatten(0, 1).to(dtype).contiguous(memory_format=torch.channels_last)
    y = norm(own)
    assert y.is_contiguous(memory_format=torch.channels_last)
    layout.update_running_statistics()
    return y.unflatten(0, (2, n)).float().detach(), norm.state_dict()["0.running_mean"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [4, 16])
def test_the_forward_has_the_same_bits_on_any_number_of_ranks(ranks, dtype, group_size):
    whole, running = _forward_bits(0, 1, dtype, group_size)
    for world_size in (2, 4):
        answers = ranks.run(world_size, _forward_bits, dtype, group_size)
        assert torch.equal(torch.cat([a[0] for a in answers], 1), whole)
        for answer in answers:
            torch.testing.assert_close(answer[1], running, rtol=1e-5, atol=1e-6)


def _stacked(rank, world_size, stacked):
    layout = make_layout(BATCH, 8, rank, world_size)
    net, n = convert(_net(), layout), BATCH // world_size
    views = torch.stack([_images(), 3 - 2 * _images()])[:, rank * n : (rank + 1) * n]
    y = net(views.flatten(0, 1)) if stacked else torch.cat([net(view) for view in views])
    y.pow(3).sum().backward()
    layout.update_running_statistics()
    return y.detach(), {k: p.grad for k, p in net.named_parameters()}, net.state_dict()["1.running_var"]


@pytest.mark.parametrize("world_size", [1, 4])
def test_views_in_one_pass_are_views_one_by_one(ranks, world_size):
    for own, apart in zip(ranks.run(world_size, _stacked, True), ranks.run(world_size, _stacked, False), strict=True):
        torch.testing.assert_close(own[0], apart[0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(own[2], apart[2], rtol=1e-11, atol=1e-11)
        for name, gradient in apart[1].items():
            torch.testing.assert_close(own[1][name], gradient, rtol=1e-9, atol=1e-9)


def test_rows_that_are_no_whole_pass_are_refused():
    net = convert(_net(), Layout(4, 8))
    with pytest.raises(ValueError, match="no whole passes of the 8 declared"):
        net(_images()[:12])
