"""From integers to metrics: rank a split with nothing but codes, codebooks, relations and decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.knowledge_graph import KnowledgeGraph, with_inverse
from model.data_parallel import World
from model.losses import SCORES_AT_ONCE
from model.ranking import filtered_ranks, summarize
from model.RQGCN import CodeScorer


@torch.no_grad()
def evaluate_vectors(
    scorer: CodeScorer,
    relations: Tensor,
    q_all: Tensor,
    kg: KnowledgeGraph,
    split: str,
    world: World | None = None,
    batch: int = 1024,
) -> dict[str, Any]:
    """Filtered metrics of ``split`` from entity vectors q_all [M, D] and relations [2R, D].

    Heads are ranked as tails of inverse queries; ties take their mean rank; all known answers of every split but the
    query's own are filtered. ``unseen`` in the result reports the triples with an entity that training never saw.
    Where [batch, M] scores would be too many, entities are scored in chunks, twice. With a ``world`` of several
    processes, each ranks its part of the triples and all return the metrics of the whole.
    """
    triples, world = with_inverse(kg.split(split), kg.num_relations), world or World()
    training = scorer.training
    scorer.eval()

    latest: list[Tensor] = []  # a batch's heads and their query vectors: its chunks come with the same heads

    def score(heads: Tensor, rels: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        if not latest or latest[0] is not heads:
            latest[:] = heads, scorer.decoder.query(q_all[heads], relations[rels])
        return latest[1] @ q_all[start:stop].T

    M = len(q_all)
    order = np.lexsort((triples[:, 1], triples[:, 0]))  # the triples of one query side by side, mostly in one part
    with world.together():
        own = filtered_ranks(
            score, triples[order[world.part(len(order))]], kg.answers(), num_relations=kg.num_relations, batch=batch,
            num_entities=M, chunk=None if batch * M <= SCORES_AT_ONCE else max(1, SCORES_AT_ONCE // batch),
            device=q_all.device,
        )  # fmt: skip
    ranks = np.empty(len(order))
    ranks[order] = world.gather(torch.from_numpy(own).to(world.device), len(order)).cpu().numpy()
    scorer.train(training)
    is_head = triples[:, 1] >= kg.num_relations
    metrics = summarize(ranks, is_head)
    unseen = kg.unseen[triples[:, 0]] | kg.unseen[triples[:, 2]]
    if unseen.any():
        metrics["unseen"] = summarize(ranks[unseen], is_head[unseen])
    return metrics


@torch.no_grad()
def evaluate_codes(
    scorer: CodeScorer,
    relations: Tensor,
    codes: Tensor,
    kg: KnowledgeGraph,
    split: str,
    levels: int | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """``evaluate_vectors`` from the integers [M, L, Q] only; ``levels`` decodes only the first levels."""
    return evaluate_vectors(scorer, relations, scorer.entity_vectors_from_codes(codes, levels), kg, split, world)


def shuffled(codes: Tensor, seed: int) -> Tensor:
    """The control: the same codes given to the wrong entities (rows permuted)."""
    return codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed)).to(codes.device)]
