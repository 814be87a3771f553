"""On the real FB15k-237 (slow; skipped without data/FB15k-237): the integers carry the graph, shuffled they do not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import run_rq
from common.files import ROOT, load_torch
from data.knowledge_graph import KnowledgeGraph
from model.evaluation import evaluate_codes
from model.RQGCN import scorer_of

FOLDER = ROOT / "data" / "FB15k-237"
STEM = "FB15k-237_4_1024_4_rq"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="data/FB15k-237 is missing: python data/download.py FB15k-237"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short epochs without the graph encoder, two of them with codes."""
    out = tmp_path_factory.mktemp("fb15k237")
    flags = ["--config", os.devnull, "--dataset", str(FOLDER), "--seq_len", "4",
             "--decoder", "distmult", "--gcn_layers", "0", "--tf_layers",
             "0", "--lr", "0.005", "--epoch", "3", "--device", "cpu",
             "--out_dir", str(out), "--checkpoint_dir", str(out / "checkpoints")]  # fmt: skip
    run_rq.train(run_rq.parse_config(flags))
    return out


def test_the_dump_scores_as_recorded_and_shuffled_codes_do_not(run: Path) -> None:
    record = json.loads((run / f"{STEM}.json").read_text())
    assert record["shape"] == [14541, 4, 4] and record["test"]["count"] == 2 * 20466
    assert record["test"]["mrr"] > 0.23
    assert record["test_shuffled_codes"]["mrr"] < 0.1 * record["test"]["mrr"]
    assert record["valid_mrr_by_levels"] == sorted(record["valid_mrr_by_levels"])
    flags = ["--dataset", str(FOLDER), "--eval_codes", str(run / f"{STEM}.pt"),
             "--checkpoint", str(run / "checkpoints" / f"{STEM}.pt"), "--device", "cpu",
             "--metrics_out", str(run / "again.json")]  # fmt: skip
    run_rq.eval_codes(run_rq.parse_config(flags))
    again = json.loads((run / "again.json").read_text())
    assert again["mrr"] == pytest.approx(record["test"]["mrr"], abs=1e-6)


def test_random_codes_score_like_chance(run: Path) -> None:
    kg = KnowledgeGraph.load(FOLDER)
    stored = load_torch(run / "checkpoints" / f"{STEM}.pt", "checkpoint")
    scorer, relations = scorer_of(stored["model"], stored["best"], "cpu")
    codes = torch.randint(0, 1024, (kg.num_entities, 4, 4), generator=torch.Generator().manual_seed(0))
    metrics = evaluate_codes(scorer, relations, codes, kg, "test")
    assert metrics["mrr"] < 0.02
