"""benchmarks/llm_real.py with a tiny model: three variants on equal rows and steps, in parts, and its record."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import llm_real
from common import steps
from common.errors import InputError
from common.files import read_json
from lora_training.compare_llm import VARIANTS, WITH
from tests.conftest import Run
from tests.test_demo import InProcess
from tests.test_train_lora import base  # noqa: F401


def words(base: Path, run: Run, out: Path) -> list[str]:  # noqa: F811
    return [
        "--dataset", str(run.dataset), "--codes", str(run.codes), "--code_init", str(run.checkpoint), "--model_name",
        str(base), "--out", str(out), "--rows", "24", "--val_rows", "6", "--test_rows", "8", "--step_tokens", "1500",
        "--eval_steps", "2",
    ]  # fmt: skip


def test_three_variants_on_equal_steps_and_a_second_call_runs_nothing(
    base: Path, family_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr(steps, "subprocess", SimpleNamespace(Popen=InProcess))
    llm_real.main(words(base, family_run, tmp_path / "out"))
    record = read_json(tmp_path / "out" / "llm_real.json", "record")
    assert [row["row"] for row in record["rows"]] == [variant.row for variant in VARIANTS]
    assert record["metric"] == "accuracy" and 1 < record["rows_per_step"] < 24
    for row in record["rows"]:
        assert row["seeds"]["0"]["count"] == 8 and row["mean"] == row["seeds"]["0"]["accuracy"]
        assert row["tuning"]["0"]["steps"] == -(-24 // record["rows_per_step"]), "equal rows, so equal steps"
    mean = {row["row"]: row["mean"] for row in record["rows"]}
    for line in record["differences"]:
        assert line["mean"] == pytest.approx(mean[WITH.row] - mean[line["minus"]]) and line["queries"] == 8
    assert len(record["seconds"]) == 6

    def no_step(*_: object, **__: object) -> None:
        raise AssertionError("a finished step was run again")

    monkeypatch.setattr(steps, "subprocess", SimpleNamespace(Popen=no_step))
    llm_real.main(words(base, family_run, tmp_path / "out"))
    assert "wrote" in capsys.readouterr().out


def test_the_end_of_a_part_is_a_sigterm_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which run_steps passes on; train_lora.py then saves a checkpoint (tests/test_train_lora.py)."""
    sent: list[int] = []
    monkeypatch.setattr(llm_real.os, "kill", lambda pid, number: sent.append(number))
    llm_real.stop_part(3)
    assert sent == [signal.SIGTERM]


def test_missing_files_are_named(tmp_path: Path) -> None:
    flags = ["--dataset", str(tmp_path), "--codes", str(tmp_path / "c.pt"), "--code_init", "x", "--model_name", "m"]
    with pytest.raises(InputError, match=r"--codes .*c\.pt does not exist"):
        llm_real.main([*flags, "--out", str(tmp_path / "out")])
