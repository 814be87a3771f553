"""What comparisons of LLMs share: with codes, without codes and with shuffled codes; steps that tune them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_training.checkpoints import SECONDS

RESULTS = "inference_results.json"
REPEAT = "remove it and repeat the command: its step runs again"


class Variant(NamedTuple):
    """What an LLM is given of an entity."""

    name: str  # of its folder
    row: str  # in the comparison
    flags: tuple[str, ...]  # of the instruction data


WITHOUT = Variant("without_codes", "LLM without codes", ("--no_codes",))
SHUFFLED = Variant("shuffled_codes", "LLM with shuffled codes", ("--shuffle_codes",))
WITH = Variant("with_codes", "LLM with codes", ())
VARIANTS = (WITHOUT, SHUFFLED, WITH)


def flags(values: Mapping[str, Any]) -> list[str]:
    """``{"lr": 0.1, "on": True, "off": False}`` -> ``["--lr", "0.1", "--on"]``."""
    return [
        word
        for name, value in values.items()
        if value is not False
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def resume_tuning(checkpoints: Path) -> list[str]:
    """Flags by which train_lora.py continues an interrupted run; complete checkpoints contain a file of seconds."""
    interrupted = any(checkpoints.glob(f"checkpoint-*/{SECONDS}"))
    return ["--resume_from_checkpoint", "last"] if interrupted else ["--overwrite"]
