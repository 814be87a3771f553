"""The sampled softmax: equal to the exact one on all entities, unbiased, and in training."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.files import read_json
from model import evaluation
from model.evaluation import evaluate_vectors
from model.losses import (
    Sample,
    Targets,
    draw_sample,
    gather_targets,
    sampled_softmax_cross_entropy,
    softmax_cross_entropy,
)
from model.schedule import CODES, WARM_UP, Phase
from tests.conftest import L, M, TrainerMaker, assert_refused, small_flags

N, B, D = 11, 6, 4  # entities, queries, width


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Targets]:
    """(heads [B], query [B, D], q_all [N, D], targets of 1 to 4 tails a query), in float64."""
    generator = torch.Generator().manual_seed(seed)
    query, q_all = (torch.randn(n, D, generator=generator, dtype=torch.float64).requires_grad_() for n in (B, N))
    tails = [torch.randperm(N, generator=generator)[: 1 + row % 4].sort().values for row in range(B)]
    rows = torch.cat([torch.full((len(t),), row) for row, t in enumerate(tails)])
    return torch.randint(N, (B,), generator=generator), query, q_all, Targets(rows, torch.cat(tails))


def sample_of(heads: Tensor, targets: Targets, drawn: list[int]) -> Sample:
    """The sample with exactly these drawn entities."""
    everything = draw_sample(heads, targets, N, N)
    return everything._replace(drawn=torch.tensor(sorted(drawn)))  # all N entities: positions are entities


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_a_sample_of_all_entities_is_the_exact_loss(smoothing: float, chunk: int | None) -> None:
    heads, query, q_all, targets = problem()
    exact = softmax_cross_entropy(query, q_all, targets, smoothing)
    expected = torch.autograd.grad(exact, (query, q_all))
    sample = draw_sample(heads, targets, N, N)
    found = sampled_softmax_cross_entropy(query, q_all[sample.entities], sample, N, smoothing, chunk)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(found, (query, q_all)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [6, 9])
def test_mean_over_all_samples_of_z_is_z(size: int) -> None:
    """Averaged over all subsets S of one size, Z_b is the sum over all entities; without the correction it is not."""
    heads, query, q_all, targets = problem(1)
    for row in range(B):
        mine = targets.rows == row
        own = Targets(torch.zeros(int(mine.sum()), dtype=torch.int64), targets.columns[mine])
        scores = (query[row] @ q_all.T).detach()
        of_tails = scores[own.columns].mean()
        found, uncorrected = [], []
        for drawn in combinations(range(N), size):
            sample = sample_of(heads[:1], own, list(drawn))
            loss = sampled_softmax_cross_entropy(query[row : row + 1], q_all[sample.entities], sample, N)
            found.append(float((loss.detach() + of_tails).exp()))
            uncorrected.append(float(scores[sorted({*drawn, *own.columns.tolist(), int(heads[0])})].exp().sum()))
        assert np.mean(found) == pytest.approx(float(scores.exp().sum()), rel=1e-10)
        assert np.mean(uncorrected) < 0.995 * float(scores.exp().sum())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("drawn", [[0, 3, 4, 9], [7]])
def test_gradients_by_finite_differences(smoothing: float, drawn: list[int]) -> None:
    heads, query, q_all, targets = problem(2)
    sample = sample_of(heads, targets, drawn)
    for chunk in (None, 4):
        assert torch.autograd.gradcheck(
            lambda q, e, chunk=chunk: sampled_softmax_cross_entropy(q, e, sample, N, smoothing, chunk), (query, q_all)
        )


@pytest.mark.parametrize("head", [0, 5])
def test_sample_of_own_entities_alone_is_a_softmax_over_them(head: int) -> None:
    """The head is included even if it was not drawn, and only once if it is a true tail of itself."""
    _, query, q_all, _ = problem()
    targets = Targets(torch.zeros(3, dtype=torch.int64), torch.tensor([2, 5, 6]))
    loss = sampled_softmax_cross_entropy(query[:1], q_all, sample_of(torch.tensor([head]), targets, [2, 6]), N)
    own = q_all[[2, 5, 6] if head == 5 else [2, 5, 6, head]]
    expected = softmax_cross_entropy(query[:1], own, Targets(targets.rows, torch.arange(3)))
    torch.testing.assert_close(loss, expected)
    for gradient in torch.autograd.grad(loss, (query, q_all)):
        assert bool(gradient.isfinite().all())


def test_draws_are_uniform_and_positions_lead_back() -> None:
    heads, _, _, targets = problem()
    generator, times = torch.Generator().manual_seed(0), torch.zeros(1000)
    for _ in range(400):
        sample = draw_sample(heads, targets, 1000, 50, generator)
        drawn = sample.entities[sample.drawn]
        assert 40 <= len(drawn) == len(drawn.unique()) <= 50
        times[drawn] += 1
    assert torch.equal(sample.entities[sample.heads], heads)
    assert torch.equal(sample.entities[sample.targets.columns], targets.columns)
    mean = float(times.mean())
    assert float(times.var()) == pytest.approx(mean, rel=0.3)  # Poisson
    assert float(times[:500].mean()) == pytest.approx(float(times[500:].mean()), rel=0.1)


# ---------------------------------------------------------------- in training


@pytest.mark.parametrize("phase", [CODES, WARM_UP])
@pytest.mark.parametrize("text", [False, True])
def test_all_entities_as_negatives_train_like_the_exact_loss(
    trainer_of: TrainerMaker, phase: Phase, text: bool
) -> None:
    found: list[dict[str, Any]] = []
    for negatives in (0, M):
        embeddings = torch.randn(M, 7, generator=torch.Generator().manual_seed(3)) if text else None
        shape = {"gcn_drop": 0.0, "decoder_drop": 0.0} | ({"text_dim": 7} if text else {})
        trainer = trainer_of(shape, embeddings, num_negatives=negatives)
        trainer.model.train()
        trainer._start_epoch(phase)
        trainer.model.zero_grad()
        structure, semantic, gradient = trainer._scorer_step(torch.arange(0, 40, 3), phase)
        found.append({
            "loss": structure + semantic, "z": gradient.to_dense(),
            **{name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None},
        })  # fmt: skip
    exact, sampled = found
    assert exact.keys() == sampled.keys()
    for name, value in exact.items():
        torch.testing.assert_close(sampled[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_only_the_needed_entities_are_decoded(trainer_of: TrainerMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(num_negatives=4)
    trainer.model.train()
    trainer._start_epoch(CODES)
    batch = torch.arange(5)
    targets = gather_targets(trainer.indptr, trainer.targets, batch)
    wanted = {*trainer.heads[batch].tolist(), *targets.columns.tolist()}
    decoded: list[int] = []
    decode = trainer.model.rq_codebook.decode_from_codes

    def counted(codes: Tensor) -> Tensor:
        decoded.append(len(codes))
        return decode(codes)

    monkeypatch.setattr(trainer.model.rq_codebook, "decode_from_codes", counted)
    *_, gradient = trainer._scorer_step(batch, CODES)
    touched = gradient.to_dense().flatten(1).abs().sum(1).nonzero().flatten().tolist()
    assert gradient.shape == (M, L, trainer.model.code_dim)
    assert decoded == [len(touched)] and len(wanted) <= len(touched) <= len(wanted) + 4 < M
    assert wanted <= set(touched)


def test_training_with_few_negatives_learns(ring: Any, tmp_path: Any, rq: Any) -> None:
    assert rq(*small_flags(ring, tmp_path, num_negatives=8, epoch=6)).code == 0
    record = read_json(next((tmp_path / "codes").glob("*.json")), "record")
    losses = [row["structure"] for row in record["history"]]
    assert record["args"]["num_negatives"] == 8 and losses[-1] < losses[0]


def test_negatives_need_the_softmax(ring: Any, tmp_path: Any, rq: Any) -> None:
    assert "--num_negatives 8 is unused" in rq(*small_flags(ring, tmp_path, num_negatives=8, loss="bce")).out
    assert_refused(rq(*small_flags(ring, tmp_path, num_negatives=-1)), "--num_negatives", "-1")


# ---------------------------------------------------------------- ranking in chunks over entities


@pytest.mark.parametrize("bound", [1, 16 * 7, 16 * 43])
def test_ranking_in_chunks_holds_no_more_scores_than_the_bound(
    trainer_of: TrainerMaker, monkeypatch: pytest.MonkeyPatch, bound: int
) -> None:
    trainer = trainer_of()
    scorer, relations = trainer.model.scorer, trainer.model.relation_vectors().detach()
    q_all = torch.randn(M, relations.shape[1], generator=torch.Generator().manual_seed(0))
    whole = evaluate_vectors(scorer, relations, q_all, trainer.kg, "test", batch=16)
    monkeypatch.setattr(evaluation, "SCORES_AT_ONCE", bound)
    sizes: list[int] = []
    matmul = torch.Tensor.__matmul__

    def recorded(a: Tensor, b: Tensor) -> Tensor:
        result = matmul(a, b)
        sizes.append(math.prod(result.shape))
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", recorded)
    found = evaluate_vectors(scorer, relations, q_all, trainer.kg, "test", batch=16)
    for part in ("head", "tail"):
        assert found[part] == pytest.approx(whole[part], rel=1e-12)
    assert sizes and max(sizes) <= max(bound, 16)
