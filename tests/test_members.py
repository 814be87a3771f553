"""An ensemble in one model: members see their own slices, train by their own losses, and add their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.files import load_torch
from data.knowledge_graph import KnowledgeGraph
from model.losses import gather_targets, softmax_cross_entropy
from model.members import MemberLinear
from model.relational_graph import RelationalGraph
from model.RQGCN import RQGCN, CodeScorer
from model.schedule import WARM_UP
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
    TrainerMaker,
    assert_refused,
    finished,
    ranked,
    small_flags,
)

G = 3  # members: each has one of the L = 3 positions and 4 of the D = 12 numbers
FLAT = SHAPE | {"ensemble": G, "gcn_layers": 0}


@pytest.mark.parametrize("bias", [False, True])
def test_member_linear_is_a_block_diagonal_linear(bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = MemberLinear(G, 12, 6, bias), torch.randn(5, 12)
    expected = x @ torch.block_diag(*layer.weight).T
    if layer.bias is not None:
        expected = expected + layer.bias
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("tf_layers", [0, 1])
def test_a_members_positions_come_from_its_own_slice(ring_kg: KnowledgeGraph, tf_layers: int) -> None:
    """Another member's inputs, of entities, relations or text, are not seen; its own move all of its positions."""
    torch.manual_seed(0)
    shape = FLAT | {"tf_layers": tf_layers, "seq_len": 2 * G, "text_dim": 5, "inputs": "learned+text"}
    model, graph = RQGCN(M, R, **shape).eval(), RelationalGraph.from_triples(ring_kg.train, M, R)
    text = torch.randn(M, 5)
    with torch.no_grad():
        before = model.encode(graph, text)._replace(relations=model.relation_embedding.clone())
        model.entity_embedding[:, 4:8] += torch.randn(M, 4)
        model.relation_embedding[:, 4:8] += torch.randn(2 * R, 4)
        assert model.text_projection is not None
        model.text_projection.weight[4:8] += 1
        after = model.encode(graph, text)
    moved = (after.z - before.z).abs().amax(dim=(0, 2)) > 1e-3
    assert moved.tolist() == [False, False, True, True, False, False]
    moved = (after.relations - before.relations).abs().amax(0) > 1e-6
    assert moved.tolist() == [False] * 4 + [True] * 4 + [False] * 4


@pytest.mark.parametrize(("positions", "width"), [(L, CODE_DIM), (1, 2 * G)], ids=["own position", "shared position"])
def test_the_score_is_the_sum_of_the_members(positions: int, width: int) -> None:
    """With fewer positions than members, each reads a slice of the one position's vector."""
    torch.manual_seed(0)
    scorer = CodeScorer(positions, K, Q, width, D, "complex", ensemble=G).eval()
    codes, relation = torch.randint(K, (M, positions, Q)), torch.randn(5, D)
    size = positions * width // G
    assert isinstance(scorer.W_q, MemberLinear)
    with torch.no_grad():
        e = scorer.entity_vectors_from_codes(codes)
        found, expected = scorer.scores(e[:5], relation, e), torch.zeros(5, M)
        x = scorer.rq_codebook.decode_from_codes(codes).flatten(1)
        for member in range(G):
            own = x[:, size * member : size * (member + 1)] @ scorer.W_q.weight[member].T
            one = CodeScorer(1, K, Q, size, 4, "complex").eval()
            expected += one.scores(own[:5], relation[:, 4 * member : 4 * member + 4], own)
        torch.testing.assert_close(found, expected)
        other = codes.clone()
        other[:, -1] = (other[:, -1] + 1) % K
        changed = (scorer.entity_vectors_from_codes(other) - e).abs().amax(0) > 0
    assert changed.tolist() == [positions == 1] * 8 + [True] * 4


@pytest.mark.parametrize("negatives", [0, M])
def test_each_member_learns_by_its_own_loss(trainer_of: TrainerMaker, negatives: int) -> None:
    """The loss is the mean of the members' cross-entropies, not the cross-entropy of the sum of their scores."""
    trainer = trainer_of(FLAT | {"decoder_drop": 0.0}, num_negatives=negatives, lbl_smooth=0.1)
    model, batch = trainer.model.train(), torch.arange(0, 40, 3)
    assert isinstance(model.scorer.W_q, MemberLinear)
    with torch.no_grad():
        model.scorer.W_q.weight.mul_(10)  # scores far from uniform: the two losses are not alike
    trainer._start_epoch(WARM_UP)
    assert trainer.z is not None
    structure = trainer._scorer_step(batch, WARM_UP)[0]
    targets = gather_targets(trainer.indptr, trainer.targets, batch)
    with torch.no_grad():
        q_all = model.scorer.entity_vectors(trainer.z)
        query = model.scorer.decoder.query(q_all[trainer.heads[batch]], model.relation_vectors()[trainer.rels[batch]])
        parts = zip(query.chunk(G, 1), q_all.chunk(G, 1), strict=True)
        expected = torch.stack([softmax_cross_entropy(q, e, targets, 0.1) for q, e in parts]).mean()
        joint = softmax_cross_entropy(query, q_all, targets, 0.1)
    torch.testing.assert_close(structure, expected, rtol=1e-5, atol=1e-6)
    assert abs(float(joint - expected)) > 1e-3


def test_each_member_predicts_the_text() -> None:
    torch.manual_seed(0)
    model = RQGCN(M, R, text_dim=5, **FLAT)
    q, text = torch.randn(7, D), torch.randn(7, 5)
    assert isinstance(model.W_s, MemberLinear) and model.W_s.bias is not None
    predicted = [q[:, 4 * m : 4 * m + 4] @ model.W_s.weight[m].T + model.W_s.bias[5 * m : 5 * m + 5] for m in range(G)]
    expected = sum((one - text).square().sum(1).mean() for one in predicted) / G
    torch.testing.assert_close(model.semantic_loss(q, text), expected)


@pytest.mark.parametrize("more", [{}, {"decoder": "conve", "init_dim": 36}])
def test_an_ensembles_record_is_what_its_integers_rank(
    rq: Command, ring: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    run = finished(ring, tmp_path, RING, **FLAT | more)
    assert ranked(rq, run, tmp_path) == run.record["test"]
    assert load_torch(run.checkpoint, "checkpoint")["model"]["ensemble"] == G


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ensemble": 2}, ["2 members", "L = 3"]),
        ({"ensemble": 5, "tf_layers": 0}, ["5 members", "3 x 6"]),
        ({"ensemble": G, "init_dim": 13}, ["3 members", "13"]),
        ({"ensemble": 0}, ["--ensemble 0", "1 or more"]),
        ({"gcn_layers": 1}, ["--ensemble 3", "--gcn_layers 0"]),
    ],
    ids=["positions", "parts", "width", "none", "graph layers"],
)
def test_members_that_cannot_share_are_refused(
    rq: Command, ring: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    assert_refused(rq(*small_flags(ring, tmp_path, **FLAT | changes)), *words)
