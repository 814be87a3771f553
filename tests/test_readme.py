"""The README: its size, its figures, which are those of the records, and its first commands in a fresh copy (slow)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.files import ROOT, read_json
from lora_training.memory import GIB, expected_memory, lora_parameters, model_shape, row_parameters
from tests.pages import HISTORY, PAGES, page_commands, read_page

README, CHINESE = read_page("README.md"), read_page("README.zh.md")
BYTES = 12_288
CPU_SIZED = [  # what runs as printed, in this order, from a fresh clone: minutes each, nothing is downloaded
    "python demo_complete.py",
    "python run_rq.py --dataset data/family",
    "python Class/gen_fb_data_rq.py",
    "python Class/gen_entity_data_rq.py",
    "python Class/build_mix.py triple_classification=1 knowledge_reasoning=2",
    "python Class/check_leaks.py",
    "cd lora_training && python test_lora_simple.py",
    "python tables/results.py",
    "python tables/make_tables.py",
    "python tables/run_ablations.py --list",
    "python test_rq_simple.py",
]


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= BYTES, f"README.md has {len(README.encode())} bytes, at most {BYTES}"


def squeezed(lines: list[str]) -> list[str]:
    return [" ".join(line.split()) for line in lines]


def test_the_chinese_readme_has_the_same_headings_and_commands() -> None:
    def headings(text: str) -> list[int]:
        return [len(line.split(" ")[0]) for line in text.splitlines() if re.match("#+ ", line)]

    assert headings(README) == headings(CHINESE)
    assert squeezed(page_commands(README)) == squeezed(page_commands(CHINESE))


@pytest.mark.parametrize("command", CPU_SIZED)
def test_the_first_commands_are_printed_somewhere(command: str) -> None:
    assert command in {line for page in PAGES for line in squeezed(page_commands(read_page(page)))}


@pytest.mark.slow
def test_the_first_commands_run_as_printed(tmp_path: Path) -> None:
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


# ---------------------------------------------------------------- figures

METRICS = {"mrr": "mrr", "hits@1": "hits@1", "hits@3": "hits@3", "hits@10": "hits@10"}
RECORD = re.compile(r"tables/records/[\w.-]+\.json")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def record_rows(text: str) -> list[tuple[list[str], list[str]]]:
    """(header, row) of every table row that names a run record."""
    found, header = [], []
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|[\s:|-]+\|", line.strip()):
            header = cells(lines[i - 1])
        elif line.startswith("|") and RECORD.search(line):
            found.append((header, cells(line)))
    return found


def expected(head: str, record: dict[str, Any]) -> list[float]:
    """What a column's cell must hold, by its heading: metrics of the test split, unless it says valid."""
    named = [METRICS[word] for word in re.findall(r"mrr|hits@\d+", head.lower()) if word in METRICS]
    if re.search("shuffled|打乱", head.lower()):
        part = record.get("test_shuffled_codes", {})  # a run without codes has none
    else:
        part = record["valid"] if re.search("valid|验证", head.lower()) else record["test"]
    return [part[name] for name in named if name in part]


def wrong_cells(text: str) -> list[str]:
    """Figures beside a record's name that are not the record's, to the digits printed."""
    wrong = []
    for header, row in record_rows(text):
        path = RECORD.search(" ".join(row))
        assert path is not None
        record = read_json(ROOT / path[0], "record")
        for head, cell in zip(header, row, strict=True):
            values = expected(head, record)
            printed = re.findall(r"(?<![\w.])[01]?\.\d+", cell.split("±")[0])
            for value, figure in zip(values, printed, strict=False):
                digits = len(figure.partition(".")[2])
                if abs(float(figure) - value) > 0.5 * 10**-digits + 1e-9:
                    wrong.append(f"{path[0]}: {head} is {value:.4f}, not {figure}")
    return wrong


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY])
def test_figures_beside_a_record_are_the_records(page: str) -> None:
    assert not wrong_cells(read_page(page))


def test_a_wrong_figure_is_seen() -> None:
    """The control of the test above, and: the README has such rows."""
    assert len(record_rows(README)) >= 2
    table = "| test MRR | record |\n|---|---|\n| {} | `tables/records/FB15k-237_4_1024_4_rq.json` |\n"
    assert not wrong_cells(table.format(".329")) and len(wrong_cells(table.format(".339"))) == 1


def test_the_memory_table_is_computed() -> None:
    from transformers import LlamaConfig

    text = " ".join(read_page(page) for page in PAGES if page not in HISTORY)
    shape = model_shape(LlamaConfig())  # LLaMA2-7B's
    lora, rows = lora_parameters(shape, 16), row_parameters(shape, 4100)
    ways: dict[str, dict[str, Any]] = {
        "one GPU": {},
        "DDP, 2 GPUs": {"world_size": 2},
        "FSDP2, 2 GPUs": {"world_size": 2, "sharding": "fsdp"},
        "QLoRA (`--load_in_4bit`)": {"four_bit": True},
    }
    for name, how in ways.items():
        need = [expected_memory(shape, lora, rows, 4100, batch, 2048, 256, **how) for batch in (1, 4)]
        assert f"| {name} | {need[0].total / GIB:.1f} | {need[1].total / GIB:.1f} |" in text
