"""NT-Xent, the loss of SimCLR, over the global batch, without the matrix of similarities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hpc.collectives import Group, group_rank, group_size
from nanodist.objectives import nt_xent_gpu
from nanodist.objectives.exchange import largest_over_ranks, rows_of_all, sum_over_ranks
from nanodist.objectives.given import differentiable
from nanodist.objectives.nt_xent_gpu import SumsOnGPU
from nanodist.objectives.tiles import Form, Negatives, Sizes, Tile, grid, shared_out, sizes

# Similarities run from -scale to +scale as exponents of 2. Up to here no sum of their powers can leave float32 (2^-126
# to 2^127) or float64, so that no maximum of a row has to be known beforehand.
SAFE = {torch.float32: 100.0, torch.float64: 900.0}
# bf16 has 8 bits: a similarity near +scale is off by scale / 512 at most, which is left to bf16 up to 6 % of a term.
SAFE_BF16 = 32.0


class _Sums:
    """Sums over the negatives of each view, and products with their weights; all exponents are of 2.

    Args:
        z: all views (2N, d).
        kin: see :func:`nt_xent`.
        form: which pairs of views are held against each other.
        dtype: of the sums.
        safe: whether powers of the similarities can be summed as they are.
        group: the tiles are shared out over its ranks.
        size: of the tiles.
    """

    def __init__(
        self, z: Tensor, kin: Tensor | None, form: Form, dtype: torch.dtype, safe: bool, group: Group, size: Sizes
    ) -> None:
        self.z, self.dtype, self.safe, self.group, self.size = z, dtype, safe, group, size
        self.negatives = Negatives(z, dtype, kin, size)
        tiles = grid(len(z) // 2, form, size.rows, size.columns)
        self.tiles = shared_out(tiles, group_rank(group), group_size(group))

    def _vector(self, value: float) -> Tensor:
        return torch.full((len(self.z),), value, dtype=self.dtype, device=self.z.device)

    def _bands(self, t: Tile, products: Tensor, *by_row: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """What :meth:`Negatives.bands` gives, and the elements of each (2N,) of ``by_row`` for the rows of the band."""
        parts = [x[t.top : t.bottom].split(self.size.band) for x in by_row]
        for i, found in enumerate(self.negatives.bands(products)):
            yield *found, *(part[i] for part in parts)

    def _largest(self) -> Tensor:
        """The largest negative similarity (2N,) of each view; 0 where there is none."""
        largest = self._vector(float("-inf"))
        for t in self.tiles:
            by_column = largest[t.left : t.right]
            for _, s, _, by_row in self._bands(t, self.negatives.products(t), largest):
                by_row.copy_(torch.maximum(by_row, s.amax(1)))
                by_column.copy_(torch.maximum(by_column, s.amax(0)))
        return largest_over_ranks(largest, self.group).nan_to_num_(neginf=0.0)

    def log2(self) -> Tensor:
        """log2 of the sum over the negatives of each view (2N,); minus infinity where there is none."""
        sums = self._vector(0.0)
        if self.safe:
            for t in self.tiles:
                by_column = sums[t.beyond : t.right]
                known = t.beyond - t.left
                for _, s, _, by_row in self._bands(t, self.negatives.products(t), sums):
                    by_row.add_(s.exp2_().sum(1))
                    if known < s.shape[1]:
                        by_column.add_((s[:, known:] if known else s).sum(0))
            return sum_over_ranks(sums, self.group).log2_()
        largest = self._largest()
        for t in self.tiles:
            by_column, of_columns = sums[t.beyond : t.right], largest[t.beyond : t.right]
            for _, s, _, by_row, of_rows in self._bands(t, self.negatives.products(t), sums, largest):
                by_row.add_((s - of_rows[:, None]).exp2_().sum(1))
                by_column.add_((s[:, t.beyond - t.left :] - of_columns).exp2_().sum(0))
        return sum_over_ranks(sums, self.group).log2_().add_(largest)

    def _weights(self, t: Tile, known: Tensor) -> Tensor:
        """2^s_ij (1 / s_i + 1 / s_j) of a tile, as a pair of views meets both ways; ``known`` is 1 / s or log2 s."""
        weights, of_columns = self.negatives.products(t), known[t.left : t.right]
        for band, s, spare, of_rows in self._bands(t, weights, known[:, None]):
            if self.safe:
                s.exp2_().mul_(torch.add(of_rows, of_columns, out=spare))
            else:
                torch.sub(s, of_rows, out=spare).exp2_()
                s.sub_(of_columns).exp2_().add_(spare)
            if s is not band:
                band.copy_(s)
        return weights

    def gradient(self, log2_sums: Tensor) -> Tensor:
        """Sum over the negatives of each view of weight times view, (2N, d), by ``log2_sums`` (2N,) of all terms."""
        total = self.z.new_zeros(self.z.shape, dtype=self.dtype)
        known = (-log2_sums).exp2() if self.safe else log2_sums
        add = _adder(self.z, self.dtype, min(len(self.z), max(self.size.rows, self.size.columns)))
        for t in self.tiles:
            weights = self._weights(t, known)
            add(total[t.top : t.bottom], weights, self.z[t.left : t.right])
            if t.beyond < t.right:
                add(total[t.beyond : t.right], weights[:, t.beyond - t.left :].T, self.z[t.top : t.bottom])
        return sum_over_ranks(total, self.group)


def _adder(z: Tensor, dtype: torch.dtype, rows: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``total += x @ y`` of at most ``rows`` rows; narrow products are added up in the wide total."""
    if z.dtype == dtype:
        return lambda total, x, y: total.addmm_(x, y)
    space = z.new_empty(rows, z.shape[1])
    return lambda total, x, y: total.add_(torch.mm(x, y, out=space[: len(x)]))


