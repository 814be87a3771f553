"""The graph as sorted, weighted edges, the input of message passing.

The training triples become one set of weighted edges, sorted by destination for the sum, and by source or relation for
its gradients.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable


class Rows(NamedTuple):
    """Edges grouped by one column: group ``k`` is ``[indptr[k], indptr[k + 1])`` of the arrays."""

    indptr: Tensor  # int64 [groups + 1]
    source: Tensor  # int32 [E]
    relation: Tensor  # int32 [E]
    destination: Tensor  # int32 [E]
    weight: Tensor  # float64 [E]


class EdgeSet:
    """Weighted edges (source, relation) -> destination, sorted by destination.

    Sources, relations and destinations have separate ids. The ids fix the order within a group, so results do not
    depend on the order in which the edges were given.

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
        """The edges [E] of one direction (int32 or int64, any order, E may be 0) with the weights 1/sqrt(d d')."""
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
        """A value that depends on the edges only, computed once per EdgeSet."""
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
        """The same edges on ``device`` (``self`` if they are there already)."""
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

    ``edges``: both in one EdgeSet over M sources, 2R relations and 2M destinations. Destination ``2 j`` receives the
    in-edges of entity j and ``2 j + 1`` its out-edges, each with the weights of its own direction. One pass gives both
    sums; its result [2M, D], viewed as [M, 2D], is multiplied by W_in stacked on W_out.
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
    """1 / sqrt(out-degree of the source * in-degree of the destination), counted over these edges: float64 [E]."""
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


# ---------------------------------------------------------------- dgl


def import_dgl() -> Any:
    """dgl with its PyTorch backend, imported on first use; ImportError if it is not installed."""
    os.environ.setdefault("DGLBACKEND", "pytorch")
    import dgl

    return dgl
