"""Training queries: high-degree queries are split, and the loss stays the same."""

from __future__ import annotations

import pytest
import torch

from data.knowledge_graph import KnowledgeGraph
from model.losses import Targets, gather_targets, softmax_cross_entropy
from model.queries import Queries, in_parts, training_queries
from tests.conftest import TrainerMaker


def test_a_long_query_is_split_into_equal_runs_of_its_tails() -> None:
    whole = Queries(
        torch.tensor([5, 6, 7]), torch.tensor([0, 1, 0]), torch.tensor([0, 5, 6, 8]),
        torch.tensor([10, 11, 12, 13, 14, 20, 30, 31]),
    )  # fmt: skip
    found = in_parts(whole, 2)
    assert found.heads.tolist() == [5, 5, 5, 6, 7] and found.relations.tolist() == [0, 0, 0, 1, 0]
    assert found.indptr.tolist() == [0, 1, 3, 5, 6, 8] and found.targets is whole.targets
    assert all(torch.equal(a, b) for a, b in zip(in_parts(whole, 5), whole, strict=True))


@pytest.mark.parametrize("most", [1, 2, 3])
def test_the_epochs_loss_and_gradient_are_those_of_whole_queries(family: KnowledgeGraph, most: int) -> None:
    torch.manual_seed(0)
    entities = torch.randn(family.num_entities, 8, dtype=torch.float64)
    relations = torch.randn(2 * family.num_relations, 8, dtype=torch.float64)

    def summed(queries: Queries) -> tuple[torch.Tensor, torch.Tensor]:
        e = entities.clone().requires_grad_()
        targets = gather_targets(queries.indptr, queries.targets, torch.arange(len(queries.heads)))
        loss = softmax_cross_entropy(e[queries.heads] * relations[queries.relations], e, Targets(*targets), 0.1)
        return loss.detach(), torch.autograd.grad(loss, e)[0]

    whole, parts = training_queries(family), training_queries(family, most)
    assert len(parts.heads) > len(whole.heads) and int(parts.indptr.diff().max()) == most
    for a, b in zip(summed(parts), summed(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_trainer_takes_queries_in_parts(trainer_of: TrainerMaker) -> None:
    whole, parts = trainer_of(), trainer_of(tails_at_once=1)
    assert int(whole.indptr.diff().max()) > 1 == int(parts.indptr.diff().max())
    assert len(parts.heads) == len(parts.targets) == len(whole.targets) > len(whole.heads)
    parts.fit()
    assert parts.best is not None
