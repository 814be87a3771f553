"""Inspect an entity's codes: its neighbours by shared codes and by distance, and the facts that they share.

    python tables/inspect_codes.py --entity "Lady Gaga" --codes codes_new/FB15k-237_4_1024_4_rq.pt
    python tables/inspect_codes.py --entity ada_ashley --codes demo_output/family_4_256_4_rq.pt --top 5

Shared prefix: at each position, the number of levels that are equal from level 0 up to the first difference (each level
refines the one before); the similarity of two entities is the sum over positions. Distance: squared distance of the
decoded vectors. A shared fact is a (relation, tail) of the entity's own training triples, inverse relations included,
that at least one neighbour has too. Facts are sorted by n * log2(n / expected): n of the entity and its neighbours have
the fact, expected = group size * (entities that have it) / M.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.codes import print_codes
from Class.source import Source, open_source
from common.errors import CommandParser, run_command
from data.knowledge_graph import Ints, KnowledgeGraph, find_name
from tables.code_quality import nearest_entities, open_code_set


class Near(NamedTuple):
    """Neighbours, nearest first."""

    entities: Ints  # [n]
    values: NDArray[np.float64]  # [n], shared levels or squared distances


class Fact(NamedTuple):
    """A (relation, tail) that the entity shares with neighbours; relation >= R is an inverse one."""

    relation: int
    tail: int
    having: int  # of the entity and its neighbours
    group: int  # the entity and its neighbours
    overall: int  # of all M entities
    lift: float  # fraction in the group over fraction of all entities


def shared_levels(codes: Ints, entity: int) -> Ints:
    """Number of shared levels, counted from level 0, by entity and position: [M, L] for codes [M, L, Q]."""
    same = codes == codes[entity]
    found: Ints = np.logical_and.accumulate(same, axis=2).sum(axis=2)
    return found


def nearest_by_prefix(codes: Ints, entity: int, top: int) -> Near:
    """The ``top`` other entities that share the most levels, ties by id; entities that share none are left out."""
    total = shared_levels(codes, entity).sum(axis=1)
    total[entity] = 0
    order = np.argsort(-total, kind="stable")[:top]
    order = order[total[order] > 0]
    return Near(order, total[order].astype(float))


def shared_facts(kg: KnowledgeGraph, entity: int, neighbours: Ints) -> list[Fact]:
    """The facts that ``entity`` shares with at least one of ``neighbours``, most over-represented first.

    A fact about a member of the group (siblings' "sibling of" each other) counts like any other.
    """
    graph = kg.csr()

    def facts(e: int) -> set[tuple[int, int]]:
        rows = slice(graph.indptr[e], graph.indptr[e + 1])
        return set(zip(graph.relation[rows].tolist(), graph.neighbour[rows].tolist(), strict=True))

    own, group = facts(entity), len(neighbours) + 1
    having = Counter(fact for e in neighbours.tolist() for fact in facts(e) & own)
    R = kg.num_relations
    found = []
    for (relation, tail), count in having.items():
        # the entities that have (relation, tail), each once: the tails of the inverse query
        rows = slice(graph.indptr[tail], graph.indptr[tail + 1])
        backwards = relation - R if relation >= R else relation + R
        overall = len(np.unique(graph.neighbour[rows][graph.relation[rows] == backwards]))
        lift = ((count + 1) / group) / (overall / kg.num_entities)
        found.append(Fact(relation, tail, count + 1, group, overall, lift))
    return sorted(found, key=lambda fact: (-fact.having * math.log2(fact.lift), fact.relation, fact.tail))


# ---------------------------------------------------------------- printing


def print_entity(source: Source, entity: int) -> None:
    """Name, description, degree and codes."""
    assert source.codes is not None
    kg, codes = source.kg, source.codes
    print(f"\n{source.names.names[entity]} [{kg.entities[entity]}], {kg.degree[entity]} training edges")
    if kg.descriptions[entity]:
        print(f"  {kg.descriptions[entity][:160]}")
    sharing = (codes == codes[entity]).sum(axis=0) - 1  # [L, Q] others with the same code there
    print("position  codes (others that have the code at this position and level)")
    for position, (row, counts) in enumerate(zip(codes[entity], sharing, strict=True)):
        cells = [f"Q{level}_{code} ({count:,})" for level, (code, count) in enumerate(zip(row, counts, strict=True))]
        print(f"  {position:6}  " + "  ".join(f"{cell:18}" for cell in cells).rstrip())
    print(print_codes(codes[entity], "compact"))


def print_neighbours(source: Source, entity: int, near: Near, title: str, number: str) -> None:
    """One line per neighbour: value, positions and levels that it shares, name."""
    assert source.codes is not None
    L, Q = source.codes.shape[1:]
    levels = shared_levels(source.codes, entity)
    print(f"\n{title}")
    for place, (other, value) in enumerate(zip(near.entities.tolist(), near.values.tolist(), strict=True), 1):
        shared = levels[other]
        print(
            f"{place:3d}. {value:{number}}  shares {int(shared.sum()):3d} of {L * Q} levels, "
            f"{int((shared > 0).sum())} of {L} positions at level 0  {source.names.names[other]} "
            f"[{source.kg.entities[other]}]"
        )
    if not len(near.entities):
        print("  none")


def print_facts(source: Source, entity: int, near: Near, title: str, top: int) -> None:
    """The facts shared with these neighbours."""
    kg, R = source.kg, source.kg.num_relations
    found = shared_facts(kg, entity, near.entities)
    print(f"\n{title}" + (f", {len(found)} in all" if len(found) > top else ""))
    for fact in found[:top]:
        words = kg.relation_labels[fact.relation % R]
        relation = words if fact.relation < R else f"inverse of {words}"
        print(
            f"  {fact.having:3d} of {fact.group}, {fact.overall:5,} of {kg.num_entities:,} in all "
            f"({fact.lift:7.1f} times as often)  {relation} | {source.names.names[fact.tail]}"
        )
    if not found:
        print("  none")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="tables/inspect_codes.py", description=__doc__.split("\n")[0])
    parser.add_argument("--entity", required=True, metavar="NAME", help="by name or raw name")
    parser.add_argument("--codes", type=Path, metavar="FILE.pt", help="codes file (default: the newest in codes_new/)")
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="graph folder (default: the graph of the codes)")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="neighbours and facts to show")
    args = parser.parse_args(argv)
    if args.top < 1:
        parser.error(f"--top must be 1 or more, got {args.top}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    source = open_source(
        argparse.Namespace(codes=args.codes, dataset=args.dataset, no_codes=False, shuffle_codes=False,
                           code_format="compact", seed=0)
    )  # fmt: skip
    assert source.codes is not None
    kg = source.kg
    entity = find_name(args.entity, kg.entities, [source.names.names, kg.labels], "entity", "--entity")
    print_entity(source, entity)
    prefix = nearest_by_prefix(source.codes, entity, args.top)
    print_neighbours(source, entity, prefix, "nearest by shared prefix: levels", "8.0f")
    print_facts(source, entity, prefix, "facts that it shares with these", args.top)
    near = nearest_by_distance(source, entity, args.top)
    if near is None:
        print("\nnearest by distance: the decoded vectors (_emd.pt) are not beside the codes")
        return
    print_neighbours(source, entity, near, "nearest by distance of the decoded vectors: squared distance", "8.4f")
    print_facts(source, entity, near, "facts that it shares with these", args.top)


def nearest_by_distance(source: Source, entity: int, top: int) -> Near | None:
    """The ``top`` nearest other entities by decoded vectors, in the graph's ids; None without vectors."""
    import torch

    found = open_code_set(Path(source.codes_info["record"]).with_suffix(".pt"))
    if found.vectors is None:
        return None
    row = {name: i for i, name in enumerate(found.entities)}
    vectors = found.flat_vectors()[[row[name] for name in source.kg.entities]]
    ids, squares = nearest_entities(torch.tensor([entity]), vectors, top)
    return Near(ids[0].numpy(), squares[0].double().numpy())


if __name__ == "__main__":
    run_command(main)
