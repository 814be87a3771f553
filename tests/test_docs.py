"""The pages agree with the code: links, commands, file names, imports, levels; the log has its form."""

from __future__ import annotations

import ast
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from common.files import ROOT
from model.decoders import DECODERS
from tests.pages import HISTORY, PAGES, check_command, help_of, page_commands, read_page

CURRENT = [page for page in PAGES if page not in HISTORY]
COMMANDS = sorted({(page, command) for page in CURRENT for command in page_commands(read_page(page))})
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


@pytest.mark.parametrize("command", PROMISED)
def test_a_promised_command_is_printed_and_exists(command: str) -> None:
    assert command in {" ".join(found.split()) for _, found in COMMANDS}
    check_command(command)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_of_a_page_exists(page: str, command: str) -> None:
    assert "$" not in command, f"a variable of {page} is not set"
    check_command(command)


@pytest.mark.parametrize("command", ["python run_rq.py --no_such_flag", "python no_such_script.py --epoch 3"])
def test_a_wrong_command_is_seen(command: str) -> None:
    """The control of the tests above."""
    with pytest.raises(AssertionError):
        check_command(command)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", read_page(page)):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", CURRENT)
def test_files_that_a_page_names_exist(page: str) -> None:
    """Names of scripts in backquotes, with their folder or without."""
    folders = [ROOT, (ROOT / page).parent, *(path for path in ROOT.iterdir() if path.is_dir())]
    for name in set(re.findall(r"`([\w/.-]+\.(?:py|sh))`", read_page(page))):
        assert any((folder / name).exists() for folder in folders), f"{page} names {name}"


def test_every_decoder_is_named_in_help() -> None:
    assert all(name in help_of("run_rq.py") for name in DECODERS)


# ---------------------------------------------------------------- the log


def entries(text: str) -> list[str]:
    return re.split(r"(?m)^## ", text)[1:]


def log_faults(text: str) -> list[str]:
    """Titles of entries without the form ``date: what was tried -> verdict``, in another order, or too long."""
    faults, latest = [], date.max
    for entry in entries(text):
        title, *lines = [line for line in entry.splitlines() if line.strip()]
        found = re.fullmatch(r"(\d{4}-\d\d-\d\d): .+ -> .+", title)
        if found is None or date.fromisoformat(found[1]) > latest:
            faults.append(title)
            continue
        latest = date.fromisoformat(found[1])
        if len(title) > 150 or len([line for line in lines if not line.startswith("|")]) > 20 or len(lines) > 30:
            faults.append(f"too long: {title}")
    return faults


def test_the_log_is_newest_first_with_short_entries() -> None:
    text = read_page("docs/LOG.md")
    assert len(entries(text)) > 20 and not log_faults(text)


def test_a_wrong_entry_of_the_log_is_seen() -> None:
    good = "# Log\n\n## 2026-11-28: a -> b\n\ntext\n\n## 2026-11-27: c -> d\n\ntext\n"
    assert not log_faults(good)
    assert log_faults(good.replace("11-27", "11-29")) and log_faults(good.replace("c -> d", "c"))
    assert log_faults(good + "a line\n" * 21)


# ---------------------------------------------------------------- imports

FOLDERS = ("common", "data", "Class", "model", "lora_training", "tables", "benchmarks")
ALLOWED = {  # folder -> folders of ours that it may import, besides itself
    "common": set(),
    "data": {"common"},
    "Class": {"common", "data"},
    "model": {"common", "data", "Class"},
    "lora_training": {"common", "data", "Class", "model"},
    "tables": {"common", "data", "Class", "model", "lora_training", "run_rq"},
}


def our_files() -> list[Path]:
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py") if file.name != "__init__.py"]
    return files + list(ROOT.glob("*.py"))


def our_imports(path: Path) -> set[str]:
    """The folders of ours (or scripts of the root) that a file imports, in functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return {name for name in found if name in FOLDERS or (ROOT / f"{name}.py").is_file()}


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_between_folders_go_down(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        above = our_imports(path) - ALLOWED[folder] - {folder}
        assert not above, f"{path.relative_to(ROOT)} imports {', '.join(sorted(above))}"


def head_commands() -> set[tuple[str, str]]:
    """(file, command) of the commands in the docstrings at the heads of our files."""
    found = set()
    for file in our_files():
        head = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")), clean=False) or ""
        commands = {re.split(" {3,}", line)[0] for line in page_commands(head)}
        found |= {(str(file.relative_to(ROOT)), command) for command in commands if not command.endswith("...")}
    return found


@pytest.mark.parametrize(("file", "command"), sorted(head_commands()))
def test_a_command_at_a_files_head_exists(file: str, command: str) -> None:
    check_command(command)


# ---------------------------------------------------------------- what pages say of LLMs


def other_llms() -> dict[str, Any]:
    """Small models of the families that the pages name as tested."""
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
    """New embeddings, LoRA, logits at chosen positions and candidate scores by two ways, with each architecture."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lora_training.candidate_scoring import score_lists
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
    prompts, candidates = [ids[0].tolist(), ids[1, :4].tolist()], [[1, 2, 103], [4, 5, 104]]
    for packed, full in zip(
        *(score_lists(adapted, prompts, [candidates] * 2, way=way) for way in ("packed", "full")), strict=True
    ):
        torch.testing.assert_close(packed, full, rtol=0, atol=1e-4)


def test_the_pages_name_the_llms_tested() -> None:
    text = " ".join(read_page(page) for page in CURRENT)
    assert all(name.split(",")[0] in text for name in other_llms())
