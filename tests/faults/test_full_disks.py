"""No room on the disk, no memory, a second run into one place, losses that are no numbers: one line, nothing lost."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer as LibraryTrainer

import model.trainer
from common.device import memory_wanted
from common.files import exclusive_lock, load_torch
from lora_training import lora_trainer
from lora_training.score_answers import read_answers
from model.sizes import smaller_batch
from tests.faults.cases import Target
from tests.faults.later import LATER
from tests.faults.permissions import modes_count
from tests.faults.targets import TARGETS
from tests.faults.test_bad_input import Outcome, call
from tests.faults.world import STEM, snapshot

BY_NAME = {target.name: target for target in [*TARGETS, *LATER]}
LIMIT = 300  # bytes per file: less than any output has


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow beyond ``limit`` bytes: what a full disk answers, at a point of our choice (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def one_line(outcome: Outcome, *words: str) -> str:
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.code == 2 and len(errors) == 1 and "Traceback" not in outcome.err, outcome
    for word in words:
        assert word in errors[0], errors[0]
    return errors[0]


WRITERS = [
    "train",
    "restore",
    "eval",
    "export",
    "gen_fb",
    "gen_entity",
    "gen_lp",
    "mix",
    "base",
    "tune",
    "merge",
    "score",
    "embed_words",
    "embed_on",
    "compare",
    "ablations",
    "studies",
    "report",
    "table_page",
    "level_page",
    "figure_usage",
]


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_what_was_there_stays(world: Path, name: str) -> None:
    before = snapshot(world)
    with small_files(LIMIT):
        one_line(call(BY_NAME[name], world), "cannot write")
    after = snapshot(world)
    assert {key: after.get(key) for key in before} == before
    new = after.keys() - before.keys()
    assert not [key for key in new if key.endswith(".tmp") or ".part" in key or key.endswith(".lock")]
    ended = call(BY_NAME[name], world) if name != "tune" else None  # its first checkpoint asks for --overwrite
    assert ended is None or ended.code == 0, ended


@pytest.mark.parametrize("name", WRITERS)
def test_folders_that_may_not_be_written_are_one_line(world: Path, name: str) -> None:
    before = snapshot(world)
    folders = [path for path in [world, *world.rglob("*")] if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    try:
        with modes_count() as counted:
            if not counted:
                pytest.skip("root here, and the kernel does not let it give up its right to write everywhere")
            one_line(call(BY_NAME[name], world), "cannot write", "Permission denied")
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert snapshot(world) == before


@pytest.mark.parametrize("limit", [0, 20_000, 60_000, 90_000])
def test_the_checkpoint_before_stays_wherever_the_disk_ends(world: Path, limit: int) -> None:
    path = world / "checkpoints" / f"{STEM}.pt"
    good, target = path.read_bytes(), BY_NAME["restore"]
    further = target._replace(arguments=lambda w: [*target.arguments(w), "--epoch", "9"])
    with small_files(limit):
        one_line(call(further, world), "cannot write", path.name)
    assert path.read_bytes() == good and load_torch(path, "checkpoint")["last"]["epoch"] == 3
    assert call(further, world).code == 0


def test_answers_before_a_full_disk_are_kept(world: Path) -> None:
    path = world / "answers" / "answers.jsonl"
    all_answers = path.read_bytes()
    first = all_answers.index(b"\n") + 1
    path.write_bytes(all_answers[:first])
    with small_files(first + 100):
        one_line(call(BY_NAME["infer"], world), "answers.jsonl", "make room, then go on")
    assert path.read_bytes()[:first] == all_answers[:first] and len(read_answers(path).answers) == 1
    assert call(BY_NAME["infer"], world).code == 0 and path.read_bytes() == all_answers


# ---------------------------------------------------------------- two runs into one place

LOCKS = {
    "restore": f"checkpoints/{STEM}.lock", "dump": f"codes/{STEM}.lock", "mix": "lora_data/dataset_stats.lock",
    "gen_fb": "lora_data/triple_classification/dataset_stats.lock", "tune": "tuned.lock", "merge": "merged.lock",
    "gen_lp": "lora_data/link_prediction/dataset_stats.lock", "infer": "answers/answers.lock", "base": "tiny.lock",
    "embed_on": "rows.lock", "compare": "comparison.lock", "ablations": "ablations.lock",
}  # fmt: skip


@pytest.mark.parametrize("name", LOCKS)
def test_a_second_run_into_the_same_place_is_refused(world: Path, name: str) -> None:
    with exclusive_lock(world / LOCKS[name]):
        before = snapshot(world)
        one_line(call(BY_NAME[name], world), "another run is writing", "or choose another --")
        assert snapshot(world) == before
    assert call(BY_NAME[name], world).code == 0


# ---------------------------------------------------------------- memory

REFUSED = "CUDA out of memory. Tried to allocate 6.00 GiB. GPU 0 has a total capacity of 8.00 GiB"


def raising(error: BaseException) -> Any:
    def method(*_: Any, **__: Any) -> None:
        raise error

    return method


ON_CPU = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(REFUSED), MemoryError(), RuntimeError(ON_CPU)])
def test_stage_one_out_of_memory_names_flags_and_sizes(
    world: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(model.trainer.Trainer, "fit", raising(error))
    line = one_line(call(BY_NAME["train"], world), "out of memory", "--batch 32 is too large", "--num_quantizers 1")
    assert "--num_negatives" in line and "--gcn_dim" in line


def test_other_errors_are_not_called_a_lack_of_memory() -> None:
    assert memory_wanted(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    found = memory_wanted(torch.OutOfMemoryError(REFUSED))
    assert found is not None and found.wanted == 6 * 2**30


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(ON_CPU)])
def test_a_lack_of_the_cpus_memory_is_not_told_by_a_gpu_that_is_there(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", raising(AssertionError("the GPU was asked")))
    found = memory_wanted(error)
    assert found is not None and 0 < found.used < found.total


def test_the_batch_that_fits() -> None:
    """1,024 queries wanted 16 of 9 free; 1 is fixed: 8 of 15 parts fit, 546 queries, of which 512 is a power of two."""
    assert smaller_batch(1024, used=8, wanted=8, total=10, fixed=1) == 512
    assert smaller_batch(1024, used=100, wanted=8, total=10, fixed=1) == 64
    assert smaller_batch(2, used=9, wanted=1, total=1, fixed=5) == 2


@pytest.mark.parametrize(("batch", "words"), [(4, "--micro_batch_size 2 in place of 4"), (1, "--load_in_4bit")])
def test_lora_out_of_memory_names_flags_and_sizes(
    world: Path, monkeypatch: pytest.MonkeyPatch, batch: int, words: str
) -> None:
    monkeypatch.setattr(LibraryTrainer, "train", raising(torch.OutOfMemoryError(REFUSED)))
    target = BY_NAME["tune"]
    asked = target._replace(arguments=lambda w: [*target.arguments(w), "--batch_size", str(batch)])
    one_line(call(asked, world), "out of memory", words)


# ---------------------------------------------------------------- no numbers


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, calls, target = lora_trainer.token_losses, [], BY_NAME["tune"]

    def broken(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return losses(logits, labels) * (math.nan if len(calls) > 12 else 1)

    monkeypatch.setattr(lora_trainer, "token_losses", broken)
    more = ["--max_steps", "20", "--logging_steps", "1"]
    longer = Target("tune", target.script, lambda w: [*target.arguments(w), *more], [])
    one_line(call(longer, world), "the loss is not finite at step", "lower --learning_rate")
    assert list(world.glob("tuned/checkpoints/checkpoint-*/seconds.json"))
