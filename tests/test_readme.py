"""The README's commands exist: each script is there and its flags are the parser's own."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest

import run_rq
from lora_training.memory import GIB, expected_memory, lora_parameters, model_shape, row_parameters
from model.decoders import DECODERS
from run_record import ROOT, read_json

TEXT = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
COMMANDS = [line.split("  #")[0].strip() for line in TEXT.splitlines() if line.startswith("    ")]
FOLDER = "cd lora_training && "
PYTHON = [line for line in COMMANDS if re.match(rf"({FOLDER})?python (?!-m)", line)]


def test_the_readme_has_commands() -> None:
    assert len(PYTHON) > 12 and "make demo      # set up" in TEXT


@pytest.mark.parametrize("command", PYTHON)
def test_command_exists(command: str) -> None:
    folder = ROOT / "lora_training" if command.startswith(FOLDER) else ROOT
    words = shlex.split(command.removeprefix(FOLDER).replace("$C", ""))
    assert (folder / words[1]).is_file(), f"README.md names {words[1]}, which is not there"
    if words[1] == "run_rq.py":
        given = shlex.split(re.search(r'C="([^"]+)"', TEXT)[1]) if "$C" in command else []  # type: ignore[index]
        run_rq.parse_args([*words[2:], *given])


def test_figures_are_the_records() -> None:
    rows = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if "`tables/records/" in line and "|" in line]
    assert len(rows) >= 2
    for _, codes, mrr, hits1, hits10, shuffled, effort, path in rows:
        record = read_json(ROOT / path.strip("` "), "record")
        test = record["test"]
        figures = [test["mrr"], test["hits@1"], test["hits@10"], record["test_shuffled_codes"]["mrr"]]
        assert [f"{float(cell):.3f}" for cell in (mrr, hits1, hits10, shuffled)] == [f"{x:.3f}" for x in figures]
        assert codes == f"{record['shape'][1]} x {record['shape'][2]} of {record['args']['num_code']:,}"
        assert effort == f"{record['epochs']} in {record['wall_seconds'] / 60:.0f}"


def test_the_memory_table_is_computed() -> None:
    from transformers import LlamaConfig

    shape = model_shape(LlamaConfig())  # LLaMA2-7B's
    lora, rows = lora_parameters(shape, 16), row_parameters(shape, 4100)
    ways: dict[str, dict[str, Any]] = {
        "one GPU": {},
        "DDP, 2 GPUs": {"world_size": 2},
        "FSDP2, ZeRO-3": {"world_size": 2, "sharding": "fsdp"},
        "ZeRO-2": {"world_size": 2, "sharding": "zero2"},
        "QLoRA (`--load_in_4bit`)": {"four_bit": True},
    }
    for name, how in ways.items():
        need = [expected_memory(shape, lora, rows, 4100, batch, 2048, 256, **how) for batch in (1, 4)]
        assert f"| {name} | {need[0].total / GIB:.1f} | {need[1].total / GIB:.1f} |" in TEXT


def test_the_parser_offers_every_decoder() -> None:
    help_text = next(action for action in run_rq.build_parser()._actions if "--decoder" in action.option_strings)
    assert list(help_text.choices or []) == list(DECODERS)
