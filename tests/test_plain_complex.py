"""Stage 1 without graph layers and without codes against a plain ComplEx: the same tables after the same steps."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks.plain_complex import PlainComplEx, n3_norm
from data.knowledge_graph import KnowledgeGraph, with_inverse
from model.RQGCN import CodeScorer
from tests.conftest import CODE_DIM, ROOT, D, K, L, M, Q, R, TrainerMaker, make_model

TABLE_ONLY: dict[str, Any] = {
    "gcn_layers": 0, "tf_layers": 0, "init_dim": L * CODE_DIM, "decoder": "complex", "decoder_drop": 0.0
}  # fmt: skip
STEPS: dict[str, Any] = {
    "quantizer": "none", "batch": 10**6, "encoder_every": 1, "lbl_smooth": 0.0, "l2": 0.0, "epoch": 10**6,
}  # fmt: skip
OPTIMIZERS = {"adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}


@pytest.mark.parametrize(("name", "n3"), [("adagrad", 0.0), ("adam", 0.0), ("adagrad", 0.2)])
def test_unquantized_training_is_a_plain_complex(
    trainer_of: TrainerMaker, ring_kg: KnowledgeGraph, name: str, n3: float
) -> None:
    trainer = trainer_of(TABLE_ONLY, optimizer=name, lr=0.1, n3=n3, **STEPS)
    ours = trainer.model.double()
    plain = PlainComplEx(M, R, L * CODE_DIM).double()
    plain.entities.data.copy_(ours.entity_embedding.data)
    plain.relations.data.copy_(ours.relation_embedding.data)
    assert 1e-4 < float(plain.entities.detach().std()) < 1e-2
    optimizer = OPTIMIZERS[name](plain.parameters(), lr=0.1)
    triples = torch.from_numpy(with_inverse(ring_kg.train, R)).unique(dim=0)
    for _ in range(4):
        trainer._train_epoch(trainer.phase())  # one step: the batch holds all queries
        trainer.epoch += 1
        optimizer.zero_grad()
        plain.loss(triples, n3).backward()
        optimizer.step()
        torch.testing.assert_close(ours.entity_embedding, plain.entities, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.relation_embedding, plain.relations, rtol=1e-5, atol=1e-6)


def test_code_vectors_are_scored_as_they_are_where_the_widths_agree() -> None:
    scorer = CodeScorer(L, K, Q, CODE_DIM, dim=L * CODE_DIM, decoder="distmult")
    codes = torch.randint(K, (M, L, Q))
    wanted = scorer.rq_codebook.decode_from_codes(codes).flatten(1)
    assert torch.equal(scorer.entity_vectors_from_codes(codes), wanted)
    assert all("W_q" not in name for name, _ in scorer.named_parameters())
    other = CodeScorer(L, K, Q, CODE_DIM, dim=2 * L * CODE_DIM, decoder="distmult")
    assert other.entity_vectors_from_codes(codes).shape == (M, 2 * L * CODE_DIM)


@pytest.mark.parametrize(
    ("changes", "is_table"),
    [
        ({}, True),
        ({"init_dim": D + 2}, False),
        ({"tf_layers": 1, "gcn_layers": 1, "gcn_dim": L * CODE_DIM}, True),
        ({"gcn_layers": 1, "gcn_dim": D}, False),
    ],
    ids=str,
)
def test_z_starts_as_the_table_where_no_map_changes_the_width(
    ring_kg: KnowledgeGraph, changes: dict[str, Any], is_table: bool
) -> None:
    from model.relational_graph import RelationalGraph

    model = make_model(ring_kg, **(TABLE_ONLY | changes))
    graph = RelationalGraph.from_triples(ring_kg.train, M, R)
    same_width = model.entity_embedding.shape[1] == L * CODE_DIM
    assert is_table == (same_width and torch.equal(model.clean_z(graph).flatten(1), model.entity_embedding))


def test_n3_is_the_sum_of_cubed_moduli() -> None:
    x = torch.tensor([[3.0, 0.0, 4.0, 1.0]])  # 3 + 4i and 0 + 1i
    assert float(n3_norm(x, x)) == pytest.approx(2 * (125 + 1), rel=1e-5)


def test_the_script_reaches_a_good_rank_on_the_bundled_graph() -> None:
    flags = "--dataset data/family --rank 16 --epochs 3 --eval_every 3 --test"
    command = [sys.executable, "benchmarks/plain_complex.py", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout.split("test MRR ")[1].split()[0]) > 0.3
