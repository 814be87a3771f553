"""The one operation of the encoder: the weighted sum over composed neighbours (the sum of Eq. 1).

    out[j] = sum over edges (i, r) -> j of  w * phi(x[i], v[r]),      w = 1 / sqrt(d_i d'_j)

with phi(a, b) = a * b (``mult``) or a - b (``sub``), d_i the out-degree of the edge's source and d'_j the in-degree of
its destination, both counted within the edge's own direction, so neither is ever zero. ``compose_sum`` gives the sum
and its gradients with one of three backends:

    dgl    DGL's u_mul_e / u_sub_e message functions over a DGLGraph
    torch  gather, multiply and index_add over chunks of edges: any device, any float type, no other package
    fused  one kernel that never writes messages to memory: fused_cpu.py (Numba), fused_gpu.py (Triton)
"""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.errors import InputError
from model.relational_graph import EdgeSet, import_dgl

if TYPE_CHECKING:
    from collections.abc import Iterator

BACKENDS = ("auto", "dgl", "torch", "fused")
COMPOSITIONS = ("mult", "sub")
# Edges per step of the torch backend. On a CPU the step should fit the caches, but be long enough that synchronizing
# the threads after each operation does not matter; a GPU needs long steps.
CHUNK_EDGES = {"cpu": 8192, "cuda": 2**18}


def compose_sum(x: Tensor, v: Tensor, edges: EdgeSet, backend: str = "auto", composition: str = "mult") -> Tensor:
    """``out[j] = sum of w phi(x[i], v[r])`` over the edges (i, r) -> j, zero without edges: Eq. 1 before its W.

    ``x``: [sources, D], ``v``: [relations, D], of one float type, on the device of ``edges``. Returns
    [destinations, D], differentiable in x and v. On CPU every backend gives the same bits on every run.
    Raises InputError for shapes that do not fit and for a backend that cannot run here.
    """
    if composition not in COMPOSITIONS:
        raise InputError(f"composition {composition!r} is not one of {', '.join(COMPOSITIONS)}")
    if x.shape != (edges.num_sources, v.shape[1]) or v.shape[0] != edges.num_relations:
        raise InputError(
            f"x {tuple(x.shape)} and v {tuple(v.shape)} do not fit {edges.num_sources} sources and "
            f"{edges.num_relations} relations of one width"
        )
    if x.dtype != v.dtype:
        raise InputError(f"x is {x.dtype} and v is {v.dtype}: give both one float type")
    chosen = resolve_backend(backend, x.device)
    if chosen == "fused" and x.dtype not in (torch.float32, torch.float64):
        if backend == "fused":
            raise InputError(f"graph backend 'fused' is for float32 and float64, not {x.dtype}; choose auto or torch")
        chosen = "torch"
    if chosen == "dgl":
        return _dgl_sum(x, v, edges, composition)
    if chosen == "fused":
        return _fused(x.device.type).apply(x.contiguous(), v.contiguous(), edges, composition == "mult")
    return _TorchSum.apply(x, v, edges, composition == "mult")


def _fused(device_type: str) -> Any:
    """The fused autograd function of a device; imported on first use, because numba and triton are optional."""
    if device_type == "cpu":
        from model import fused_cpu

        return fused_cpu.FusedSum
    from model import fused_gpu

    return fused_gpu.FusedSum


def resolve_backend(name: str, device: str | torch.device) -> str:
    """The backend for ``name`` on ``device``; ``auto``: fused where it can run, else torch.

    Raises InputError that names what is missing and what to choose instead.
    """
    device = torch.device(device)
    if name not in BACKENDS:
        raise InputError(f"graph backend {name!r} is not one of {', '.join(BACKENDS)}")
    if name == "auto":
        return "fused" if _missing_for("fused", device) is None else "torch"
    missing = _missing_for(name, device)
    if missing:
        raise InputError(f"graph backend {name!r} cannot run on {device}: {missing}; choose auto or torch")
    return name


