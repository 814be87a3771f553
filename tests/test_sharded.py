"""FSDP2 against plain processes: the same losses, the same adapter, also when stopped and resumed. Old libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import InputError
from lora_training import plan, train_lora
from lora_training.base_model import check_version
from tests.test_train_lora import adapter, base, data, record, two_processes, words  # noqa: F401 (fixtures)

FLAGS = {"lora_dropout": 0, "max_steps": 4, "eval_steps": 2, "batch_size": 2, "gradient_checkpointing": True}


@pytest.mark.slow
def test_fsdp2_equals_plain_processes(base: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    plain = two_processes("lora_training/train_lora.py", words(base, data, tmp_path / "plain", **FLAGS))
    assert plain.returncode == 0, plain.stderr[-2000:]
    flags = words(base, data, tmp_path / "sharded", **FLAGS)
    stopped = two_processes("tests/fsdp_on_cpu.py", flags, STOP_AT="3")
    assert "stopped: step 3 is saved" in stopped.stderr, stopped.stderr[-2000:]
    resumed = two_processes("tests/fsdp_on_cpu.py", [*flags, "--resume_from_checkpoint", "last"])
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    for done in (stopped, resumed):
        line = next(line for line in done.stdout.splitlines() if "parameters are sharded" in line).split()
        assert line[0] == line[2] and int(line[0]) > 40, "every parameter is split"
    expected, found = adapter(tmp_path / "plain"), adapter(tmp_path / "sharded")
    assert expected.keys() == found.keys() and sum("trainable_tokens" in name for name in found) == 2
    assert max(float((expected[name] - found[name]).abs().max()) for name in expected) < 1e-5
    assert record(tmp_path / "sharded")["sharding"] == "fsdp" and record(tmp_path / "plain")["sharding"] == "ddp"
    losses = [[e[key] for e in record(tmp_path / name)["history"] if key in e]
              for name in ("plain", "sharded") for key in ("loss", "eval_loss")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[2], abs=1e-4) and losses[1] == pytest.approx(losses[3], abs=1e-4)


def test_an_old_transformers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("5.23.0", "5.24.0.dev0", "6.0.1"):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        check_version()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.17.0")
    with pytest.raises(InputError, match=r"transformers 5.17.0 is installed, training needs 5.23 or later"):
        plan.check_device(train_lora.parse_args([]))
