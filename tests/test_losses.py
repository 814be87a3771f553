"""The 1-N losses against torch's dense ones, the gathering of targets against a loop."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.losses import LOSSES, Targets, binary_cross_entropy, gather_targets, softmax_cross_entropy

B, M = 6, 11


def batch(seed: int = 0) -> tuple[Tensor, Targets, Tensor]:
    """Scores [B, M] in float64, true tails (1 to 4 a query), dense labels [B, M]."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(B, M, generator=generator, dtype=torch.float64) * 3
    labels = torch.zeros(B, M, dtype=torch.float64)
    for row in range(B):
        labels[row, torch.randperm(M, generator=generator)[: 1 + row % 4]] = 1
    rows, columns = labels.nonzero(as_tuple=True)
    return scores, Targets(rows, columns), labels


def value_and_gradient(loss: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(loss, scores)
    return loss.detach(), gradient


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_softmax_cross_entropy_is_torch_with_a_row_per_triple(smoothing: float) -> None:
    scores, targets, _ = batch()
    scores.requires_grad_()
    dense = F.cross_entropy(scores[targets.rows], targets.columns, label_smoothing=smoothing)
    expected = value_and_gradient(dense, scores)
    found = value_and_gradient(softmax_cross_entropy(scores, targets, smoothing), scores)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_binary_cross_entropy_is_torch_with_dense_labels(smoothing: float) -> None:
    scores, targets, labels = batch()
    scores.requires_grad_()
    smooth = (1 - smoothing) * labels + smoothing / M
    expected = value_and_gradient(F.binary_cross_entropy_with_logits(scores, smooth), scores)
    found = value_and_gradient(binary_cross_entropy(scores, targets, smoothing), scores)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradients_by_finite_differences(name: str, smoothing: float) -> None:
    scores, targets, _ = batch(1)
    loss = partial(LOSSES[name], targets=targets, label_smoothing=smoothing)
    assert torch.autograd.gradcheck(lambda s: 3.0 * loss(s), scores.requires_grad_())


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_extreme_scores_stay_finite(name: str) -> None:
    _, targets, labels = batch()
    scores = (1e4 * (2 * labels - 1)).float().requires_grad_()  # a perfect model
    loss, gradient = value_and_gradient(LOSSES[name](scores, targets, 0.0), scores)
    assert float(loss) < 1.5  # ce: log of the number of tails at most
    assert bool(gradient.isfinite().all())
    worst = (-scores.detach()).requires_grad_()
    assert 1e3 < float(LOSSES[name](worst, targets, 0.0).detach()) < 1e5


def test_gather_targets_equals_a_loop() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 5, size=20)  # queries without tails among them
    assert (sizes == 0).any()
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    tails = rng.integers(0, 99, size=indptr[-1])
    queries = rng.permutation(20)[:13]
    expected = [(row, tails[i]) for row, query in enumerate(queries) for i in range(indptr[query], indptr[query + 1])]
    found = gather_targets(torch.from_numpy(indptr), torch.from_numpy(tails), torch.from_numpy(queries))
    assert list(zip(found.rows.tolist(), found.columns.tolist(), strict=True)) == expected
