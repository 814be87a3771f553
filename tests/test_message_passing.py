"""compose_sum: every backend against a loop over edges; gradients, unusual sizes, missing packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import InputError
from model.message_passing import compose_sum, resolve_backend
from model.relational_graph import EdgeSet, RelationalGraph

ROOT = Path(__file__).resolve().parent.parent


def runs_here(backend: str) -> bool:
    try:
        return resolve_backend(backend, "cpu") == backend
    except InputError:
        return False


INSTALLED = [name for name in ("torch", "dgl", "fused") if runs_here(name)]
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(name not in INSTALLED, reason=f"{name} cannot run here"))
    for name in ("torch", "dgl", "fused")
]


def random_edges(
    num_edges: int, num_entities: int, num_relations: int, seed: int = 0, used: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Skewed random edges among the first ``used`` entities; the rest stay isolated."""
    rng = np.random.default_rng(seed)
    used = used or num_entities
    source = (used * rng.random(num_edges) ** 3).astype(np.int64)
    relation = (num_relations * rng.random(num_edges) ** 3).astype(np.int64)
    return torch.from_numpy(source), torch.from_numpy(relation), torch.from_numpy(rng.integers(used, size=num_edges))


def loop_over_edges(x: Tensor, v: Tensor, triples: tuple[Tensor, Tensor, Tensor], composition: str) -> Tensor:
    """The sum of the docstring, edge by edge, differentiable."""
    source, relation, destination = (column.tolist() for column in triples)
    rows: list[list[Tensor]] = [[] for _ in x]
    for i, r, j in zip(source, relation, destination, strict=True):
        weight = (source.count(i) * destination.count(j)) ** -0.5
        rows[j].append(weight * (x[i] * v[r] if composition == "mult" else x[i] - v[r]))
    return torch.stack([torch.stack(row).sum(0) if row else torch.zeros_like(x[0]) for row in rows])


def results(x: Tensor, v: Tensor, edges: EdgeSet, backend: str, composition: str, weights: Tensor) -> list[Tensor]:
    """[out, grad_x, grad_v] of the scalar sum(weights * out)."""
    x, v = x.clone().requires_grad_(), v.clone().requires_grad_()
    out = compose_sum(x, v, edges, backend, composition)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), (x, v))]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


CASES = {  # edges, entities, relations, width, entities in use
    "plain": (400, 50, 7, 16, None),
    "isolated entities": (100, 60, 5, 33, 20),
    "one relation": (300, 40, 1, 7, None),
    "one edge": (1, 3, 2, 5, None),
    "one entity": (9, 1, 3, 8, None),
    "width 1": (50, 10, 3, 1, None),
    "unused relations": (30, 20, 200, 24, None),
}


