"""CompGCN: the graph encoder, layer by layer (Eq. 1-2 of SSQR; Vashishth et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import InputError
from model.message_passing import COMPOSITIONS, compose_sum
from model.relational_graph import RelationalGraph

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "identity": nn.Identity,
}


class Encoded(NamedTuple):
    """A layer's or the encoder's output."""

    x: Tensor  # [M, out_dim] entities
    v: Tensor  # [2R, out_dim] relations and their inverses


class CompGCNLayer(nn.Module):
    """One layer of Eq. 1-2:

        x'_j = x_j + g * act(BN((in_j + out_j + loop_j) / 3)),        v' = v W_rel
        in_j   = sum over training triples (i, r, j) of W_in  w phi(x_i, v_r)
        out_j  = sum over training triples (j, r, i) of W_out w phi(x_i, v_(r + R))
        loop_j = W_loop phi(x_j, v_loop)

    with phi(a, b) = a * b (``mult``) or a - b (``sub``) and w = 1/sqrt(d d') of the direction. W is linear, so the
    neighbours are summed first and W_in, W_out are applied once per entity, not once per edge. The shift of the batch
    norm is the layer's bias. ``v_loop`` is a parameter of the layer: the 2R relations contain no self-loop.

    A layer that keeps the width starts as the identity: the learned g [out_dim] is 0 at first, and W_rel the identity,
    so that a run begins as one without graph layers (ReZero, Bachlechner et al. 2021). A layer that changes the width
    has no ``x_j +``, and g = 1.

    ``dropout`` applies to the summed in- and out-neighbours, as in CompGCN; ``backend``: see message_passing.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_relations: int,
        composition: str = "mult",
        dropout: float = 0.2,
        act: str = "tanh",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if composition not in COMPOSITIONS:
            raise InputError(f"composition {composition!r} is not one of {', '.join(COMPOSITIONS)}")
        if act not in ACTIVATIONS:
            raise InputError(f"activation {act!r} is not one of {', '.join(ACTIVATIONS)}")
        self.in_dim, self.num_relations = in_dim, num_relations
        self.composition, self.backend = composition, backend
        self.w_in = _weight(in_dim, out_dim)
        self.w_out = _weight(in_dim, out_dim)
        self.w_loop = _weight(in_dim, out_dim)
        keeps_width = in_dim == out_dim
        self.w_rel = nn.Parameter(torch.eye(in_dim)) if keeps_width else _weight(in_dim, out_dim)
        self.gate = nn.Parameter(torch.zeros(out_dim)) if keeps_width else None
        self.v_loop = _weight(1, in_dim)
        self.dropout = nn.Dropout(dropout)
        # every pass contains all entities, so batch statistics are population statistics, in training and in eval
        self.norm = nn.BatchNorm1d(out_dim, track_running_stats=False)
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor, v: Tensor, graph: RelationalGraph) -> Encoded:
        """``x`` [M, in_dim], ``v`` [2R, in_dim] -> x' [M, out_dim], v' [2R, out_dim]."""
        if v.shape != (2 * self.num_relations, self.in_dim):
            raise InputError(f"v is {tuple(v.shape)}, expected {(2 * self.num_relations, self.in_dim)}: 2R x width")
        sums = compose_sum(x, v, graph.edges, self.backend, self.composition)  # [2M, in_dim]
        return Encoded(self.combine(x, sums.view(len(x), -1)), v @ self.w_rel)

    def combine(self, x: Tensor, sums: Tensor) -> Tensor:
        """``x`` [M, in_dim], ``sums`` [M, 2 in_dim] over in-neighbours | out-neighbours -> x' [M, out_dim]."""
        sums = self.dropout(sums)
        if self.composition == "mult":  # (x * v_loop) W_loop, but scales the smaller matrix
            loop = x @ (self.v_loop.T * self.w_loop)
        else:
            loop = (x - self.v_loop) @ self.w_loop
        total = torch.addmm(loop, sums, torch.cat([self.w_in, self.w_out]))  # [M, out_dim]
        found: Tensor = self.act(self.norm(total / 3))
        return found if self.gate is None else x + self.gate * found


class CompGCN(nn.Module):
    """``num_layers`` layers, widths ``in_dim -> hidden_dim -> ... -> out_dim``; 0 layers: the identity ("w/o GCN").

    ``options``: composition, dropout, act and backend of every layer. Raises InputError for sizes that do not fit.
    """

    def __init__(
        self,
        num_layers: int,
        in_dim: int,
        hidden_dim: int,
        out_dim: int,
        num_relations: int,
        **options: Any,
    ) -> None:
        super().__init__()
        if num_layers < 0 or (num_layers == 0 and in_dim != out_dim):
            raise InputError(
                f"{num_layers} GCN layers from width {in_dim} to {out_dim}: "
                "give 0 or more, and equal widths for 0 (no layer changes them)"
            )
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim][: num_layers + 1]
        self.layers = nn.ModuleList(
            CompGCNLayer(width, next_width, num_relations, **options) for width, next_width in pairwise(widths)
        )

    def forward(self, x: Tensor, v: Tensor, graph: RelationalGraph) -> Encoded:
        """``x`` [M, in_dim], ``v`` [2R, in_dim] -> x [M, out_dim], v [2R, out_dim]."""
        for layer in self.layers:
            x, v = layer(x, v, graph)
        return Encoded(x, v)

    def relations(self, v: Tensor) -> Tensor:
        """v [2R, in_dim] after all layers: [2R, out_dim] (v' = v W_rel). Does not depend on entities."""
        for weight in self.relation_weights():
            v = v @ weight
        return v

    def relation_weights(self) -> list[Tensor]:
        """W_rel of every layer: the parameters that ``relations`` uses."""
        return [layer.w_rel for layer in self.layers]  # type: ignore[misc]


def _weight(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_normal_(torch.empty(rows, columns)))
