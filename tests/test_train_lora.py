"""Training a LLaMA with 30,000 parameters: what changes, resuming, several processes, memory, rejected input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file  # type: ignore[import-untyped]
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import LlamaConfig, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging

from common import errors, files
from common.errors import InputError
from common.files import ROOT, read_json, save_torch, write_json
from lora_training import code_tokens, lora_trainer, memory, plan, train_lora
from lora_training.adapters import load_adapted, read_saved
from lora_training.base_model import load_base, load_config, load_tokenizer
from lora_training.checkpoints import run_plan
from lora_training.code_tokens import CodeShape, add_code_tokens
from lora_training.prompts import Example, encode_examples
from lora_training.token_rows import ByLength, Collate
from tests.test_prompts_tokens import SHAPE, hand_made_tokenizer, rows, small_model, two_matrices

CODES = {"file": "ring_2_16_2_rq.pt", "sha256": "a" * 64, "num_code": 16, "num_quantizers": 2, "shuffled": False}
WEIGHTS = "adapter_model.safetensors"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def write_rows(lines: list[dict[str, Any]], path: Path) -> None:
    """A file of instruction data: a row a line."""
    path.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")


def write_data(folder: Path, count: int = 24, codes: dict[str, Any] | None = None) -> Path:
    """Rows of every task in turn, their answers of unequal length, and the statistics beside them."""
    made = list(rows().values())
    for split, offset in (("train", 0), ("validation", 3)):
        lines = [made[(i + offset) % len(made)] | {"id": f"{split}-{i}", "task_type": "t"} for i in range(count)]
        path = folder / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(lines, path)
    write_json({"codes": CODES if codes is None else codes}, folder / "dataset_stats.json")
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with random weights and the hand-made tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    small_model().save_pretrained(str(folder))
    hand_made_tokenizer().save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("lora_data"))


@pytest.fixture(autouse=True)
def libraries() -> Iterator[None]:
    """train_lora.py silences transformers for its own process."""
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)


def words(base: Path | str, data: Path, out: Path, **more: Any) -> list[str]:
    flags: dict[str, Any] = {
        "model_name": base, "train_data": data / "train.json", "val_data": data / "validation.json", "output_dir": out,
        "batch_size": 4, "learning_rate": 0.01, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "max_steps": 6,
        "eval_steps": 2, "logging_steps": 1,
    } | more  # fmt: skip
    return [
        word for key, value in flags.items() if value is not None
        for word in ([f"--{key}"] if value is True else [f"--{key}", str(value)])
    ]  # fmt: skip


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(str(out / "lora_adapters" / WEIGHTS))


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "lora_adapters" / "run_record.json").read_text())
    return found


@pytest.fixture(scope="session")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one uninterrupted run."""
    out = tmp_path_factory.mktemp("trained")
    train_lora.main(words(base, data, out))
    return out


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codebooks of SHAPE's sizes, as stage 1 keeps them."""
    path = tmp_path_factory.mktemp("stage1") / "ck.pt"
    draw = torch.Generator().manual_seed(9)
    weights = {
        f"scorer.rq_codebook.codebooks.{q}.weight": torch.randn(SHAPE.num_code, 6, generator=draw)
        for q in range(SHAPE.num_quantizers)
    }
    save_torch({"best": {"model": weights}}, path)
    return path


# ---------------------------------------------------------------- what training leaves


def test_all_rows_train_where_they_are_to(base: Path, data: Path, tmp_path: Path) -> None:
    """Words that come up move in embedding and head, without codes too, where nothing moves by default."""
    before = load_file(str(base / "model.safetensors"))
    names = write_data(tmp_path / "names", codes={"file": None})
    lines = [{"id": str(i), "task_type": "t", "instruction": f"name {i % 5}", "input": "", "output": "a name"}
             for i in range(8)]  # fmt: skip
    for split in ("train", "validation"):
        write_rows(lines, names / f"{split}.json")
    for which, rows_of, count in (("all", data, 482), ("all", names, 446), ("code", names, 0)):
        out = tmp_path / f"{which}_{count}"
        train_lora.main(words(base, rows_of, out, train_rows=which, max_steps=2, eval_steps=0))
        assert record(out)["trained_parameters"]["rows"] == 2 * count * small_model().config.hidden_size
        after = dict(load_adapted(read_saved(out / "lora_adapters"), str(base), torch.float32)
                     .merge_and_unload().state_dict())  # fmt: skip
        for matrix in ("model.embed_tokens.weight", "lm_head.weight"):
            moved = int((after[matrix][:446] != before[matrix]).any(1).sum())
            assert moved > 5 if which == "all" else moved == 0


