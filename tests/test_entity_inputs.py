"""What the encoder starts from: each member its own sources; the mean of what neighbours by text have learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.knowledge_graph import KnowledgeGraph
from model.entity_inputs import TEMPERATURE, EntityInputs, nearest_by_text, sources_of
from model.relational_graph import RelationalGraph
from model.RQGCN import RQGCN
from tests.conftest import RING, SHAPE, Command, M, R, assert_refused, finished, ranked, small_flags

T, N, G = 5, 3, 3  # width of texts, neighbours, members


def model_of(inputs: str, members: int = G) -> RQGCN:
    torch.manual_seed(0)
    more = {"gcn_layers": 0, "init_dim": 12, "ensemble": members, "text_dim": T, "inputs": inputs}
    return RQGCN(M, R, **(SHAPE | more)).eval()


def texts(seed: int = 0) -> torch.Tensor:
    return torch.randn(M, T, generator=torch.Generator().manual_seed(seed))


def dense(text: torch.Tensor, count: int) -> torch.Tensor:
    """[M, M]: the weights by which neighbours mean, from a full sort of all cosines."""
    unit = (text / text.norm(dim=1, keepdim=True)).double().numpy()
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    weights = np.zeros_like(cosines)
    for row, own in zip(weights, cosines, strict=True):
        best = np.argsort(-own)[:count]
        row[best] = np.exp(own[best] / TEMPERATURE) / np.exp(own[best] / TEMPERATURE).sum()
    return torch.from_numpy(weights).float()


@pytest.mark.parametrize("count", [1, N, M - 1, M + 5])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_neighbours_are_those_of_a_full_sort(monkeypatch: pytest.MonkeyPatch, count: int, rows: int) -> None:
    monkeypatch.setattr("model.entity_inputs.ROWS_AT_ONCE", rows * M)
    found = nearest_by_text(texts(), count)
    assert found.entities.shape == (M, min(count, M - 1))
    vectors = torch.randn(M, 4, requires_grad=True)
    torch.testing.assert_close(found.mean(vectors), dense(texts(), count) @ vectors)


def test_gradients_reach_the_neighbours_and_not_the_entity_itself() -> None:
    vectors = torch.randn(M, 4, requires_grad=True)
    nearest_by_text(texts(), N).mean(vectors)[2].sum().backward()
    assert vectors.grad is not None
    torch.testing.assert_close(vectors.grad[:, 0], dense(texts(), N)[2])
    assert vectors.grad[2].abs().max() == 0


@pytest.mark.parametrize(
    "inputs, expected",
    [
        ("learned", [{"learned"}] * 2), ("learned+text", [{"learned", "text"}] * 2),
        ("text,neighbours+learned", [{"text"}, {"learned", "neighbours"}]),
    ],
)  # fmt: skip
def test_sources(inputs: str, expected: list[set[str]]) -> None:
    assert sources_of(inputs, 2) == expected


@pytest.mark.parametrize("inputs", ["texts", "learned,text,text", "learned+"])
def test_wrong_sources_are_refused(inputs: str) -> None:
    with pytest.raises(ValueError):
        sources_of(inputs, 2)


def test_each_member_starts_from_its_own_sources() -> None:
    learned, text, projection = torch.randn(M, 12), texts(), torch.randn(12, T)
    found = EntityInputs(sources_of("learned,text,neighbours+text+learned", G), 12)(learned, text, projection)
    near = dense(text, 10) @ learned
    torch.testing.assert_close(found[:, :4], learned[:, :4])
    torch.testing.assert_close(found[:, 4:8], text @ projection[4:8].T)
    torch.testing.assert_close(found[:, 8:], learned[:, 8:] + text @ projection[8:].T + near[:, 8:])


def test_a_member_without_text_neither_sees_nor_predicts_it(ring_kg: KnowledgeGraph) -> None:
    graph = RelationalGraph.from_triples(ring_kg.train, M, R)
    model = model_of("learned+text,learned,neighbours")
    z, other = model.encode(graph, texts()).z, model.encode(graph, texts(1)).z
    part = model.seq_len // G
    assert torch.equal(z[:, part : 2 * part], other[:, part : 2 * part])
    for member in (0, 2):
        assert not torch.allclose(
            z[:, member * part : (member + 1) * part], other[:, member * part : (member + 1) * part]
        )
    q = torch.randn(M, 12, requires_grad=True)
    model.semantic_loss(q, texts()).backward()
    assert q.grad is not None
    assert [bool(q.grad[:, 4 * member : 4 * member + 4].any()) for member in range(G)] == [True, False, True]
    assert model.W_s is not None
    predicted = model.W_s(q).view(M, G, T)[:, [0, 2]]
    torch.testing.assert_close(model.semantic_loss(q, texts()), (predicted - texts()[:, None]).square().sum(2).mean())


def test_a_text_is_needed_where_a_member_starts_from_it(ring_kg: KnowledgeGraph) -> None:
    with pytest.raises(ValueError):
        RQGCN(M, R, **(SHAPE | {"inputs": "learned+neighbours"}))
    with pytest.raises(ValueError):
        model_of("neighbours").encode(RelationalGraph.from_triples(ring_kg.train, M, R))


def test_a_runs_record_is_what_its_integers_rank(rq: Command, ring: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "emb.npy", texts().numpy())
    inputs = "learned+text,learned,neighbours"
    run = finished(ring, tmp_path, RING, inputs=inputs, ensemble=G, gcn_layers=0, text_emb=tmp_path / "emb.npy")
    assert ranked(rq, run, tmp_path) == run.record["test"] and run.record["args"]["inputs"] == inputs


@pytest.mark.parametrize(
    "more, words",
    [
        ({"inputs": "learned+text"}, ["--inputs learned+text", "--text_emb"]),
        ({"inputs": "neighbours"}, ["--inputs neighbours", "--text_emb"]),
        ({"inputs": "letters"}, ["'letters'", "learned, text, neighbours"]),
        ({"inputs": "learned,learned"}, ["2 members", "3"]),
    ],
)
def test_wrong_inputs_are_one_line(
    rq: Command, ring: Path, tmp_path: Path, more: dict[str, Any], words: list[str]
) -> None:
    found = rq(*small_flags(ring, tmp_path, ensemble=G, gcn_layers=0, **more))
    assert_refused(found, *words)
