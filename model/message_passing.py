"""The one operation of the encoder: the weighted sum over composed neighbours (the sum of Eq. 1).

    out[j] = sum over edges (i, r) -> j of  w * phi(x[i], v[r]),      w = 1 / sqrt(d_i d'_j)

with phi(a, b) = a * b (``mult``) or a - b (``sub``), d_i the out-degree of the edge's source and d'_j the in-degree of
its destination, both counted within the edge's own direction, so neither is ever zero. ``compose_sum`` gives the sum
and its gradients by one of three backends:

    dgl    DGL's u_mul_e / u_sub_e message functions over a DGLGraph
    torch  gather, multiply and index_add over chunks of edges: any device, any float type, needs nothing else
    fused  one kernel that never writes a message to memory: fused_cpu.py (Numba), fused_gpu.py (Triton)
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from run_record import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BACKENDS = ("auto", "dgl", "torch", "fused")
COMPOSITIONS = ("mult", "sub")
# Edges per step of the torch backend: on CPU small enough for the caches, large enough that the threads' meeting
# after each operation does not count; a GPU wants long steps.
CHUNK_EDGES = {"cpu": 8192, "cuda": 2**18}


class Rows(NamedTuple):
    """Edges grouped by one of their ends: group ``k`` is ``[indptr[k], indptr[k + 1])`` of the arrays."""

    indptr: Tensor  # int64 [groups + 1]
    source: Tensor  # int32 [E]
    relation: Tensor  # int32 [E]
    destination: Tensor  # int32 [E]
    weight: Tensor  # float64 [E]


class EdgeSet:
    """Weighted edges (source, relation) -> destination, kept sorted by destination, and sorted by source for the
    gradient. Sources, relations and destinations are numbered apart. The order within a group is fixed by the ids, so
    results do not depend on the order in which the edges were given.

    ``source``, ``relation``, ``destination``: int tensors [E]; ``weight``: float [E].
    """

    def __init__(
        self,
        source: Tensor,
        relation: Tensor,
        destination: Tensor,
        weight: Tensor,
        num_sources: int,
        num_relations: int,
        num_destinations: int,
    ) -> None:
        for what, ids, count in (
            ("source", source, num_sources),
            ("relation", relation, num_relations),
            ("destination", destination, num_destinations),
        ):
            if ids.shape != weight.shape or ids.dim() != 1:
                raise InputError(f"edges: {what} ids have shape {tuple(ids.shape)}, weights {tuple(weight.shape)}")
            if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < count < 2**31):
                raise InputError(f"edges: {what} ids span {int(ids.min())}..{int(ids.max())}, expected 0..{count - 1}")
        self.num_sources, self.num_relations, self.num_destinations = num_sources, num_relations, num_destinations
        self.by_destination = _grouped(
            destination, (relation, source), num_destinations, source, relation, destination, weight
        )
        self._cache: dict[tuple[object, ...], Any] = {}

    @classmethod
    def from_triples(
        cls, source: Tensor, relation: Tensor, destination: Tensor, num_entities: int, num_relations: int
    ) -> EdgeSet:
        """One direction's edges [E] (int32 or int64, in any order, none allowed) with their weights 1/sqrt(d d')."""
        weight = symmetric_weights(source, destination, num_entities)
        return cls(source, relation, destination, weight, num_entities, num_relations, num_entities)

    def rows(self, by: str) -> Rows:
        """The edges grouped by "destination" (rows of the sum), "source" or "relation" (rows of its gradients)."""
        if by == "destination":
            return self.by_destination
        return self.cached(("rows", by), lambda: self._regrouped(by))

    def _regrouped(self, by: str) -> Rows:
        _, source, relation, destination, weight = self.by_destination
        columns = (source, relation, destination, weight)
        if by == "source":
            return _grouped(source, (relation, destination), self.num_sources, *columns)
        return _grouped(relation, (destination, source), self.num_relations, *columns)

    def cached(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """What a backend derives from the edges alone, made once per EdgeSet."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    @property
    def dgl_graph(self) -> Any:
        """The edges, in destination order, as a DGLGraph from ``source`` to ``destination`` nodes."""

        def make() -> Any:
            ends = (self.by_destination.source, self.by_destination.destination)
            return import_dgl().heterograph(
                {("source", "composed", "destination"): ends},
                num_nodes_dict={"source": self.num_sources, "destination": self.num_destinations},
            )

        return self.cached(("dgl",), make)

    @property
    def num_edges(self) -> int:
        return len(self.by_destination.source)

    @property
    def device(self) -> torch.device:
        return self.by_destination.source.device

    def weight(self, dtype: torch.dtype, by: str = "destination") -> Tensor:
        """Edge weights in the order of ``rows(by)``, as ``dtype``: [E]."""
        return self.cached(("weight", by, dtype), lambda: self.rows(by).weight.to(dtype))

    def to(self, device: str | torch.device) -> EdgeSet:
        """The same edges on ``device`` (itself when they are there already)."""
        if torch.empty(0, device=device).device == self.device:
            return self
        moved = object.__new__(EdgeSet)
        moved.num_sources, moved.num_relations = self.num_sources, self.num_relations
        moved.num_destinations = self.num_destinations
        moved.by_destination = Rows(*(tensor.to(device) for tensor in self.by_destination))
        moved._cache = {}
        return moved


