"""CompGCN layers against Eq. 1-2, computed edge by edge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.errors import InputError
from model.CompGCN import CompGCN, CompGCNLayer
from model.relational_graph import RelationalGraph
from tests.test_message_passing import BACKENDS, random_edges, relative

M, R, E, D = 30, 4, 120, 6


def small_graph() -> tuple[list[list[int]], RelationalGraph]:
    triples = torch.stack(random_edges(E, M, R, seed=5, used=25), dim=1)  # five entities stay isolated
    return triples.tolist(), RelationalGraph.from_triples(triples, M, R)


def layers_of(encoder: CompGCN) -> list[CompGCNLayer]:
    return [layer for layer in encoder.layers if isinstance(layer, CompGCNLayer)]


def equation_1(layer: CompGCNLayer, x: Tensor, v: Tensor, triples: list[list[int]]) -> Tensor:
    """The layer's docstring with a matrix product per edge, batch norm from the batch's own statistics, tanh."""

    def phi(a: Tensor, b: Tensor) -> Tensor:
        return a * b if layer.composition == "mult" else a - b

    heads, tails = [h for h, _, _ in triples], [t for _, _, t in triples]
    rows = [phi(x[j], layer.v_loop[0]) @ layer.w_loop for j in range(M)]
    for h, r, t in triples:
        weight = (heads.count(h) * tails.count(t)) ** -0.5  # the same pair of degrees in both directions
        rows[t] = rows[t] + weight * phi(x[h], v[r]) @ layer.w_in
        rows[h] = rows[h] + weight * phi(x[t], v[r + R]) @ layer.w_out
    total = torch.stack(rows) / 3
    centred = total - total.mean(0)
    normed = centred / (centred.square().mean(0) + layer.norm.eps).sqrt()
    found = torch.tanh(normed * layer.norm.weight + layer.norm.bias)
    return found if layer.gate is None else x + layer.gate * found


@pytest.mark.parametrize("composition", ["mult", "sub"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out", [5, D])
def test_layer_is_equation_1_and_2(out: int, backend: str, composition: str) -> None:
    triples, graph = small_graph()
    torch.manual_seed(0)
    layer = CompGCNLayer(D, out, R, composition, dropout=0.0, act="tanh", backend=backend).double()
    for weight in (layer.w_rel, layer.gate):
        if weight is not None:
            torch.nn.init.normal_(weight)
    x = torch.randn(M, D, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2 * R, D, dtype=torch.float64, requires_grad=True)
    leaves = {"x": x, "v": v, **{n: p for n, p in layer.named_parameters() if n != "w_rel"}}
    direction = torch.randn(M, out, dtype=torch.float64)
    ours, relations = layer(x, v, graph)
    theirs = equation_1(layer, x, v, triples)
    assert relative(ours.detach(), theirs.detach()) <= 1e-12
    assert torch.equal(relations, v @ layer.w_rel)
    our_grads = torch.autograd.grad((ours * direction).sum(), list(leaves.values()))
    their_grads = torch.autograd.grad((theirs * direction).sum(), list(leaves.values()))
    for name, a, b in zip(leaves, our_grads, their_grads, strict=True):
        # batch norm removes what all rows share: the gradient of `sub`'s v_loop is zero, so the bound is absolute
        assert (a - b).norm() <= 1e-10 * max(1.0, float(b.norm())), name


def test_layers_that_keep_the_width_start_as_the_identity() -> None:
    _, graph = small_graph()
    x, v = torch.randn(M, D), torch.randn(2 * R, D)
    encoder = CompGCN(2, D, D, D, R)
    out = encoder(x, v, graph)
    assert torch.equal(out.x, x) and torch.equal(out.v, v)
    out.x.square().sum().backward()
    for layer in layers_of(encoder):
        assert layer.gate is not None and layer.gate.grad is not None and bool((layer.gate.grad != 0).all())


def test_zero_layers_are_the_identity_and_widths_are_checked() -> None:
    _, graph = small_graph()
    x, v = torch.randn(M, D), torch.randn(2 * R, D)
    out = CompGCN(0, D, 99, D, R)(x, v, graph)
    assert out.x is x and out.v is v
    with pytest.raises(InputError):
        CompGCN(0, D, D, D + 1, R)
    assert [tuple(layer.w_in.shape) for layer in layers_of(CompGCN(3, 4, 5, 6, R))] == [(4, 5), (5, 5), (5, 6)]
    with pytest.raises(InputError):
        CompGCN(1, D, D, D, R)(x, v[:R], graph)
    with pytest.raises(InputError):
        CompGCNLayer(D, D, R, act="swish")


def test_dropout_does_not_affect_the_self_loop_and_is_off_in_eval() -> None:
    """If the sums over in- and out-neighbours are dropped completely, only the self-loop remains."""
    _, graph = small_graph()
    torch.manual_seed(0)
    layer = CompGCNLayer(D, D, R, dropout=1.0, act="identity", backend="torch")
    layer.gate = torch.nn.Parameter(torch.ones(D))
    x, v = torch.randn(M, D), torch.randn(2 * R, D)
    alone = x + layer.norm(x * layer.v_loop @ layer.w_loop / 3)
    assert torch.allclose(layer(x, v, graph).x, alone, atol=1e-5)
    layer.eval()
    assert torch.equal(layer(x, v, graph).x, layer(x, v, graph).x)
    assert not torch.allclose(layer(x, v, graph).x, alone, atol=1e-3)
