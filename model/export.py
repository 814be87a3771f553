"""Candidate lists of stage 1 for link prediction by an LLM: the best entities of each query, by the codes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from Class.candidates import Candidates
from data.knowledge_graph import KnowledgeGraph, with_inverse
from model.ranking import rank_scores

if TYPE_CHECKING:
    from model.RQGCN import CodeScorer


def top_candidates(
    scorer: CodeScorer,
    relations: torch.Tensor,
    codes: torch.Tensor,
    kg: KnowledgeGraph,
    split: str,
    count: int = 20,
    filter_splits: Sequence[str] = ("train", "valid"),
    batch: int = 512,
) -> Candidates:
    """The ``count`` best entities of every query of ``split``, tails and heads, from the integers [M, L, Q] alone.

    Rows follow ``with_inverse(kg.split(split))``: [2n], tail queries first. A query's other answers known from
    ``filter_splits`` are left out of its list, its own truth never; equal scores go by the lower id. ``rank``: the
    truth's place among all entities, filtered by all splits, ties at their mean. Raises ValueError for NaN scores.
    """
    with torch.no_grad():
        training = scorer.training
        scorer.eval()
        q_all = scorer.entity_vectors_from_codes(codes)
        found = top_of_scores(
            lambda h, r: scorer.scores(q_all[h], relations[r], q_all),
            kg,
            split,
            count,
            filter_splits,
            batch,
            q_all.device,
        )
        scorer.train(training)
    return found


def top_of_scores(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    kg: KnowledgeGraph,
    split: str,
    count: int,
    filter_splits: Sequence[str],
    batch: int,
    device: str | torch.device,
) -> Candidates:
    """``top_candidates`` of any ``score(heads [B], relations [B]) -> [B, M]``."""
    R, M = kg.num_relations, kg.num_entities
    triples = with_inverse(kg.split(split), R)
    some, everything = kg.answers(*filter_splits), kg.answers()
    queries, query_of = np.unique(triples[:, 0] * (2 * R) + triples[:, 1], return_inverse=True)
    order = np.argsort(query_of, kind="stable")
    first = np.searchsorted(query_of[order], np.arange(len(queries) + 1))
    C = min(count, M)
    ids, scores = np.full((len(triples), C), -1), np.full((len(triples), C), np.nan)
    ranks = np.empty(len(triples))
    least = torch.iinfo(torch.int64).min
    for start in range(0, len(queries), batch):
        h, r = np.divmod(queries[start : start + batch], 2 * R)
        values = score(torch.from_numpy(h).to(device), torch.from_numpy(r).to(device)).float() + 0.0  # no -0.0
        members = order[first[start] : first[start + len(h)]]
        rows, truth = (torch.from_numpy(x).to(device) for x in (query_of[members] - start, triples[members, 2]))
        known = [torch.from_numpy(x).to(device) for x in everything.of(h, r)]
        ranks[members] = rank_scores(values, truth, (known[0], known[1]), rows).cpu().numpy()
        # integers that order by score, then by lower id: the bits of a float32 order like its value, once those of
        # negative numbers are inverted
        bits = values.view(torch.int32)
        bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
        keys = (bits << 32) + (M - 1 - torch.arange(M, device=device))
        own = keys[rows, truth]
        indptr, drop = (torch.from_numpy(x).to(device) for x in some.of(h, r))
        keys[torch.repeat_interleave(indptr.diff()), drop] = least
        best = keys.topk(C, dim=1).values[rows]  # (N, C): per triple, whose truth may have been dropped with the others
        own = torch.where((best == own[:, None]).any(1), least, own)
        best = torch.cat([best, own[:, None]], dim=1).topk(C, dim=1).values
        listed = torch.where(best == least, -1, M - 1 - (best & 0xFFFFFFFF))
        ids[members] = listed.cpu().numpy()
        found = values[rows[:, None], listed.clamp(min=0)].double()
        scores[members] = found.masked_fill(listed < 0, torch.nan).cpu().numpy()
    info = {"dataset": kg.name, "split": split, "filter": list(filter_splits), "count": C}
    return Candidates(triples[:, :2].copy(), triples[:, 2].copy(), ids, scores, ranks, info)
