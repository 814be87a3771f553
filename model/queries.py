"""The training queries (h, r, ?) with their true tails; high-degree queries are split."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from data.knowledge_graph import KnowledgeGraph


class Queries(NamedTuple):
    """n queries of the training split in both directions; tails of query i: ``targets[indptr[i]:indptr[i + 1]]``."""

    heads: Tensor  # int64 [n]
    relations: Tensor  # int64 [n], in 0..2R-1
    indptr: Tensor  # int64 [n + 1]
    targets: Tensor  # int64: every true tail once

    def to(self, device: torch.device) -> Queries:
        """The same on another device."""
        return Queries(*(tensor.to(device) for tensor in self))


def training_queries(kg: KnowledgeGraph, tails_at_once: int = 0) -> Queries:
    """All queries of the training split; one of more than ``tails_at_once`` true tails (0: any number) is split.

    A batch's loss is the mean over its triples, so a query has the weight of its number of tails: with 3,612 of them,
    as in FB15k-237, it is half of its batch, and such a step can undo epochs (docs/LOG.md). Parts are spread over
    batches. With the exact softmax, each tail's softmax is over all entities either way: parts change no triple's loss,
    only which triples share a step. With a sampled one, a part's other true tails may be drawn as negatives. The
    semantic loss, a mean over queries, counts a split query once per part.
    """
    known = kg.answers("train")
    heads, relations = known.keys // (2 * kg.num_relations), known.keys % (2 * kg.num_relations)
    found = Queries(*(torch.from_numpy(array) for array in (heads, relations, known.indptr, known.targets)))
    return in_parts(found, tails_at_once) if tails_at_once else found


def in_parts(queries: Queries, most: int) -> Queries:
    """The queries with at most ``most`` tails each: a longer one comes several times, with a run of its tails each."""
    size = queries.indptr.diff()
    parts = (size + most - 1) // most
    own = torch.repeat_interleave(torch.arange(len(size)), parts)
    place = torch.arange(len(own)) - (parts.cumsum(0) - parts)[own]  # of a part among its query's
    start = queries.indptr[own] + place * size[own] // parts[own]
    return Queries(queries.heads[own], queries.relations[own], torch.cat([start, queries.indptr[-1:]]), queries.targets)