@pytest.mark.parametrize("composition", ["mult", "sub"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_loop_over_edges(backend: str, case: str, composition: str) -> None:
    num_edges, num_entities, num_relations, width, used = CASES[case]
    triples = random_edges(num_edges, num_entities, num_relations, used=used)
    torch.manual_seed(1)
    x, v = torch.randn(num_entities, width).double(), torch.randn(num_relations, width).double()
    weights = torch.randn(num_entities, width).double()
    leaves = x.clone().requires_grad_(), v.clone().requires_grad_()
    out = loop_over_edges(*leaves, triples, composition)
    expected = [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)]
    edges = EdgeSet.from_triples(*triples, num_entities, num_relations)
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        found = results(x.to(dtype), v.to(dtype), edges, backend, composition, weights.to(dtype))
        for name, ours, theirs in zip(("out", "grad x", "grad v"), found, expected, strict=True):
            assert relative(ours, theirs) <= bound, (name, dtype)


@pytest.mark.parametrize("composition", ["mult", "sub"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_larger_graph_against_float64_with_equal_bits_on_every_run(backend: str, composition: str) -> None:
    """Several chunks and segments, an entity and a relation with very many edges, a width that is no multiple of 4."""
    triples = random_edges(30_000, 2_000, 50, seed=3, used=1_900)
    edges = EdgeSet.from_triples(*triples, 2_000, 50)
    torch.manual_seed(0)
    x, v, weights = torch.randn(2_000, 33), torch.randn(50, 33), torch.randn(2_000, 33)
    expected = results(x.double(), v.double(), edges, "torch", composition, weights.double())
    found = results(x, v, edges, backend, composition, weights)
    again = results(x, v, EdgeSet.from_triples(*triples, 2_000, 50), backend, composition, weights)
    for name, ours, repeated, theirs in zip(("out", "grad x", "grad v"), found, again, expected, strict=True):
        assert relative(ours, theirs) <= (1e-6 if name == "out" else 1e-5), name
        assert torch.equal(ours, repeated), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_do_not_depend_on_order_or_integer_type_of_the_edges(backend: str) -> None:
    triples = random_edges(2_000, 100, 9)
    by_tail = torch.argsort(triples[2])
    torch.manual_seed(0)
    x, v, weights = torch.randn(100, 12), torch.randn(9, 12), torch.randn(100, 12)
    given = [list(triples), [t.int() for t in triples], [t[by_tail] for t in triples]]
    first, *others = (
        results(x, v, EdgeSet.from_triples(source, relation, destination, 100, 9), backend, "mult", weights)
        for source, relation, destination in given
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("composition", ["mult", "sub"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, composition: str) -> None:
    edges = EdgeSet.from_triples(*random_edges(25, 8, 3, used=7), 8, 3)
    torch.manual_seed(0)
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, v: compose_sum(x, v, edges, backend, composition), (x, v))


@pytest.mark.parametrize("composition", ["mult", "sub"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_gradient_alone_and_strided_tensors(backend: str, composition: str) -> None:
    edges = EdgeSet.from_triples(*random_edges(300, 40, 6), 40, 6)
    torch.manual_seed(0)
    x, v, weights = torch.randn(40, 10), torch.randn(6, 10), torch.randn(40, 10)
    _, grad_x, grad_v = results(x, v, edges, backend, composition, weights)
    strided_x, strided_v = x.T.contiguous().T, v.T.contiguous().T
    leaf = strided_x.clone(memory_format=torch.preserve_format).requires_grad_()
    compose_sum(leaf, strided_v, edges, backend, composition).backward(weights.T.contiguous().T)
    assert leaf.grad is not None and relative(leaf.grad, grad_x) <= 1e-6
    leaf = strided_v.clone(memory_format=torch.preserve_format).requires_grad_()
    compose_sum(strided_x, leaf, edges, backend, composition).backward(weights.T.contiguous().T)
    assert leaf.grad is not None and relative(leaf.grad, grad_v) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_edges(backend: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    edges = EdgeSet.from_triples(none, none, none, 4, 2)
    for result in results(torch.randn(4, 3), torch.randn(2, 3), edges, backend, "mult", torch.ones(4, 3)):
        assert not result.any()


def test_both_directions_at_once_equal_each_direction_alone() -> None:
    head, relation, tail = random_edges(500, 60, 5, used=50)
    graph = RelationalGraph.from_triples(torch.stack([head, relation, tail], 1).numpy(), 60, 5)
    torch.manual_seed(0)
    x, v = torch.randn(60, 8), torch.randn(10, 8)
    both = compose_sum(x, v, graph.edges, "torch").view(60, 2, 8)
    arriving = compose_sum(x, v, EdgeSet.from_triples(head, relation, tail, 60, 10), "torch")
    leaving = compose_sum(x, v, EdgeSet.from_triples(tail, relation + 5, head, 60, 10), "torch")
    assert torch.allclose(both[:, 0], arriving, atol=1e-6) and torch.allclose(both[:, 1], leaving, atol=1e-6)


def test_bad_input_is_rejected() -> None:
    edges = EdgeSet.from_triples(*random_edges(10, 4, 2), 4, 2)
    x, v = torch.randn(4, 3), torch.randn(2, 3)
    with pytest.raises(InputError):
        EdgeSet.from_triples(torch.tensor([4]), torch.tensor([0]), torch.tensor([0]), 4, 2)
    with pytest.raises(InputError):
        RelationalGraph.from_triples(torch.tensor([[0, 2, 1]]), 4, 2)
    with pytest.raises(InputError):
        compose_sum(x[:3], v, edges)
    with pytest.raises(InputError):
        compose_sum(x, v.double(), edges)
    with pytest.raises(InputError):
        compose_sum(x, v, edges, composition="corr")
    with pytest.raises(InputError):
        resolve_backend("cuda", "cpu")


def test_half_precision_uses_torch() -> None:
    edges = EdgeSet.from_triples(*random_edges(200, 20, 3), 20, 3)
    torch.manual_seed(0)
    x, v = torch.randn(20, 4), torch.randn(3, 4)
    half = compose_sum(x.bfloat16(), v.bfloat16(), edges)
    assert half.dtype == torch.bfloat16 and relative(half, compose_sum(x, v, edges)) < 0.02


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    if "fused" not in INSTALLED:
        pytest.skip("numba is not installed")
    edges = EdgeSet.from_triples(*random_edges(40_000, 500, 11), 500, 11)
    torch.manual_seed(0)
    x, v, weights = torch.randn(500, 20), torch.randn(11, 20), torch.randn(500, 20)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(results(x, v, edges, "fused", "mult", weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


# Triton's interpreter runs the source of the GPU kernel on CPU tensors; on a CUDA machine the kernel is run.
ON_TRITON = """
import torch
from model.fused_gpu import FusedSum
from model.message_passing import compose_sum
from model.relational_graph import EdgeSet
from tests.test_message_passing import random_edges, relative

device = "cuda" if torch.cuda.is_available() else "cpu"
for width, composition in ((7, "mult"), (33, "sub"), (300, "mult")):  # below, between and above a block
    triples = random_edges(900, 40, 5, used=30)  # groups longer than a segment, and empty ones
    edges = EdgeSet.from_triples(*triples, 40, 5)
    torch.manual_seed(0)
    x, v = torch.randn(40, width).double(), torch.randn(5, width).double()
    weights = torch.randn(40, width).double()

    def results(run, kind, device):
        leaves = [t.to(device, kind).requires_grad_() for t in (x, v)]
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(device, kind))]

    there = edges.to(device)
    expected = results(lambda x, v: compose_sum(x, v, edges, "torch", composition), torch.float64, "cpu")
    for kind, bound in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        found = results(lambda x, v: FusedSum.apply(x, v, there, composition == "mult"), kind, device)
        again = results(lambda x, v: FusedSum.apply(x, v, there, composition == "mult"), kind, device)
        for ours, same, theirs in zip(found, again, expected):
            assert relative(ours.cpu(), theirs) <= bound, (width, composition, kind)
            assert torch.equal(ours, same)
"""


def test_triton_kernel() -> None:
    pytest.importorskip("triton")
    environment = os.environ if torch.cuda.is_available() else {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ON_TRITON], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


BLOCKED = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # an import of it now raises ImportError
import torch
from model.CompGCN import CompGCN
from model.message_passing import resolve_backend
from model.relational_graph import RelationalGraph
from common.errors import InputError

triples = torch.tensor([[0, 0, 1], [2, 1, 0]])
out = CompGCN(2, 4, 4, 4, 2)(torch.randn(3, 4), torch.randn(4, 4), RelationalGraph.from_triples(triples, 3, 2))
assert out.x.shape == (3, 4)
print(resolve_backend("auto", "cpu"))
for name in {rejected!r}:
    try:
        resolve_backend(name, "cpu")
    except InputError as error:
        assert name in str(error), error
    else:
        raise SystemExit(f"{{name}} was accepted")
"""


@pytest.mark.parametrize(
    ("blocked", "rejected", "auto"),
    [(("dgl", "numba", "triton"), ("dgl", "fused"), "torch"), (("dgl",), ("dgl",), None)],
)
def test_runs_without_dgl_and_numba(blocked: tuple[str, ...], rejected: tuple[str, ...], auto: str | None) -> None:
    code = BLOCKED.format(blocked=blocked, rejected=rejected)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert auto is None or done.stdout.strip() == auto
