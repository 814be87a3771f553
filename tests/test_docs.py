"""The pages agree: commands with the scripts, the Chinese README with the English one, tables with the records."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InputError
from common.files import ROOT
from tables.levels import level_lines, with_levels
from tests.pages import check_command, indented, page_commands, read_page

PAGES = ("README.md", "README.zh.md", "docs/MIGRATION.md", "docs/ARCHITECTURE.md", "docs/ROBUSTNESS.md", "docs/AUDIT.md",
         "data/README.md", "benchmarks/README.md", "CONTRIBUTING.md")  # fmt: skip
ROOMS = ("Class", "benchmarks", "data", "lora_training", "model", "tables")
README, CHINESE = read_page("README.md"), read_page("README.zh.md")
COMMANDS = sorted({(page, command) for page in PAGES for command in page_commands(read_page(page))})
PROMISED = [  # they must work as they stand here
    "python run_rq.py --dataset data/FB15k-237 --seq_len 16 --num_code 1024 --num_quantizers 4 "
    "--gcn_layers 2 --tf_layers 1 --epoch 800 --lr 0.0005 --batch 1024",
    "python Class/gen_fb_data_rq.py",
    "python test_rq_simple.py",
    "python demo_complete.py",
    "cd lora_training && python test_lora_simple.py",
    "cd lora_training && python train_lora.py --model_name meta-llama/Llama-2-7b-hf --train_data lora_data/train.json "
    "--val_data lora_data/validation.json --output_dir lora_outputs --epochs 3 --batch_size 4 "
    "--learning_rate 2e-4 --lora_r 16 --lora_alpha 32",
    "cd lora_training && python inference.py --base_model meta-llama/Llama-2-7b-hf "
    "--lora_adapter lora_outputs/lora_adapters --output inference_results.json",
]


def squeezed(lines: list[str]) -> list[str]:
    return [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize("text", [README, CHINESE], ids=["en", "zh"])
def test_every_promised_command_is_there(text: str) -> None:
    assert set(PROMISED) <= set(squeezed(indented(text)))


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_exists(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # --config is read where it stands
    assert "$" not in command, f"a variable of {page} is not set"
    check_command(command)


@pytest.mark.parametrize("command", ["python run_rq.py --no_such_flag", "python no_such_script.py --epoch 3",
                                     "cd lora_training && torchrun train_lora.py --epochs many"])  # fmt: skip
def test_a_wrong_command_is_seen(command: str) -> None:
    """The control of the test above."""
    with pytest.raises((AssertionError, SystemExit)):
        check_command(command)


def test_the_chinese_readme_has_the_same_commands() -> None:
    assert squeezed(indented(README)) == squeezed(indented(CHINESE))


def test_the_chinese_readme_has_the_same_tables() -> None:
    """Every number and every piece of code in a table, and the headings, in the same order."""

    def facts(text: str) -> list[list[str]]:
        rows = [line for line in text.splitlines() if line.startswith("|")]
        return [sorted(re.findall(r"`[^`]+`", row)) + re.findall(r"(?<![\w.`-])\.?\d[\d,.]*\d", row) for row in rows]

    def shape(text: str) -> list[int]:
        return [line.count("#") for line in text.splitlines() if re.match("#+ ", line)]

    assert facts(README) == facts(CHINESE) and shape(README) == shape(CHINESE)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", read_page(page)):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def our_files() -> list[Path]:
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.py") if file.name != "__init__.py"]
    return files + list(ROOT.glob("*.py"))


def head_commands() -> set[tuple[str, str]]:
    """(file, command) of the commands at the heads of our files; three blanks part a command from what it does."""
    found = set()
    for file in our_files():
        head = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")), clean=False) or ""
        commands = {re.split(" {3,}", line)[0] for line in page_commands(head)}
        found |= {(str(file.relative_to(ROOT)), command) for command in commands if not command.endswith("...")}
    return found


@pytest.mark.parametrize(("file", "command"), sorted(head_commands()))
def test_command_at_a_files_head_exists(file: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check_command(command)


def our_imports(path: Path) -> set[Path]:
    """The files of ours that a file imports, in functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {ROOT / f"{name.replace('.', '/')}.py" for name in names}
    return {file for file in found if file.is_file()}


