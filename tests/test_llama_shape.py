"""The FLOPs of a LoRA step in closed form, and the whole benchmark at a tiny shape."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import llama_shape
from benchmarks.llama_shape import SHAPES, step_flops
from common.files import ROOT, read_json
from lora_training.code_tokens import CodeShape, add_code_tokens
from lora_training.memory import model_shape

ABSENT = ("numba", "pooch", "requests", "dgl", "sklearn", "scipy", "matplotlib", "pykeen", "datasets")


@pytest.fixture(scope="module")
def vocabulary() -> tuple[Any, list[int]]:
    """The tiny shape's tokenizer and the ids of its code tokens."""
    tokenizer = llama_shape.filled_tokenizer(SHAPES["tiny"]["vocab_size"])
    return tokenizer, add_code_tokens(tokenizer, CodeShape(*llama_shape.CODES["tiny"]))


def test_flops_of_llama2_7b_by_hand() -> None:
    """One row of 2,048 tokens: forward, forward again, gradient of the input; nine products of the attention."""
    shape = model_shape(llama_shape.llama_config("LLaMA2-7B"))
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    attention = 32 * 9 * 2 * (2048 * 2049 // 2) * 4096
    assert step_flops(shape, 1, 2048) == 3 * 2 * 2048 * matrices + attention
    assert step_flops(shape, 2, 2048) == 2 * step_flops(shape, 1, 2048)


def test_the_model_is_that_of_train_lora(vocabulary: tuple[Any, list[int]], tmp_path: Path) -> None:
    tokenizer, ids = vocabulary
    args = llama_shape.parse_args(["--quick"])
    lora = llama_shape.lora_arguments(args, 2, tmp_path)
    plan = llama_shape.make_plan(args, tokenizer, ids, 2)
    model = llama_shape.build_model(args, lora, plan, torch.device("cpu"))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert (lora.lora_r, lora.bf16, lora.gradient_checkpointing) == (16, True, True)
    assert sum("trainable_tokens_delta" in name for name in trained) == 2
    assert sum("lora_A" in name for name in trained) == 7 * SHAPES["tiny"]["num_hidden_layers"]
    assert {value.dtype for name, value in model.named_parameters() if name not in trained} == {torch.bfloat16}
    assert len(model.get_input_embeddings().weight) == len(tokenizer) == 320 + 4 + 2 * 16
    assert set(plan.train.lengths) == {args.sequence} and set(plan.train.answers) == {args.answer}


def test_quick_measures_every_micro_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--threads", "1", "--json", str(tmp_path / "rows.json"), "--micro_batches", "1", "2"]
    assert llama_shape.main(words) == 0
    rows = read_json(tmp_path / "rows.json", "record")["rows"]
    assert [row["rows"] for row in rows] == [1, 2] and "ratio" in capsys.readouterr().out
    for row in rows:
        assert row["ratio"] == pytest.approx(row["TFLOP/step"] * 1e12 / row["s/step"] / row["matmul_rate"])
        assert row["tokens/s"] == pytest.approx(row["rows"] * 64 / row["s/step"]) and "expected_GB" in row


@pytest.mark.slow
def test_quick_on_a_bare_machine(tmp_path: Path) -> None:
    """In a process without what a GPU machine lacks."""
    (tmp_path / "site").mkdir()
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in ABSENT)
    (tmp_path / "site" / "sitecustomize.py").write_text(f"import sys\n{blocked}")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / "benchmarks" / "llama_shape.py"), "--quick"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout + done.stderr


def test_without_a_gpu_only_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(llama_shape.InputError):
        llama_shape.main([])
