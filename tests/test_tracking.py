"""--report_to: what the loggers receive, that training stays the same to the bit, and packages that are missing."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.files import load_torch
from model.tracking import values_of
from tests.conftest import RING, Command, L, M, Q, Run, assert_refused, finished, small_flags

CODE_DIM = 6


@pytest.fixture(scope="module")
def logged(ring: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(ring, tmp_path_factory.mktemp("logged"), RING, report_to="tensorboard")


def test_a_logger_changes_no_bit_of_the_codes(logged: Run, ring_run: Run) -> None:
    assert torch.equal(load_torch(logged.codes, "codes"), load_torch(ring_run.codes, "codes"))
    trained, plain = (load_torch(run.checkpoint, "checkpoint")["last"] for run in (logged, ring_run))
    assert all(torch.equal(trained["model"][name], value) for name, value in plain["model"].items())


def test_tensorboard_has_every_epoch_and_the_entities_by_name(logged: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = logged.folder / "checkpoints" / f"{RING}_log"
    events = EventAccumulator(str(folder))
    events.Reload()
    history = logged.record["history"]
    for name, wanted in {
        "loss/structure": [row["structure"] for row in history],
        "valid/mrr": [row["valid"]["mrr"] for row in history],
        f"perplexity/level_{Q}": [row["valid"]["perplexity"][-1] for row in history if "perplexity" in row["valid"]],
    }.items():
        assert [scalar.value for scalar in events.Scalars(name)] == pytest.approx(wanted), name
    assert [scalar.step for scalar in events.Scalars("valid/mrr")] == [1, 2, 3, 4]
    names = (folder / "00000" / "entities" / "metadata.tsv").read_text().splitlines()
    rows = (folder / "00000" / "entities" / "tensors.tsv").read_text().splitlines()
    assert names == [f"Entity {i}" for i in range(M)] and len(rows) == M
    vectors = load_torch(logged.codes.with_name(f"{RING}_emd.pt"), "embeddings")
    assert [float(word) for word in rows[7].split("\t")] == pytest.approx(vectors[7].flatten().tolist())
    assert len(rows[7].split("\t")) == L * CODE_DIM


def test_a_missing_package_is_one_line_before_anything_is_read(
    rq: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
        outcome = rq("--dataset", str(tmp_path / "none"), "--report_to", name)
        assert_refused(outcome, f"--report_to {name}", f"pip install {name}")


def test_wandb_is_offline_by_default(ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rq: Command) -> None:
    """With a stand-in for the package."""
    calls: list[tuple[str, Any]] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append(("log", (step, values))), finish=lambda: calls.append(("finish", None))
    )

    def init(**settings: Any) -> SimpleNamespace:
        calls.append(("init", settings))
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert rq(*small_flags(ring, tmp_path, epoch=2, report_to="wandb")).code == 0
    assert [name for name, _ in calls] == ["init", "log", "log", "finish"]
    assert calls[0][1]["mode"] == "offline" and calls[0][1]["config"]["epoch"] == 2
    assert [step for name, (step, _) in (call for call in calls if call[0] == "log")] == [1, 2]


def test_the_numbers_of_an_epoch_are_floats_by_name() -> None:
    row = {
        "structure": 1.0, "semantic": 0.0, "quantization": 0.5, "levels": [0.3, 0.2], "lr": 0.01,
        "valid": {"mrr": 0.4, "hits@10": 0.6, "queries": 12, "perplexity": [7.0, 5.0], "unseen": {"mrr": 0.1}},
    }  # fmt: skip
    found = values_of(row)
    assert found["loss/quantization_level_2"] == 0.2 and found["perplexity/level_1"] == 7.0
    assert found["valid/hits@10"] == 0.6 and all(isinstance(x, float) and math.isfinite(x) for x in found.values())
    del row["valid"]
    assert "valid/mrr" not in values_of(row)
