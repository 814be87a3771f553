"""lora_training/word_rows.py: rows that say the words of an entity's neighbours, and train_lora.py takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_training import word_rows
from lora_training.code_tokens import CodeShape, read_codebooks
from tests.conftest import Run
from tests.test_train_lora import base  # noqa: F401


def test_words_are_the_mean_of_the_neighbours_centred() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [4.0, 4.0], [9.0, 9.0]])
    words, seen = word_rows.words_of(vectors, torch.tensor([[0, 0, 1], [0, 1, 2]]))
    expected = torch.tensor([[2.0, 2.5], [1.0, 0.0], [1.0, 0.0]])
    assert seen.tolist() == [0, 1, 2], "entity 3 has no triple"
    assert torch.allclose(words, expected - expected.mean(0))


def test_the_sum_of_an_entitys_rows_gives_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 5, (300, 3, 2), generator=generator)
    true = torch.randn(2, 5, 7, generator=generator)
    words = (true[0][codes[..., 0]] + true[1][codes[..., 1]]).sum(1)
    monkeypatch.setattr(word_rows, "RIDGE", 1e-4)
    monkeypatch.setattr(word_rows, "BLOCK", 128)
    rows = word_rows.code_rows(codes, 5, words)
    found = (rows[0][codes[..., 0]] + rows[1][codes[..., 1]]).sum(1)
    assert torch.allclose(found, words, atol=1e-2)


def test_the_file_is_a_start_for_train_lora(base: Path, family_run: Run, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "rows.pt"
    word_rows.main(["--codes", str(family_run.codes), "--dataset", str(family_run.dataset), "--model_name", str(base),
                    "--out", str(out)])  # fmt: skip
    stored = torch.load(out, weights_only=True)["codebooks"]
    Q, K, _ = stored.shape
    assert torch.equal(read_codebooks(out, CodeShape(K, Q)), stored) and (tmp_path / "rows.json").is_file()
