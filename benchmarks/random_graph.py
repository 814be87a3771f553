"""Random graphs with the degree law and relation frequencies of FB15k-237, which is a part of Freebase.

    python benchmarks/random_graph.py [--quick] [--json F] [--dataset DIR] [--entities M]

The table fits a real graph and one drawn by FREEBASE.

Heads and tails are drawn with weights (rank - 1 + shift)^(-1 / (a - 1)), which gives degrees the tail P(d) ~ d^-a;
the shift sets the share of the largest hub. One entity has the same rank as a head and as a tail. Relations have
weights rank^-s (Zipf). Ends and relation of a triple are independent: nothing is there to be learned.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import run_command
from data.knowledge_graph import KnowledgeGraph

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Law(NamedTuple):
    """What ``fit_law`` finds in a graph and ``random_triples`` draws by."""

    out_exponent: float  # a of the degrees of heads
    out_shift: float
    in_exponent: float  # of the degrees of tails
    in_shift: float
    relation_exponent: float  # s


FREEBASE = Law(out_exponent=3.147, out_shift=0.404, in_exponent=2.488, in_shift=0.498, relation_exponent=0.871)
RELATIONS = 237


# ---------------------------------------------------------------- fitting


def tail_exponent(degrees: Ints) -> tuple[float, int]:
    """(a, first degree of the tail) of P(d) ~ d^-a: maximum likelihood for integers above a cut, and the cut whose law
    is closest to what was found (Clauset, Shalizi and Newman 2009, Eq. 3.7, Section 3.3), with 100 degrees above it.
    """
    found = np.sort(degrees[degrees > 0])
    best = (np.inf, 0.0, 0)
    for cut in np.unique(found)[:400]:
        tail = found[np.searchsorted(found, cut) :]
        logs = np.log(tail / (cut - 0.5)).sum()
        if len(tail) < 100:
            break
        exponent = 1 + len(tail) / logs
        values, ends = np.unique(tail, return_counts=True)
        law = 1 - ((values + 0.5) / (cut - 0.5)) ** (1 - exponent)  # share of degrees up to each value
        best = min(best, (float(np.abs(ends.cumsum() / len(tail) - law).max()), float(exponent), int(cut)))
    return best[1], best[2]


def zipf_exponent(counts: Ints) -> float:
    """s of frequencies ~ rank^-s by maximum likelihood: where the law's mean of log rank is that of the counts."""
    ranked = np.sort(counts[counts > 0])[::-1]
    logs = np.log(np.arange(1, len(ranked) + 1))
    return _decreasing_root(
        lambda s: float(np.average(logs, weights=np.exp(-s * logs))), np.average(logs, weights=ranked)
    )


def fit_law(triples: Ints, num_entities: int) -> Law:
    """The law of ``triples`` [n, 3]; the shifts are those that give the largest hubs their share in expectation."""

    def of_end(column: int) -> tuple[float, float]:
        degrees = np.bincount(triples[:, column], minlength=num_entities)
        exponent, _ = tail_exponent(degrees)
        share = float(degrees.max() / degrees.sum())
        return exponent, _decreasing_root(lambda shift: float(_weights(num_entities, exponent, shift)[0]), share, 1e3)

    return Law(*of_end(0), *of_end(2), zipf_exponent(np.bincount(triples[:, 1])))


def _decreasing_root(function: Callable[[float], float], value: float, high: float = 8.0) -> float:
    low = 1e-3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > value else (low, middle)
    return (low + high) / 2


# ---------------------------------------------------------------- drawing


