"""One CompGCN layer, forward and backward over both directions, with each message-passing backend.

    python benchmarks/message_passing.py [--quick] [--json F] [--dataset DIR]

On FB15k-237 (a random graph of its size if the folder is missing; --quick: a quarter of the triples), equal parameters,
no dropout. The reference is the original code's method: DGL with a user-defined message function and a matrix product
per edge. The ways alternate, and each keeps its best time. Errors are relative to the same layer in float64, the
largest over output and gradients. The last rows are the sum alone, with both gradients.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import DATASET, Row, benchmark_parser, best_times, print_table, write_rows
from benchmarks.random_graph import real_or_random
from common.errors import InputError, run_command
from model.CompGCN import CompGCNLayer, Encoded
from model.message_passing import compose_sum, resolve_backend
from model.relational_graph import RelationalGraph, import_dgl

REFERENCE = "matrix product per edge (DGL function)"


class PerEdgeLayer(CompGCNLayer):
    """The same layer as in the original code: each edge's message is multiplied by W, then summed."""

    def forward(self, x: Tensor, v: Tensor, graph: RelationalGraph) -> Encoded:
        import_dgl()
        import dgl.function as fn

        total = (x * self.v_loop) @ self.w_loop
        for g, w in zip(one_graph_per_direction(graph), (self.w_in, self.w_out), strict=True):
            with g.local_scope():
                g.ndata["x"] = x
                relation, norm = g.edata["relation"], g.edata["norm"]
                g.update_all(
                    lambda edges, r=relation, n=norm, w=w: {"m": (edges.src["x"] * v[r]) @ w * n}, fn.sum("m", "out")
                )
                total = total + g.ndata["out"]
        return Encoded(self.act(self.norm(total / 3)), v @ self.w_rel)


GRAPHS: dict[int, list[Any]] = {}


def one_graph_per_direction(graph: RelationalGraph) -> list[Any]:
    """Two DGLGraphs over the entities with relation ids and 1/sqrt(d d') on their edges, built once."""
    if id(graph) not in GRAPHS:
        dgl, rows = import_dgl(), graph.edges.by_destination
        GRAPHS[id(graph)] = []
        for direction in (0, 1):
            mine = rows.destination % 2 == direction
            g = dgl.graph((rows.source[mine], rows.destination[mine] // 2), num_nodes=graph.num_entities)
            g.edata["relation"] = rows.relation[mine].long()
            g.edata["norm"] = rows.weight[mine, None].float()
            GRAPHS[id(graph)].append(g)
    return GRAPHS[id(graph)]


def installed(backends: tuple[str, ...]) -> list[str]:
    """The ``backends`` that can run here."""
    found = []
    for name in backends:
        try:
            found.append(resolve_backend(name, "cpu"))
        except InputError as error:
            print(f"left out: {error}")
    return found


def main() -> int:
    parser = benchmark_parser(__doc__, "a quarter of the triples, one turn each")
    parser.add_argument("--dataset", type=Path, default=DATASET, help="graph folder")
    parser.add_argument("--width", type=int, default=200, help="D, of input and output")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and of a random graph")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    begun, D = time.perf_counter(), args.width

    kg = real_or_random(args.dataset, args.seed)
    triples, M, R = kg.train[:: 4 if args.quick else 1], kg.num_entities, kg.num_relations
    graph = RelationalGraph.from_triples(triples, M, R)
    backends = installed(("dgl", "torch", "fused"))
    x, v = torch.randn(M, D, requires_grad=True), torch.randn(2 * R, D, requires_grad=True)
    grad_out, grad_sum = torch.randn(M, D), torch.randn(2 * M, D)

    parameters = CompGCNLayer(D, D, R, dropout=0.0).state_dict()

    def layer(way: type[CompGCNLayer], backend: str) -> CompGCNLayer:
        made = way(D, D, R, dropout=0.0, backend=backend)
        made.load_state_dict(parameters)
        return made

    layers = {f"{backend} backend": layer(CompGCNLayer, backend) for backend in backends}
    if "dgl" in backends:
        layers = {REFERENCE: layer(PerEdgeLayer, "dgl"), **layers}

    def results(made: CompGCNLayer, x: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        """[out, gradients of x, v and the weights] of one forward and backward."""
        out = made(x, v, graph).x
        leaves = [x, v, made.w_in, made.w_out, made.w_loop, made.v_loop]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    exact = results(
        layer(CompGCNLayer, "torch").double(),
        x.detach().double().requires_grad_(),
        v.detach().double().requires_grad_(),
        grad_out.double(),
    )

    def error(made: CompGCNLayer) -> float:
        pairs = zip(results(made, x, v, grad_out), exact, strict=True)
        return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)

    def sum_and_gradients(backend: str) -> None:
        torch.autograd.grad(compose_sum(x, v, graph.edges, backend), (x, v), grad_sum)

    repeats = 1 if args.quick else 3
    whole = best_times({way: partial(results, made, x, v, grad_out) for way, made in layers.items()}, repeats)
    parts = best_times({f"sum and gradients, {b}": partial(sum_and_gradients, b) for b in backends}, repeats)
    reference = whole.get(REFERENCE)
    rows: list[Row] = [
        {
            "way": way,
            "seconds": seconds,
            "ratio": reference / seconds if reference else None,
            "relative_error": error(layers[way]) if way in layers else None,
        }
        for way, seconds in {**whole, **parts}.items()
    ]
    print(f"{kg.name}: {M:,} entities, {2 * len(triples):,} edges, D = {D}, {args.threads} threads")
    print_table(rows, {"way": "<", "seconds": ".4f", "ratio": ".1f", "relative_error": ".1e"})
    print("ratio: seconds of the reference layer over this row's")
    write_rows(args, rows, begun, inputs=kg.input_hashes, graph=kg.name)
    return 0


if __name__ == "__main__":
    run_command(main)
