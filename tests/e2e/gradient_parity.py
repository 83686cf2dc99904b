"""``python -m tests.e2e.gradient_parity``: each objective in each form on 1, 2 and 4 ranks against its paper's formula.

The ranks are processes that hold contiguous parts of one global batch whose parts have different means. Printed are the
relative errors, in fp64, of the loss (the worst rank's) and of the gradient (L2, the ranks' parts put together) against
the formula written naively on one process; above 1e-12 the exit code is 1. A sabotage has to be seen: every rank
for itself, with its own statistics and negatives.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from nanodist.objectives import barlow_twins, nt_xent, vicreg
from nanodist.objectives.tiles import Sizes
from tests.nanodist.original_objectives import original_barlow_twins, original_nt_xent, original_vicreg
from tests.ranks import RankPool

LIMIT = 1e-12
WORLDS = (1, 2, 4)
SAMPLES, COLUMNS = 20, 37
TILES = Sizes(rows=7, columns=11, band=3)
KIN = torch.arange(SAMPLES) % 6

Loss = Callable[[Tensor, Tensor, object, Tensor], Tensor]
Formula = Callable[[Tensor, Tensor], Tensor]
CASES: dict[tuple[str, str], tuple[Loss, Formula]] = {
    ("NT-Xent", "one tile"): (
        lambda a, b, g, kin: nt_xent(a, b, 0.2, g),
        lambda a, b: original_nt_xent(a, b, 0.2),
    ),
    ("NT-Xent", "tiles"): (
        lambda a, b, g, kin: nt_xent(a, b, 0.2, g, size=TILES),
        lambda a, b: original_nt_xent(a, b, 0.2),
    ),
    ("NT-Xent", "tiles, kin left out"): (
        lambda a, b, g, kin: nt_xent(a, b, 0.2, g, kin, size=TILES),
        lambda a, b: original_nt_xent(a, b, 0.2, KIN),
    ),
    ("NT-Xent", "tiles, row maxima (temperature 0.001)"): (
        lambda a, b, g, kin: nt_xent(a, b, 0.001, g, size=TILES),
        lambda a, b: original_nt_xent(a, b, 0.001),
    ),
    ("NT-Xent, cross-view", "tiles"): (
        lambda a, b, g, kin: nt_xent(a, b, 0.1, g, None, "cross_view", TILES),
        lambda a, b: original_nt_xent(a, b, 0.1, cross=True),
    ),
    ("NT-Xent, cross-view", "tiles, kin left out"): (
        lambda a, b, g, kin: nt_xent(a, b, 0.1, g, kin, "cross_view", TILES),
        lambda a, b: original_nt_xent(a, b, 0.1, KIN, cross=True),
    ),
    ("Barlow Twins", "dense"): (
        lambda a, b, g, kin: barlow_twins(a, b, 0.0051, g, "dense"),
        lambda a, b: original_barlow_twins(a, b, 0.0051),
    ),
    ("Barlow Twins", "Gram"): (
        lambda a, b, g, kin: barlow_twins(a, b, 0.0051, g, "gram"),
        lambda a, b: original_barlow_twins(a, b, 0.0051),
    ),
    ("VICReg", "dense"): (
        lambda a, b, g, kin: vicreg(a, b, group=g, way="dense"),
        lambda a, b: original_vicreg(a, b, 25.0, 25.0, 1.0),
    ),
    ("VICReg", "Gram"): (
        lambda a, b, g, kin: vicreg(a, b, group=g, way="gram"),
        lambda a, b: original_vicreg(a, b, 25.0, 25.0, 1.0),
    ),
}


def projections() -> tuple[Tensor, Tensor]:
    """Two views (samples, columns) in fp64; each quarter of the batch has a mean and a spread of its own."""
    generator = torch.Generator().manual_seed(5)
    quarter = torch.arange(4.0, dtype=torch.float64).repeat_interleave(SAMPLES // 4)[:, None]
    a = torch.randn(SAMPLES, COLUMNS, generator=generator, dtype=torch.float64) * (0.5 + 0.2 * quarter)
    a = a + quarter * torch.linspace(-1, 2, COLUMNS, dtype=torch.float64)
    return a, a + torch.randn(SAMPLES, COLUMNS, generator=generator, dtype=torch.float64)


def on_rank(rank: int, world_size: int, case: tuple[str, str], alone: bool) -> tuple[Tensor, Tensor]:
    """Loss (1,) and gradients (2, n, columns) of one rank; ``alone`` leaves the other ranks out, which is wrong."""
    n = SAMPLES // world_size
    rows = slice(rank * n, (rank + 1) * n)
    a, b = (x[rows].clone().requires_grad_() for x in projections())
    group = None if alone or world_size == 1 else dist.group.WORLD
    loss = CASES[case][0](a, b, group, KIN[rows])
    loss.backward()
    if world_size > 1:
        dist.barrier()  # a rank that leaves before the others have met it breaks their meeting
    return loss.detach(), torch.stack([a.grad, b.grad])  # type: ignore[list-item]


def errors(pool: RankPool, case: tuple[str, str], world_size: int, alone: bool = False) -> tuple[float, float]:
    """Relative errors of loss and gradient."""
    a, b = (x.requires_grad_() for x in projections())
    loss = CASES[case][1](a, b)
    gradient, loss = torch.stack(torch.autograd.grad(loss, (a, b))), loss.detach()
    answers = pool.run(world_size, on_rank, case, alone)
    of_loss = max(float(abs(answer[0] - loss) / abs(loss)) for answer in answers)
    found = torch.cat([answer[1] for answer in answers], 1)
    return of_loss, float((found - gradient).norm() / gradient.norm())


def main() -> int:
    """Print the table; 0 where every error is at most 1e-12 and the sabotages are seen."""
    torch.set_num_threads(1)
    pool, worst = RankPool(max(WORLDS)), 0.0
    print("Relative error of loss / gradient against the formula on one process, fp64\n")
    print("| objective | form | " + " | ".join(f"{w} rank{'s' * (w > 1)}" for w in WORLDS) + " |")
    print("|---" * (2 + len(WORLDS)) + "|")
    try:
        for case in CASES:
            row = [errors(pool, case, world_size) for world_size in WORLDS]
            worst = max(worst, *(max(pair) for pair in row))
            print(f"| {case[0]} | {case[1]} | " + " | ".join(f"{x:.0e} / {g:.0e}" for x, g in row) + " |", flush=True)
        alone = min(min(errors(pool, case, 2, alone=True)) for case in CASES)
    finally:
        pool.close()
    print(f"\nlargest {worst:.1e}, allowed {LIMIT:.0e}; smallest where each of 2 ranks is left alone: {alone:.1e}")
    return int(not worst <= LIMIT or not alone > 1e-3)


if __name__ == "__main__":
    sys.exit(main())