def test_code_rows_move_in_both_matrices_and_nothing_else_of_the_base(base: Path, trained: Path) -> None:
    saved = read_saved(trained / "lora_adapters")
    before = load_base(str(base), torch.float32)
    old = [part.clone() for part in two_matrices(before)]
    code_tokens.resize_model(before, saved.tokenizer, seed=0)  # the seed of the run
    frozen = {name: value.clone() for name, value in before.state_dict().items()}
    after = load_adapted(saved, str(base), torch.float32)
    merged = dict(after.merge_and_unload().state_dict())
    codes_used = sorted({number for row in encoded(base) for number in row.input_ids if number >= 446})
    for name, old_rows in (("model.embed_tokens.weight", old[0]), ("lm_head.weight", old[1])):
        assert torch.equal(merged[name][:446], old_rows), f"old rows of {name} changed"
        moved = (merged[name] - frozen[name]).abs().amax(1)
        assert (moved[codes_used] > 1e-3).all(), f"rows of {name} that the data hold did not move"
    for name, value in frozen.items():  # the adapted layers move by B A alone, the norms not at all
        if "norm" in name:
            assert torch.equal(merged[name], value)
        elif "proj" in name:
            assert not torch.equal(merged[name], value)
    assert sum(v.numel() for v in adapter(trained).values()) < 0.2 * sum(v.numel() for v in frozen.values())


def encoded(base: Path) -> list[Example]:
    tokenizer = load_tokenizer(str(base))
    add_code_tokens(tokenizer, SHAPE)
    return list(encode_examples(rows().values(), tokenizer))


