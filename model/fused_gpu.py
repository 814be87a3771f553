"""The composed-neighbour sum on CUDA as one Triton kernel, used for the sum and for both of its gradients.

All three are sums, over the edges of a group, of ``w * a[i] * b[k]``, ``w * (a[i] - b[k])`` or ``w * a[i]``:

    out     groups = destinations    a = x[source]             b = v[relation]
    grad x  groups = sources         a = grad[destination]     b = v[relation]
    grad v  groups = relations       a = grad[destination]     b = x[source]

Groups differ much in size (high-degree entities, relations with thousands of edges). So each is split into segments of
at most SEGMENT edges, one program sums one segment, and a second launch of the same kernel adds the segments of each
group in order. There are no atomics, and every run gives the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.relational_graph import EdgeSet, Rows

SEGMENT = 128  # edges summed by one program
TILE = 8  # edges fetched together
PRODUCT, DIFFERENCE, FIRST = 0, 1, 2


@triton.jit
def sum_groups(  # type: ignore[no-untyped-def]
    out, a, b, bounds, a_row, b_row, weight, width, MODE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    first, last = tl.load(bounds + group), tl.load(bounds + group + 1)
    total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    for start in range(first, last, TILE):
        edge = start + tl.arange(0, TILE)
        live = edge < last
        taken = live[:, None] & inside[None, :]
        w = tl.load(weight + edge, mask=live, other=0.0)[:, None]
        i = tl.load(a_row + edge, mask=live, other=0).to(tl.int64)
        value = tl.load(a + i[:, None] * width + d[None, :], mask=taken, other=0.0)
        if MODE != 2:
            k = tl.load(b_row + edge, mask=live, other=0).to(tl.int64)
            second = tl.load(b + k[:, None] * width + d[None, :], mask=taken, other=0.0)
            if MODE == 0:
                value = value * second
            else:
                value = value - second
        total += tl.sum(w * value, axis=0)
    tl.store(out + group * width + d, total, mask=inside)


class Segments(NamedTuple):
    """Segment s is the edges ``[bounds[s], bounds[s + 1])``; group g is the segments ``[indptr[g], indptr[g + 1])``."""

    bounds: Tensor  # int64 [S + 1]
    indptr: Tensor  # int64 [groups + 1]
    rows: Tensor  # int32 [S], 0 .. S - 1
    ones: Tensor  # float64 [S]


def split(rows: Rows) -> Segments:
    """Every group in segments of at most SEGMENT edges; a group without edges has none."""
    counts = (rows.indptr.diff() + SEGMENT - 1) // SEGMENT  # segments per group
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    total = int(indptr[-1])
    group = torch.repeat_interleave(counts)
    rank = torch.arange(total, device=counts.device) - indptr[group]  # of the segment within its group
    bounds = torch.cat([rows.indptr[group] + rank * SEGMENT, rows.indptr[-1:]])
    numbers = torch.arange(total, device=counts.device)
    return Segments(bounds, indptr, numbers.int(), torch.ones_like(numbers, dtype=torch.float64))


def grouped_sum(edges: EdgeSet, by: str, a: Tensor, a_row: Tensor, b: Tensor, b_row: Tensor, mode: int) -> Tensor:
    """[groups, D]: the sum of each group of the edges' order ``by``; ``a_row``, ``b_row`` in that order."""
    segments: Segments = edges.cached(("segments", by), lambda: split(edges.rows(by)))
    ones = edges.cached(("ones", by, a.dtype), lambda: segments.ones.to(a.dtype))
    parts = _launch(a, b, segments.bounds, a_row, b_row, edges.weight(a.dtype, by), mode)
    return _launch(parts, parts, segments.indptr, segments.rows, segments.rows, ones, FIRST)


def _launch(a: Tensor, b: Tensor, bounds: Tensor, a_row: Tensor, b_row: Tensor, weight: Tensor, mode: int) -> Tensor:
    groups, width = len(bounds) - 1, a.shape[1]
    out = a.new_empty(groups, width)
    if out.numel():
        block = min(256, triton.next_power_of_2(width))
        with torch.cuda.device_of(a):  # triton launches on the current device, which may be another
            sum_groups[(groups, triton.cdiv(width, block))](
                out, a, b, bounds, a_row, b_row, weight, width, MODE=mode, TILE=TILE, BLOCK=block
            )
    return out


class FusedSum(torch.autograd.Function):
    """message_passing.compose_sum over ``sum_groups``; x and v contiguous, float32 or float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, edges: EdgeSet, mult: bool) -> Tensor:
        ctx.save_for_backward(x, v)
        ctx.edges, ctx.mult = edges, mult
        rows = edges.rows("destination")
        return grouped_sum(edges, "destination", x, rows.source, v, rows.relation, PRODUCT if mult else DIFFERENCE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, v = ctx.saved_tensors
        edges, grad = ctx.edges, grad.contiguous()
        mode = PRODUCT if ctx.mult else FIRST
        grad_x = grad_v = None
        if ctx.needs_input_grad[0]:
            rows = edges.rows("source")
            grad_x = grouped_sum(edges, "source", grad, rows.destination, v, rows.relation, mode)
        if ctx.needs_input_grad[1]:
            rows = edges.rows("relation")
            grad_v = grouped_sum(edges, "relation", grad, rows.destination, x, rows.source, mode)
            grad_v = grad_v if ctx.mult else -grad_v
        return grad_x, grad_v, None, None
