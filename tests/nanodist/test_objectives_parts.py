"""Tiles, Gram matrices, exchanges and collapse measures."""

import pytest
import torch
import torch.distributed as dist

from nanodist.objectives.collapse import collapse_measures
from nanodist.objectives.exchange import columns_to_rows, rows_to_columns
from nanodist.objectives.gram import Gram, takes_gram
from nanodist.objectives.tiles import grid, shared_out


@pytest.mark.parametrize("form", ["nt_xent", "cross_view"])
@pytest.mark.parametrize(("total", "rows", "columns"), [(1, 4, 4), (10, 3, 7), (13, 5, 5), (13, 100, 200)])
def test_tiles_hold_each_pair_of_views_once(form, total, rows, columns):
    times = torch.zeros(2 * total, 2 * total, dtype=torch.int)
    for t in grid(total, form, rows, columns):
        assert t.bottom - t.top <= rows and t.right - t.left <= columns
        times[t.top : t.bottom, t.left : t.right] += 1
        times[t.beyond : t.right, t.top : t.bottom] += 1
    expected = torch.ones_like(times)
    if form == "cross_view":
        expected[:total, :total] = expected[total:, total:] = 0
    assert torch.equal(times, expected)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_tiles_are_shared_out_evenly(ranks):
    tiles = grid(1000, "nt_xent", 64, 128)
    shares = [shared_out(tiles, rank, ranks) for rank in range(ranks)]
    assert sorted((t.top, t.left) for share in shares for t in share) == sorted((t.top, t.left) for t in tiles)
    work = [sum(t.work for t in share) for share in shares]
    assert max(work) < 1.02 * sum(work) / ranks


def test_gram_of_blocks_is_the_product():
    x = torch.randn(300, 90, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = Gram(x, 300)
    for block in x.split(40, 1):
        gram.add(block)
    torch.testing.assert_close(gram.whole(None), x @ x.T)


def test_the_form_follows_the_shape_unless_told():
    assert takes_gram("auto", 256, 8192, 0.9) and not takes_gram("auto", 8192, 8192, 0.9)
    assert takes_gram("gram", 8192, 16, 0.9) and not takes_gram("dense", 16, 8192, 0.9)


def _there_and_back(rank, world_size, dtype):
    whole = torch.arange(8.0 * 11).view(8, 11).to(dtype)
    own = whole[rank * 2 : rank * 2 + 2]
    columns = rows_to_columns(own, dist.group.WORLD)
    return columns, torch.equal(columns_to_rows(columns, 11, dist.group.WORLD), own)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_columns_come_whole_and_go_back(ranks, dtype):
    answers = ranks.run(4, _there_and_back, dtype)
    assert torch.equal(torch.cat([columns for columns, _ in answers], 1), torch.arange(8.0 * 11).view(8, 11).to(dtype))
    assert [columns.shape[1] for columns, _ in answers] == [3, 3, 3, 2] and all(back for _, back in answers)


def test_collapse_is_seen():
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(256, 16, generator=generator)
    point = torch.ones(256, 16) + 1e-4 * spread
    line = spread[:, :1] * torch.ones(1, 16)
    healthy, collapsed, dimensional = (collapse_measures(x, x) for x in (spread, point, line))
    assert healthy["embedding_std"] > 0.9 and collapsed["embedding_std"] < 0.01
    assert healthy["effective_rank"] > 12 and dimensional["effective_rank"] < 1.5
    assert healthy["uniformity"] < -3 < collapsed["uniformity"] and healthy["alignment"] < 1e-9
