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
        batch, num_entities = scores.shape
        share = (1.0 - smoothing) / torch.bincount(rows, minlength=batch).to(scores.dtype)[rows]
        log_total = torch.logsumexp(scores, dim=1)
        loss = log_total.mean() - (scores[rows, columns] * share).sum() / batch
        if smoothing:
            loss = loss - smoothing * scores.mean()
        ctx.save_for_backward(scores, log_total, rows, columns, share)
        ctx.smoothing = smoothing
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scores, log_total, rows, columns, share = ctx.saved_tensors
        batch, num_entities = scores.shape
        grad = scores.sub(log_total[:, None]).exp_()
        if ctx.smoothing:
            grad.sub_(ctx.smoothing / num_entities)
        grad.index_put_((rows, columns), -share, accumulate=True)
        return grad.mul_(grad_outputs[0] / batch), None, None, None


def softmax_cross_entropy(scores: Tensor, targets: Targets, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the B queries of the cross-entropy between softmax(scores [B, M]) and the uniform law on a query's
    true tails, mixed with ``label_smoothing`` of the uniform law on all entities. Every query needs a tail."""
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
