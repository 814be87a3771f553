"""1-N losses over all entities (Eq. 7): softmax cross-entropy or binary cross-entropy, targets straight from CSR."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """One pass forward and one backward over [B, M]; no dense label matrix exists."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, rows: Tensor, columns: Tensor, smoothing: float) -> Tensor:
        count = torch.bincount(rows, minlength=len(scores)).to(scores.dtype)  # true tails per query
        log_total = torch.logsumexp(scores, dim=1)
        loss = (count * log_total).sum() - (1 - smoothing) * scores[rows, columns].sum()
        if smoothing:
            loss = loss - smoothing * (count * scores.mean(dim=1)).sum()
        ctx.save_for_backward(scores, log_total, count, rows, columns)
        ctx.smoothing = smoothing
        return loss / len(rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scores, log_total, count, rows, columns = ctx.saved_tensors
        grad = scores.sub(log_total[:, None]).exp_()
        if ctx.smoothing:
            grad.sub_(ctx.smoothing / scores.shape[1])
        grad.mul_(count[:, None])
        grad.index_put_((rows, columns), grad.new_tensor(ctx.smoothing - 1), accumulate=True)
        return grad.mul_(grad_outputs[0] / len(rows)), None, None, None


def softmax_cross_entropy(scores: Tensor, targets: Targets, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the n true triples of the batch of -log softmax(scores [B, M]) at the tail; every triple counts once,
    so a query weighs as much as it has tails. ``label_smoothing``: share of the target law spread over all entities."""
    loss: Tensor = _SoftmaxCrossEntropy.apply(scores, targets.rows, targets.columns, label_smoothing)
    return loss


def binary_cross_entropy(scores: Tensor, targets: Targets, label_smoothing: float = 0.0) -> Tensor:
    """Eq. 7: mean over [B, M] of the binary cross-entropy; labels are (1 - smoothing) y + smoothing / M."""
    positive = scores[targets.rows, targets.columns].sum() / scores.numel()
    return (
        F.softplus(scores).mean()
        - (1.0 - label_smoothing) * positive
        - label_smoothing / scores.shape[1] * scores.mean()
    )


LOSSES = {"ce": softmax_cross_entropy, "bce": binary_cross_entropy}
