"""Checks of the LoRA stage on a small LLaMA that is made here, in half a minute; no GPU, no network.

cd lora_training && python test_lora_simple.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from Class import prompts as tasks
from Class.codes import entity_text, parse_codes, print_codes
from common.errors import CommandParser, InputError, run_command
from lora_training import lora_trainer, make_tiny_base, train_lora
from lora_training.base_model import load_base, load_tokenizer, quiet_libraries
from lora_training.code_tokens import CodeShape, reload_check
from lora_training.plan import check_model
from lora_training.prompts import IGNORED, decode_answer, encode_answer, encode_example, encode_prompt
from lora_training.token_rows import Collate

SHAPE = CodeShape(num_code=64, num_quantizers=3)
CODES = [[[5, 9, 0], [63, 1, 2]], [[7, 7, 7], [0, 63, 1]]]


class Setup:
    """A base model of two layers after a few training steps, its tokenizer with the codes, and rows of two tasks."""

    def __init__(self, folder: Path) -> None:
        make_tiny_base.main(
            ["--out", str(folder), "--width", "64", "--layers", "2", "--heads", "2", "--vocab_size", "1200",
             "--steps", "4", "--block", "64", "--device", "cpu"]
        )  # fmt: skip
        self.folder = str(folder)
        self.args = train_lora.parse_args(["--model_name", self.folder, "--lora_dropout", "0", "--lora_r", "4"])
        self.base = check_model(self.args, SHAPE)
        self.tokenizer, self.ids = self.base.tokenizer, self.base.row_ids
        ada, ann = (entity_text(name, codes) for name, codes in zip(("Ada Ashley", "Ann"), CODES, strict=True))
        self.rows: list[dict[str, Any]] = [
            {"instruction": tasks.classification("Ada Ashley", "has mother", "Ann", ada, ann, True), "output": "True"},
            {"instruction": tasks.name_to_codes("Ada Ashley"), "output": print_codes(CODES[0])},
        ]

    def adapted_model(self) -> lora_trainer.AdaptedModel:
        """The base with code rows and a new adapter, as train_lora.py builds it."""
        base = train_lora.grown_base(self.args, self.base, torch.float32, 0)
        return lora_trainer.add_adapter(base, train_lora.lora_settings(self.args), self.ids, self.base.shape)


def token_round_trips(setup: Setup) -> str:
    """Every token is one id, the same after saving; decoded code text equals the encoded text."""
    reload_check(setup.tokenizer, SHAPE)
    for text in (print_codes(CODES[0]), print_codes(CODES[1], "compact"), entity_text("a </s> b", CODES[0])):
        assert decode_answer(encode_answer(text, setup.tokenizer), setup.tokenizer) == text
    text = decode_answer(encode_answer(print_codes(CODES[0], "compact"), setup.tokenizer), setup.tokenizer)
    assert parse_codes(text).tolist() == CODES[0]
    plain = load_tokenizer(setup.folder)
    before, after = (len(encode_answer(print_codes(CODES[0]), one)) for one in (plain, setup.tokenizer))
    assert after == 2 + 6 + 5 + 1 < before  # marks, codes, separators, end
    return f"{len(setup.ids)} tokens, ids {setup.ids[0]}..{setup.ids[-1]}; a code text: {before} tokens, now {after}"


def masks(setup: Setup) -> str:
    """Labels are the tokens of the answer only; nothing is truncated."""
    shown = []
    for row in setup.rows:
        example = encode_example(row, setup.tokenizer)
        learned = [label for label in example.labels if label != IGNORED]
        assert learned == encode_answer(row["output"], setup.tokenizer) and learned[-1] == setup.tokenizer.eos_token_id
        assert example.input_ids == encode_prompt(row, setup.tokenizer) + learned
        shown.append(f"{example.prompt_length} + {len(learned)}")
        try:
            encode_example(row, setup.tokenizer, len(example.input_ids) - 1)
        except InputError:
            continue
        raise AssertionError("a row that is too long was cut")
    return f"prompt + answer tokens: {', '.join(shown)}; with one token less there is an error"


def one_step(setup: Setup) -> str:
    """An optimization step lowers the loss and changes LoRA and the code rows in both matrices, and nothing else."""
    model = setup.adapted_model()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    batch = Collate(0)([encode_example(row, setup.tokenizer) for row in setup.rows])
    labels = batch.pop("labels")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(2):
        loss = lora_trainer.mean_loss(model(**batch), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert moved == trained and all("lora_" in name or "trainable_tokens_delta" in name for name in moved)
    rows = sorted(name.split(".token_adapter")[0].split(".")[-1] for name in moved if "trainable_tokens" in name)
    assert rows == ["embed_tokens", "lm_head"] and losses[1] < losses[0]
    return (
        f"loss {losses[0]:.3f} -> {losses[1]:.3f}; changed: {len(moved) - 2} LoRA matrices, rows of {', '.join(rows)}"
    )


def adapter_reloads(setup: Setup) -> str:
    """A saved adapter gives bit-equal logits on a base loaded again; the base's own rows are unchanged."""
    model = setup.adapted_model()
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.01 * torch.randn_like(value))
    examples, collate = [encode_example(row, setup.tokenizer) for row in setup.rows], Collate(0)
    expected = lora_trainer.probe_logits(model, examples, collate)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        cpu = torch.device("cpu")
        found = train_lora.saved_logits(setup.args, setup.base, Path(folder), torch.float32, cpu, examples)
    assert torch.equal(expected, found)
    merged = model.merge_and_unload().state_dict()
    for name, value in load_base(setup.folder, torch.float32).state_dict().items():
        assert "proj" in name or torch.equal(merged[name][: len(value)], value)
    return f"{len(found)} x {found.shape[1]} logits are bit-equal; adapter file {size / 1024:.0f} KiB"


CHECKS: tuple[Callable[[Setup], str], ...] = (token_round_trips, masks, one_step, adapter_reloads)


def main() -> int:
    CommandParser(description="Checks of code tokens, masks and one step, in seconds; no flags.").parse_args()
    started = time.monotonic()
    quiet_libraries()
    failed = 0
    with TemporaryDirectory() as folder:
        setup = Setup(Path(folder) / "base")
        for check in CHECKS:
            print(f"{check.__name__.replace('_', ' ')}: {check.__doc__}")
            try:
                print(f"  ok: {check(setup)}")
            except Exception as error:
                failed += 1
                print(f"  FAILED: {type(error).__name__}: {error}")
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed in {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main)
