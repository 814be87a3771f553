"""Merging: W_after = W + scale * B A, idempotent, loadable without this toolkit; adapters and bases that do not fit."""

# ruff: noqa: F811  (fixtures of another file)
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common import files
from common.errors import InputError
from lora_training import adapters, code_tokens, merge_adapter, train_lora
from lora_training.adapters import read_saved
from lora_training.base_model import load_base
from lora_training.code_tokens import CodeShape, add_code_tokens, token_ids
from tests.conftest import Command, assert_refused
from tests.test_prompts_tokens import SHAPE, hand_made_tokenizer, small_model
from tests.test_train_lora import CODES, base, data, libraries, trained, words, write_data  # noqa: F401

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def merged(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merging") / "merged"
    merge_adapter.main(["--lora_adapter", str(trained / "lora_adapters"), "--output_dir", str(out)])
    return out


def test_a_base_folder_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training recorded a path relative to the repository; the adapter is read from another folder."""
    (tmp_path / "made" / "tiny").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(adapters, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path / "elsewhere")
    tokenizer = hand_made_tokenizer()
    bases = [adapters.Saved(tmp_path, {"base_model": name}, None, tokenizer).base
             for name in ("made/tiny", "owner/model", str(tmp_path / "gone"))]  # fmt: skip
    assert bases == [str(tmp_path / "made" / "tiny"), "owner/model", str(tmp_path / "gone")]


def test_weights_after_merging(base: Path, trained: Path, merged: Path) -> None:
    """Every matrix from the two files themselves: W + (8 / 4) B A, the codes' rows as trained, the rest bit by bit."""
    before = load_base(str(base), torch.float32).state_dict()
    lora = load_file(str(trained / "lora_adapters" / WEIGHTS))
    after = load_file(str(merged / "model.safetensors"))
    assert before.keys() == after.keys()
    adapted = 0
    for name, value in after.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in lora:
            product = 8 / 4 * lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"]
            assert float(product.abs().max()) > 1e-3
            torch.testing.assert_close(value, before[name] + product, rtol=0, atol=1e-6)
            adapted += 1
        elif f"{key}.token_adapter.trainable_tokens_delta" in lora:
            assert torch.equal(value[:446], before[name])
            assert torch.equal(value[446:], lora[f"{key}.token_adapter.trainable_tokens_delta"])
        else:
            assert torch.equal(value, before[name]), name
    assert adapted == 2 * 7


def test_merging_twice_is_merging_once(trained: Path, merged: Path, tmp_path: Path) -> None:
    again = tmp_path / "merged"
    flags = ["--lora_adapter", str(trained / "lora_adapters"), "--output_dir", str(again)]
    for more in ([], ["--overwrite"]):
        merge_adapter.main([*flags, *more])
        for file in ("model.safetensors", "tokenizer.json", "config.json"):
            assert files.sha256_file(again / file) == files.sha256_file(merged / file), file
    with pytest.raises(InputError, match="--overwrite"):
        merge_adapter.main(flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"], "no part is left"


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_logits_equal_the_adapters(trained: Path, tmp_path: Path, dtype: str, bound: float) -> None:
    out = tmp_path / "merged"
    merge_adapter.main(["--lora_adapter", str(trained / "lora_adapters"), "--output_dir", str(out), "--dtype", dtype])
    found = json.loads((out / "run_record.json").read_text())
    assert 0 < found["logit_difference"] < bound
    assert AutoModelForCausalLM.from_pretrained(out).dtype == getattr(torch, dtype), "the folder says its own type"


def test_the_merged_folder_loads_without_this_toolkit(base: Path, trained: Path, merged: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    assert model.config.vocab_size == len(tokenizer) == 482 and model.config.use_cache
    saved = read_saved(merged, "config.json")
    assert token_ids(tokenizer, SHAPE) == token_ids(saved.tokenizer, SHAPE) == list(range(446, 482))
    assert saved.record["codes"]["sha256"] == "a" * 64 and saved.shape == SHAPE
    adapted = adapters.load_adapted(read_saved(trained / "lora_adapters"), str(base), torch.float32)
    ids = torch.tensor([[1, 446, 300, 447, 448, 455, 470, 449]])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, adapted(input_ids=ids).logits, atol=1e-5)
        assert not torch.allclose(small_model(482)(ids).logits, adapted(input_ids=ids).logits, atol=1e-2), "control"


def test_a_merge_that_changes_the_logits_fails(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tampering(tokenizer: Any, folder: Path, shape: Any) -> None:
        tensors = load_file(str(folder / "model.safetensors"))
        tensors["lm_head.weight"][5] += 0.01
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
        code_tokens.save_tokenizer(tokenizer, folder, shape)

    monkeypatch.setattr(merge_adapter, "save_tokenizer", tampering)
    with pytest.raises(InputError, match="logits differ by"):
        merge_adapter.main(["--lora_adapter", str(trained / "lora_adapters"), "--output_dir", str(tmp_path / "merged")])
    assert not list(tmp_path.iterdir()), "nothing is left of it"


def test_a_merged_folder_is_never_there_without_its_record(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_adapter, "make_record", killed)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter.main(["--lora_adapter", str(trained / "lora_adapters"), "--output_dir", str(tmp_path / "merged")])
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_can_be_tuned_once_more(merged: Path, data: Path, tmp_path: Path) -> None:
    """The paper tunes twice: the codes' rows are there already, are trained on, and must be the same run's codes."""
    train_lora.main(words(merged, data, tmp_path / "out", max_steps=2))
    second = json.loads((tmp_path / "out" / "lora_adapters" / "run_record.json").read_text())
    first = json.loads((merged / "run_record.json").read_text())
    assert second["base_vocabulary"] == second["vocabulary"] == first["vocabulary"] == 482
    rows = load_file(str(tmp_path / "out" / "lora_adapters" / WEIGHTS))
    for key, name in (("model.embed_tokens", "model.embed_tokens.weight"), ("lm_head", "lm_head.weight")):
        now = rows[f"base_model.model.{key}.token_adapter.trainable_tokens_delta"]
        before = load_file(str(merged / "model.safetensors"))[name][446:]
        assert now.shape == before.shape and 1e-4 < float((now - before).abs().max()) < 0.1
    other = write_data(tmp_path / "other", codes={**CODES, "sha256": "b" * 64})
    with pytest.raises(InputError, match="the same token means another code"):
        train_lora.main(words(merged, other, tmp_path / "out2"))


# ---------------------------------------------------------------- what is refused, before weights are loaded


@pytest.fixture
def refused(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Command) -> Callable[..., str]:
    """refused("--flag", ...) -> the one line on stderr; a copy of the adapter lies in tmp_path/adapter."""
    shutil.copytree(trained / "lora_adapters", tmp_path / "adapter")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr(adapters, "load_base", never)

    def call(*flags: str | Path) -> str:
        words = ["--lora_adapter", tmp_path / "adapter", "--output_dir", tmp_path / "out", *flags]
        outcome = shell(merge_adapter, *words)
        assert_refused(outcome)
        return outcome.err

    return call


def test_adapters_that_do_not_fit(
    refused: Callable[..., str],
    base: Path,
    data: Path,
    merged: Path,
    tmp_path: Path,
) -> None:
    adapter = tmp_path / "adapter"
    assert "/nowhere does not exist" in refused("--lora_adapter", "/nowhere")
    assert "has no adapter_config.json" in refused("--lora_adapter", merged)
    assert f"--output_dir {data}" in refused("--output_dir", data)
    assert "is a file" in refused("--output_dir", data / "train.json")
    assert f"--output_dir {adapter}" in refused("--output_dir", adapter)
    assert "--device cuda:99 is not there" in refused("--device", "cuda:99")
    assert "--output_dir ." in refused("--output_dir", ".")
    small_model(500).save_pretrained(str(tmp_path / "other"))
    assert "has 500 token rows" in refused("--base_model", tmp_path / "other")
    assert "does not exist" in refused("--base_model", tmp_path / "nothing" / "here")
    wide = LlamaConfig.from_pretrained(str(base))
    wide.intermediate_size += 16
    LlamaForCausalLM(wide).save_pretrained(str(tmp_path / "wide"))
    assert "has other layers than" in refused("--base_model", tmp_path / "wide")
    (tmp_path / "wide" / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused("--base_model", tmp_path / "wide")

    other = hand_made_tokenizer()
    other.add_tokens(["zebra"])
    add_code_tokens(other, SHAPE)
    other.save_pretrained(str(adapter))
    assert "has 483 tokens, its record says 482" in refused()
    few = hand_made_tokenizer()
    add_code_tokens(few, CodeShape(16, 1))
    few.add_tokens([f"zebra{i}" for i in range(16)])
    few.save_pretrained(str(adapter))
    assert "lacks 16 of 36 code tokens, such as Q1_0" in refused()
    (adapter / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refused()
    (adapter / "run_record.json").write_text("{}")
    assert "run_record.json" in refused()
    (adapter / "run_record.json").unlink()
    assert "has no run_record.json" in refused()