def test_the_folder_of_the_adapter(base: Path, trained: Path, data: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == ["lora_adapters"], "checkpoints are gone"
    assert not list(trained.rglob("*.bin")) and not list(trained.rglob("*.pt")), "no pickles"
    found = record(trained)
    assert found["codes"] == CODES and found["base_model"] == str(base) and found["steps"] == 6
    assert (found["base_vocabulary"], found["vocabulary"]) == (446, 482)
    assert found["inputs"]["train.json"] == files.sha256_file(data / "train.json")
    losses = {entry["step"]: entry["eval_loss"] for entry in found["history"] if "eval_loss" in entry}
    assert list(losses) == [0, 2, 4, 6] and found["best_step"] == min(losses, key=losses.__getitem__)
    assert found["validation"]["best_loss"] == pytest.approx(min(losses.values()), abs=1e-6)
    assert losses[6] < losses[2], "training on rows that validation repeats lowers its loss"
    assert found["reload_difference"] == 0.0
    sizes = {name: value.numel() for name, value in adapter(trained).items()}
    rows_of = {name: n for name, n in sizes.items() if "trainable_tokens_delta" in name}
    assert found["trained_parameters"] == {"lora": sum(sizes.values()) - sum(rows_of.values()), "rows": 2 * 36 * 32}
    assert list(rows_of.values()) == [36 * 32, 36 * 32]
    for name, value in adapter(trained).items():
        assert value.dtype == torch.float32, name


def test_the_best_epoch_is_kept_not_the_last(base: Path, data: Path, tmp_path: Path) -> None:
    """A learning rate that ruins the model after its first steps: what is saved is the better, earlier state."""
    train_lora.main(words(base, data, tmp_path, learning_rate=2.0, warmup_ratio=0.7, eval_steps=1))
    losses = {entry["step"]: entry["eval_loss"] for entry in record(tmp_path)["history"] if "eval_loss" in entry}
    best = min(losses, key=losses.__getitem__)
    assert best < 6 and losses[6] > losses[best] + 0.1, losses
    assert record(tmp_path)["validation"]["best_loss"] == pytest.approx(losses[best], abs=1e-6)


def test_an_adapter_that_does_not_reload_fails(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tampering(tokenizer: Any, folder: Path, shape: Any) -> None:
        tensors = load_file(str(folder / WEIGHTS))
        name = next(name for name in tensors if "lora_B" in name)
        save_file({**tensors, name: tensors[name] + 1e-4}, str(folder / WEIGHTS), metadata={"format": "pt"})
        code_tokens.save_tokenizer(tokenizer, folder, shape)

    monkeypatch.setattr(train_lora, "save_tokenizer", tampering)
    with pytest.raises(InputError, match="does not reload"):
        train_lora.main(words(base, data, tmp_path, max_steps=1))


def test_without_codes_no_rows_are_added(base: Path, tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data", codes={"file": None})
    train_lora.main(words(base, folder, tmp_path / "out", max_steps=1))
    assert record(tmp_path / "out")["vocabulary"] == 446
    assert not [name for name in adapter(tmp_path / "out") if "trainable_tokens" in name]


# ---------------------------------------------------------------- interruption


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the end of a step."""
    make = lora_trainer.make_trainer

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

    def made(*arguments: Any) -> Any:
        trainer = make(*arguments)
        trainer.add_callback(Stop())
        return trainer

    monkeypatch.setattr(lora_trainer, "make_trainer", made)


def test_interrupted_and_resumed_is_bit_identical(
    base: Path, data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            train_lora.main(words(base, data, tmp_path))
    assert not (tmp_path / "lora_adapters").exists()
    elsewhere = {"resume_from_checkpoint": tmp_path / "checkpoints" / "checkpoint-4"}
    with pytest.raises(InputError, match=r"learning_rate 0\.01 before, 0\.02 now"):
        train_lora.main(words(base, data, tmp_path / "other", **elsewhere, learning_rate=0.02))
    train_lora.main(words(base, data, tmp_path / "other", **elsewhere))
    with pytest.raises(InputError, match="--resume_from_checkpoint last"):
        train_lora.main(words(base, data, tmp_path))
    with pytest.raises(InputError, match=r"learning_rate 0\.01 before, 0\.02 now"):
        train_lora.main(words(base, data, tmp_path, resume_from_checkpoint="last", learning_rate=0.02))
    train_lora.main(words(base, data, tmp_path, resume_from_checkpoint="last"))
    expected, found, other = adapter(trained), adapter(tmp_path), adapter(tmp_path / "other")
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]) and torch.equal(expected[name], other[name]), name
    assert [e["eval_loss"] for e in record(tmp_path)["history"] if "eval_loss" in e] == [
        e["eval_loss"] for e in record(trained)["history"] if "eval_loss" in e
    ]


def test_the_time_before_an_interruption_counts(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            train_lora.main(words(base, data, tmp_path))
    mark = tmp_path / "checkpoints" / "checkpoint-2" / "seconds.json"
    write_json(read_json(mark, "mark") | {"seconds": 5000.0}, mark)
    train_lora.main(words(base, data, tmp_path, resume_from_checkpoint="last"))
    assert 5000 < record(tmp_path)["wall_seconds"] < 5100


def test_a_loss_that_is_not_finite_stops(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_trainer, "token_losses", lambda logits, labels: logits.sum(-1) * math.nan)
    with pytest.raises(InputError, match="--learning_rate"):
        train_lora.main(words(base, data, tmp_path))


def test_another_seed_is_another_adapter(base: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    """The control of the test above: equality of bits is no accident."""
    train_lora.main(words(base, data, tmp_path, seed=1))
    assert not any(torch.equal(value, adapter(trained)[name]) for name, value in adapter(tmp_path).items())


# ---------------------------------------------------------------- finished adapters


def test_a_finished_adapter_is_replaced_only_on_request(base: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "done")
    for more, way in (({}, "--overwrite"), ({"resume_from_checkpoint": "last"}, "--init_adapter")):
        with pytest.raises(InputError, match=way):
            train_lora.main(words(base, data, tmp_path / "done", **more))
    assert adapter(tmp_path / "done").keys() == adapter(trained).keys()
    train_lora.main(words(base, data, tmp_path / "done", overwrite=True, max_steps=1))
    assert record(tmp_path / "done")["steps"] == 1


def test_training_continues_from_a_finished_adapter(base: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    """With the adapter's rank and scale, whatever the flags say; its loss is where the first run ended."""
    first = trained / "lora_adapters"
    train_lora.main(words(base, data, tmp_path, init_adapter=first, max_steps=2, lora_r=8, lora_alpha=1))
    found, before = record(tmp_path), record(trained)
    assert found["before_training"]["eval_loss"] == pytest.approx(before["validation"]["best_loss"], abs=1e-5)
    assert (found["args"]["lora_r"], found["args"]["lora_alpha"]) == (4, 8)
    assert found["trained_parameters"] == before["trained_parameters"]
    assert files.sha256_file(first / WEIGHTS) in found["inputs"].values()
    old, new = adapter(trained), adapter(tmp_path)
    assert old.keys() == new.keys()
    assert all(0 < float((new[name] - old[name]).abs().max()) < 0.1 for name in old)
    logits = [load_adapted(read_saved(folder), str(base), torch.float32)(torch.tensor([[1, 447, 460]])).logits
              for folder in (first, tmp_path / "lora_adapters")]  # fmt: skip
    assert not torch.allclose(*logits)


def test_other_adapters_to_continue_from(
    refused: Callable[..., str], trained: Path, data: Path, tmp_path: Path
) -> None:
    assert "/nowhere does not exist" in refused(init_adapter="/nowhere")
    other = write_data(tmp_path / "other", codes={**CODES, "sha256": "b" * 64})
    assert "the same token means another code" in refused(other, init_adapter=trained / "lora_adapters")
    small_model(500).save_pretrained(str(tmp_path / "wide"))
    hand_made_tokenizer().save_pretrained(str(tmp_path / "wide"))
    line = refused(init_adapter=trained / "lora_adapters", model_name=tmp_path / "wide")
    assert "has 500 token rows" in line


# ---------------------------------------------------------------- plain text and learning rates


def test_plain_text_is_reported_and_a_rise_is_warned_of_once(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before training it is the base model's own loss; a rate that ruins the model raises it."""
    sentences = ["Ada has mother Ann", "Give plausible candidates"]
    (tmp_path / "plain.txt").write_text("\n".join(sentences) + "\n\n")
    more = {"plain_text": tmp_path / "plain.txt", "learning_rate": 3.0, "warmup_ratio": 0, "eval_steps": 1}
    train_lora.main(words(base, data, tmp_path / "out", **more))
    tokenizer, model = load_tokenizer(str(base)), load_base(str(base), torch.float32).eval()
    total, count = 0.0, 0
    for sentence in sentences:
        ids = torch.tensor([[1, *tokenizer(sentence, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    found = record(tmp_path / "out")
    assert found["before_training"]["eval_plain_base"] == pytest.approx(total / count, abs=1e-5)
    losses = [entry["eval_plain_loss"] for entry in found["history"] if "eval_plain_loss" in entry]
    assert len(losses) == 7 and max(losses) > losses[0] + 0.5
    assert capsys.readouterr().out.count("warning: the loss of plain text rose") == 1
    assert found["inputs"]["plain.txt"] == files.sha256_file(tmp_path / "plain.txt")


def test_token_rows_have_a_rate_of_their_own(base: Path, data: Path, tmp_path: Path) -> None:
    """The first Adam step changes each weight by its learning rate."""
    more = {"max_steps": 1, "eval_steps": 1, "warmup_ratio": 0, "learning_rate": 1e-3, "rows_lr": 4e-3}
    train_lora.main(words(base, data, tmp_path, lora_dropout=0, **more))
    tokenizer = read_saved(tmp_path / "lora_adapters").tokenizer
    started = load_base(str(base), torch.float32)
    code_tokens.resize_model(started, tokenizer, 0)
    for name, value in adapter(tmp_path).items():
        if "lora_B" in name:  # begins at 0
            assert float(value.abs().max()) == pytest.approx(1e-3, rel=0.01)
        elif "lm_head" in name and "trainable" in name:
            assert float((value - two_matrices(started)[1][446:].detach()).abs().max()) == pytest.approx(4e-3, rel=0.01)


@pytest.mark.slow
def test_two_threads_give_the_same_bits_every_time_and_after_a_kill(base: Path, data: Path, tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "2"}

    def command(place: str, *more: str) -> list[str]:
        line = words(base, data, tmp_path / place, max_steps=20)
        return [sys.executable, str(ROOT / "lora_training" / "train_lora.py"), *line, *more]

    for place in ("one", "again"):
        subprocess.run(command(place), env=environment, check=True, capture_output=True, timeout=300)
    checkpoints = tmp_path / "killed" / "checkpoints"
    with subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL) as process:
        while not any(checkpoints.glob("checkpoint-*/seconds.json")) and process.poll() is None:
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL and checkpoints.is_dir(), "it had ended before it was killed"
    resume = command("killed", "--resume_from_checkpoint", "last")
    subprocess.run(resume, env=environment, check=True, capture_output=True, timeout=300)
    one, again, killed = (adapter(tmp_path / place) for place in ("one", "again", "killed"))
    assert all(torch.equal(one[name], again[name]) and torch.equal(one[name], killed[name]) for name in one)


# ---------------------------------------------------------------- loss and order


def test_loss_at_answer_positions_is_the_models_own_loss(base: Path) -> None:
    """mean_loss of the selected logits equals transformers' loss of all logits, with and without a global count."""
    examples = encoded(base)
    model = small_model(482).eval()
    batch = Collate(0)(examples)
    with torch.no_grad():
        everything = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
        selected = model(
            batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=batch["logits_to_keep"]
        )
    count = int((batch["labels"] != -100).sum())
    assert selected.logits.shape == (count, 482) and count < batch["labels"].numel() / 4
    assert lora_trainer.mean_loss(selected, batch["labels"]) == pytest.approx(float(everything.loss), abs=1e-6)
    assert lora_trainer.mean_loss(selected, batch["labels"], 2 * count) == pytest.approx(
        float(everything.loss) / 2, abs=1e-6
    )


@pytest.mark.parametrize("change", [{"micro_batch_size": 1}, {"micro_batch_size": 2, "gradient_checkpointing": True}])
def test_how_a_step_is_cut_does_not_change_it(base: Path, data: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """Answers have 2 to 27 tokens: a mean of means would differ by far more than rounding."""
    for name, more in {"whole": {}, "cut": change}.items():
        train_lora.main(words(base, data, tmp_path / name, lora_dropout=0, max_steps=3, eval_steps=3, **more))
    whole, cut = adapter(tmp_path / "whole"), adapter(tmp_path / "cut")
    assert max(float((whole[name] - cut[name]).abs().max()) for name in whole) < 2e-5
    logged = [[e["loss"] for e in record(tmp_path / n)["history"] if "loss" in e] for n in ("whole", "cut")]
    assert logged[0] == pytest.approx(logged[1], abs=1e-4)


def test_the_best_checkpoint_is_the_one_of_the_lowest_validation_loss() -> None:
    history = [{"eval_loss": 0.5, "step": 0}, {"loss": 0.1, "step": 4}, {"eval_loss": 1.0, "step": 5},
               {"eval_loss": 2.0, "step": 9}]  # fmt: skip
    assert train_lora.best_step(history) == 5
    checked = plan.Plan({}, None, None, None, None, [], 1, None)  # type: ignore[arg-type]
    args = train_lora.parse_args(["--gradient_checkpointing", "--no-bf16"])
    found = train_lora.training_arguments(args, checked, torch.device("cpu"))
    assert (found.metric_for_best_model, found.greater_is_better) == ("eval_loss", False)


def test_row_order() -> None:
    lengths = np.random.default_rng(0).integers(20, 2000, 1003)
    order = ByLength(lengths, 8, seed=0)
    first = list(order)
    assert sorted(first) == list(range(1003)) and list(order) == first and len(order) == 1003
    order.set_epoch(1)
    assert list(order) != first and list(ByLength(lengths, 8, seed=1)) != first

    def padded(rows_in_order: list[int]) -> int:
        return sum(lengths[rows_in_order[i : i + 8]].max() * 8 for i in range(0, 1003, 8))

    random = np.random.default_rng(1).permutation(1003).tolist()
    assert padded(first) < 1.1 * lengths.sum() < 1.6 * lengths.sum() < padded(random)
    longest_steps = [int(lengths[first[i : i + 8]].max()) for i in range(0, 1000, 8)]
    assert longest_steps != sorted(longest_steps, reverse=True), "steps come in random order, not by length"


# ---------------------------------------------------------------- two processes


def two_processes(script: str, flags: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of ours under torchrun, at a free port."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / script),
         *flags],
        env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_two_processes_equal_one(base: Path, data: Path, tmp_path: Path) -> None:
    """Two real processes over gloo, 2 rows each, against one with 4: same losses, same adapter but for rounding."""
    flags = {"lora_dropout": 0, "max_steps": 4, "eval_steps": 2}
    train_lora.main(words(base, data, tmp_path / "one", **flags))
    done = two_processes("lora_training/train_lora.py", words(base, data, tmp_path / "two", **flags, batch_size=2))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes have the same weights" in done.stdout
    assert record(tmp_path / "two")["processes"] == 2 and record(tmp_path / "one")["processes"] == 1
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 2e-5
    for key in ("loss", "eval_loss"):
        found = [[e[key] for e in record(tmp_path / n)["history"] if key in e] for n in ("one", "two")]
        assert len(found[0]) >= 2 and found[0] == pytest.approx(found[1], abs=1e-4)


def test_processes_that_differ_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(into: list[Any], mine: str) -> None:
        into[:] = [mine, "another"]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    with pytest.raises(RuntimeError, match="different weights"):
        lora_trainer.check_ranks(small_model())


def test_configurations_are_known_to_accelerate() -> None:
    files = sorted((ROOT / "lora_training" / "configs").glob("*.yaml"))
    kinds = {file.stem: load_config_from_file(str(file)).distributed_type.value for file in files}
    assert kinds == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "multi_node": "MULTI_GPU"}


# ---------------------------------------------------------------- memory


def test_parameters_and_memory_of_llama2_7b() -> None:
    """Counts in closed form; the total is what a 24 GB card must hold, and what splitting saves."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        tie_word_embeddings=False,
    )  # fmt: skip
    shape = memory.model_shape(config)
    assert shape.parameters == 6_738_415_616
    lora, added = memory.lora_parameters(shape, 16), memory.row_parameters(shape, 4100)
    assert lora == 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008)) == 39_976_960
    assert memory.lora_parameters(shape, 16, ("q_proj", "v_proj")) == 8_388_608
    assert added == 2 * 4100 * 4096 == 33_587_200

    def need(**more: Any) -> float:
        return memory.expected_memory(shape, lora, added, 4100, 1, 2048, 256, **more).total / memory.GIB

    assert 16 < need(world_size=2) < 21
    assert need(world_size=2, sharding="fsdp") < 13 and need(four_bit=True) < 10
    assert need(checkpointing=False) > 35, "without checkpointing it does not fit"


def test_counts_are_those_of_the_adapter(base: Path, trained: Path) -> None:
    shape = memory.model_shape(load_config(str(base)))
    sizes = [value.numel() for name, value in adapter(trained).items() if "lora_" in name]
    assert memory.lora_parameters(shape, 4) == sum(sizes)


# ---------------------------------------------------------------- bad input, before any weights are loaded


@pytest.fixture
def refused(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """refused(flag=...) -> the one line on stderr; fails where weights are touched or the exit code is not 2."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr(train_lora, "load_base", never)

    def call(folder: Path = data, **more: Any) -> str:
        line = words(base, folder, tmp_path / "out", **more)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            errors.run_command(lambda: train_lora.main(line))
        error = capsys.readouterr().err
        assert end.value.code == 2, error
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()
        return error

    return call


def test_bad_flags(refused: Callable[..., str]) -> None:
    assert "--batch_size must be 1 or more, got 0" in refused(batch_size=0)
    assert "does not divide --batch_size 4" in refused(micro_batch_size=3)
    assert "--val_limit must be 0 or more, got -1" in refused(val_limit=-1)
    assert "--warmup_ratio must be in [0, 1), got 1.0" in refused(warmup_ratio=1.0)
    assert "not allowed with argument" in refused(bf16=True, fp16=True)
    assert "--epochs must be above 0 and finite, got inf" in refused(epochs="inf")
    assert "--learning_rate must be above 0 and finite, got nan" in refused(learning_rate="nan")
    assert f"--seed must be from 0 to 2**32 - 1, got {2**32}" in refused(seed=2**32)
    assert "is a file, expected a folder" in refused(output_dir=__file__)
    assert "nowhere/model does not exist" in refused(model_name="/nowhere/model")
    assert "has no checkpoint" in refused(resume_from_checkpoint="last")
    assert "is no checkpoint" in refused(resume_from_checkpoint="/nowhere")
    assert "--report_to foo: " in refused(report_to="foo")
    assert "--report_to comet_ml: CometCallback requires comet-ml" in refused(report_to="comet_ml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(refused: Callable[..., str]) -> None:
    assert "--fp16 needs a GPU, and none is visible" in refused(fp16=True)
    assert "--load_in_4bit needs a GPU" in refused(load_in_4bit=True)


def test_bad_bases(refused: Callable[..., str], base: Path, data: Path, tmp_path: Path) -> None:
    """One whose record is damaged, and one with a context shorter than a validation row."""
    damaged, narrow = tmp_path / "damaged", tmp_path / "narrow"
    shutil.copytree(base, damaged)
    for content in ("3", '{"codes": "x"}'):
        (damaged / "run_record.json").write_text(content)
        assert "run_record.json" in refused(model_name=damaged)
    shutil.copytree(base, narrow)
    write_json(read_json(base / "config.json", "config") | {"max_position_embeddings": 276}, narrow / "config.json")
    longer = write_data(tmp_path / "longer")
    lines = read_json(longer / "validation.json", "rows")
    write_rows([lines[0] | {"instruction": "word " * 300}, *lines[1:]], longer / "validation.json")
    assert "validation.json has a row of" in refused(longer, model_name=narrow)


def test_bad_bases_are_found_before_rows_are_encoded(
    refused: Callable[..., str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("rows were encoded before the base was checked")

    monkeypatch.setattr(plan, "encode_file", never)
    backend = hand_made_tokenizer().backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    uncased = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    special = hand_made_tokenizer()
    special.add_special_tokens({"additional_special_tokens": ["<CODE>"]})
    for name, tokenizer, problem in (("uncased", uncased, "entity names would change"),
                                     ("special", special, "<CODE> as a special token")):  # fmt: skip
        shutil.copytree(base, tmp_path / name)
        tokenizer.save_pretrained(str(tmp_path / name))
        assert problem in refused(model_name=tmp_path / name)
    for name, content in (("empty", None), ("cut", (base / "model.safetensors").read_bytes()[:-9])):
        weights = shutil.copytree(base, tmp_path / name) / "model.safetensors"
        weights.unlink()
        if content is not None:
            weights.write_bytes(content)
        assert "model.safetensors" in refused(model_name=tmp_path / name)
    for kind in ("t5", "bert"):
        (tmp_path / kind).mkdir()
        write_json({"model_type": kind}, tmp_path / kind / "config.json")
        assert f"a {kind} model is not a causal language model" in refused(model_name=tmp_path / kind)
    assert "has down_proj, gate_proj, k_proj" in refused(lora_target="q_proj,query")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert f"--plain_text {empty} has no sentences" in refused(plain_text=empty)


def test_faults_of_rows_are_found_before_the_training_rows_are_kept(
    refused: Callable[..., str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation rows are read first, and of every file the longest row."""
    kept: list[Example] = []
    append = plan.TokenRows.append

    def counted(rows: plan.TokenRows, example: Example) -> None:
        kept.append(example)
        append(rows, example)

    monkeypatch.setattr(plan.TokenRows, "append", counted)
    changed = Path(shutil.copytree(data, tmp_path / "changed"))
    lines = read_json(data / "train.json", "rows")
    write_rows([*lines, lines[0] | {"id": "last", "instruction": "word " * 3000}], changed / "train.json")
    assert "row last has" in refused(changed) and len(kept) == len(read_json(data / "validation.json", "rows"))
    kept.clear()
    (changed / "validation.json").write_text('{"instruction": "x"}\n')
    assert "validation.json:1: a row needs" in refused(changed) and not kept


def test_bad_data(refused: Callable[..., str], data: Path, tmp_path: Path) -> None:
    assert "--train_data /nowhere.json does not exist" in refused(train_data="/nowhere.json")
    assert "has 276 tokens (27 in the answer), --max_length is 275" in refused(max_length=275)
    empty = tmp_path / "empty"
    shutil.copytree(data, empty)
    (empty / "train.json").write_text("[]\n")
    assert "train.json cannot be used: it has no rows" in refused(empty)
    (empty / "train.json").write_text("{}\n")
    assert "train.json:1: a row needs instruction and output" in refused(empty)
    shutil.copy(data / "train.json", empty / "train.json")
    assert "24 rows are all longer than --max_length 10" in refused(empty, max_length=10, skip_long=True)
    (empty / "dataset_stats.json").unlink()
    assert "has no dataset_stats.json beside it" in refused(empty)
    other = write_data(tmp_path / "other", codes={**CODES, "sha256": "b" * 64})
    assert "the same token means another code" in refused(val_data=other / "validation.json")


def test_a_base_that_knows_other_codes(refused: Callable[..., str], base: Path, tmp_path: Path) -> None:
    tokenizer = hand_made_tokenizer()
    add_code_tokens(tokenizer, CodeShape(99, 3))
    shutil.copytree(base, tmp_path / "other_base")
    tokenizer.save_pretrained(str(tmp_path / "other_base"))
    assert "tokens of other codes, such as" in refused(model_name=tmp_path / "other_base")


@pytest.mark.parametrize("from_codebooks", [False, True])
def test_rows_that_no_example_has_keep_their_start(
    base: Path, data: Path, checkpoint: Path, tmp_path: Path, from_codebooks: bool
) -> None:
    """In the embedding; the rows of tokens in the data changed from there."""
    more = {"code_init": checkpoint} if from_codebooks else {}
    train_lora.main(words(base, data, tmp_path, max_steps=2, **more))
    saved = read_saved(tmp_path / "lora_adapters")
    used = {number for row in encoded(base) for number in row.input_ids}
    codes = code_tokens.token_ids(saved.tokenizer, SHAPE)[4:]
    unused = [number for number in codes if number not in used]
    assert len(unused) >= 8
    weights = load_adapted(saved, str(base), torch.float32).merge_and_unload()
    started = load_base(str(base), torch.float32)
    codebooks = code_tokens.read_codebooks(checkpoint, SHAPE) if from_codebooks else None
    code_tokens.resize_model(started, saved.tokenizer, 0, codebooks=codebooks)
    for after, before in zip(two_matrices(weights), two_matrices(started), strict=True):
        assert (after - before)[codes].abs().max() > 1e-4
    embedding = (two_matrices(weights)[0] - two_matrices(started)[0]).abs().amax(1)
    assert embedding[unused].max() == 0, "no gradient, no decay"
    if from_codebooks:
        assert record(tmp_path)["inputs"][checkpoint.name] == files.sha256_file(checkpoint)
    plans = [run_plan(train_lora.parse_args(words(base, data, tmp_path, code_init=c))) for c in (None, checkpoint)]
    assert plans[0] != plans[1], "a resumed run must begin with the same rows"


def test_bad_codebooks(refused: Callable[..., str], base: Path, data: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(code_init=tmp_path / "nowhere.pt")
    other = write_data(tmp_path / "more", codes=CODES | {"num_quantizers": 3})
    assert "has codebooks [2, 16, 6]" in refused(other, code_init=checkpoint)
    plain = write_data(tmp_path / "plain", codes={"file": None})
    assert "--code_init" in refused(plain, code_init=checkpoint)
    tokenizer = hand_made_tokenizer()
    add_code_tokens(tokenizer, SHAPE)
    shutil.copytree(base, tmp_path / "tuned")
    tokenizer.save_pretrained(str(tmp_path / "tuned"))
    assert "has trained rows of these codes" in refused(model_name=tmp_path / "tuned", code_init=checkpoint)


def test_skip_long_leaves_rows_out(base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(str(base))
    add_code_tokens(tokenizer, SHAPE)
    kept = plan.encode_file(data / "train.json", tokenizer, 275, skip_long=True)
    assert len(kept) == 20 and kept.lengths.max() <= 275 and "4 too long" in capsys.readouterr().out
    assert kept[0] == encoded(base)[0]
    first = plan.encode_file(data / "train.json", tokenizer, 2048, skip_long=False, limit=5)  # --val_limit
    assert [first[row] for row in range(len(first))] == encoded(base)[:5]


def test_the_output_folder_may_be_the_one_stood_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--train_data nothing\.json does not exist"):
        train_lora.main(["--output_dir", ".", "--train_data", "nothing.json"])
    assert not list(tmp_path.iterdir())
