"""Half a minute of checks that stage 1 is correct: `python test_rq_simple.py`, or through pytest."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from common.errors import CommandParser, run_command
from common.files import ROOT, load_torch, read_json
from data.knowledge_graph import KnowledgeGraph
from model.relational_graph import RelationalGraph
from model.RQCodebook import RQCodebook
from model.RQGCN import RQGCN

M, L, K, Q, D = 50, 4, 16, 3, 8


def seeded_codebook() -> tuple[RQCodebook, torch.Tensor]:
    """A codebook initialised by residual k-means on [M, L, D] vectors, and the vectors."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(M, L, D, generator=generator)
    codebook = RQCodebook(K, D, Q)
    codebook.init_from_data(z, generator=generator)
    return codebook.eval(), z


def test_codes_are_what_is_decoded() -> None:
    """decode_from_codes(cal_codes(z)), cal_code_emds(z) and forward(z).z_q are the same bits [M, L, D]."""
    codebook, z = seeded_codebook()
    codes = codebook.cal_codes(z)
    assert codes.shape == (M, L, Q) and codes.dtype == torch.int64 and 0 <= int(codes.min()) <= int(codes.max()) < K
    decoded = codebook.decode_from_codes(codes)
    assert decoded.shape == (M, L, D)
    assert torch.equal(decoded, codebook.cal_code_emds(z)) and torch.equal(decoded, codebook(z).z_q)


def test_each_level_quantizes_the_residual_of_the_last_one() -> None:
    """The error of the decoded vectors falls with every level, and level q's code is the nearest to its residual."""
    codebook, z = seeded_codebook()
    codes = codebook.cal_codes(z)
    errors = [
        float((codebook.decode_from_codes(codes, levels) - z).detach().square().mean()) for levels in range(1, Q + 1)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]
    residual = z - codebook.decode_from_codes(codes, 1)
    weight = codebook.codebooks[1](torch.arange(K))
    second = torch.cdist(residual.view(-1, D), weight).argmin(1).view(M, L)
    assert torch.equal(second, codes[:, :, 1])


def test_beta_weighs_the_commitment_term() -> None:
    """Eq. 5: vectors get the commitment term's gradient times beta, codebooks the codebook term's."""
    codebook, z = seeded_codebook()
    z.requires_grad_()
    output = codebook(z)
    output.total_loss.backward()
    residual, pull = z.detach().clone(), torch.zeros_like(z)
    for level in range(Q):
        residual = residual - codebook.codebooks[level](output.all_indices[:, :, level]).detach()
        pull += residual
    torch.testing.assert_close(z.grad, codebook.beta * 2 / z.numel() * pull)


def test_entities_with_equal_codes_score_alike() -> None:
    """Scores depend on entities through their codes only: equal codes give equal scores, as head and as tail."""
    kg = KnowledgeGraph.load(ROOT / "data" / "family")
    torch.manual_seed(0)
    model = RQGCN(kg.num_entities, kg.num_relations, init_dim=16, gcn_dim=16, seq_len=L, num_code=K, num_quantizers=Q,
                  code_dim=D, decoder="distmult").eval()  # fmt: skip
    graph = RelationalGraph.from_triples(kg.train, kg.num_entities, kg.num_relations)
    model.rq_codebook.init_from_data(model.clean_z(graph))
    codes = model.cal_allent_codes(graph)
    assert codes.shape == (kg.num_entities, L, Q)
    codes[1] = codes[0]
    q_all = model.scorer.entity_vectors_from_codes(codes)
    scores = model.scorer.scores(q_all, model.relation_vectors()[:1].expand(len(q_all), -1), q_all)
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[:, 0], scores[:, 1])
    assert not torch.equal(scores[0], scores[2])


def test_a_short_run_writes_codes_that_score_as_recorded() -> None:
    """run_rq.py on the bundled graph: files of the fixed names and shapes, and the integers carry the graph."""
    import run_rq

    with tempfile.TemporaryDirectory() as folder:
        flags = ["--config", os.devnull, "--dataset", str(ROOT / "data" / "family"), "--seq_len", "4",
                 "--num_code", "64", "--num_quantizers", "2", "--init_dim", "64", "--gcn_dim", "64", "--code_dim", "16",
                 "--gcn_layers", "1", "--decoder", "distmult", "--epoch", "8", "--lr", "0.01", "--batch", "256",
                 "--device", "cpu", "--out_dir", folder, "--checkpoint_dir", f"{folder}/checkpoints"]  # fmt: skip
        run_rq.train(run_rq.parse_config(flags))
        codes = load_torch(Path(folder) / "family_4_64_2_rq.pt", "codes")
        record = read_json(Path(folder) / "family_4_64_2_rq.json", "record")
        assert list(codes.shape) == [1000, 4, 2] and codes.dtype == torch.int64
        assert record["test"]["mrr"] > 0.3 and record["test_shuffled_codes"]["mrr"] < 0.1 * record["test"]["mrr"]


def main() -> None:
    """Run every check and print its description."""
    CommandParser(description="Half a minute of checks that stage 1 is correct; no flags.").parse_args()
    checks = [value for name, value in globals().items() if name.startswith("test_") and callable(value)]
    for check in checks:
        print(f"checking: {(check.__doc__ or '').strip()}", flush=True)
        check()
        print("  ok")
    print(f"{len(checks)} checks passed; next: make demo")


if __name__ == "__main__":
    run_command(main)
