"""The benchmarks' own arithmetic, that each runs and writes what it prints, and the GPU checklist on a bare machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import step_profile, time_to_quality
from benchmarks.gpu_checklist import keep_results, parity
from benchmarks.measure import PartTimes, around_parts, make_trainer, print_table, run_steps
from benchmarks.time_to_quality import original_model, original_step, ours_row, train_original
from common.errors import InputError
from common.files import ROOT, load_torch, read_json
from data.knowledge_graph import KnowledgeGraph
from model.schedule import CODES
from tests.conftest import SHAPE, K, L, M, Q, flags_of, small_flags

SMALL = ["--config", os.devnull, *flags_of(SHAPE), "--device", "cpu", "--batch", "32"]
# what a bare machine with CUDA torch does not have
ABSENT = ("numba", "pooch", "requests", "dgl", "sklearn", "scipy", "matplotlib", "pykeen", "datasets", "accelerate")


# ---------------------------------------------------------------- tables and parts


def test_tables_leave_blanks_and_keep_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([{"way": "a", "ratio": 1.234}, {"way": "bcd", "ratio": None}], {"way": "<", "ratio": ".2f"})
    assert capsys.readouterr().out == "way  ratio\na     1.23\nbcd\n"


def test_parts_of_a_step_are_counted_and_put_back(ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    trainer = make_trainer(ring_kg, [*SMALL, "--encoder_every", "2", "--warmup_epochs", "0"], tmp_path / "x.pt")
    before = {name: getattr(trainer, name) for name in ("_scorer_step", "_encoder_step", "_refresh")}
    parts = PartTimes()
    with around_parts(trainer, parts):
        total = run_steps(trainer, 4)
    assert parts.calls["_scorer_step"] == parts.calls["optimizer.step"] == 4
    assert parts.calls["_encoder_step"] == 2 and parts.calls["_start_epoch"] == 1
    assert 0 < sum(parts.seconds.values()) <= total  # parts within parts count once
    assert all(getattr(trainer, name) == method for name, method in before.items())
    assert len(trainer._batches()) > 4


def test_flops_and_bytes_are_those_of_the_operators() -> None:
    a, b, out = torch.randn(30, 20), torch.randn(20, 10), torch.empty(30, 10)
    costs = step_profile.PartCosts()
    with costs("products"):
        torch.mm(a, b, out=out)
        a.t() @ out
    with costs("rows"):
        a.index_select(0, torch.tensor([1, 2, 3]))
        a.view(-1).view(600)
    assert costs.flops["products"] == 2 * (30 * 20 * 10) * 2
    assert costs.bytes["products"] >= 4 * (600 + 200 + 300) + 4 * (600 + 300 + 200)
    assert costs.flops["rows"] == 0 and 2 * 4 * 3 * 20 <= costs.bytes["rows"] < 4 * 600  # the rows and the index alone


def test_profile_adds_up(ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    recipe = ["--encoder_every", "2", "--frozen_noise", "0.3", "--weight_average", "0.9"]
    trainer = step_profile.ready_trainer(ring_kg, [*SMALL, *recipe], "cpu", tmp_path)
    rows = step_profile.profile_step(trainer, 1, {"medium": 1e9, "highest": 5e8})
    *parts, whole = rows
    assert sum(row["ms"] for row in parts) == pytest.approx(whole["ms"])
    assert sum(row["share"] for row in parts) == pytest.approx(1)
    assert whole["floor_ms"] == pytest.approx(sum(row["floor_ms"] for row in parts)) and whole["floor_ms"] > 0
    assert whole["ratio"] == pytest.approx(whole["ms"] / whole["floor_ms"])
    scorer = parts[0]
    assert scorer["floor_ms"] == pytest.approx(1e3 * scorer["gflop"])  # at 1 GFLOP/s
    assert parts[2]["floor_ms"] == pytest.approx(2e3 * parts[2]["gflop"])  # codes are searched in full precision
    costs = step_profile.PartCosts()
    with costs("search"):
        trainer._refresh(CODES)
    once = costs.flops["search"] / step_profile.cycle_of(trainer)
    assert parts[2]["gflop"] * 1e9 == once, "the epoch's own search at its start is no part of a step"
    # scores [32, M] against D: one product forward, two backward, at least
    assert scorer["gflop"] * 1e9 >= 3 * 2 * 32 * M * SHAPE["gcn_dim"]


def test_profile_of_a_recipe_with_text_and_sampled_negatives(ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", np.eye(M, dtype=np.float32))
    recipe = ["--text_emb", str(tmp_path / "text.npy"), "--inputs", "neighbours+text", "--num_negatives", "8"]
    trainer = step_profile.ready_trainer(ring_kg, [*SMALL, *recipe], "cpu", tmp_path)
    assert trainer.text is not None and trainer.text.shape == (M, M)
    scorer, *_, whole = step_profile.profile_step(trainer, 1, {"medium": 1e9, "highest": 5e8})
    assert 0 < scorer["gbyte"] < whole["gbyte"]


# ---------------------------------------------------------------- time to quality


def test_marks_are_read_from_a_record() -> None:
    history = [
        {"phase": "warm-up", "valid": {"mrr": 0.9}, "seconds": 1.0},
        {"phase": "codes", "seconds": 2.0},
        {"phase": "codes", "valid": {"mrr": 0.31}, "seconds": 3.0},
        {"phase": "frozen", "valid": {"mrr": 0.29}, "seconds": 4.0},
    ]
    record = {"name": "run", "args": {"max_minutes": 0}, "history": history}
    row = ours_row(record, [0.30, 0.33], minutes=1)
    assert (row["s_to_0.30"], row["s_to_0.33"], row["mrr"]) == (3.0, None, 0.31)
    assert (row["epochs"], row["s_per_epoch"]) == (4, 1.0)
    assert ours_row(record, [0.30], minutes=2.5 / 60)["mrr"] is None, "only what was there in the same minutes"
    limited = record | {"args": {"max_minutes": 3.5 / 60}}
    assert ours_row(limited, [0.30], minutes=3.5 / 60)["epochs"] == 4, "the last epoch of a limited run ends past it"
    with pytest.raises(InputError, match=r"no epoch of run was over after --minutes 0\.01"):
        ours_row(record, [0.30], minutes=0.01)


def test_original_step_is_the_trainers_loss_by_the_other_way(ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    """Per-edge products, dense labels, one graph: the value is that of encode -> codes -> scores by our own parts."""
    pytest.importorskip("dgl")
    trainer = original_model(ring_kg, SMALL, tmp_path)
    codebook = trainer.model.rq_codebook
    assert (trainer.model.seq_len, codebook.num_codes, codebook.num_quantizers) == (L, K, Q)
    ours = make_trainer(ring_kg, [*size_flags(), *time_to_quality.ORIGINAL], tmp_path / "y.pt")
    for model in (trainer.model, ours.model):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout | torch.nn.Dropout2d):
                module.p = 0.0
    batch = torch.arange(0, 30)
    found = original_step(trainer, trainer.model, batch)
    ours.model.load_state_dict(trainer.model.state_dict())  # after the step: it initialised the codebooks
    output = ours.model.rq_codebook(ours.model.encode(ours.graph).z)
    structure, _ = ours._scorer_losses(ours.model.scorer.entity_vectors(output.z_q), batch, None)
    torch.testing.assert_close(found, structure + output.total_loss, rtol=1e-4, atol=1e-5)


def size_flags() -> list[str]:
    return flags_of({"seq_len": L, "num_code": K, "num_quantizers": Q})


def test_original_recipe_reports_what_it_did_and_no_more(ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    pytest.importorskip("dgl")
    row = train_original(ring_kg, SMALL, 0.001, tmp_path)
    assert row["steps"] >= 1 and 0 < row["mrr"] < 1 and row["minutes"] >= 0.001
    assert row["epochs"] == pytest.approx(row["steps"])  # one batch of 1024 is the ring's epoch
    assert row["s_per_epoch"] is None or row["s_per_epoch"] > 0


# ---------------------------------------------------------------- the checklist


def test_parity_finds_equal_kernels_and_would_find_unequal_ones(
    ring_kg: KnowledgeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    rows = parity(ring_kg, "cpu", 16)
    assert [row["note"] for row in rows] == [""] * 4
    from benchmarks import gpu_checklist

    whole = gpu_checklist.compose_sum
    monkeypatch.setattr(
        gpu_checklist, "compose_sum",
        lambda x, v, edges, backend, composition: whole(x, v, edges, backend, composition)
        * (1.001 if backend == "fused" else 1),
    )  # fmt: skip
    assert all("FAILED" in row["note"] for row in parity(ring_kg, "cpu", 16))


def test_what_is_kept_ranks_like_the_run(ring: Path, tmp_path: Path, rq: Any) -> None:
    assert rq(*small_flags(ring, tmp_path)).code == 0
    codes = next((tmp_path / "codes").glob("*_rq.pt"))
    checkpoint = next((tmp_path / "checkpoints").glob("*.pt"))
    record, out = read_json(codes.with_suffix(".json"), "record"), tmp_path / "out"
    keep_results(out, record, codes, checkpoint)
    assert {file.name for file in out.iterdir()} == {"metrics.json", "codes.pt", "decoder.pt"}
    kept = load_torch(out / "codes.pt", "codes")
    assert torch.equal(kept, load_torch(codes, "codes"))
    assert "entity_embedding" not in load_torch(out / "decoder.pt", "decoder")["best"]["model"]
    words = {
        "dataset": ring, "eval_codes": out / "codes.pt", "checkpoint": out / "decoder.pt", "device": "cpu",
        "metrics_out": tmp_path / "m.json",
    }  # fmt: skip
    assert rq(*flags_of(words)).code == 0
    assert read_json(tmp_path / "m.json", "metrics")["mrr"] == pytest.approx(record["test"]["mrr"], rel=1e-6)


def checklist(folder: Path, absent: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """gpu_checklist.sh --dry_run in a process of its own, in which the packages ``absent`` cannot be imported."""
    (folder / "site").mkdir(exist_ok=True)
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in absent)
    (folder / "site" / "sitecustomize.py").write_text(f"import sys\n{blocked}")
    environment = os.environ | {
        "PYTHON": sys.executable, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1",
        "OUT": str(folder / "out"), "WORK": str(folder / "work"),
    }  # fmt: skip
    words = ["bash", str(ROOT / "benchmarks" / "gpu_checklist.sh"), "--dry_run"]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=500)


@pytest.mark.slow
def test_checklist_runs_bare_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    first = checklist(tmp_path, ABSENT)
    assert first.returncode == 0, first.stdout + first.stderr
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {
        "table.txt", "checklist.json", "metrics.json", "codes.pt", "decoder.pt", "train.log",
    }  # fmt: skip
    assert first.stdout.endswith((out / "table.txt").read_text())
    assert "numba is not installed" in first.stdout and "FAILED" not in first.stdout
    assert read_json(out / "metrics.json", "record")["epochs"] == 2
    second = checklist(tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "continuing gpu_checklist.pt after epoch 2" in (out / "train.log").read_text()
    assert "parity mult float64" in second.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["message_passing", "step_profile", "time_to_quality", "random_graph"])
def test_quick_prints_a_ratio_and_writes_the_same(name: str, tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--quick", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_json(tmp_path / "rows.json", "rows")
    assert record["args"]["quick"] and all("ratio" in row for row in record["rows"]) and "ratio" in done.stdout


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "benchmarks").glob("*.py") if p.name != "measure.py"))
def test_help_names_the_flags(script: str) -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / script), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT / "benchmarks", timeout=100)
    assert done.returncode == 0 and ("--quick" in done.stdout or "--dry_run" in done.stdout), done.stderr
