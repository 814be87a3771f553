"""RQGCN: codes, what scores depend on, the scorer alone, backends, ablations."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from data.knowledge_graph import KnowledgeGraph
from model.evaluation import evaluate_codes, evaluate_vectors, shuffled
from model.relational_graph import RelationalGraph
from model.RQGCN import RQGCN, CodeScorer, scorer_of
from tests.conftest import CODE_DIM, SHAPE, D, K, L, M, Q, R, books_of, make_model

DECODERS = ["conve", "distmult", "complex"]


@pytest.fixture(scope="module")
def graph(ring_kg: KnowledgeGraph) -> RelationalGraph:
    return RelationalGraph.from_triples(ring_kg.train, M, R)


def initialized(kg: KnowledgeGraph, graph: RelationalGraph, **changes: Any) -> RQGCN:
    """A model whose graph layers and transformer blocks are no longer the identity, with codebooks of its vectors."""
    model = make_model(kg, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith(".gate"):
            torch.nn.init.ones_(parameter)
        elif name.endswith(".linear2.weight"):
            torch.nn.init.xavier_normal_(parameter)
    model.rq_codebook.init_from_data(model.clean_z(graph), generator=torch.Generator().manual_seed(0))
    return model.eval()


VARIANTS: list[dict[str, Any]] = [
    {},
    {"gcn_layers": 0},
    {"gcn_layers": 2, "init_dim": 10},
    {"tf_layers": 0},
    {"tf_layers": 2},
    {"num_quantizers": 1},
    {"decoder": "conve"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_codes_have_the_promised_form_and_decode_to_their_vectors(
    ring_kg: KnowledgeGraph, graph: RelationalGraph, changes: dict[str, Any]
) -> None:
    model = initialized(ring_kg, graph, **changes)
    model.train()  # dropout must not reach the codes
    codes = model.cal_allent_codes(graph)
    assert model.training
    assert codes.dtype == torch.int64
    assert codes.shape == (M, L, changes.get("num_quantizers", Q))
    assert int(codes.min()) >= 0 and int(codes.max()) < K
    assert torch.equal(codes, model.cal_allent_codes(graph))
    vectors = model.cal_allent_codes_emds(graph)
    assert vectors.shape == (M, L, CODE_DIM)
    by_hand = torch.stack([book[codes[..., q]] for q, book in enumerate(books_of(model))]).sum(0)
    torch.testing.assert_close(vectors, by_hand.detach())
    # of K codes and L positions several must be in use, or the test would hold for constant codes
    assert len(torch.unique(codes.reshape(M, -1), dim=0)) > M // 2


def test_positions_see_different_vectors(ring_kg: KnowledgeGraph, graph: RelationalGraph) -> None:
    z = initialized(ring_kg, graph).clean_z(graph)
    for a in range(L):
        for b in range(a):
            both = torch.stack([z[:, a].flatten(), z[:, b].flatten()])
            assert abs(float(torch.corrcoef(both)[0, 1])) < 0.9


def test_the_graph_reaches_the_codes_only_with_gcn_layers(ring_kg: KnowledgeGraph, graph: RelationalGraph) -> None:
    other = RelationalGraph.from_triples(ring_kg.train[: len(ring_kg.train) // 2], M, R)
    with_graph, without = initialized(ring_kg, graph), initialized(ring_kg, graph, gcn_layers=0)
    assert not torch.equal(with_graph.cal_allent_codes(graph), with_graph.cal_allent_codes(other))
    assert torch.equal(without.cal_allent_codes(graph), without.cal_allent_codes(other))


@pytest.mark.parametrize("decoder", DECODERS)
def test_entities_with_one_code_score_alike_as_head_and_as_tail(
    ring_kg: KnowledgeGraph, graph: RelationalGraph, decoder: str
) -> None:
    model = initialized(ring_kg, graph, decoder=decoder)
    codes = model.cal_allent_codes(graph)
    a, b, c = 4, 29, 17
    codes[b] = codes[a]
    assert not torch.equal(codes[a], codes[c])
    q_all = model.scorer.entity_vectors_from_codes(codes)
    relations = model.relation_vectors()
    for r in range(2 * R):
        heads = torch.tensor([a, b, c])
        scores = model.scorer.scores(q_all[heads], relations[[r] * 3], q_all)
        torch.testing.assert_close(scores[0], scores[1], rtol=1e-6, atol=1e-7)  # as head
        torch.testing.assert_close(scores[:, a], scores[:, b], rtol=1e-6, atol=1e-7)  # as tail
        assert not torch.allclose(scores[0], scores[2])
        assert not torch.allclose(scores[:, a], scores[:, c])


@pytest.mark.parametrize("decoder", DECODERS)
def test_nothing_after_the_codes_is_indexed_by_entities(decoder: str) -> None:
    assert M not in (2 * R, L, K, Q, CODE_DIM, D, L * CODE_DIM, 2 * D)
    names = ("seq_len", "num_code", "num_quantizers", "code_dim")
    scorer = CodeScorer(**{name: SHAPE[name] for name in names}, dim=D, decoder=decoder)
    for name, value in scorer.state_dict().items():
        assert M not in value.shape, name


@pytest.mark.parametrize("decoder", DECODERS)
def test_scorer_from_a_checkpoint_reproduces_the_scores(
    ring_kg: KnowledgeGraph, graph: RelationalGraph, decoder: str
) -> None:
    model = initialized(ring_kg, graph, decoder=decoder)
    config = SHAPE | {"decoder": decoder, "decoder_drop": None, "ensemble": 1}
    state = {name: value for name, value in model.state_dict().items() if M not in value.shape}
    assert len(state) < len(model.state_dict())  # the entity embedding is gone
    scorer, relations = scorer_of(config, {"model": state, "relations": model.relation_vectors().detach()}, "cpu")
    codes = model.cal_allent_codes(graph)
    heads, rels = torch.arange(M), torch.arange(M) % (2 * R)
    with torch.no_grad():
        of_model = model.scorer.entity_vectors(model.cal_allent_codes_emds(graph))
        expected = model.scorer.scores(of_model[heads], model.relation_vectors()[rels], of_model)
        q_all = scorer.entity_vectors_from_codes(codes)
        torch.testing.assert_close(scorer.scores(q_all[heads], relations[rels], q_all), expected, rtol=0, atol=0)
    assert evaluate_codes(scorer, relations, codes, ring_kg, "test") == evaluate_vectors(
        model.scorer, model.relation_vectors(), of_model, ring_kg, "test"
    )


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_relation_vectors_need_no_entity(ring_kg: KnowledgeGraph, graph: RelationalGraph, layers: int) -> None:
    model = initialized(ring_kg, graph, gcn_layers=layers)
    torch.testing.assert_close(model.relation_vectors(), model.encode(graph).relations)
    assert model.relation_vectors().shape == (2 * R, D)
    model.relation_vectors().sum().backward()
    moved = {id(p) for p in model.parameters() if p.grad is not None}
    assert moved == {id(p) for p in model.relation_parameters()}


@pytest.mark.parametrize("composition", ["mult", "sub"])
def test_backends_give_the_same_vectors_and_codes(
    ring_kg: KnowledgeGraph, graph: RelationalGraph, composition: str
) -> None:
    reference = initialized(ring_kg, graph, gcn_layers=2, composition=composition, graph_backend="torch")
    z = reference.clean_z(graph)
    codes = reference.cal_allent_codes(graph)
    backends = [name for name, package in {"dgl": "dgl", "fused": "numba"}.items() if importlib.util.find_spec(package)]
    if not backends:
        pytest.skip("neither dgl nor numba is installed")
    for name in backends:
        other = make_model(ring_kg, seed=1, gcn_layers=2, composition=composition, graph_backend=name)
        other.load_state_dict(reference.state_dict())
        torch.testing.assert_close(other.clean_z(graph), z, rtol=1e-5, atol=1e-5)
        # a code may differ only where two are equally near: none of the 43 * 3 * 2 is
        assert torch.equal(other.cal_allent_codes(graph), codes)


def test_shuffled_is_a_permutation_that_the_seed_decides() -> None:
    codes = torch.arange(M * L * Q).view(M, L, Q)
    mixed = shuffled(codes, 3)
    assert torch.equal(mixed, shuffled(codes, 3)) and not torch.equal(mixed, shuffled(codes, 4))
    assert torch.equal(mixed[mixed[:, 0, 0].argsort()], codes)
    assert int((mixed == codes).all(dim=(1, 2)).sum()) < 5
