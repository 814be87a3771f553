"""Filtered ranking by counting against the usual way (dense filter mask, two argsorts), on given scores.

    python benchmarks/ranking.py [--quick] [--json F] [--dataset DIR]

Both rank the test triples of FB15k-237 in both directions (random triples of the same sizes where the data set's
folder is not there) on the same scores without ties, batch by batch in turns; their ranks must be equal.
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

from data.knowledge_graph import Answers, KnowledgeGraph, with_inverse
from model.ranking import filtered_ranks, rank_scores
from run_record import ROOT, CommandParser, device_name, run_command, versions, write_json

BATCH = 1024
REFERENCE = "dense mask + two argsorts"


def reference_ranks(scores: Tensor, targets: Tensor, known: tuple[Tensor, Tensor]) -> Tensor:
    """As public code on top of ConvE's does it: mask the other answers, then sort the sorting order."""
    masked, own = masked_scores(scores, targets, known)
    masked[torch.arange(len(targets)), targets] = own
    return 1 + masked.argsort(1, descending=True).argsort(1)[torch.arange(len(targets)), targets]


def mask_and_count(scores: Tensor, targets: Tensor, known: tuple[Tensor, Tensor]) -> Tensor:
    """Half the way: the dense mask stays, counting stands in for the sorts."""
    masked, own = masked_scores(scores, targets, known)
    return 1 + (masked > own[:, None]).sum(1)


def masked_scores(scores: Tensor, targets: Tensor, known: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(scores with -inf at all known answers, the targets' own scores)."""
    indptr, ids = known
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    mask[torch.arange(len(targets)).repeat_interleave(indptr.diff()), ids] = True
    return scores.masked_fill(mask, -torch.inf), scores[torch.arange(len(targets)), targets]


def random_graph(seed: int) -> KnowledgeGraph:
    """FB15k-237's sizes, entities and relations drawn by a 1/rank law."""
    rng, M, R = np.random.default_rng(seed), 14_541, 237

    def law(n: int, size: int) -> np.ndarray:
        weight = 1 / np.arange(1, n + 1)
        return rng.choice(n, size, p=weight / weight.sum())

    train, valid, test = (np.stack([law(M, n), law(R, n), law(M, n)], axis=1) for n in (272_115, 17_535, 20_466))
    names = [f"e{i}" for i in range(M)]
    return KnowledgeGraph(
        name="random triples",
        entities=names,
        relations=[f"r{i}" for i in range(R)],
        train=train,
        valid=valid,
        test=test,
        labels=names,
        has_label=np.ones(M, dtype=bool),
        descriptions=[""] * M,
        relation_labels=[f"r{i}" for i in range(R)],
    )


def known_rows(answers: Answers, triples: np.ndarray) -> tuple[Tensor, Tensor]:
    """CSR of the known tails of each triple's query."""
    rows = answers.rows(triples[:, 0], triples[:, 1])
    tails = [answers.targets[answers.indptr[i] : answers.indptr[i + 1]] for i in rows]
    return torch.from_numpy(np.cumsum([0, *map(len, tails)])), torch.from_numpy(np.concatenate(tails))


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def main() -> int:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a sample of the batches, under 50 s on two cores")
    parser.add_argument("--json", type=Path, metavar="F", help="write the table there as JSON too")
    parser.add_argument("--dataset", type=Path, default=ROOT / "data" / "FB15k-237", help="the data set's folder")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="of the scores and of random triples")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    kg = KnowledgeGraph.load(args.dataset) if (args.dataset / "train.txt").exists() else random_graph(args.seed)
    M, R = kg.num_entities, kg.num_relations
    triples, answers = with_inverse(kg.test, R), kg.answers()
    queries, query_of = np.unique(triples[:, 0] * (2 * R) + triples[:, 1], return_inverse=True)
    batches = np.arange(-(-len(queries) // BATCH))
    if args.quick:
        batches = batches[:: max(1, len(batches) // 4)]
    taken = np.isin(query_of // BATCH, batches)
    triples, total = triples[taken], len(triples)
    queries, query_of = np.unique(query_of[taken], return_inverse=True)

    # Query i of the sorted queries has row i % BATCH: permutations, so that no two scores of a row are equal.
    torch.manual_seed(args.seed)
    pool = torch.stack([torch.randperm(M) for _ in range(BATCH)]).float()
    ways: dict[str, Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]] = {
        REFERENCE: reference_ranks,
        "dense mask + counting": mask_and_count,
        "rank_scores": rank_scores,
    }
    seconds: dict[str, float] = {}
    ranks = {name: np.empty(len(triples)) for name in ways}
    for batch in range(-(-len(queries) // BATCH)):
        members = np.flatnonzero(query_of // BATCH == batch)
        scores = pool[query_of[members] - batch * BATCH]
        targets, known = torch.from_numpy(triples[members, 2]), known_rows(answers, triples[members])
        for name, way in ways.items():
            with timed(seconds, name):
                ranks[name][members] = way(scores, targets, known).numpy()
    # Each distinct query's row once, the grouping of the triples and the choice of their filters included.
    grouped = "filtered_ranks (all stages)"
    with timed(seconds, grouped):
        ranks[grouped] = filtered_ranks(
            lambda heads, _: pool[: len(heads)], triples, answers, num_relations=R, batch=BATCH
        )
    unequal = [name for name, found in ranks.items() if not np.array_equal(found, ranks[REFERENCE])]
    if unequal:
        print(f"ranks differ from the reference's: {', '.join(unequal)}", file=sys.stderr)
        return 1

    rows = [{"way": name, "seconds": s, "ratio": seconds[REFERENCE] / s} for name, s in seconds.items()]
    print(f"{kg.name}: {len(triples):,} of {total:,} test queries, {len(queries):,} distinct, M = {M:,}; equal ranks")
    print(f"{device_name('cpu')}, ratio = the reference's seconds / seconds\n")
    print(f"{'way':<30}{'seconds':>10}{'ratio':>10}")
    for row in rows:
        print(f"{row['way']:<30}{row['seconds']:>10.3f}{row['ratio']:>10.1f}")
    if args.json:
        write_json(
            {
                "benchmark": "ranking",
                "args": {"quick": args.quick, "threads": args.threads, "seed": args.seed},
                "data": {"name": kg.name, "queries": len(triples), "distinct": len(queries), "entities": M},
                "versions": versions(),
                "rows": rows,
            },
            args.json,
        )
    return 0


if __name__ == "__main__":
    run_command(main)
