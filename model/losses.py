"""1-N losses: every query (h, r) is scored against all entities (Eq. 7).

``LOSSES`` lists them by name. A new loss is a function of (query [B, D], q_all [M, D], targets, label_smoothing) with
a line in ``LOSSES`` that says what its mean runs over. That keeps it correct when several processes share a batch.

Gradients pass through ``index_select`` and products only: the backward of ``x[i]`` adds in an order that depends on the
threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.decoders import Decoder
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


class _SoftmaxCrossEntropy(torch.autograd.Function):
    """Loss and gradients of a chunk of queries while its probabilities are in memory: three products, one softmax.

    With n_b the number of true tails of query b, n their sum, and s the smoothing:

        P'               = P - (1 - s) / n_b at the true tails
        d loss / d query = n_b / n (P' E - s * mean E)
        d loss / d E     = P'^T (n_b / n query) - s / M * sum of n_b / n query

    The true tails are subtracted before the products, so that rounding is relative to what is left to learn. The
    smoothing is of rank one and never touches the [B, M] probabilities.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, q_all: Tensor, rows: Tensor, columns: Tensor, smoothing: float, chunk: int
    ) -> Tensor:
        count = torch.bincount(rows, minlength=len(query)).to(query.dtype)  # n_b (B)
        share = count / len(rows)  # n_b / n (B)
        small = _product_dtype(query)
        entities = q_all.to(small)
        d_query, d_all = torch.empty_like(query), torch.zeros_like(q_all)
        log_total, tail_scores = query.new_empty(len(query)), query.new_zeros(())
        for start in range(0, len(query), chunk):
            part = slice(start, start + chunk)
            here = (rows >= start) & (rows < start + chunk)
            at, tails = rows[here] - start, columns[here]
            scores = query[part] @ q_all.T  # (chunk, M)
            tail_scores += scores[at, tails].sum()
            highest = scores.amax(1)
            probabilities = torch.softmax(scores, dim=1, out=scores)
            log_total[part] = highest - probabilities.amax(1).log()
            probabilities.index_put_((at, tails), (smoothing - 1) * (1 / count[part][at]), accumulate=True)
            left = probabilities.to(small)
            d_query[part] = left @ entities
            weighted = (query[part] * share[part, None]).to(small)
            d_all += left.T @ weighted
        d_query.mul_(share[:, None])
        loss = share @ log_total - (1 - smoothing) * tail_scores / len(rows)
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
        return d_query * grad_outputs[0], d_all * grad_outputs[0], *[None] * 4


def _product_dtype(like: Tensor) -> torch.dtype:
    """bfloat16 for the products of probabilities, if the precision in force allows it and the processor supports it.

    Its 8 bits change a gradient by less than 2^-6 of |P'| |E|, or of |P'|^T |query| (tests/test_losses.py). The loss
    itself is float32.
    """
    fast = like.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
    return torch.bfloat16 if fast and has_bfloat16(like.device) else like.dtype