def _missing_for(name: str, device: torch.device) -> str | None:
    """The reason why a backend cannot run on ``device``; None if it can."""
    if name == "dgl":
        try:
            dgl = import_dgl()
            if device.type != "cpu":
                dgl.graph(([0], [0])).to(device)
        except Exception as error:
            return f"dgl does not work there ({(str(error) or type(error).__name__).splitlines()[0][:120]})"
    elif name == "fused":
        package = {"cpu": "numba", "cuda": "triton"}.get(device.type)
        if package is None:
            return "its kernels run on cpu and cuda only"
        if sys.modules.get(package, package) is None or importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    return None


def _dgl_sum(x: Tensor, v: Tensor, edges: EdgeSet, composition: str) -> Tensor:
    """DGL's message functions; the weight multiplies the relation (mult) or the message (sub)."""
    import_dgl()
    import dgl.function as fn

    graph, rows = edges.dgl_graph, edges.by_destination
    weight = edges.weight(x.dtype)[:, None]  # [E, 1]
    with graph.local_scope():
        graph.srcdata["x"] = x
        relations = v.index_select(0, rows.relation.long())  # [E, D]
        if composition == "mult":
            graph.edata["v"] = weight * relations
            graph.update_all(fn.u_mul_e("x", "v", "message"), fn.sum("message", "out"))
            return graph.dstdata["out"]
        graph.edata["v"] = relations
        graph.apply_edges(fn.u_sub_e("x", "v", "message"))
        graph.edata["message"] = weight * graph.edata["message"]
        graph.update_all(fn.copy_e("message", "message"), fn.sum("message", "out"))
        return graph.dstdata["out"]


class _TorchSum(torch.autograd.Function):
    """The sum in chunks of edges: memory O((M + CHUNK_EDGES) D), never [E, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, edges: EdgeSet, mult: bool) -> Tensor:
        ctx.save_for_backward(x, v)
        ctx.edges, ctx.mult = edges, mult
        out = x.new_zeros(edges.num_destinations, x.shape[1])
        for source, relation, destination, weight, first, second in _chunks(edges, x):
            message = torch.index_select(x, 0, source, out=first)
            relations = torch.index_select(v, 0, relation, out=second)
            message = message.mul_(relations) if mult else message.sub_(relations)
            out.index_add_(0, destination, message.mul_(weight))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, v = ctx.saved_tensors
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grad_v = torch.zeros_like(v) if ctx.needs_input_grad[1] else None
        for source, relation, destination, weight, first, second in _chunks(ctx.edges, x):
            share = torch.index_select(grad, 0, destination, out=first).mul_(weight)
            if grad_x is not None:
                grad_x.index_add_(
                    0, source, torch.index_select(v, 0, relation, out=second).mul_(share) if ctx.mult else share
                )
            if grad_v is not None:
                grad_v.index_add_(
                    0, relation, torch.index_select(x, 0, source, out=second).mul_(share) if ctx.mult else share.neg_()
                )
        return grad_x, grad_v, None, None


def _chunks(edges: EdgeSet, like: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """(source, relation, destination [c], weight [c, 1]) of c edges at a time, in destination order, and two buffers
    [c, D] that every step overwrites: allocating new ones would take longer than the arithmetic."""
    _, source, relation, destination, _ = edges.by_destination
    weight = edges.weight(like.dtype)[:, None]
    step = CHUNK_EDGES.get(like.device.type, CHUNK_EDGES["cpu"])
    buffers = like.new_empty(2, min(step, edges.num_edges), like.shape[1])
    for start in range(0, edges.num_edges, step):
        part = slice(start, start + step)
        first, second = buffers[:, : edges.num_edges - start]
        # int64: gather and index_add take half as long with it as with int32
        yield source[part].long(), relation[part].long(), destination[part].long(), weight[part], first, second
