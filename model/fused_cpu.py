"""The composed-neighbour sum on CPU as Numba kernels: no message is ever written to memory.

``sum_rows`` loops over the edges of one row and adds ``w phi(x[i], v[r])``, four edges per pass over the width, so
that their rows are fetched together. ``gradient_rows`` loops over the edges of one source i and uses each row of the
output's gradient for both gradients: that of x[i] stays in the L1 cache, that of v is a [R', D] per segment. There are
no atomics: the edges are split into segments of whole rows, whose number depends on the graph only, and the segments' v
gradients are added in order. The result has the same bits on every run and for every number of threads.

The kernels release the GIL and run in a pool of Python threads, as many as torch uses. So no second OpenMP runtime is
loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.relational_graph import EdgeSet

MAX_SEGMENTS = 16
MIN_SEGMENT_EDGES = 8192  # below, another thread does not pay
MAX_SEGMENT_BYTES = 2**28  # of all segments' v gradients


def _compiled(kernel: Callable[..., None]) -> Callable[..., None]:
    """Compile on first use and cache the result on disk, or in memory if no cache folder is writable."""
    options = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz"}}
    try:
        return njit(cache=True, **options)(kernel)
    except RuntimeError:  # numba found no writable folder
        return njit(**options)(kernel)


@_compiled
def sum_rows(out, x, v, indptr, source, relation, weight, first, last, mult):  # type: ignore[no-untyped-def]
    width = x.shape[1]
    for row in range(first, last):
        total = out[row]
        total[:] = 0
        edge, end = indptr[row], indptr[row + 1]
        while edge + 4 <= end:
            x0, v0, w0 = x[source[edge]], v[relation[edge]], weight[edge]
            x1, v1, w1 = x[source[edge + 1]], v[relation[edge + 1]], weight[edge + 1]
            x2, v2, w2 = x[source[edge + 2]], v[relation[edge + 2]], weight[edge + 2]
            x3, v3, w3 = x[source[edge + 3]], v[relation[edge + 3]], weight[edge + 3]
            if mult:
                for d in range(width):
                    total[d] += w0 * x0[d] * v0[d] + w1 * x1[d] * v1[d] + w2 * x2[d] * v2[d] + w3 * x3[d] * v3[d]
            else:
                for d in range(width):
                    total[d] += (
                        w0 * (x0[d] - v0[d]) + w1 * (x1[d] - v1[d]) + w2 * (x2[d] - v2[d]) + w3 * (x3[d] - v3[d])
                    )
            edge += 4
        while edge < end:
            x0, v0, w0 = x[source[edge]], v[relation[edge]], weight[edge]
            if mult:
                for d in range(width):
                    total[d] += w0 * x0[d] * v0[d]
            else:
                for d in range(width):
                    total[d] += w0 * (x0[d] - v0[d])
            edge += 1


@_compiled
def gradient_rows(grad_x, grad_v, grad, x, v, indptr, relation, destination, weight, first, last, mult):  # type: ignore[no-untyped-def]
    width = x.shape[1]
    for row in range(first, last):
        total, own = grad_x[row], x[row]
        total[:] = 0
        for edge in range(indptr[row], indptr[row + 1]):
            g, w = grad[destination[edge]], weight[edge]
            v_r, total_v = v[relation[edge]], grad_v[relation[edge]]
            if mult:
                for d in range(width):
                    share = w * g[d]
                    total[d] += share * v_r[d]
                    total_v[d] += share * own[d]
            else:
                for d in range(width):
                    share = w * g[d]
                    total[d] += share
                    total_v[d] -= share


class FusedSum(torch.autograd.Function):
    """message_passing.compose_sum over ``sum_rows`` and ``gradient_rows``; x and v contiguous, float32 or float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, edges: EdgeSet, mult: bool) -> Tensor:
        ctx.save_for_backward(x, v)
        ctx.edges, ctx.mult = edges, mult
        rows = edges.by_destination
        out = x.new_empty(edges.num_destinations, x.shape[1])
        arrays = _arrays(out, x, v, rows.indptr, rows.source, rows.relation, edges.weight(x.dtype))
        bounds = _segments(edges, arrays[3], MAX_SEGMENTS)
        _run(lambda k: sum_rows(*arrays, bounds[k], bounds[k + 1], mult), len(bounds) - 1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, v = ctx.saved_tensors
        edges: EdgeSet = ctx.edges
        mult, rows = ctx.mult, edges.rows("source")
        bytes_each = max(1, v.numel() * v.element_size())
        weight = edges.weight(x.dtype, by="source")
        indptr, relation, destination, w = _arrays(rows.indptr, rows.relation, rows.destination, weight)
        bounds = _segments(edges, indptr, min(MAX_SEGMENTS, MAX_SEGMENT_BYTES // bytes_each))
        grad_x, grad_vs = torch.empty_like(x), v.new_empty(len(bounds) - 1, *v.shape)
        gx, gvs, g, xs, vs = _arrays(grad_x, grad_vs, grad.contiguous(), x, v)

        def segment(k: int) -> None:
            gvs[k] = 0
            gradient_rows(gx, gvs[k], g, xs, vs, indptr, relation, destination, w, bounds[k], bounds[k + 1], mult)

        _run(segment, len(bounds) - 1)
        return grad_x, grad_vs.sum(0), None, None


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(tensor.detach().numpy() for tensor in tensors)


def _segments(edges: EdgeSet, indptr: np.ndarray, most: int) -> np.ndarray:
    """Bounds of row ranges with about equally many edges; they depend on the graph and ``most`` only."""
    count = max(1, min(most, edges.num_edges // MIN_SEGMENT_EDGES))
    bounds = np.searchsorted(indptr, np.linspace(0, edges.num_edges, count + 1))
    bounds[0], bounds[-1] = 0, len(indptr) - 1
    return bounds


def _run(task: Callable[[int], None], count: int) -> None:
    """``task(0) .. task(count - 1)`` on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), count)
    if threads == 1:
        for k in range(count):
            task(k)
    else:
        list(_pool(threads, os.getpid()).map(task, range(count)))  # list: so that an exception of a task is raised


@lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """One pool per process: a fork copies the object but not its threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"compose-sum-{process}")
