"""Fold-in: codes of entities that arrive after training, from some of their triples; nothing that was trained changes.

The vector z of a new entity minimizes the softmax loss of stage 1, with all else frozen. Its parts: the support triples
(e, r, t) as queries of e, the same triples with e as the answer, and e as a wrong answer of training queries (h, r).

    sum over support   softplus(log sum over t' of exp s(e, r, t') - s(e, r, t))       t': sampled known entities
    sum over support   softplus(log sum over e' of exp s(t, r^-1, e') - s(t, r^-1, e))       e': known, no true answers
    sum over training  softplus(s(h, r, e) - log sum over t' of exp s(h, r, t'))          estimated from a sample
    prior(n) / 2 * |z - mean|^2 / variance                                                    n: support triples

``mean``: of the known entities that share a pair (r, t) with e (ERAvg, Albooyeh et al. 2020, arXiv 2006.12365), and,
where there are texts, of those nearest by text, which count as TEXT_PAIRS pairs; scaled to the mean length of known
entities' vectors. Without a triple, z is that mean. All terms are convex in z for decoders that are linear in it
(distmult, complex). Then codes are chosen level by level: of the CANDIDATES nearest ones the one with the least loss.

Sums are float64 and no draw depends on the batch, so an entity gets the same codes alone and in a batch.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.knowledge_graph import KnowledgeGraph, with_inverse
from model.entity_inputs import nearest_by_text
from model.RQGCN import CodeScorer

PRIOR, PRIOR_OF_FEW = 0.1, 0.9  # prior(n) = PRIOR + PRIOR_OF_FEW / n for n support triples (docs/NEW_ENTITIES.md)
TEXT_PAIRS = 2.0  # what the mean of the nearest by text weighs beside the means of pairs
STEPS, RATE = 40, 0.1  # of Adagrad
SAMPLED = 512  # known entities that a query of a new entity is compared with
WRONG = 2048  # training queries that a new entity is a wrong answer of
CANDIDATES = 32  # codes per choice
SCORES_AT_ONCE = 2**24


class Support(NamedTuple):
    """What is known of N new entities: edges, (entity[i], relation[i], known[i]) is true, and texts."""

    entity: Tensor  # int64 [n], ascending, 0..N-1
    relation: Tensor  # int64 [n], 0..2R-1
    known: Tensor  # int64 [n], ids of entities that have codes
    size: int  # N
    text: Tensor | None = None  # [N, T]; a row of NaN: no text. An entity has an edge or a text

    def counts(self) -> Tensor:
        """Edges of each entity, float64 [N]."""
        return torch.bincount(self.entity, minlength=self.size).double()


class FoldIn:
    """The frozen scorer, relations [2R, D] and codes [M, L, Q] of the entities of ``kg``; their texts [M, T], needed
    where new entities have some."""

    def __init__(
        self, scorer: CodeScorer, relations: Tensor, codes: Tensor, kg: KnowledgeGraph,
        text: Tensor | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.scorer = copy.deepcopy(scorer).double().eval().requires_grad_(False)
        self.relations, self.answers, self.R = relations.detach().double(), kg.answers("train"), kg.num_relations
        self.codebook, self.codes, self.text = self.scorer.rq_codebook, codes, text
        self.known = self.codebook.decode_from_codes(codes)  # (M, L, code_dim); ``add`` appends to it
        self.q_known = self.q_train = self.scorer.entity_vectors(self.known)  # (M, D)
        self.variance, self.length = self.known.var(0).mean(), self.known.flatten(1).norm(dim=1).mean()
        rng = np.random.default_rng(seed)
        self.samples = [torch.from_numpy(rng.permutation(len(codes))[:SAMPLED]) for _ in range(STEPS + 1)]
        edges = with_inverse(kg.train, self.R)
        drawn = torch.from_numpy(edges[np.sort(rng.permutation(len(edges))[:WRONG])])
        self.wrong_query = self.query(drawn[:, 0], drawn[:, 1])  # (W, D)
        self.wrong_total = self.totals(self.wrong_query)
        # for an entity with the mean number of edges 2E / M, all 2E queries count; for others in proportion to theirs
        self.wrong_weight = len(codes) / len(drawn)

    def totals(self, query: Tensor) -> Tensor:
        """Log-sum-exp over the known entities of the scores of queries [B, D] -> [B]."""
        return torch.cat(
            [(part @ self.q_train.T).logsumexp(1) for part in query.split(max(1, SCORES_AT_ONCE // len(self.q_train)))]
        )

    def query(self, heads: Tensor, relations: Tensor) -> Tensor:
        """Query vectors [B, D] of entities with codes."""
        return self.scorer.decoder.query(self.q_known.index_select(0, heads), self.relations.index_select(0, relations))

    def inverse(self, relation: Tensor) -> Tensor:
        """The relation of the other direction."""
        return torch.where(relation < self.R, relation + self.R, relation - self.R)

    def mean_of_pairs(self, support: Support) -> Tensor:
        """ERAvg [N, L, code_dim]: the mean over an entity's pairs (r, t) of the mean of the known entities that have
        the pair too; a pair that nobody has counts as the mean of all entities. Zero for an entity without edges."""
        ends = torch.stack([support.known, self.inverse(support.relation)])
        pairs, place = ends.unique(dim=1, return_inverse=True)
        indptr, tails = self.answers.of(*pairs.numpy())
        flat = self.known.flatten(1)
        of_pair = F.embedding_bag(torch.from_numpy(tails), flat, torch.from_numpy(indptr[:-1]), mode="mean")
        of_pair[torch.from_numpy(np.diff(indptr) == 0)] = flat[: len(self.q_train)].mean(0)
        sums = torch.zeros(support.size, flat.shape[1], dtype=flat.dtype)
        sums.index_add_(0, support.entity, of_pair[place])
        return (sums / support.counts().clamp_min(1)[:, None]).view(-1, *self.known.shape[1:])

    def mean_by_text(self, text: Tensor) -> Tensor:
        """[N, L, code_dim]: the weighted mean of the known entities nearest to text [N, T]."""
        if self.text is None:
            raise ValueError("new entities have texts, but those of the known ones are not given")
        near = nearest_by_text(self.text.double(), new=text.double())
        return near.mean(self.known[: len(self.text)].flatten(1)).view(-1, *self.known.shape[1:])

    def center(self, support: Support) -> Tensor:
        """[N, L, code_dim]: where z starts, and the mean of its prior. A mean of vectors is shorter than they are, and
        an entity with a short vector is seldom an answer: the center has the mean length of known entities."""
        mean = self.mean_of_pairs(support)
        if support.text is not None and not support.text.isnan().any(1).all():
            rows = ~support.text.isnan().any(1)
            part = TEXT_PAIRS / (support.counts()[rows] + TEXT_PAIRS)
            mean[rows] = torch.lerp(mean[rows], self.mean_by_text(support.text[rows]), part[:, None, None])
        return mean * (self.length / mean.flatten(1).norm(dim=1).clamp_min(1e-9))[:, None, None]

    def encode(self, support: Support) -> Tensor:
        """Codes int64 [N, L, Q] of new entities, not yet distinct from others."""
        if not len(support.entity):
            return self.codebook.cal_codes(self.center(support))
        problem = Problem(self, support)
        return self.quantize(self.solve(problem), problem)

    def add(self, codes: Tensor) -> None:
        """Codes [N, L, Q] of all new entities, which may be neighbours from now on: their ids follow the known ones."""
        M = len(self.q_train)
        self.known = torch.cat([self.known[:M], self.codebook.decode_from_codes(codes)])
        self.q_known = self.scorer.entity_vectors(self.known)

    def solve(self, problem: Problem) -> Tensor:
        """z [N, L, code_dim] of least loss."""
        z = problem.mean.clone().requires_grad_()
        optimizer = torch.optim.Adagrad([z], lr=RATE)
        for sample in self.samples[:STEPS]:
            optimizer.zero_grad()
            problem.losses(z, sample).sum().backward()
            optimizer.step()
        return z.detach()

    @torch.no_grad()
    def quantize(self, z: Tensor, problem: Problem) -> Tensor:
        """Codes int64 [N, L, Q] of z: the nearest ones, then level by level and position by position the one of least
        loss among the candidates nearest to what the other levels leave of z."""
        codes = self.codebook.cal_codes(z)
        z_q = self.codebook.decode_from_codes(codes)
        for level in range(self.codebook.num_quantizers):
            book = self.codebook.codes_of_level(level)
            for position in range(z.shape[1]):
                rest = z_q[:, position] - book[codes[:, position, level]]
                near = torch.cdist(z[:, position] - rest, book).topk(min(CANDIDATES, len(book)), largest=False).indices
                losses = []
                for choice in near.T:
                    z_q[:, position] = rest + book[choice]
                    losses.append(problem.losses(z_q, self.samples[-1]))
                best = near.gather(1, torch.stack(losses).argmin(0)[:, None])[:, 0]
                codes[:, position, level] = best
                z_q[:, position] = rest + book[best]
        return codes


class Problem:
    """The loss of a batch of new entities, with all that does not depend on z."""

    @torch.no_grad()
    def __init__(self, model: FoldIn, support: Support) -> None:
        self.model, self.support, self.mean = model, support, model.center(support)
        keys = torch.stack([support.entity, support.relation])
        self.out_pairs, self.row = keys.unique(dim=1, return_inverse=True)
        ends = torch.stack([support.known, model.inverse(support.relation)])
        pairs, place = ends.unique(dim=1, return_inverse=True)
        of_pairs = model.query(*pairs)
        self.in_query, self.in_total = of_pairs[place], model.totals(of_pairs)[place]
        self.counts = support.counts()
        self.prior = (PRIOR + PRIOR_OF_FEW / self.counts.clamp_min(1)) / (2 * model.variance)

    def losses(self, z: Tensor, sample: Tensor) -> Tensor:
        """The loss of each new entity [N] from z [N, L, code_dim]; ``sample``: the known entities that are t'."""
        m, s, q = self.model, self.support, self.model.scorer.entity_vectors(z)
        heads, relations = self.out_pairs
        query = m.scorer.decoder.query(q.index_select(0, heads), m.relations.index_select(0, relations))
        scores = query @ m.q_train[sample].T
        place = torch.full((len(m.q_known),), -1)
        place[sample] = torch.arange(len(sample))
        hit = place[s.known] >= 0
        hidden = torch.zeros(scores.shape, dtype=torch.bool)
        hidden[self.row[hit], place[s.known[hit]]] = True  # an entity's true answers are no wrong ones
        total = scores.masked_fill(hidden, -1e30).logsumexp(1) + np.log(len(m.q_train) / len(sample))
        own = (query.index_select(0, self.row) * m.q_known.index_select(0, s.known)).sum(1)
        out = F.softplus(total.index_select(0, self.row) - own)
        into = F.softplus(self.in_total - (self.in_query * q.index_select(0, s.entity)).sum(1))
        wrong = F.softplus(q @ m.wrong_query.T - m.wrong_total).sum(1)
        prior = self.prior * (z - self.mean).square().sum((1, 2))
        return (m.wrong_weight * self.counts * wrong + prior).index_add(0, s.entity, out + into)
