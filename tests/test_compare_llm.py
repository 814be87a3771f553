"""What comparisons of LLMs share: how tuning continues, flags of steps, and shuffled codes that are found again."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from Class.source import open_source
from common.errors import InputError
from lora_training import ask
from lora_training.code_tokens import refuse_other_codes
from lora_training.compare_llm import flags, resume_tuning
from tests.test_instructions import write_codes


def test_flags_of_a_step() -> None:
    assert flags({"lr": 0.1, "on": True, "off": False}) == ["--lr", "0.1", "--on"]


def test_interrupted_tuning_continues_from_its_checkpoint(tmp_path: Path) -> None:
    assert resume_tuning(tmp_path) == ["--overwrite"]
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "trainer_state.json").write_text("{}")
    assert resume_tuning(tmp_path) == ["--overwrite"], "killed before the checkpoint was complete"
    (tmp_path / "checkpoint-7" / "seconds.json").write_text("{}")
    assert resume_tuning(tmp_path) == ["--resume_from_checkpoint", "last"]


def test_shuffled_codes_are_found_again_by_their_seed(ring: Path, tmp_path: Path) -> None:
    """What a model was tuned on says which codes to open: its own circle, not that of seed 0."""
    codes = write_codes(ring, tmp_path / "codes", (3, 8, 2))
    made = {
        seed: open_source(argparse.Namespace(
            codes=codes, dataset=ring, no_codes=False, shuffle_codes=True, code_format="spec", seed=seed,
                keep_names=False,
        ))
        for seed in (0, 5)
    }  # fmt: skip
    for seed, source in made.items():
        again = ask.open_codes(source.codes_info, codes, ring)
        assert source.codes_info["shuffle_seed"] == seed and again.code_texts == source.code_texts
    assert made[0].code_texts != made[5].code_texts
    with pytest.raises(InputError, match="shuffled by seed 0"):
        refuse_other_codes(made[0].codes_info, made[5].codes_info, "the model", "the rows")
