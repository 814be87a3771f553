"""Filtered ranking by counting against the usual method (dense filter mask, two argsorts), on given scores.

    python benchmarks/ranking.py [--quick] [--json F] [--dataset DIR]

All ways rank the test triples of FB15k-237 in both directions on the same scores without ties, batch by batch in turns;
their ranks must be equal.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import DATASET, Row, benchmark_parser, print_table, write_rows
from common.errors import at_least, run_command
from data.knowledge_graph import KnowledgeGraph, with_inverse
from model.ranking import filtered_ranks, rank_scores

BATCH = 1024
REFERENCE = "dense mask + two argsorts"


def reference_ranks(scores: Tensor, targets: Tensor, known: tuple[Tensor, Tensor]) -> Tensor:
    """The method of public code based on ConvE: mask the other answers, then sort the sorting order."""
    indptr, ids = known
    rows = torch.arange(len(targets))
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    mask[rows.repeat_interleave(indptr.diff()), ids] = True
    mask[rows, targets] = False
    masked = scores.masked_fill(mask, -torch.inf)
    return 1 + masked.argsort(1, descending=True).argsort(1)[rows, targets]


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add what the block takes to ``seconds[name]``."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def main() -> int:
    parser = benchmark_parser(__doc__, "a sample of the batches")
    parser.add_argument("--dataset", type=Path, default=DATASET, help="graph folder")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the scores")
    args = parser.parse_args()
    begun = time.perf_counter()
    torch.set_num_threads(args.threads)

    kg = KnowledgeGraph.load(args.dataset)
    M, R = kg.num_entities, kg.num_relations
    triples, answers = with_inverse(kg.test, R), kg.answers()
    queries, query_of = np.unique(triples[:, 0] * (2 * R) + triples[:, 1], return_inverse=True)
    batches = np.arange(-(-len(queries) // BATCH))
    if args.quick:
        batches = batches[:: max(1, len(batches) // 4)]
    taken = np.isin(query_of // BATCH, batches)
    triples, total = triples[taken], len(triples)
    queries, query_of = np.unique(query_of[taken], return_inverse=True)

    # query i of the sorted queries has row i % BATCH; permutations, so no two scores of a row are equal
    torch.manual_seed(args.seed)
    pool = torch.stack([torch.randperm(M) for _ in range(BATCH)]).float()
    ways: dict[str, Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]] = {
        REFERENCE: reference_ranks,
        "rank_scores": rank_scores,
    }
    seconds: dict[str, float] = {}
    ranks = {name: np.empty(len(triples)) for name in ways}
    for batch in range(-(-len(queries) // BATCH)):
        members = np.flatnonzero(query_of // BATCH == batch)
        scores = pool[query_of[members] - batch * BATCH]
        indptr, tails = map(torch.from_numpy, answers.of(*triples[members, :2].T))
        targets, known = torch.from_numpy(triples[members, 2]), (indptr, tails)
        for name, way in ways.items():
            with timed(seconds, name):
                ranks[name][members] = way(scores, targets, known).numpy()
    # each distinct query once; grouping the triples and collecting the filters included
    grouped = "filtered_ranks (all stages)"
    with timed(seconds, grouped):
        ranks[grouped] = filtered_ranks(
            lambda heads, _: pool[: len(heads)], triples, answers, num_relations=R, batch=BATCH
        )
    unequal = [name for name, found in ranks.items() if not np.array_equal(found, ranks[REFERENCE])]
    if unequal:
        print(f"ranks differ from the reference's: {', '.join(unequal)}", file=sys.stderr)
        return 1

    rows: list[Row] = [{"way": name, "seconds": s, "ratio": seconds[REFERENCE] / s} for name, s in seconds.items()]
    print(
        f"{kg.name}: {len(triples):,} of {total:,} test queries, {len(queries):,} distinct, M = {M:,}; equal ranks; "
        f"{args.threads} threads"
    )
    print_table(rows, {"way": "<", "seconds": ".3f", "ratio": ".1f"})
    print("ratio: the reference's seconds over this row's")
    write_rows(args, rows, begun, inputs=kg.input_hashes, graph=kg.name, queries=len(triples), distinct=len(queries))
    return 0


if __name__ == "__main__":
    run_command(main)
