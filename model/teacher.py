"""A teacher: what trained models answer to the training queries, learned beside the true tails (distillation).

Hinton, Vinyals and Dean 2015 (arXiv 1503.02531) at temperature 1. Each query's best answers are asked for once, before
training, and kept: a step then costs no more than without a teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from data.knowledge_graph import KnowledgeGraph
from model.decoders import Decoder, JointDecoder
from model.losses import SCORES_AT_ONCE, SoftTargets
from model.relational_graph import RelationalGraph
from model.RQGCN import RQGCN, scorer_of

TOP = 64  # answers kept per query: 88 % of an FB15k-237 teacher's probability


class Trained(NamedTuple):
    """A model that can be asked: its decoder, relations [2R, D] and entity vectors [M, D]."""

    decoder: Decoder
    relations: Tensor
    entities: Tensor


@dataclass(frozen=True)
class Teacher:
    """The answers to n queries: ``entities`` int32 [n, k], their probabilities ``mass`` [n, k], 1 in sum."""

    entities: Tensor
    mass: Tensor
    weight: float  # of these answers in the loss, in [0, 1]

    def answers(self, queries: Tensor) -> SoftTargets:
        """To a batch of queries, int64 [B]."""
        entities, mass = self.entities[queries], self.mass[queries]
        rows = torch.arange(len(queries), device=queries.device).repeat_interleave(entities.shape[1])
        return SoftTargets(rows, entities.flatten().long(), mass.flatten(), self.weight)


@torch.no_grad()
def trained_model(
    config: dict[str, Any], best: dict[str, Any], kg: KnowledgeGraph, text: Tensor | None, device: torch.device | str
) -> Trained:
    """A checkpoint's best epoch: its entities from its own codes, or from z where it has none (unquantized).

    Raises KeyError, RuntimeError or ValueError where it does not fit ``kg``, ``text`` or itself.
    """
    scorer, relations = scorer_of(config, best, device)
    if best["codes"] is not None:
        entities = scorer.entity_vectors_from_codes(best["codes"].to(device))
    else:
        model = RQGCN(kg.num_entities, kg.num_relations, **config).to(device).eval()
        model.load_state_dict(best["model"])
        graph = RelationalGraph.from_triples(kg.train, kg.num_entities, kg.num_relations).to(torch.device(device))
        entities = scorer.entity_vectors(model.clean_z(graph, None if text is None else text.to(device)))
    if relations.shape[1:] != entities.shape[1:]:
        raise ValueError(f"its relations {list(relations.shape)} and entities {list(entities.shape)} differ in width")
    if len(entities) != kg.num_entities or len(relations) != 2 * kg.num_relations:
        raise ValueError(
            f"it knows {len(entities)} entities and {len(relations) // 2} relations, {kg.name} has "
            f"{kg.num_entities} and {kg.num_relations}"
        )
    return Trained(scorer.decoder, relations, entities)


@torch.no_grad()
def ask(
    models: Sequence[Trained], heads: Tensor, relations: Tensor, weight: float, top: int = TOP, batch: int | None = None
) -> Teacher:
    """The ``top`` answers of the models' mean score (the geometric mean of their probabilities) to the queries
    (heads [n], relations [n]); what the others had is shared out among them. ``batch``: queries at a time (by default
    1024, or what keeps the scores under 256 MB).
    """
    decoder = JointDecoder([model.decoder for model in models]).eval()
    of_relations = torch.cat([model.relations for model in models], dim=1)
    of_entities = torch.cat([model.entities for model in models], dim=1)
    top, batch = min(top, len(of_entities)), batch or max(1, min(1024, SCORES_AT_ONCE // len(of_entities)))
    entities = torch.empty(len(heads), top, dtype=torch.int32, device=heads.device)
    mass = torch.empty(len(heads), top, device=heads.device)
    for start in tqdm(range(0, len(heads), batch), desc="asking the teacher", leave=False, unit="batch", disable=None):
        part = slice(start, start + batch)
        query = decoder.query(of_entities[heads[part]], of_relations[relations[part]])
        found = (query @ of_entities.T).div_(len(models)).topk(top, dim=1)
        entities[part] = found.indices.int()
        mass[part] = torch.softmax(found.values, dim=1)
    return Teacher(entities, mass, weight)