def softmax_cross_entropy(
    query: Tensor, q_all: Tensor, targets: Targets, label_smoothing: float = 0.0, chunk: int | None = None
) -> Tensor:
    """Mean over the n true triples of the batch of -log softmax(query q_all^T) at the tail, query [B, D], q_all [M, D].

    Every triple has the same weight, so a query with many tails weighs more. ``label_smoothing``: probability that the
    target distribution spreads over all entities. ``chunk``: queries at a time (default: what keeps the scores under
    256 MB).
    """
    chunk = chunk or max(1, SCORES_AT_ONCE // len(q_all))
    loss: Tensor = _SoftmaxCrossEntropy.apply(query, q_all, *targets, label_smoothing, chunk)
    return loss


class Sample(NamedTuple):
    """The entities that a batch needs with sampled negatives; positions point into ``entities``."""

    entities: Tensor  # int64 [U], ascending: heads, true tails and the drawn entities
    heads: Tensor  # positions [B]
    targets: Targets  # their columns are positions
    drawn: Tensor  # positions [S], ascending: the set S that all queries share


def draw_sample(
    heads: Tensor, targets: Targets, num_entities: int, count: int, generator: torch.Generator | None = None
) -> Sample:
    """``count`` uniform draws (CPU ``generator``), repeats removed; all M entities where count >= M.

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
    """``softmax_cross_entropy`` with an estimate of the sum over all M entities; query [B, D], q_some [U, D].

    own_b is the set of the n_b true tails of query b and its head; S is the drawn set:

        Z_b = sum over own_b of exp(s) + (M - |own_b|) / |S \\ own_b| * sum over S \\ own_b of exp(s)

    This is an unbiased estimate of the sum over all entities, and exact where S is all of them (log Z_b is too low on
    average, less so for larger S). The head is in own_b because bilinear scores often rank it first, and it is seldom
    among the negatives. Where S lies in own_b, the second term is zero. ``label_smoothing`` is spread over S instead
    of all entities; ``chunk`` bounds the scores [chunk, S] in memory.
    """
    B, true = len(query), sample.targets
    chunk = chunk or max(1, SCORES_AT_ONCE // len(sample.drawn))
    known = torch.bincount(true.rows[sample.heads[true.rows] == true.columns], minlength=B) > 0  # h is a tail of (h, r)
    others = (~known).nonzero().flatten()
    rows, columns = torch.cat([true.rows, others]), torch.cat([true.columns, sample.heads[others]])  # own_b
    place = torch.searchsorted(sample.drawn, columns).clamp_max_(len(sample.drawn) - 1)
    hit = sample.drawn[place] == columns
    hits = Targets(rows[hit], place[hit])  # drawn entities that are in own_b
    negatives = q_some.index_select(0, sample.drawn)  # (S, D)
    parts = []
    for start in range(0, B, chunk):
        here = (hits.rows >= start) & (hits.rows < start + chunk)
        inputs = (query[start : start + chunk], negatives, hits.rows[here] - start, hits.columns[here])
        parts.append(_log_total(*inputs) if chunk >= B else checkpoint(_log_total, *inputs, use_reentrant=False))
    free = len(sample.drawn) - torch.bincount(hits.rows, minlength=B)  # |S \ own_b| (B)
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
    """[B]: log of the sum of exp(query negatives^T) over all columns except the coordinates (rows, columns)."""
    scores = query @ negatives.T
    scores[rows, columns] = torch.finfo(scores.dtype).min / 2  # not -inf: a row without other columns has gradient 0
    return scores.logsumexp(1)


def binary_cross_entropy(query: Tensor, q_all: Tensor, targets: Targets, label_smoothing: float = 0.0) -> Tensor:
    """Eq. 7: mean over the scores query q_all^T [B, M] of the binary cross-entropy, query [B, D], q_all [M, D].

    Labels are (1 - smoothing) y + smoothing / M.
    """
    scores = query @ q_all.T
    at = targets.rows * scores.shape[1] + targets.columns
    positive = scores.flatten().index_select(0, at).sum() / scores.numel()
    return (
        F.softplus(scores).mean()
        - (1.0 - label_smoothing) * positive
        - label_smoothing / scores.shape[1] * scores.mean()
    )


def nuclear_3_norm(decoder: Decoder, q_head: Tensor, relations: Tensor, q_all: Tensor, targets: Targets) -> Tensor:
    """Mean over the n true triples of |h|^3 + |r|^3 + |t|^3 (N3; Lacroix et al., ICML 2018, arXiv 1806.07297).

    q_head and relations [B, D] of the queries; the targets' columns are rows of q_all.
    """
    count = torch.bincount(targets.rows, minlength=len(q_head)).to(q_head.dtype)
    of_queries = count @ (decoder.cubed_norm(q_head) + decoder.cubed_norm(relations))
    of_tails = decoder.cubed_norm(q_all.index_select(0, targets.columns)).sum()
    return (of_queries + of_tails) / len(targets.rows)


@dataclass(frozen=True)
class Loss:
    """An entry of ``LOSSES``: call it with query [B, D], q_all [M, D], targets, label_smoothing."""

    function: Callable[..., Tensor]
    averages_over: str  # "triples": a mean over true triples; "queries": a mean in which each query weighs the same
    sampled: Callable[..., Tensor] | None = None  # its form with sampled negatives (--num_negatives), if there is one

    def __call__(self, query: Tensor, q_all: Tensor, targets: Targets, label_smoothing: float = 0.0) -> Tensor:
        return self.function(query, q_all, targets, label_smoothing)

    def share(self, tails: Tensor, own_tails: Tensor) -> float:
        """Weight of one process's loss in the loss of the whole batch; the weights of all processes sum to 1.

        ``tails`` [B]: number of true tails of each query; ``own_tails``: the same of this process's queries.
        """
        if self.averages_over == "queries":
            return len(own_tails) / len(tails)
        return int(own_tails.sum()) / int(tails.sum())


LOSSES = {
    "ce": Loss(softmax_cross_entropy, "triples", sampled_softmax_cross_entropy),
    "bce": Loss(binary_cross_entropy, "queries"),
}