def random_triples(
    num_entities: int, count: int, seed: int, law: Law = FREEBASE, num_relations: int = RELATIONS
) -> Ints:
    """``count`` distinct triples [count, 3] in a random order, entity ids in no order of degree.

    Raises ValueError where that many distinct triples do not come out of the law.
    """
    rng = np.random.default_rng(seed)
    names = rng.permutation(num_entities)
    heads, tails = (
        _weights(num_entities, *end) for end in ((law.out_exponent, law.out_shift), (law.in_exponent, law.in_shift))
    )
    relations = np.arange(1, num_relations + 1) ** -law.relation_exponent
    keys = np.empty(0, dtype=np.int64)
    for _ in range(50):
        missing = count - len(keys)
        if missing <= 0:
            break
        drawn = (_draws(rng, p, missing + missing // 20 + 10) for p in (heads, relations / relations.sum(), tails))
        h, r, t = drawn
        keys = np.concatenate([keys, (names[h] * num_relations + r) * num_entities + names[t]])
        keys.sort()  # not np.unique: its hashing takes ten times as long on keys like these
        keys = keys[np.append(True, keys[1:] != keys[:-1])]
    if len(keys) < count:
        raise ValueError(f"{count} distinct triples over {num_entities} entities are too many for this law")
    keys = rng.permutation(keys)[:count]
    return np.stack(
        [keys // (num_relations * num_entities), keys // num_entities % num_relations, keys % num_entities], 1
    )


def _weights(size: int, exponent: float, shift: float) -> Floats:
    weights = (np.arange(size) + shift) ** (-1 / (exponent - 1))
    return weights / weights.sum()


def _draws(rng: np.random.Generator, p: Floats, count: int) -> Ints:
    """``count`` independent draws from ``p``: how often each comes, then a random order; linear in time."""
    return rng.permutation(np.repeat(np.arange(len(p)), rng.multinomial(count, p)))


def random_kg(
    num_entities: int, count: int, seed: int, held_out: tuple[int, int] = (0, 0), law: Law = FREEBASE
) -> KnowledgeGraph:
    """A graph of ``count`` training triples and ``held_out`` (valid, test) more of the same law."""
    triples = random_triples(num_entities, count + sum(held_out), seed, law)
    train, valid, test = np.split(triples, np.cumsum([count, held_out[0]]))
    names, relations = [str(i) for i in range(num_entities)], [str(i) for i in range(RELATIONS)]
    return KnowledgeGraph(
        name=f"random graph of {num_entities:,} entities", entities=names, relations=relations, train=train,
        valid=valid, test=test, labels=names, has_label=np.zeros(num_entities, dtype=bool),
        descriptions=[""] * num_entities, relation_labels=relations,
    )  # fmt: skip


def real_or_random(folder: Path, seed: int) -> KnowledgeGraph:
    """The graph in ``folder``; where the default one is not there, a random one of FB15k-237's sizes."""
    from benchmarks.measure import DATASET

    if folder != DATASET or folder.is_dir():
        return KnowledgeGraph.load(folder)
    return random_kg(14_541, 272_115, seed, held_out=(17_535, 20_466))


# ---------------------------------------------------------------- the fits as a table


def main() -> int:
    from benchmarks.measure import DATASET, Row, benchmark_parser, print_table, write_rows

    parser = benchmark_parser(__doc__, "a random graph of 10,000 entities", threads=False)
    parser.add_argument("--dataset", type=Path, default=DATASET, help="the graph to fit (left out where it is absent)")
    parser.add_argument("--entities", type=int, default=1_000_000, help="M of the random graph, 10 triples each")
    parser.add_argument("--seed", type=int, default=0, help="of the random graph")
    args = parser.parse_args()
    begun = time.perf_counter()
    M = 10_000 if args.quick else args.entities
    rows: list[Row] = []
    if (args.dataset / "train.txt").exists():
        kg = KnowledgeGraph.load(args.dataset)
        rows.append({"graph": kg.name, **describe(kg.train, kg.num_entities)})
    start = time.perf_counter()
    triples = random_triples(M, 10 * M, args.seed)
    seconds = time.perf_counter() - start
    rows.append({"graph": f"random, M = {M:,}", **describe(triples, M), "seconds": seconds})
    for row in rows:
        row["ratio"] = row["in_exponent"] / FREEBASE.in_exponent
    print_table(rows, {
        "graph": "<", "triples": ",d", "out_exponent": ".3f", "out_shift": ".2f", "in_exponent": ".3f",
        "in_shift": ".2f", "relation_exponent": ".3f", "largest_degree": ",d", "seconds": ".2f", "ratio": ".2f",
    })  # fmt: skip
    print("seconds: to draw the triples; ratio: exponent of the tails' degrees over that of FREEBASE, this file's law")
    write_rows(args, rows, begun)
    return 0


def describe(triples: Ints, num_entities: int) -> dict[str, float]:
    """Size, fitted law and largest degree of ``triples`` [n, 3]."""
    degrees = np.bincount(triples[:, [0, 2]].ravel(), minlength=num_entities)
    return {"triples": len(triples), **fit_law(triples, num_entities)._asdict(), "largest_degree": int(degrees.max())}


if __name__ == "__main__":
    run_command(main)
