"""1-N losses over all entities (Eq. 7): softmax cross-entropy or binary cross-entropy, targets straight from CSR."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.precision import has_bfloat16

SCORES_AT_ONCE = 2**26  # of float32: 256 MB


class Targets(NamedTuple):
    """The true tails of a batch of queries, as coordinates: query ``rows[i]`` has the tail ``columns[i]``."""

    rows: Tensor  # int64 [n], in [0, B)
    columns: Tensor  # int64 [n], in [0, M)


def gather_targets(indptr: Tensor, targets: Tensor, queries: Tensor) -> Targets:
    """Coordinates of the tails of ``queries`` (int64 [B], positions in the CSR ``indptr [n + 1]``, ``targets``)."""
    start, count = indptr[queries], indptr[queries + 1] - indptr[queries]
    rows = torch.repeat_interleave(torch.arange(len(queries), device=queries.device), count)
    offset = torch.arange(len(rows), device=queries.device) - (count.cumsum(0) - count)[rows]
    return Targets(rows, targets[start[rows] + offset])


class SoftTargets(NamedTuple):
    """What a teacher answers to a batch: ``columns[i]`` to query ``rows[i]`` with probability ``mass[i]``."""

    rows: Tensor  # int64 [n], in [0, B)
    columns: Tensor  # int64 [n], in [0, M)
    mass: Tensor  # [n], sums to 1 over each query's rows
    weight: float  # of the teacher's answers, in [0, 1]; the rest is the true tails'


class _SoftmaxCrossEntropy(torch.autograd.Function):
    """Loss and gradients of a chunk of queries while its probabilities are at hand: three products, one softmax.

    The targets are taken from the probabilities before the products, so that these are of what is left to learn and
    rounding is a share of it; the smoothing, of rank one, never touches the [B, M] probabilities:

        P'               = P - (1 - smoothing) * mass at the targets
        d loss / d query = share (P' E - smoothing * mean E)
        d loss / d E     = P'^T (share query) - smoothing / M * sum of share query

    with mass [n] the targets' probabilities, 1 in sum for each query, and share [B] what a query weighs in the loss.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, q_all: Tensor, rows: Tensor, columns: Tensor, mass: Tensor, share: Tensor,
        smoothing: float, chunk: int,
    ) -> Tensor:  # fmt: skip
        small = _product_dtype(query)
        entities = q_all.to(small)
        d_query, d_all = torch.empty_like(query), torch.zeros_like(q_all)
        log_total, of_targets = query.new_empty(len(query)), query.new_zeros(())  # of_targets: their scores, weighted
        for start in range(0, len(query), chunk):
            part = slice(start, start + chunk)
            here = (rows >= start) & (rows < start + chunk)
            at, tails, masses = rows[here] - start, columns[here], mass[here]
            scores = query[part] @ q_all.T
            of_targets += (share[part][at] * masses * scores[at, tails]).sum()
            highest = scores.amax(1)
            probabilities = torch.softmax(scores, dim=1, out=scores)
            log_total[part] = highest - probabilities.amax(1).log()
            probabilities.index_put_((at, tails), (smoothing - 1) * masses, accumulate=True)
            left = probabilities.to(small)
            d_query[part] = left @ entities
            weighted = (query[part] * share[part, None]).to(small)
            d_all += left.T @ weighted
        d_query.mul_(share[:, None])
        loss = share @ log_total - (1 - smoothing) * of_targets
        if smoothing:
            mean, weighted_sum = q_all.mean(0), share @ query
            loss = loss - smoothing * (weighted_sum @ mean)
            d_query.sub_(smoothing * share[:, None] * mean)
            d_all.sub_(weighted_sum * (smoothing / len(q_all)))
        ctx.save_for_backward(d_query, d_all)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_query, d_all = ctx.saved_tensors
        return d_query * grad_outputs[0], d_all * grad_outputs[0], *[None] * 6


def _product_dtype(like: Tensor) -> torch.dtype:
    """bfloat16 for the products of probabilities where the precision in force allows it and the processor has it.

    Its 8 bits round what the gradients sum up: share |P'| |E| and |P'|^T |share query|, each to less than 2^-6 of
    itself (tests/test_losses.py). The loss itself is float32.
    """
    fast = like.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
    return torch.bfloat16 if fast and has_bfloat16(like.device) else like.dtype


