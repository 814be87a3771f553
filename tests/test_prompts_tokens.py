"""Rows to token ids and labels, literally; code tokens as single ids; models and tokenizers that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from Class import prompts as tasks
from Class.codes import entity_text, parse_codes, print_codes
from lora_training import code_tokens
from lora_training.code_tokens import CodeShape, add_code_tokens, load_tokenizer, token_ids
from lora_training.prompts import (
    IGNORED,
    decode_answer,
    encode_answer,
    encode_example,
    encode_examples,
    encode_prompt,
    pad_batch,
    prompt_text,
)
from run_record import InputError, write_json

SHAPE = CodeShape(16, 2)  # ids behind the base's 329 tokens: marks 329..332, Q0_0 333, Q1_0 349
WORDS = (
    "Instruction Response Triple classification judge whether following triple knowledge graph holds itself quantized "
    "codes head tail Head Tail Answer True False has mother Ada Ann Give plausible candidates numbered line"
).split()
CODES = {"Ada": [[5, 9], [0, 15]], "Ann": [[1, 1], [0, 2]]}
ADA, ANN = (entity_text(name, codes) for name, codes in CODES.items())


def hand_made_tokenizer(**more: Any) -> LlamaTokenizer:
    """A LLaMA tokenizer written out: control tokens, bytes, letters, and each of WORDS built letter by letter."""
    letters = sorted(set("".join(WORDS)))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {piece: len(vocabulary) + i for i, piece in enumerate(["▁", "#", *letters])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for i in range(1, len(word)):
            if (word[:i], word[i]) not in merges:
                merges.append((word[:i], word[i]))
                vocabulary.setdefault(word[: i + 1], len(vocabulary))
    return LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=more.pop("legacy", False), **more)


def save_hand_made(folder: Path, **more: Any) -> Path:
    hand_made_tokenizer(**more).save_pretrained(str(folder))
    write_json({"model_type": "llama"}, folder / "config.json")
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    loaded = load_tokenizer(str(save_hand_made(tmp_path / "base")))
    add_code_tokens(loaded, SHAPE)
    return loaded


def rows() -> dict[str, dict[str, Any]]:
    """One row of each task, as Class/gen_*.py writes it."""
    made = {
        "triple_classification": (tasks.classification("Ada", "has mother", "Ann", ADA, ANN, True), "True"),
        "link_prediction": (
            tasks.link_prediction("Ada", "has mother", ADA, [ANN, ADA], True),
            tasks.numbered([print_codes(CODES["Ann"]), print_codes(CODES["Ada"])]),
        ),
        "name_to_codes": (tasks.name_to_codes("Ada"), print_codes(CODES["Ada"], "compact")),
        "predict_tail": (tasks.predict_tail("Ada", "has mother", ADA, True), ANN),
        "hidden_level": (tasks.hidden_level(ADA.replace("Q1_9", "?")), "Q1_9"),
        "question_answering": (tasks.question(ADA, ["has mother"], 0), "Ann"),
    }
    return {task: {"instruction": i, "input": "", "output": o, "id": task} for task, (i, o) in made.items()}


GOLDEN = json.loads((Path(__file__).parent / "GOLDEN").read_text()) if False else {}
