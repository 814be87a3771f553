"""Codes of entities that arrive after training by one pass of the graph encoder, which a run with --mask_inputs trained
to represent an entity by its neighbours and text.

A new entity receives messages from known neighbours and sends none: known entities keep their vectors, and batch norms
the statistics of the known entities, so that the codes of an entity depend on its own triples only. All is float64.

Frozen codes train on after the encoder. Where z of the known entities no longer has their codes, z is not compared with
the codebooks, but with the mean of what the known entities of a code leave for its level: the codebooks of k-means.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from data.knowledge_graph import KnowledgeGraph
from model.CompGCN import CompGCNLayer
from model.fold_in import Support
from model.relational_graph import RelationalGraph
from model.RQGCN import RQGCN


class GraphEncoder:
    """The encoder of ``model`` over ``kg``, whose entities have ``codes`` [M, L, Q] and ``text`` [M, T] (or None)."""

    @torch.no_grad()
    def __init__(self, model: RQGCN, codes: Tensor, kg: KnowledgeGraph, text: Tensor | None = None) -> None:
        self.model = model = copy.deepcopy(model).double().eval()
        graph = RelationalGraph.from_triples(kg.train, kg.num_entities, kg.num_relations)
        text = None if text is None else text.double()
        z = _fix_norms(model, lambda: model.encode(graph, text).z)
        book = model.rq_codebook
        choices = (
            [book.codes_of_level(q) for q in range(book.num_quantizers)],
            _means_of_codes(z, codes, book.num_codes),
        )
        same = [float((_nearest(z, levels) == codes).float().mean()) for levels in choices]
        self.levels, self.same_codes = choices[same[1] > same[0]], max(same)  # and how many known codes it finds again
        ends = (np.bincount(kg.train[:, column], minlength=kg.num_entities) for column in (0, 2))
        self.as_head, self.as_tail = (torch.from_numpy(count).double() for count in ends)
        x, v = model.start(model.entity_embedding, text), model.relation_embedding
        self.x, self.v = [], []  # what each layer reads of the known entities and the relations
        for layer in model.encoder.layers:
            self.x.append(x)
            self.v.append(v)
            x, v = layer(x, v, graph)

    def encode(self, support: Support) -> Tensor:
        """Codes int64 [N, L, Q] of new entities, not yet distinct from others; their texts, where the model has texts
        as inputs."""
        return _nearest(self.vectors(support), self.levels)

    @torch.no_grad()
    def vectors(self, support: Support) -> Tensor:
        """z [N, L, code_dim]."""
        model, R = self.model, len(self.v[0]) // 2
        N, outgoing = support.size, support.relation < R
        received = torch.where(outgoing, support.relation + R, support.relation - R)
        place = 2 * support.entity + outgoing  # in-neighbours and out-neighbours of an entity, as in RelationalGraph
        own = torch.bincount(place, minlength=2 * N)[place].double()
        other = torch.where(outgoing, self.as_tail[support.known], self.as_head[support.known]) + 1  # with this edge
        weight = (own * other).rsqrt()[:, None]
        learned = torch.zeros(N, model.entity_embedding.shape[1], dtype=torch.float64)
        e = model.start(learned, None if support.text is None else support.text.double())
        for layer, x, v in zip(model.encoder.layers, self.x, self.v, strict=True):
            assert isinstance(layer, CompGCNLayer)
            known, relation = x[support.known], v[received]
            message = known * relation if layer.composition == "mult" else known - relation
            sums = torch.zeros(2 * N, x.shape[1], dtype=torch.float64).index_add_(0, place, weight * message)
            e = layer.combine(e, sums.view(N, -1))
        return model.expand(e)


def _nearest(z: Tensor, levels: list[Tensor]) -> Tensor:
    """Codes int64 [N, L, Q] of z [N, L, code_dim], level by level the nearest."""
    rest, codes = z.flatten(0, 1), []
    for means in levels:
        codes.append(torch.cdist(rest, means, compute_mode="donot_use_mm_for_euclid_dist").argmin(1))
        rest = rest - means[codes[-1]]
    return torch.stack(codes, dim=1).view(*z.shape[:2], -1)


def _fix_norms(model: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """``run`` the model, and keep the statistics that its batch norms had for all later calls. Returns what it gave."""

    def keep(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        norm.running_mean, norm.running_var = inputs[0].mean(0), inputs[0].var(0, unbiased=False)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    hooks = [norm.register_forward_pre_hook(keep) for norm in norms]
    found = run()
    for hook in hooks:
        hook.remove()
    return found


def _means_of_codes(z: Tensor, codes: Tensor, K: int) -> list[Tensor]:
    """[K, code_dim] for each level: the mean of what the codes before leave of z [M, L, code_dim], over the positions
    that have a code; infinite for a code that none has."""
    rest, found = z.flatten(0, 1), []
    for column in codes.flatten(0, 1).T:
        count = torch.bincount(column, minlength=K).to(rest)
        means = torch.zeros(K, rest.shape[1], dtype=rest.dtype).index_add_(0, column, rest) / count[:, None]
        rest = rest - means[column]
        found.append(means.nan_to_num(torch.inf))
    return found
