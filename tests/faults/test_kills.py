"""Killed at any moment and continued, a run ends in the same bits; asked to stop, it saves, says so and goes."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common import errors
from common.files import ROOT, load_torch
from lora_training import lora_trainer, train_lora
from tests.conftest import flags_of, small_flags
from tests.faults.children import finish, start
from tests.faults.world import pristine, tuning
from tests.test_trainer import assert_same

FAMILY: dict[str, Any] = {
    "seq_len": 4, "num_code": 32, "num_quantizers": 2, "code_dim": 16, "init_dim": 32, "gcn_dim": 32, "gcn_layers": 1,
    "tf_layers": 0, "decoder": "distmult", "epoch": 12, "batch": 512, "lr": 0.01, "device": "cpu", "freeze_at": 0.7,
    "graph_backend": "torch",
}  # fmt: skip


def family_flags(folder: Path) -> list[str]:
    places = {
        "dataset": ROOT / "data" / "family",
        "out_dir": folder / "codes",
        "checkpoint_dir": folder / "checkpoints",
    }
    return flags_of(places | FAMILY)


def ring_flags(folder: Path) -> list[str]:
    return small_flags(pristine() / "data" / "ring", folder, epoch=20, graph_backend="torch", freeze_at=0.8)


def kill_and_continue(flags: list[str], folder: Path, after: float) -> None:
    """SIGKILL after so many seconds, or once the first checkpoint is there if that is later, then --restore."""
    folder.mkdir()
    process = start("run_rq", flags, folder / "killed.txt")
    deadline = time.monotonic() + 120
    while process.is_alive() and not list(folder.glob("checkpoints/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(after)
    process.kill()
    process.join()
    more = ["--restore"] if list(folder.glob("checkpoints/*.pt")) else []
    assert finish("run_rq", [*flags, *more], folder / "continued.txt") == 0, (folder / "continued.txt").read_text()


def assert_same_run(a: Path, b: Path, stem: str) -> None:
    """Codes, and everything in the checkpoints, bit for bit; and nothing else lies about."""
    parts = [load_torch(folder / "checkpoints" / f"{stem}.pt", "checkpoint") for folder in (a, b)]
    for part in ("best", "last"):
        assert_same(parts[0][part], parts[1][part])
    codes = [load_torch(folder / "codes" / f"{stem}.pt", "codes") for folder in (a, b)]
    assert torch.equal(*codes)
    listed = [sorted(path.name for path in folder.glob("c*/*")) for folder in (a, b)]
    assert listed[0] == listed[1] and not list(b.glob("c*/.*.tmp"))


def moments(flags: Any, stem: str, folder: Path, count: int, seed: int) -> None:
    straight = folder / "straight"
    straight.mkdir()
    began = time.monotonic()
    assert finish("run_rq", flags(straight), straight / "out.txt") == 0, (straight / "out.txt").read_text()
    length, rng = time.monotonic() - began, random.Random(seed)
    for i in range(count):
        kill_and_continue(flags(folder / str(i)), folder / str(i), rng.random() * length * 0.8)
        assert_same_run(straight, folder / str(i), stem)


def test_killed_at_two_moments(tmp_path: Path) -> None:
    moments(ring_flags, "ring_3_8_2_rq", tmp_path, 2, seed=1)


@pytest.mark.slow
def test_killed_at_twenty_moments(tmp_path: Path) -> None:
    moments(family_flags, "family_4_32_2_rq", tmp_path, 20, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_stage_one_saves_and_says_so(tmp_path: Path, number: int, code: int) -> None:
    process = start("run_rq", family_flags(tmp_path), tmp_path / "out.txt")
    while process.is_alive() and not list(tmp_path.glob("checkpoints/*.pt")):
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    text = (tmp_path / "out.txt").read_text()
    assert process.exitcode == code, text
    found = re.findall(r"^stopped: epoch (\d+) is saved in .*--restore goes on", text, re.MULTILINE)
    assert len(found) == 1 and "Traceback" not in text, text
    assert load_torch(next(tmp_path.glob("checkpoints/*.pt")), "checkpoint")["last"]["epoch"] == int(found[0])


# ---------------------------------------------------------------- LoRA


def lora_flags(out: Path, steps: int = 6) -> list[str]:
    flags = tuning(pristine(), out, "--lora_dropout", "0.1", "--learning_rate", "0.01", "--logging_steps", "1")
    for name, value in (("--max_steps", steps), ("--eval_steps", 2)):
        flags[flags.index(name) + 1] = str(value)
    return flags


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(str(out / "lora_adapters" / "adapter_model.safetensors"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "straight"
    train_lora.main(lora_flags(out))
    return out


def assert_same_adapter(a: Path, b: Path) -> None:
    expected, found = weights(a), weights(b)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert sorted(path.name for path in b.iterdir()) == ["lora_adapters"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_lora_saves_the_step_and_goes_on_bit_for_bit(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    number: int, code: int,
) -> None:  # fmt: skip
    """Step 3 is between two regular checkpoints: it is saved because of the signal alone."""
    loss, calls = lora_trainer.mean_loss, []

    def asking(*words: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return loss(*words, **more)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(lora_trainer, "mean_loss", asking)
        errors.run_command(lambda: train_lora.main(lora_flags(out)))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stopped")]
    assert end.value.code == code
    assert lines == [f"stopped: step 3 is saved in {out / 'checkpoints'}; go on with --resume_from_checkpoint last"]
    assert not (out / "lora_adapters").exists()
    train_lora.main([*lora_flags(out), "--resume_from_checkpoint", "last"])
    assert_same_adapter(straight, out)


def test_a_half_written_checkpoint_is_passed_over(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of seconds comes last, so a folder without it was being written when the run was killed."""
    write = lora_trainer.write_record

    def dying(value: Any, path: Path) -> None:
        if path.parent.name == "checkpoint-4":
            raise KeyboardInterrupt
        write(value, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lora_trainer, "write_record", dying)
        train_lora.main(lora_flags(tmp_path))
    assert (tmp_path / "checkpoints" / "checkpoint-4" / "trainer_state.json").is_file()
    train_lora.main([*lora_flags(tmp_path), "--resume_from_checkpoint", "last"])
    assert_same_adapter(straight, tmp_path)


