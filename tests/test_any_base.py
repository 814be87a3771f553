"""Families of causal language models with random weights: a training step, reload and merge of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils import logging

from lora_training import merge_adapter, train_lora
from lora_training.adapters import load_adapted, read_saved
from lora_training.base_model import load_base, load_tokenizer
from lora_training.code_tokens import token_matrices
from tests.test_other_tokenizers import LLAMA3, QWEN2, QWEN2_ROOM, save_base
from tests.test_prompts_tokens import hand_made_tokenizer
from tests.test_train_lora import adapter, record, words, write_data

ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, Any] = ENDS | {
    "vocab_size": 446, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip
HEADS: dict[str, Any] = {"head_dim": 4}
FAMILIES: dict[str, Any] = {
    "Llama": LlamaConfig(**SIZES),
    "Mistral": MistralConfig(**SIZES, **HEADS),
    "Qwen3": Qwen3Config(**SIZES, **HEADS),
    "Gemma 2": Gemma2Config(**SIZES, **HEADS, query_pre_attn_scalar=4),  # eager, tied
    "Phi-3": Phi3Config(**SIZES),
    "GPT-2": GPT2Config(vocab_size=446, n_embd=8, n_layer=1, n_head=2, n_positions=512, **ENDS),  # Conv1D, tied
    "GPT-NeoX": GPTNeoXConfig(**{key: value for key, value in SIZES.items() if key != "num_key_value_heads"}),
    "Mixtral": MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1),
    "Qwen3-MoE": Qwen3MoeConfig(**SIZES, **HEADS, moe_intermediate_size=4, num_experts=2, num_experts_per_tok=1),
}
EXPERTS = {"Mixtral", "Qwen3-MoE"}


@pytest.fixture(autouse=True)
def libraries() -> Iterator[None]:
    """train_lora.py changes the log level of transformers for its own process."""
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), count=6)


@pytest.mark.parametrize("family", [*FAMILIES, LLAMA3, QWEN2, QWEN2_ROOM])
def test_a_step_reload_and_merge(family: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """train_lora.py fails unless the adapter reloads bit-equal; old rows and experts keep their bits."""
    base = tmp_path / "base"
    if family in FAMILIES:
        hand_made_tokenizer().save_pretrained(str(base))
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(str(base))
    else:  # byte-level tokenizers; Qwen2 has more rows than tokens
        save_base(family, base)
    old = len(load_tokenizer(str(base)))
    train_lora.main(words(base, data, tmp_path / "out", max_steps=1, eval_steps=1, warmup_ratio=0, lora_r=2))
    printed = capsys.readouterr().out
    assert ("experts and routers get no LoRA" in printed) == (family in EXPERTS)
    assert ("eager attention" in printed) == (family == "Gemma 2")

    before = load_base(str(base), torch.float32)
    matrices = [name for name in adapter(tmp_path / "out") if "trainable_tokens" in name]
    assert len(matrices) == len(token_matrices(before)) == (1 if before.config.tie_word_embeddings else 2)
    sizes = [value.numel() for name, value in adapter(tmp_path / "out").items() if "lora_" in name]
    assert record(tmp_path / "out")["trained_parameters"]["lora"] == sum(sizes) > 0
    assert not any("expert" in name or "gate." in name for name in adapter(tmp_path / "out"))

    saved = read_saved(tmp_path / "out" / "lora_adapters")
    merge_adapter.main(["--lora_adapter", str(saved.folder), "--output_dir", str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32).eval()
    for name, matrix in token_matrices(before).items():
        new = token_matrices(merged)[name]
        assert len(new) == max(len(matrix), old + 36) and len(load_tokenizer(str(tmp_path / "merged"))) == old + 36
        assert torch.equal(new[:old], matrix[:old]) and not torch.equal(new[old:], matrix[old : len(new)])
    for name, value in merged.state_dict().items():
        if "expert" in name or "norm" in name or name.endswith("mlp.gate.weight"):
            assert torch.equal(value, before.state_dict()[name]), name
    ids = torch.tensor([[1, 300, *range(old, old + 10)]])
    with torch.no_grad():
        adapted = load_adapted(saved, str(base), torch.float32)(input_ids=ids).logits
        assert torch.allclose(merged(ids).logits, adapted, atol=1e-5)
        assert not torch.allclose(
            adapted[..., :old], before.eval()(ids.clamp(max=old - 1)).logits[..., :old], atol=1e-5
        )
