"""An ensemble in one model: members see their own slices, learn apart, and add their scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.files import load_torch
from data.knowledge_graph import KnowledgeGraph
from model.CompGCN import CompGCN
from model.losses import gather_targets, softmax_cross_entropy
from model.members import MemberCompGCN, MemberLinear
from model.relational_graph import RelationalGraph
from model.RQGCN import RQGCN, CodeScorer
from model.trainer import Phase
from tests.conftest import (
    CODE_DIM,
    RING,
    SHAPE,
    Command,
    D,
    K,
    L,
    M,
    Q,
    R,
    Run,
    TrainerMaker,
    assert_refused,
    finished,
    small_flags,
)

G = 3  # members: each has one of the L = 3 positions and 4 of the D = 12 numbers


def graph_of(kg: KnowledgeGraph) -> RelationalGraph:
    return RelationalGraph.from_triples(kg.train, kg.num_entities, kg.num_relations)


@pytest.mark.parametrize("bias", [False, True])
def test_member_linear_is_a_block_diagonal_linear(bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = MemberLinear(G, 12, 6, bias), torch.randn(5, 12)
    expected = x @ torch.block_diag(*layer.weight).T
    if layer.bias is not None:
        expected = expected + layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_member_graph_layers_are_each_members_own(ring_kg: KnowledgeGraph) -> None:
    torch.manual_seed(0)
    parts = [CompGCN(2, 4, 5, 6, R, dropout=0.0, backend="torch") for _ in range(G)]
    x, v, graph = torch.randn(M, 12), torch.randn(2 * R, 12), graph_of(ring_kg)
    together = MemberCompGCN(parts)
    found = together(x, v, graph)
    for member, part in enumerate(parts):
        alone = part(x[:, 4 * member : 4 * member + 4].contiguous(), v[:, 4 * member : 4 * member + 4], graph)
        torch.testing.assert_close(found.x[:, 6 * member : 6 * member + 6], alone.x)
        torch.testing.assert_close(found.v[:, 6 * member : 6 * member + 6], alone.v)
    torch.testing.assert_close(together.relations(v), found.v)


@pytest.mark.parametrize("tf_layers", [0, 1])
@pytest.mark.parametrize("gcn_layers", [0, 1])
def test_a_members_positions_come_from_its_own_slice(ring_kg: KnowledgeGraph, gcn_layers: int, tf_layers: int) -> None:
    """Another member's inputs, of entities, relations or text, are not seen; its own move all of its positions."""
    torch.manual_seed(0)
    shape = SHAPE | {"gcn_layers": gcn_layers, "tf_layers": tf_layers, "seq_len": 2 * G, "ensemble": G, "text_dim": 5}
    model, graph = RQGCN(M, R, text_init=True, **shape).eval(), graph_of(ring_kg)
    text = torch.randn(M, 5)
    with torch.no_grad():
        before = model.encode(graph, text)
        model.entity_embedding[:, 4:8] += torch.randn(M, 4)
        model.relation_embedding[:, 4:8] += torch.randn(2 * R, 4)
        assert model.text_projection is not None
        model.text_projection.weight[4:8] += 1
        after = model.encode(graph, text)
    moved = (after.z - before.z).abs().amax(dim=(0, 2)) > 1e-3
    assert moved.tolist() == [False, False, True, True, False, False]
    assert ((after.relations - before.relations).abs().amax(0) > 1e-6).tolist() == [False] * 4 + [True] * 4 + [
        False
    ] * 4


def test_the_score_is_the_sum_of_the_members(ring_kg: KnowledgeGraph) -> None:
    torch.manual_seed(0)
    scorer = CodeScorer(L, K, Q, CODE_DIM, D, "complex", ensemble=G).eval()
    codes, relation = torch.randint(K, (M, L, Q)), torch.randn(5, D)
    with torch.no_grad():
        e = scorer.entity_vectors_from_codes(codes)
        found = scorer.scores(e[:5], relation, e)
        expected = torch.zeros(5, M)
        x = scorer.rq_codebook.decode_from_codes(codes)
        for member in range(G):
            own = x[:, member] @ scorer.W_q.weight[member].T
            one = CodeScorer(1, K, Q, CODE_DIM, 4, "complex").eval()
            expected += one.scores(own[:5], relation[:, 4 * member : 4 * member + 4], own)
    torch.testing.assert_close(found, expected)
    other = codes.clone()
    other[:, 1] = torch.randint(K, (M, Q))
    with torch.no_grad():
        changed = (scorer.entity_vectors_from_codes(other) - e).abs().amax(0) > 0
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4, "a position is one member's"