def test_arrows_run_down() -> None:
    """docs/ARCHITECTURE.md: every file of ours is in one line of the table and imports nothing of a line above."""
    line_of: dict[Path, int] = {}
    for number, line in enumerate(re.findall(r"^\| (`.*?) \|", read_page("docs/ARCHITECTURE.md"), re.MULTILINE)):
        folder = ROOT
        for name in re.findall(r"`([^`]+)`", line):
            folder = ROOT / Path(name).parent if "/" in name.rstrip("/") else folder
            pattern = f"{Path(name).name}/*.py" if name.endswith("/") else Path(name).name
            for file in folder.glob(pattern):
                line_of.setdefault(file, number)
    files = our_files()
    assert [file for file in files if file not in line_of] == []
    up = [(a, b) for a in files for b in our_imports(a) if b in line_of and line_of[b] < line_of[a]]
    assert not up, [f"{a.relative_to(ROOT)} imports {b.relative_to(ROOT)}" for a, b in up]


def test_the_levels_are_those_of_the_records() -> None:
    page = read_page("docs/MIGRATION.md")
    assert with_levels(page) == page, "out of date: python tables/levels.py --page docs/MIGRATION.md"


def test_a_level_changed_by_hand_is_seen(tmp_path: Path) -> None:
    page = read_page("docs/MIGRATION.md")
    changed = re.sub(r"(\| of \d+ |)\| \.\d\d\d \|", "| .999 |", page, count=1)
    assert changed != page and with_levels(changed) == page
    assert [line.count("|") for line in level_lines(tmp_path)] == [6] * 5  # no record: three graphs, blank
    with pytest.raises(InputError, match="has no <!-- levels -->"):
        with_levels("# another page\n")


def other_llms() -> dict[str, Any]:
    """Small models of the families that the README names as tested."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

    sizes: dict[str, Any] = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return {
        "LLaMA": LlamaConfig(**sizes),
        "Qwen2": Qwen2Config(**sizes),
        "Qwen2, tied": Qwen2Config(**sizes, tie_word_embeddings=True),
        "Qwen3": Qwen3Config(**sizes, head_dim=8),
        "GPT-2": GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    }


@pytest.mark.parametrize("name", ["LLaMA", "Qwen2", "Qwen2, tied", "Qwen3", "GPT-2"])
def test_other_llms_take_code_tokens(name: str) -> None:
    """New rows, LoRA, logits at chosen positions and candidate scores by two ways, with each architecture."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lora_training.candidate_scoring import score_candidates
    from lora_training.code_tokens import trainable_rows

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(other_llms()[name], attn_implementation="sdpa")
    model.resize_token_embeddings(108, mean_resizing=False)
    rows = trainable_rows(model, range(100, 108))
    assert len(rows) == (1 if model.config.tie_word_embeddings else 2)
    settings = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear", trainable_token_indices=rows)
    adapted = get_peft_model(model, settings).eval()
    ids, keep = torch.randint(108, (2, 9)), torch.zeros(2, 9, dtype=torch.bool)
    keep[0, 5:8] = keep[1, 3:6] = True
    chosen = adapted(input_ids=ids, logits_to_keep=keep).logits
    torch.testing.assert_close(chosen, adapted(input_ids=ids).logits[keep], rtol=1e-4, atol=1e-5)
    packed, full = (score_candidates(adapted, ids[0].tolist(), [[1, 2, 103], [4, 5, 104]], way=way)
                    for way in ("packed", "full"))  # fmt: skip
    torch.testing.assert_close(packed, full, rtol=0, atol=1e-4)


def test_the_readme_names_the_llms_tested() -> None:
    assert "small random LLaMA, Qwen2 (tied and not), Qwen3 and GPT-2" in README