def last_step(out: Path) -> int:
    """The step of the newest whole checkpoint, 0 where there is none."""
    found = [path.parent.name for path in out.glob("checkpoints/checkpoint-*/seconds.json")]
    return max((int(name.removeprefix("checkpoint-")) for name in found), default=0)


def lora_moments(folder: Path, count: int, seed: int) -> None:
    """SIGKILL somewhere between the first checkpoint and the end, then --resume_from_checkpoint."""
    module = "lora_training.train_lora"
    began = time.monotonic()
    straight = folder / "straight"
    assert finish(module, lora_flags(straight, 30), folder / "straight.txt") == 0, (folder / "straight.txt").read_text()
    length, rng, killed = time.monotonic() - began, random.Random(seed), 0
    for i in range(count):
        out, log = folder / str(i), folder / f"{i}.txt"
        process = start(module, lora_flags(out, 30), log)
        step = rng.randrange(2, 28, 2)  # by steps, not by seconds: other programs may keep either run waiting
        while process.is_alive() and last_step(out) < step:
            time.sleep(0.005)
        time.sleep(rng.random() * length / 30)
        process.kill()
        process.join()
        if not (out / "lora_adapters").is_dir():
            killed += 1
            go_on = [*lora_flags(out, 30), "--resume_from_checkpoint", "last"]
            assert finish(module, go_on, log) == 0, log.read_text()
        assert_same_adapter(straight, out)
    assert killed > count / 2, f"only {killed} of {count} were killed before their end"


def test_lora_killed_at_two_moments(tmp_path: Path) -> None:
    lora_moments(tmp_path, 2, seed=3)


@pytest.mark.slow
def test_lora_killed_at_twenty_moments(tmp_path: Path) -> None:
    lora_moments(tmp_path, 20, seed=4)
