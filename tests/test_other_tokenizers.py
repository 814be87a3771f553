"""Byte-level BPE as in LLaMA 3 and Qwen2: code tokens and masks (training with them: test_any_base.py).

Tokenizers are trained here on a few sentences with the splitting patterns of these families; weights are random.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from lora_training.base_model import load_tokenizer
from lora_training.code_tokens import add_code_tokens, reload_check
from lora_training.prompts import IGNORED, decode_answer, encode_answer, encode_examples, encode_prompt
from tests.test_prompts_tokens import SHAPE, TEXT, rows

# what both families split text by; LLaMA 3 takes up to three digits together, Qwen2 one
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3, QWEN2, QWEN2_ROOM = "LLaMA 3", "Qwen2, tied", "Qwen2, rows to spare"
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "max_position_embeddings": 2048}  # fmt: skip


def byte_level(digits: str) -> Tokenizer:
    """Byte-level BPE of 600 tokens at most."""
    made = Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN % digits), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([TEXT, "### Instruction:\n### Response:\n1. True\n2. False\n"] * 3, trainer)
    return made


def save_tokenizer(family: str, folder: Path) -> Any:
    """The tokenizer as its family stores it: LLaMA 3 puts a start token before every text, Qwen2 has none."""
    if family == LLAMA3:
        made = byte_level("{1,3}")
        fast = PreTrainedTokenizerFast(
            tokenizer_object=made, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>",
            clean_up_tokenization_spaces=True,
        )  # fmt: skip
        start = [("<|begin_of_text|>", fast.bos_token_id)]
        template = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=start)
        fast.backend_tokenizer.post_processor = template
        fast.save_pretrained(str(folder))
        return fast
    made = byte_level("")
    made.normalizer = normalizers.NFC()
    end = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=end, pad_token=end, extra_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    fast.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False}
    path.write_text(json.dumps(settings))
    return fast


def save_base(family: str, folder: Path) -> Path:
    """Tokenizer, configuration and random weights of a family's kind."""
    fast = save_tokenizer(family, folder)
    ends: dict[str, Any] = {"bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id}
    config: Any
    if family == LLAMA3:
        stretch = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 256}  # fmt: skip
        config = LlamaConfig(vocab_size=len(fast), rope_parameters=stretch, **SIZES, **ends)
    else:  # more rows than tokens, as Qwen2 has: the codes' tokens fit in, or go beyond
        spare = 200 if family == QWEN2_ROOM else 10
        config = Qwen2Config(
            vocab_size=len(fast) + spare, tie_word_embeddings=family == QWEN2, **SIZES, **ends
        )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module", params=[LLAMA3, QWEN2, QWEN2_ROOM])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(request.param, tmp_path_factory.mktemp("base"))


def test_every_code_is_one_token_and_text_comes_back(base: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    size = len(tokenizer)
    ids = add_code_tokens(tokenizer, SHAPE)
    assert ids == list(range(size, size + 4 + 16 * 2)) and len(tokenizer) == ids[-1] + 1
    reload_check(tokenizer, SHAPE)
    for text in (
        "<ENT>Ada</ENT> <CODE>Q0_5:Q1_9|Q0_0:Q1_15</CODE>", "<CODE>Q0_5Q1_9</CODE>", "1. <CODE>Q0_5:Q1_9</CODE>\n2. x",
        "<ENT>Ann <|begin_of_text|><|endoftext|><|im_end|></ENT>", "a , b . c ' s n't  é 東京 \n\n 1234567",
    ):  # fmt: skip
        encoded = encode_answer(text, tokenizer)
        assert decode_answer(encoded, tokenizer) == text and encoded[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in encoded[:-1] and tokenizer.bos_token_id not in encoded
    codes = encode_answer("Q0_5:Q1_9|Q0_0", tokenizer, end=False)
    assert len(codes) == 5 and codes[::2] == [ids[4 + 5], ids[4 + 16 + 9], ids[4]]


def test_prompts_are_masked_and_begin_as_the_family_does(base: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    add_code_tokens(tokenizer, SHAPE)
    for row, example in zip(rows().values(), encode_examples(rows().values(), tokenizer), strict=True):
        prompt, answer = encode_prompt(row, tokenizer), encode_answer(row["output"], tokenizer)
        assert example.input_ids == prompt + answer and example.labels == [IGNORED] * len(prompt) + answer
        assert (prompt[0] == tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)
        assert prompt.count(tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)
