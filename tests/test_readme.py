"""The README: its commands for a CPU run as printed in a fresh copy (slow), its figures are the records' own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.config import build_parser, parse_config
from common.files import ROOT, read_json
from lora_training.memory import GIB, expected_memory, lora_parameters, model_shape, row_parameters
from model.decoders import DECODERS
from tests.pages import page_commands, read_page

TEXT = read_page("README.md").replace("\\\n", " ")


CPU_SIZED = [  # what a newcomer can run as printed, in this order, from a fresh clone: minutes each, nothing fetched
    "python demo_complete.py --quick --out_dir demo_output/quick",
    "python run_rq.py --dataset data/family",
    "python Class/gen_fb_data_rq.py",
    "python Class/gen_entity_data_rq.py",
    "python Class/build_mix.py triple_classification=1 knowledge_reasoning=2",
    "python Class/check_leaks.py",
    "cd lora_training && python test_lora_simple.py",
    "python tables/results.py",
    "python tables/make_tables.py --table 2 --format latex",
    "python tables/make_figures.py --figure 6 10 levels",
    "python tables/code_quality.py",
    "python tables/make_report.py codes_new",
    "python tables/run_ablations.py --list",
    "python test_rq_simple.py",
]


def test_the_commands_of_a_newcomer_are_printed_in_this_order() -> None:
    printed = [" ".join(command.split()) for command in page_commands(TEXT)]
    for command in CPU_SIZED:
        assert command in printed, f"README.md does not print {command}, or prints it earlier than those before it here"
        printed = printed[printed.index(command) + 1 :]


@pytest.mark.slow
def test_the_commands_of_a_newcomer_run_as_printed(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in CPU_SIZED:
        found = subprocess.run(
            ["bash", "-c", command], cwd=clone, env=os.environ | {"PATH": path}, capture_output=True, text=True
        )
        assert found.returncode == 0, f"{command}\n{found.stdout[-2000:]}{found.stderr[-2000:]}"


def test_the_readme_begins_with_make() -> None:
    assert "make demo      # set up" in TEXT


def test_figures_are_the_records() -> None:
    rows = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if "`tables/records/" in line and "|" in line]
    assert len(rows) >= 2
    for _, codes, mrr, hits1, hits10, shuffled, effort, recipe, path in rows:
        record = read_json(ROOT / path.strip("` "), "record")
        test = record["test"]
        figures = [test["mrr"], test["hits@1"], test["hits@10"], record["test_shuffled_codes"]["mrr"]]
        assert [f"{float(cell):.3f}" for cell in (mrr, hits1, hits10, shuffled)] == [f"{x:.3f}" for x in figures]
        assert codes == f"{record['shape'][1]} x {record['shape'][2]} of {record['args']['num_code']:,}"
        if recipe.endswith(".txt`"):
            config = parse_config(["--config", str(ROOT / "configs" / recipe.strip("`"))])
            settings = config.compared().keys() - {"name", "gcn_dim", "inputs", "weight_average"}
            differing = {key for key in settings & record["args"].keys() if record["args"][key] != getattr(config, key)}
            assert differing <= {"seed", "max_minutes", "tails_at_once"}, f"{path} is no run of {recipe}: {differing}"
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
    whole = expected_memory(shape, lora, row_parameters(shape, 36100), 4100, 1, 2048, 256)
    assert f"`--train_rows all` takes {whole.total / GIB:.1f} on one GPU" in " ".join(TEXT.split())


def test_the_parser_offers_every_decoder() -> None:
    help_text = next(action for action in build_parser()._actions if "--decoder" in action.option_strings)
    assert list(help_text.choices or []) == list(DECODERS)