def test_members_may_share_one_position() -> None:
    """Fewer positions than members: each has a slice of the one position's vector, so every code speaks to all."""
    torch.manual_seed(0)
    scorer = CodeScorer(1, K, Q, 2 * G, D, "complex", ensemble=G).eval()
    codes, relation = torch.randint(K, (M, 1, Q)), torch.randn(5, D)
    with torch.no_grad():
        e = scorer.entity_vectors_from_codes(codes)
        found = scorer.scores(e[:5], relation, e)
        expected, x = torch.zeros(5, M), scorer.rq_codebook.decode_from_codes(codes)[:, 0]
        for member in range(G):
            own = x[:, 2 * member : 2 * member + 2] @ scorer.W_q.weight[member].T
            one = CodeScorer(1, K, Q, 2, 4, "complex").eval()
            expected += one.scores(own[:5], relation[:, 4 * member : 4 * member + 4], own)
        torch.testing.assert_close(found, expected)
        changed = (scorer.entity_vectors_from_codes((codes + 1) % K) - e).abs().amax(0) > 0
    assert changed.all(), "a code is every member's"


@pytest.mark.parametrize("negatives", [0, M])
def test_each_member_learns_by_its_own_loss(trainer_of: TrainerMaker, negatives: int) -> None:
    """The loss is the mean of the members' cross-entropies, not the cross-entropy of the sum of their scores."""
    shape = {"ensemble": G, "decoder_drop": 0.0, "gcn_drop": 0.0}
    trainer = trainer_of(shape, num_negatives=negatives, lbl_smooth=0.1)
    model, batch = trainer.model.train(), torch.arange(0, 40, 3)
    with torch.no_grad():
        model.scorer.W_q.weight *= 10  # scores far from uniform: the two losses are not alike
    trainer._start_epoch(Phase(0.0, "warm-up"))
    assert trainer.z is not None
    structure = trainer._scorer_step(batch, Phase(0.0, "warm-up"))[0]
    targets = gather_targets(trainer.indptr, trainer.targets, batch)
    with torch.no_grad():
        q_all = model.scorer.entity_vectors(trainer.z)
        query = model.scorer.decoder.query(q_all[trainer.heads[batch]], model.relation_vectors()[trainer.rels[batch]])
        parts = zip(query.chunk(G, 1), q_all.chunk(G, 1), strict=True)
        expected = torch.stack([softmax_cross_entropy(q, e, targets, 0.1) for q, e in parts]).mean()
        joint = softmax_cross_entropy(query, q_all, targets, 0.1)
    torch.testing.assert_close(structure, expected, rtol=1e-5, atol=1e-6)
    assert abs(float(joint - expected)) > 1e-3


def test_each_member_tells_the_text(ring_kg: KnowledgeGraph) -> None:
    torch.manual_seed(0)
    model = RQGCN(M, R, text_dim=5, **SHAPE, ensemble=G)
    q, text = torch.randn(7, D), torch.randn(7, 5)
    assert isinstance(model.W_s, MemberLinear) and model.W_s.bias is not None
    told = [q[:, 4 * m : 4 * m + 4] @ model.W_s.weight[m].T + model.W_s.bias[5 * m : 5 * m + 5] for m in range(G)]
    expected = sum((one - text).square().sum(1).mean() for one in told) / G
    torch.testing.assert_close(model.semantic_loss(q, text), expected)


@pytest.mark.parametrize("more", [{}, {"decoder": "conve", "gcn_layers": 0, "init_dim": 36, "gcn_dim": 36}])
def test_an_ensembles_record_is_what_its_integers_rank(
    rq: Command, ring: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    run: Run = finished(ring, tmp_path, RING, ensemble=G, **more)
    out = tmp_path / "metrics.json"
    found = rq(*run.scored(None, None, "--metrics_out", str(out)))
    assert found.code == 0 and "warning" not in found.err, found.err
    assert json.loads(out.read_text()) == run.record["test"]
    assert load_torch(run.checkpoint, "checkpoint")["config"]["ensemble"] == G


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ensemble": 2}, ["2 members", "L = 3"]),
        ({"ensemble": 5, "tf_layers": 0}, ["5 members", "3 x 4"]),
        ({"ensemble": G, "init_dim": 13, "gcn_layers": 0}, ["3 members", "13"]),
        ({"ensemble": 0}, ["--ensemble 0", "1 or more"]),
        ({"ensemble": G, "relation_weight": 1}, ["--relation_weight", "--ensemble"]),
    ],
    ids=["positions", "parts", "width", "none", "relations"],
)
def test_members_that_cannot_share_are_refused(
    rq: Command, ring: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    found = rq(*small_flags(ring, tmp_path, **changes))
    assert_refused(found, *words)


def test_a_width_that_nothing_has_need_not_be_shared() -> None:
    model = RQGCN(M, R, **(SHAPE | {"gcn_layers": 0, "gcn_dim": 13}), ensemble=G)
    assert model.scorer.W_q.out_features == D
