"""The arithmetic of the benchmarks; each runs and writes what it prints; the GPU checklist on a bare machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu_checklist, step_profile
from benchmarks.gpu_checklist import parity
from benchmarks.measure import FAMILY, PartTimes, around_parts, make_trainer, print_table, run_steps
from common.files import ROOT, read_json
from data.knowledge_graph import KnowledgeGraph
from model.schedule import CODES
from tests.conftest import SHAPE, M, flags_of

SMALL = ["--config", os.devnull, *flags_of(SHAPE), "--device", "cpu", "--batch", "32"]
# packages that a machine with only CUDA torch does not have
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
    assert 0 < sum(parts.seconds.values()) <= total  # a part within a part counts once
    assert all(getattr(trainer, name) == method for name, method in before.items())
    assert len(trainer._batches()) > 4


def test_profile_adds_up(ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    trainer = step_profile.ready_trainer(ring_kg, [*SMALL, "--encoder_every", "2"], "cpu", tmp_path)
    rows = step_profile.profile_step(trainer, 1, {"medium": 1e9, "highest": 5e8})
    *parts, whole = rows
    assert sum(row["ms"] for row in parts) == pytest.approx(whole["ms"])
    assert sum(row["share"] for row in parts) == pytest.approx(1)
    assert whole["floor_ms"] == pytest.approx(sum(row["floor_ms"] for row in parts)) and whole["floor_ms"] > 0
    assert whole["ratio"] == pytest.approx(whole["ms"] / whole["floor_ms"])
    by_name = {row["part"]: row for row in parts}
    scorer, search = (by_name[step_profile.STEP_PARTS[part]] for part in ("_scorer_step", "_refresh"))
    assert scorer["floor_ms"] == pytest.approx(1e3 * scorer["gflop"])  # at 1 GFLOP/s
    assert search["floor_ms"] == pytest.approx(2e3 * search["gflop"])  # the search uses full precision
    costs = step_profile.PartFlops()
    with costs("search"):
        trainer._refresh(CODES)
    assert search["gflop"] * 1e9 == costs.flops["search"] / step_profile.cycle_of(trainer), "one search per cycle"
    # scores [32, M] with D: one product forward, two backward, at least
    assert scorer["gflop"] * 1e9 >= 3 * 2 * 32 * M * SHAPE["gcn_dim"]


def test_profile_of_a_recipe_with_text_and_sampled_negatives(ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", np.eye(M, dtype=np.float32))
    recipe = ["--text_emb", str(tmp_path / "text.npy"), "--inputs", "neighbours+text", "--num_negatives", "8"]
    trainer = step_profile.ready_trainer(ring_kg, [*SMALL, *recipe], "cpu", tmp_path)
    assert trainer.text is not None and trainer.text.shape == (M, M)
    assert step_profile.profile_step(trainer, 1, {"medium": 1e9, "highest": 5e8})[-1]["gflop"] > 0


# ---------------------------------------------------------------- the checklist


def test_parity_finds_equal_kernels_and_would_find_unequal_ones(
    ring_kg: KnowledgeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    rows = parity(ring_kg, "cpu", 16)
    assert [row["note"] for row in rows] == [""] * 4
    whole = gpu_checklist.compose_sum
    monkeypatch.setattr(
        gpu_checklist, "compose_sum",
        lambda x, v, edges, backend, composition: whole(x, v, edges, backend, composition)
        * (1.001 if backend == "fused" else 1),
    )  # fmt: skip
    assert all("FAILED" in row["note"] for row in parity(ring_kg, "cpu", 16))


def checklist(folder: Path, absent: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """gpu_checklist.py --dry_run in its own process, in which the packages ``absent`` cannot be imported."""
    (folder / "site").mkdir(exist_ok=True)
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in absent)
    (folder / "site" / "sitecustomize.py").write_text(f"import sys\n{blocked}")
    environment = os.environ | {"PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / "benchmarks" / "gpu_checklist.py"), "--dry_run"]
    words += ["--out", str(folder / "out"), "--work", str(folder / "work")]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=500)


@pytest.mark.slow
def test_checklist_runs_without_optional_packages_and_continues(tmp_path: Path) -> None:
    first = checklist(tmp_path, ABSENT)
    assert first.returncode == 0, first.stdout + first.stderr
    out = tmp_path / "out"
    assert {"table.txt", "checklist.json", "train.log"} <= {file.name for file in out.iterdir()}
    assert first.stdout.endswith((out / "table.txt").read_text()) and "FAILED" not in first.stdout
    (written,) = out.glob("*_rq.json")
    assert written.with_suffix(".pt").exists() and read_json(written, "record")["epochs"] == 2
    second = checklist(tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "parity mult float64" in second.stdout


@pytest.mark.slow
def test_quick_prints_a_ratio_and_writes_the_same(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / "step_profile.py"), "--quick", "--dataset", str(FAMILY)]
    words += ["--json", str(tmp_path / "rows.json")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_json(tmp_path / "rows.json", "rows")
    assert record["args"]["quick"] and all("ratio" in row for row in record["rows"]) and "ratio" in done.stdout
