"""The 1-N losses against torch's dense ones; their weights over several processes; targets from CSR."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import losses
from model.losses import LOSSES, Targets, binary_cross_entropy, gather_targets, softmax_cross_entropy
from model.precision import matmul_precision

B, M, D = 6, 11, 4


class Batch(NamedTuple):
    """query [B, D] and q_all [M, D] in float64, true tails (1 to 4 a query), dense labels [B, M]."""

    query: Tensor
    q_all: Tensor
    targets: Targets
    labels: Tensor

    def value_and_gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss, (self.query, self.q_all))


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    query, q_all = (torch.randn(n, D, generator=generator, dtype=torch.float64).requires_grad_() for n in (B, M))
    labels = torch.zeros(B, M, dtype=torch.float64)
    for row in range(B):
        labels[row, torch.randperm(M, generator=generator)[: 1 + row % 4]] = 1
    rows, columns = labels.nonzero(as_tuple=True)
    return Batch(query, q_all, Targets(rows, columns), labels)


@pytest.mark.parametrize("chunk", [None, 1, 4, B])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_softmax_cross_entropy_is_torch_with_a_row_per_triple(smoothing: float, chunk: int | None) -> None:
    data = batch()
    rows, columns = data.targets
    dense = F.cross_entropy((data.query @ data.q_all.T)[rows], columns, label_smoothing=smoothing)
    expected = data.value_and_gradients(dense)
    found = data.value_and_gradients(softmax_cross_entropy(*data[:3], smoothing, chunk))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_binary_cross_entropy_is_torch_with_dense_labels(smoothing: float) -> None:
    data = batch()
    smooth = (1 - smoothing) * data.labels + smoothing / M
    expected = data.value_and_gradients(F.binary_cross_entropy_with_logits(data.query @ data.q_all.T, smooth))
    found = data.value_and_gradients(binary_cross_entropy(*data[:3], smoothing))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradients_by_finite_differences(name: str, smoothing: float) -> None:
    query, q_all, targets, _ = batch(1)
    assert torch.autograd.gradcheck(lambda q, e: 3.0 * LOSSES[name](q, e, targets, smoothing), (query, q_all))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_extreme_scores_stay_finite(name: str) -> None:
    targets, labels = batch()[2:]
    query = (1e4 * (2 * labels - 1)).float().requires_grad_()  # scores of a perfect model, entities being unit vectors
    loss = LOSSES[name](query, torch.eye(M), targets, 0.0)
    (gradient,) = torch.autograd.grad(loss, query)
    assert float(loss.detach()) < 1.5  # ce: log of the number of tails at most
    assert bool(gradient.isfinite().all())
    assert 1e3 < float(LOSSES[name](-query.detach(), torch.eye(M), targets, 0.0)) < 1e5


@pytest.mark.parametrize("certainty", [2.0, 9.0, 60.0])
def test_reduced_precision_rounds_what_is_left_to_learn(monkeypatch: pytest.MonkeyPatch, certainty: float) -> None:
    """The error is bounded by the rounding of P - labels alone, so it vanishes with the gradient of a perfect model."""
    monkeypatch.setattr(losses, "has_bfloat16", lambda device: True)  # torch emulates it where it is missing
    generator = torch.Generator().manual_seed(0)
    q_all = torch.nn.functional.normalize(torch.randn(500, 32, generator=generator), dim=1).requires_grad_()
    tails = torch.arange(0, 500, 5)
    query = (certainty * q_all[tails]).detach().requires_grad_()  # at 60, P is 1 at the tail up to e^-20
    targets = Targets(torch.arange(len(tails)), tails)
    exact = torch.autograd.grad(softmax_cross_entropy(query, q_all, targets), (query, q_all))
    with matmul_precision("medium"):
        fast = torch.autograd.grad(softmax_cross_entropy(query, q_all, targets), (query, q_all))
    left = torch.softmax(query @ q_all.T, 1).detach()
    left[targets.rows, targets.columns] -= 1
    sizes = left.abs() @ q_all.detach().abs(), left.abs().T @ query.detach().abs()
    for own, ours, size in zip(exact, fast, sizes, strict=True):
        share = (ours - own).abs() / (size / len(tails) + 1e-12)
        assert float(share.max()) < 2**-6
        assert certainty == 60 or float(share.max()) > 2**-12, "no rounding: bfloat16 was not used"


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


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_weighted_parts_of_a_batch_sum_to_the_whole(name: str) -> None:
    """What several processes do: each computes the mean of its own queries, weighted by ``share``."""
    data, loss = batch(), LOSSES[name]
    tails = data.labels.sum(1).long()
    parts = []
    for part in (slice(0, 2), slice(2, 3), slice(3, B)):
        rows, columns = data.labels[part].nonzero(as_tuple=True)
        value = loss(data.query[part], data.q_all, Targets(rows, columns), 0.1)
        parts.append(loss.share(tails, tails[part]) * value)
    torch.testing.assert_close(torch.stack(parts).sum(), loss(*data[:3], 0.1))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_have_the_same_bits_on_two_threads(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, q_all = torch.randn(300, 32, generator=generator), torch.randn(500, 32, generator=generator)
    rows = torch.arange(300).repeat_interleave(40)
    targets = Targets(rows, torch.randint(500, (len(rows),), generator=generator))
    data, threads = Batch(query.requires_grad_(), q_all.requires_grad_(), targets, query), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, second = (data.value_and_gradients(LOSSES[name](*data[:3], 0.1)) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
