"""Exact search for the nearest code, and k-means built on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.precision import FULL, matmul_precision

BALANCED, SOFTNESS, SINKHORN = 6, 0.03, 8  # iterations, distances relative to their mean, updates of the prices
LANES = 32  # scores are reduced as [rows, K / LANES, LANES]: torch's amin over the middle axis is vectorized
# Rows searched at a time; bounds the memory to ROWS_AT_ONCE * K floats. On a CPU the scores should stay in the cache.
# The value never changes a result.
ROWS_AT_ONCE = {"cpu": 1024, "cuda": 32768}


# ---------------------------------------------------------------- nearest codes


class _Table(NamedTuple):
    """One codebook prepared for the search, K padded to a multiple of LANES by codes at infinite distance."""

    codes: Tensor  # [K', D]
    transposed: Tensor  # [D, K'], contiguous
    norms: Tensor  # [K'], |c|^2, infinite at the padding
    longest: float  # the largest |c|

    @classmethod
    def of(cls, weight: Tensor) -> _Table:
        padding = -len(weight) % LANES
        squares = weight.double().square().sum(1)
        codes = nn.functional.pad(weight, (0, 0, 0, padding))
        norms = nn.functional.pad(squares, (0, padding), value=torch.inf).to(weight.dtype)
        return cls(codes, codes.t().contiguous(), norms, float(squares.max().sqrt()))


@torch.no_grad()
def nearest_codes(rows: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """Residual search (Eq. 3): rows [N, D], Q codebooks [K, D] -> int64 [N, Q].

    Per level the nearest code of the residual, the lower index on a tie. The result does not depend on the number of
    rows at a time, on threads or on the BLAS library (see ``_nearest_in_chunk``). Distances are float32 or wider, under
    autocast too: autocast does not change products that have a given output.
    """
    wide = at_least_float32(rows.dtype)
    tables = [_Table.of(weight.to(wide)) for weight in codebooks]
    step = ROWS_AT_ONCE.get(rows.device.type, ROWS_AT_ONCE["cuda"])
    found = rows.new_empty(len(tables), len(rows), dtype=torch.int64)
    scratch = rows.new_empty(min(step, len(rows)), len(tables[0].codes), dtype=wide)
    with matmul_precision(FULL):  # the rounding bound in _nearest_in_chunk is float32's
        for start in range(0, len(rows), step):  # all levels of one chunk, while it is in the cache
            residual = rows[start : start + step].to(wide, copy=True)
            for level, (table, weight) in enumerate(zip(tables, codebooks, strict=True)):
                codes = _nearest_in_chunk(residual, table, scratch[: len(residual)])
                found[level, start : start + step] = codes.clamp_max_(len(weight) - 1)  # acts on NaN rows only
                residual -= table.codes.index_select(0, codes)
    return found.t().contiguous()


def _nearest_in_chunk(rows: Tensor, table: _Table, scores: Tensor) -> Tensor:
    """rows [n, D] -> int64 [n]; ``scores`` [n, K'] is overwritten.

    One matrix product gives |c|^2 - 2 r.c. Its last bits depend on the shape and the library. Where the second-best
    score lies within the product's largest possible rounding error, the candidates are compared by float64 distances.
    """
    n, width = rows.shape
    torch.addmm(table.norms, rows, table.transposed, alpha=-2, out=scores)
    folded = scores.view(n, -1, LANES)
    # argmin over K takes ten times as long as amin: find the best lane first, then the best code in it
    lanes = folded.amin(1)  # [n, LANES]
    best, lane = lanes.min(1)
    slots = folded.gather(2, lane.view(n, 1, 1).expand(-1, folded.shape[1], 1)).squeeze(2)  # [n, K' / LANES]
    slot = slots.argmin(1)
    codes = slot * LANES + lane

    lanes.scatter_(1, lane.unsqueeze(1), torch.inf)
    slots.scatter_(1, slot.unsqueeze(1), torch.inf)
    second = torch.minimum(lanes.amin(1), slots.amin(1))
    rounding = (width + 4) * torch.finfo(rows.dtype).eps
    limit = best + rounding * table.longest * (table.longest + 2 * torch.linalg.vector_norm(rows, dim=1))
    unsure = (second <= limit).nonzero().squeeze(1)
    if len(unsure):
        row, code = (scores[unsure] <= limit[unsure].unsqueeze(1)).nonzero(as_tuple=True)  # sorted by row, then code
        pairs = max(1, scores.numel() // (2 * width))  # at a time, so that their differences are as large as scores
        exact = torch.cat(
            [
                (rows[unsure[r]].double() - table.codes[c].double()).square().sum(1)
                for r, c in zip(row.split(pairs), code.split(pairs), strict=True)
            ]
        )
        least = exact.new_full((len(unsure),), torch.inf).scatter_reduce_(0, row, exact, "amin")
        wins = exact == least[row]
        codes[unsure] = codes[unsure].fill_(len(table.codes)).scatter_reduce_(0, row[wins], code[wins], "amin")
    return codes


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and distances: float32, or ``dtype`` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------- k-means


@torch.no_grad()
def kmeans(
    rows: Tensor,
    k: int,
    iterations: int = 10,
    generator: torch.Generator | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """rows [n, D] -> centers [k, D]: k-means++ starts, BALANCED iterations with clusters of equal size, then Lloyd's.

    Lloyd's iterations alone end in one large cluster and many of one row when rows have as little structure as
    residuals have; from balanced clusters they reach a lower error (docs/LOG.md). Equal generators give equal centers.
    ``weights`` [n] > 0: a row of weight w counts like w equal rows (default: 1 each).
    The starts are drawn several at a time, a quarter of those already there. A cluster that becomes empty gets a new
    center by ``draw``. With fewer than k distinct rows, the remaining centers are copies that no row chooses.
    """
    weights = rows.new_ones(len(rows)) if weights is None else weights
    fresh = centers = rows[permutation(len(rows), generator)[:1].to(rows.device)]
    errors = rows.new_full((len(rows),), torch.inf)
    while len(centers) < k:
        rest = rows - fresh[nearest_codes(rows, [fresh])[:, 0]]
        errors = torch.minimum(errors, rest.square().sum(1))
        fresh = rows[draw(weights * errors, min(k - len(centers), max(1, len(centers) // 4)), generator)]
        if not len(fresh):
            fresh = centers[:1].expand(k - len(centers), -1)
        centers = torch.cat([centers, fresh])
    for iteration in range(iterations):
        if iteration < BALANCED and len(rows) > k:
            codes = balanced_codes(rows, centers)
        else:
            codes = nearest_codes(rows, [centers])[:, 0]
        counts = torch.bincount(codes, minlength=k)
        mass = weights.new_zeros(k).index_add_(0, codes, weights)
        rest = rows - centers[codes]
        # centers + mean(rest) instead of a mean of rows: adding small differences loses fewer bits
        sums = torch.zeros_like(centers).index_add_(0, codes, rest * weights.unsqueeze(1))
        centers = centers + sums / torch.where(counts > 0, mass, 1).unsqueeze(1)
        empty = (counts == 0).nonzero().squeeze(1)
        picks = draw(weights * rest.square().sum(1), len(empty), generator)
        centers[empty[: len(picks)]] = rows[picks]
    return centers


def balanced_codes(rows: Tensor, centers: Tensor) -> Tensor:
    """rows [n, D], centers [k, D] -> int64 [n]: near centers, each of about n / k rows (optimal transport with an
    entropic term by Sinkhorn's iterations; Cuturi, NeurIPS 2013, arXiv 1306.0895)."""
    plan = torch.addmm(centers.square().sum(1), rows, centers.t(), alpha=-2)  # [n, k], the one large block of memory
    plan += rows.square().sum(1, keepdim=True)  # squared distances
    scale = SOFTNESS * plan.mean().clamp_min(torch.finfo(rows.dtype).tiny)
    plan.sub_(plan.amin(1, keepdim=True)).div_(-scale).exp_()
    price = rows.new_ones(len(centers))
    for _ in range(SINKHORN):
        price = len(rows) / len(centers) / (plan.t() @ (1 / (plan @ price))).clamp_min(1e-30)
    return plan.mul_(price).argmax(1)


def permutation(n: int, generator: torch.Generator | None) -> Tensor:
    """A random order of 0..n-1, int64 [n], on the generator's device (CPU without one)."""
    return torch.randperm(n, generator=generator, device=generator.device if generator else "cpu")


def draw(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """int64 [<= count]: distinct rows, drawn in proportion to weights [n] >= 0; never one of weight 0.

    The largest w / Exp(1) are such a sample (Efraimidis and Spirakis 2006); any n, unlike torch.multinomial.
    """
    if not count:
        return weights.new_empty(0, dtype=torch.int64)
    noise = torch.empty(len(weights), dtype=torch.float64, device=generator.device if generator else "cpu")
    keys = weights.double() / noise.exponential_(generator=generator).to(weights.device)
    return keys.topk(min(count, int((weights > 0).sum()))).indices
