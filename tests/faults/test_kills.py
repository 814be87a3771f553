"""A run that was killed at any moment and continued ends in the same bits; one that is asked to stop saves first."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.files import load_torch
from tests.faults.world import SMALL, STAGE1, STEM, TUNE, finish, start

STEPS = 20
TRAIN = f"run_rq.py --dataset W/data/ring --out_dir OUT/codes --checkpoint_dir OUT/checkpoints {SMALL} --epoch 40"
LORA = f"lora_training/train_lora.py {TUNE} --max_steps {STEPS} --eval_steps 2 --output_dir OUT/tuned"


def wait_for(condition: Callable[[], object], process: Any, seconds: float = 120) -> None:
    """Until ``condition`` holds or the process has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and process.is_alive():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Nested dictionaries and lists of tensors and plain values, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b) or ((torch.isnan(a) == torch.isnan(b)).all() and a.isnan().any()), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if "seconds" not in str(key):
                assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}/{i}")
    else:
        assert a == b or a != a, where


# ---------------------------------------------------------------- stage 1


@pytest.fixture(scope="module")
def whole_run(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole")
    finish(TRAIN, pristine, out)
    return out


def last_epoch(out: Path) -> int:
    """The epoch that the checkpoint holds, 0 where there is none."""
    path = out / "checkpoints" / f"{STEM}.pt"
    return int(load_torch(path, "checkpoint")["last"]["epoch"]) if path.exists() else 0


def assert_same_run(a: Path, b: Path) -> None:
    """Codes and everything in the checkpoints are equal, and nothing else is left in the folders."""
    parts = [load_torch(out / "checkpoints" / f"{STEM}.pt", "checkpoint") for out in (a, b)]
    for part in ("best", "last"):
        assert_equal(parts[0][part], parts[1][part], part)
    codes = [load_torch(out / "codes" / f"{STEM}.pt", "codes") for out in (a, b)]
    assert torch.equal(*codes)
    files = [sorted(path.name for path in out.glob("c*/*")) for out in (a, b)]
    assert files[0] == files[1]


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, 20))])
def test_stage_one_killed_at_any_moment_goes_on_to_the_same_bits(
    pristine: Path, tmp_path: Path, whole_run: Path, seed: int
) -> None:
    rng = random.Random(seed)
    process = start(TRAIN, pristine, tmp_path)
    epoch = rng.randrange(1, 20)  # by epochs, not by seconds: other programs may keep the run waiting
    wait_for(lambda: last_epoch(tmp_path) >= epoch, process)
    time.sleep(rng.random() / 20)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it had ended before it was killed"
    finish(f"{TRAIN} --restore", pristine, tmp_path)
    assert_same_run(whole_run, tmp_path)


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))])
def test_a_killed_dump_leaves_the_codes_before_it_or_its_own(pristine: Path, tmp_path: Path, seed: int) -> None:
    world = Path(shutil.copytree(pristine, tmp_path / "world"))
    command, codes = f"run_rq.py {STAGE1} --restore", world / "codes" / f"{STEM}.pt"
    good = load_torch(codes, "codes")
    if seed % 2:
        codes.unlink()
    process = start(command, world, tmp_path / "out")
    wait_for(lambda: (tmp_path / "out" / "log.txt").exists(), process)
    time.sleep(random.Random(seed).random() * 0.3)
    process.kill()
    process.join()
    assert not codes.exists() or torch.equal(load_torch(codes, "codes"), good)
    finish(command, world, tmp_path / "out")
    assert torch.equal(load_torch(codes, "codes"), good)


# ---------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def whole_tuning(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuning")
    finish(LORA, pristine, out)
    return out


def last_step(out: Path) -> int:
    """The step of the newest checkpoint that is complete, 0 where there is none."""
    found = [path.parent.name for path in out.glob("tuned/checkpoints/checkpoint-*/seconds.json")]
    return max((int(name.removeprefix("checkpoint-")) for name in found), default=0)


def assert_same_adapter(a: Path, b: Path) -> None:
    whole, found = (load_file(str(out / "tuned" / "lora_adapters" / "adapter_model.safetensors")) for out in (a, b))
    assert_equal(whole, found)
    assert not (b / "tuned" / "checkpoints").exists()


def go_on(pristine: Path, out: Path, whole: Path) -> None:
    finish(f"{LORA} --resume_from_checkpoint last", pristine, out)
    assert_same_adapter(whole, out)


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 20))])
def test_lora_killed_at_any_moment_goes_on_to_the_same_bits(
    pristine: Path, tmp_path: Path, whole_tuning: Path, seed: int
) -> None:
    rng = random.Random(seed)
    process = start(LORA, pristine, tmp_path)
    step = rng.randrange(2, STEPS - 2, 2)  # by steps, not by seconds: other programs may keep the run waiting
    wait_for(lambda: last_step(tmp_path) >= step, process)
    time.sleep(rng.random() / 20)
    process.kill()
    process.join()
    assert not (tmp_path / "tuned" / "lora_adapters").exists(), "it had ended before it was killed"
    go_on(pristine, tmp_path, whole_tuning)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_lora_that_is_asked_to_stop_saves_the_step(
    pristine: Path, tmp_path: Path, whole_tuning: Path, number: int, code: int
) -> None:
    process = start(LORA, pristine, tmp_path)
    wait_for(lambda: last_step(tmp_path) >= 2, process)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    text = (tmp_path / "log.txt").read_text()
    assert process.exitcode == code and "Traceback" not in text, text
    assert f"step {last_step(tmp_path)} " in text.splitlines()[-1], text
    go_on(pristine, tmp_path, whole_tuning)


def test_a_checkpoint_that_was_half_written_is_passed_over(pristine: Path, tmp_path: Path, whole_tuning: Path) -> None:
    """``seconds.json`` is written last: a folder without it was being written when the run was killed."""
    process = start(LORA, pristine, tmp_path)
    wait_for(lambda: last_step(tmp_path) >= 4, process)
    process.kill()
    process.join()
    (tmp_path / "tuned" / "checkpoints" / f"checkpoint-{last_step(tmp_path)}" / "seconds.json").unlink()
    assert last_step(tmp_path) >= 2
    go_on(pristine, tmp_path, whole_tuning)