class RelationalGraph:
    """The training triples in both directions: (h, r, t) as edges h -> t ("in"), and (t, r + R, h) as t -> h ("out").

    ``edges``: both in one EdgeSet over M sources, 2R relations and 2M destinations; destination ``2 j + 0`` collects
    entity j's in-edges and ``2 j + 1`` its out-edges, each with the weights of its own direction. One pass over it
    gives both sums; its result [2M, D] read as [M, 2D] stands ready for the product with W_in over W_out.
    """

    def __init__(self, edges: EdgeSet, num_entities: int, num_relations: int) -> None:
        self.edges, self.num_entities, self.num_relations = edges, num_entities, num_relations

    @classmethod
    def from_triples(cls, triples: Tensor | np.ndarray, num_entities: int, num_relations: int) -> RelationalGraph:
        """``triples``: int [E, 3] of (h, r, t), without inverses; ``num_relations`` = R, without inverses."""
        triples = torch.as_tensor(triples)
        if triples.dim() != 2 or triples.shape[1] != 3:
            raise InputError(f"triples have shape {tuple(triples.shape)}, expected (E, 3)")
        head, relation, tail = triples.long().unbind(1)
        if len(relation) and int(relation.max()) >= num_relations:
            raise InputError(
                f"triples: relation id {int(relation.max())} with R = {num_relations}; give them without inverses"
            )
        edges = EdgeSet(
            torch.cat([head, tail]),
            torch.cat([relation, relation + num_relations]),
            torch.cat([2 * tail, 2 * head + 1]),
            torch.cat([symmetric_weights(head, tail, num_entities), symmetric_weights(tail, head, num_entities)]),
            num_entities,
            2 * num_relations,
            2 * num_entities,
        )
        return cls(edges, num_entities, num_relations)

    @property
    def device(self) -> torch.device:
        return self.edges.device

    def to(self, device: str | torch.device) -> RelationalGraph:
        return RelationalGraph(self.edges.to(device), self.num_entities, self.num_relations)


def symmetric_weights(source: Tensor, destination: Tensor, num_entities: int) -> Tensor:
    """1 / sqrt(out-degree of the source * in-degree of the destination), over these edges alone: float64 [E]."""
    out_degree = torch.bincount(source, minlength=num_entities)
    in_degree = torch.bincount(destination, minlength=num_entities)
    return (out_degree[source.long()] * in_degree[destination.long()]).double().rsqrt()


def _grouped(key: Tensor, ties: tuple[Tensor, ...], num_groups: int, *columns: Tensor) -> Rows:
    """``columns`` sorted by ``key``, ties by ``ties`` (the last one first)."""
    order = torch.argsort(ties[0], stable=True)
    for column in (*ties[1:], key):
        order = order[torch.argsort(column[order], stable=True)]
    counts = torch.bincount(key, minlength=num_groups)
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    source, relation, destination, weight = (column[order] for column in columns)
    return Rows(indptr, source.int(), relation.int(), destination.int(), weight.double())


# ---------------------------------------------------------------- the operation


def compose_sum(x: Tensor, v: Tensor, edges: EdgeSet, backend: str = "auto", composition: str = "mult") -> Tensor:
    """``out[j] = sum of w phi(x[i], v[r])`` over the edges (i, r) -> j, zero where none ends: Eq. 1 before its W.

    ``x``: [sources, D], ``v``: [relations, D], of one float type, on the device of ``edges``. Returns
    [destinations, D], differentiable in x and v. On CPU every backend gives the same bits on every run.
    Raises InputError on shapes that do not fit and on a backend that cannot run here.
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
        return _fused(x.device.type).apply(x, v, edges, composition == "mult")
    return _TorchSum.apply(x, v, edges, composition == "mult")


def _fused(device_type: str) -> Any:
    """The fused autograd function of a device; imported on first use, as numba and triton may be absent."""
    if device_type == "cpu":
        from model import fused_cpu

        return fused_cpu.FusedSum
    from model import fused_gpu

    return fused_gpu.FusedSum


def resolve_backend(name: str, device: str | torch.device) -> str:
    """The backend that ``name`` means on ``device``: ``auto`` takes the fastest that is there.

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
    """What keeps a backend from running on ``device``; None when nothing does."""
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
            return "its kernels are for cpu and cuda"
        if sys.modules.get(package, package) is None or importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    return None


def import_dgl() -> Any:
    """dgl on its PyTorch side, imported on first use; ImportError where it is not installed."""
    os.environ.setdefault("DGLBACKEND", "pytorch")
    import dgl

    return dgl


def _dgl_sum(x: Tensor, v: Tensor, edges: EdgeSet, composition: str) -> Tensor:
    """DGL's own message functions: the weight rides on the edge's operand (mult) or on the sum's (sub)."""
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
    """The sum by chunks of edges: memory O((M + CHUNK_EDGES) D), never [E, D]."""

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
    [c, D] that every step writes anew: fresh ones would cost more than the arithmetic."""
    _, source, relation, destination, _ = edges.by_destination
    weight = edges.weight(like.dtype)[:, None]
    step = CHUNK_EDGES.get(like.device.type, CHUNK_EDGES["cpu"])
    buffers = like.new_empty(2, min(step, edges.num_edges), like.shape[1])
    for start in range(0, edges.num_edges, step):
        part = slice(start, start + step)
        first, second = buffers[:, : edges.num_edges - start]
        # int64: torch's gather and index_add take half as long with it as with int32
        yield source[part].long(), relation[part].long(), destination[part].long(), weight[part], first, second