def _of_all(own: Tensor, dtype: torch.dtype, group: Group) -> Tensor:
    """Views (2, n, d) of every rank as (2N, d): view a of the global batch, then view b."""
    if group is None:
        return own.flatten(0, 1).to(dtype)
    total = own.shape[1] * group_size(group)
    z = own.new_empty(2 * total, own.shape[2], dtype=dtype)
    for view in (0, 1):
        rows_of_all(own[view], z[view * total : (view + 1) * total], group)
    return z


def nt_xent(
    a: Tensor,
    b: Tensor,
    temperature: float,
    group: Group = None,
    kin: Tensor | None = None,
    form: Form = "nt_xent",
    size: Sizes | None = None,
) -> Tensor:
    """Normalised temperature-scaled cross entropy over 2N views (Chen et al. 2020, eq. 1).

    For each of the 2N views of the global batch, its partner has to be told from the other 2N - 2 views by cosine
    similarity; the mean over the 2N views is returned. The similarities are made tile by tile above the diagonal, each
    rank having its share of the tiles, once for the sums and once more for the gradient; two tiles and the views of
    the global batch are all that stands in memory. Products are taken in the precision of ``a`` and ``b``, sums in
    float32 at least.

    Args:
        a, b: projections (n, d) of the two views of this rank's samples, row i of one sample; any scale.
        temperature: divides the cosine similarities; must be positive, and may be tiny.
        group: process group over which the batch is spread; ``None`` for one process.
        kin: (n,) integers; views of samples with equal numbers are not held against each other, as they may well
            show the same thing (tiles of one micrograph). ``None``: every other sample is a negative.
        form: ``cross_view`` holds a view only against the other view of the other samples, N - 1 negatives each (Lu
            et al. 2022; InfoNCE taken both ways).
        size: of the tiles; ``None``: what was measured to be fast on the device.

    Returns:
        The loss of the global batch, the same on every rank; gradients follow :mod:`hpc.collectives`.
    """
    scale = math.log2(math.e) / temperature
    total = a.shape[0] * group_size(group)

    def rule(a: Tensor, b: Tensor, gradient: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        narrow = a.dtype == b.dtype == torch.bfloat16 and scale <= SAFE_BF16
        own = a.new_empty(2, *a.shape, dtype=torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32))
        own[0].copy_(a)
        own[1].copy_(b)
        lengths = torch.linalg.vector_norm(own, dim=2, keepdim=True).clamp_min_(1e-12)
        own.mul_(math.sqrt(scale) / lengths)  # unit vectors whose products are the exponents of 2
        kin_of_all = None if kin is None else rows_of_all(kin, kin.new_empty(total), group)
        z = _of_all(own, torch.bfloat16 if narrow else own.dtype, group)
        sums: _Sums | SumsOnGPU
        if size is None and nt_xent_gpu.fits(z):
            sums = SumsOnGPU(z, kin_of_all, form, group)
        else:
            sums = _Sums(z, kin_of_all, form, own.dtype, scale <= SAFE[own.dtype], group, size or sizes(z))
        positive = rows_of_all((own[0] * own[1]).sum(1), own.new_empty(total), group).repeat(2)
        negative = sums.log2()
        # log2 of (all terms / positive term), which keeps its digits where the loss is small.
        against = (negative - positive) * math.log(2)
        loss = torch.logaddexp(against, torch.zeros_like(against)).mean()
        if not gradient:
            return loss, None
        g = sums.gradient(torch.logaddexp2(negative, positive))
        return loss, _finish(g, own, lengths, against, scale, group)

    return differentiable(a, b, rule)


def _finish(
    g: Tensor, own: Tensor, lengths: Tensor, against: Tensor, scale: float, group: Group
) -> tuple[Tensor, Tensor]:
    """Gradients of a rank's a and b (n, d): its rows of the negatives' ``g`` (2N, d), the positives', the length's."""
    n, total = own.shape[1], g.shape[0] // 2
    first = group_rank(group) * n
    pull = against.sigmoid().view(2, total).sum(0)[first : first + n, None]
    found = []
    for view in (0, 1):
        rows = g[view * total + first :][:n].addcmul_(own[1 - view], pull, value=-1)
        # Only what is across a view turns it: z' = sqrt(scale) x / |x|.
        rows.addcmul_(own[view], (own[view] * rows).sum(1, keepdim=True), value=-1 / scale)
        found.append(rows.mul_(math.sqrt(scale) * math.log(2) / (2 * total) / lengths[view]))
    return found[0], found[1]