def softmax_cross_entropy(
    query: Tensor,
    q_all: Tensor,
    targets: Targets,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
    teacher: SoftTargets | None = None,
) -> Tensor:
    """Mean over the n true triples of the batch of -log softmax(query q_all^T) at the tail, query [B, D], q_all [M, D].

    Every triple counts once, so a query weighs as much as it has tails. ``label_smoothing``: share of the target law
    spread over all entities; ``chunk``: queries at a time (by default what keeps the scores under 256 MB);
    ``teacher``: its answers take ``weight`` of each query's target law from the true tails (Hinton, Vinyals and Dean
    2015, arXiv 1503.02531, at temperature 1).
    """
    chunk = chunk or max(1, SCORES_AT_ONCE // len(q_all))
    rows, columns = targets
    count = torch.bincount(rows, minlength=len(query)).to(query.dtype)  # true tails per query
    mass, share = 1 / count[rows], count / len(rows)
    if teacher is not None:
        mass = torch.cat([(1 - teacher.weight) * mass, teacher.weight * teacher.mass.to(mass.dtype)])
        rows, columns = torch.cat([rows, teacher.rows]), torch.cat([columns, teacher.columns])
    loss: Tensor = _SoftmaxCrossEntropy.apply(query, q_all, rows, columns, mass, share, label_smoothing, chunk)
    return loss


class Sample(NamedTuple):
    """What a batch needs of the entities when the softmax is sampled; positions point into ``entities``."""

    entities: Tensor  # int64 [U], ascending: heads, true tails and the drawn entities
    heads: Tensor  # positions [B]
    targets: Targets  # their columns are positions
    drawn: Tensor  # positions [S], ascending: the set S that all queries share


def draw_sample(
    heads: Tensor, targets: Targets, num_entities: int, count: int, generator: torch.Generator | None = None
) -> Sample:
    """``count`` uniform draws (CPU ``generator``), an entity drawn twice standing once; all M where count >= M.

    ``heads`` [B] and the targets' columns are entities. Given its size, S is a uniform subset.
    """
    if count < num_entities:
        drawn = torch.randint(num_entities, (count,), generator=generator).unique().to(heads.device)
    else:
        drawn = torch.arange(num_entities, device=heads.device)
    entities, places = torch.cat([heads, targets.columns, drawn]).unique(return_inverse=True)
    of_heads, of_tails, of_drawn = places.split([len(heads), len(targets.columns), len(drawn)])
    return Sample(entities, of_heads, Targets(targets.rows, of_tails), of_drawn)


def sampled_softmax_cross_entropy(
    query: Tensor,
    q_some: Tensor,
    sample: Sample,
    num_entities: int,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """``softmax_cross_entropy`` with the sum over all M entities estimated, query [B, D], q_some [U, D] of the sample.

    With own_b the n_b true tails of query b and its head, and S the drawn set:

        Z_b = sum over own_b of exp(s) + (M - |own_b|) / |S \\ own_b| * sum over S \\ own_b of exp(s)

    an unbiased estimate of the sum over all entities, and the sum itself where S is all of them (log Z_b is low on
    average, less so the larger S). The head's term is exact because bilinear scores put it on top where it is seldom
    among the negatives. Where S holds own_b only, the second term is zero. ``label_smoothing`` spreads its
    share over S instead of over all entities, ``chunk`` bounds the scores [chunk, S] that are held at once.
    """
    B, true = len(query), sample.targets
    chunk = chunk or max(1, SCORES_AT_ONCE // len(sample.drawn))
    known = torch.bincount(true.rows[sample.heads[true.rows] == true.columns], minlength=B) > 0  # h is a tail of (h, r)
    others = (~known).nonzero().flatten()
    rows, columns = torch.cat([true.rows, others]), torch.cat([true.columns, sample.heads[others]])  # own_b
    place = torch.searchsorted(sample.drawn, columns).clamp_max_(len(sample.drawn) - 1)
    hit = sample.drawn[place] == columns
    hits = Targets(rows[hit], place[hit])  # drawn entities that are in own_b
    negatives = q_some.index_select(0, sample.drawn)
    parts = []
    for start in range(0, B, chunk):
        here = (hits.rows >= start) & (hits.rows < start + chunk)
        inputs = (query[start : start + chunk], negatives, hits.rows[here] - start, hits.columns[here])
        parts.append(_log_total(*inputs) if chunk >= B else checkpoint(_log_total, *inputs, use_reentrant=False))
    free = len(sample.drawn) - torch.bincount(hits.rows, minlength=B)
    scale = (num_entities - torch.bincount(rows, minlength=B)).clamp_min(1).to(query.dtype) / free.clamp_min(1)
    log_negative = torch.cat(parts) + scale.log()
    own = (query.index_select(0, rows) * q_some.index_select(0, columns)).sum(1)
    highest = log_negative.detach().scatter_reduce(0, rows, own.detach(), "amax")
    total = (log_negative - highest).exp().index_add(0, rows, (own - highest[rows]).exp())
    n = len(true.rows)
    weight = torch.bincount(true.rows, minlength=B).to(query.dtype)
    loss = weight @ (highest + total.log()) - (1 - label_smoothing) * own[:n].sum()
    return (loss - label_smoothing * ((weight @ query) @ negatives.mean(0))) / n


def _log_total(query: Tensor, negatives: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B]: log of the sum of exp(query negatives^T) over all columns but the coordinates (rows, columns)."""
    scores = query @ negatives.T
    scores[rows, columns] = torch.finfo(scores.dtype).min / 2  # not -inf: a row of nothing else has a gradient, zero
    return scores.logsumexp(1)


def binary_cross_entropy(query: Tensor, q_all: Tensor, targets: Targets, label_smoothing: float = 0.0) -> Tensor:
    """Eq. 7: mean over the scores query q_all^T [B, M] of the binary cross-entropy, query [B, D], q_all [M, D].

    Labels are (1 - smoothing) y + smoothing / M.
    """
    scores = query @ q_all.T
    positive = scores[targets.rows, targets.columns].sum() / scores.numel()
    return (
        F.softplus(scores).mean()
        - (1.0 - label_smoothing) * positive
        - label_smoothing / scores.shape[1] * scores.mean()
    )


LOSSES = {"ce": softmax_cross_entropy, "bce": binary_cross_entropy}
