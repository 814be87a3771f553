"""Small base models: nothing held out in the corpus, a tokenizer of LLaMA's kind, a model that learns and reloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from Class import prompts
from Class.codes import unique_names
from Class.source import Source
from common import files
from common.errors import InputError
from common.files import ROOT
from data.knowledge_graph import KnowledgeGraph
from lora_training import make_tiny_base
from lora_training.base_model import load_tokenizer
from lora_training.code_tokens import CodeShape, add_code_tokens, reload_check
from lora_training.prompts import encode_text, prompt_text
from tests.conftest import Command, assert_refused

FAMILY = ROOT / "data" / "family"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "base"
    run(out)
    return out


def run(out: Path, **more: Any) -> None:
    flags = {"dataset": FAMILY, "out": out, "vocab_size": 1500, "width": 64, "layers": 2, "heads": 2, "block": 64,
             "steps": 25, "lr": 0.01, "device": "cpu"} | more  # fmt: skip
    make_tiny_base.main([word for key, value in flags.items() for word in (f"--{key}", str(value))])


def test_the_corpus_says_what_training_says_and_nothing_held_out(family: KnowledgeGraph) -> None:
    documents = list(make_tiny_base.documents(family, 0))
    lines = {line for document in documents for line in document.split("\n")}
    assert len(documents) == family.num_entities
    source = Source(family, unique_names(family))

    def statements(triples: Any) -> set[str]:
        found = set()
        for h, r, t in triples.tolist():
            head, relation, tail = source.shown[h], source.relations[r], source.shown[t]
            found |= {f"({head} | {relation} | {tail})", f"({tail} | inverse of {relation} | {head})"}
        return found

    train, held_out = statements(family.train), statements(family.valid) | statements(family.test)
    assert {line for line in lines if line.startswith("(")} == train
    assert len(held_out) > 1000 and not held_out & lines
    heads = [line for line in lines if not line.startswith("(")]
    assert len(heads) == family.num_entities
    pairs = {frozenset((h, t)) for h, _, t in family.train.tolist()}
    only_held_out = [(h, t) for h, _, t in (*family.valid.tolist(), *family.test.tolist()) if {h, t} not in pairs]
    assert only_held_out, "some held-out pairs share no training triple: their names must never share a line"
    held_out_pairs = {frozenset((source.shown[h], source.shown[t])) for h, t in only_held_out}
    facts = [line[1:-1].split(" | ") for line in lines if line.startswith("(")]
    assert not held_out_pairs & {frozenset((fact[0], fact[2])) for fact in facts}


def test_prompt_tokens_are_one_token_each_and_come_back(made: Path) -> None:
    row = {"instruction": prompts.prediction({"head": "a", "relation": "has b", "head_codes": None}), "output": "c d"}
    text, tokenizer = prompt_text(row), load_tokenizer(str(made))
    ids = encode_text(text, tokenizer)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces[:2] == ["### Instruction:\n", "What completes this?\n"] and pieces[-1] == "\n\n### Response:\n"


def test_names_and_descriptions_of_the_bundled_graph_name_no_relative(family: KnowledgeGraph) -> None:
    names, words = set(family.labels), {label.removeprefix("has ") for label in family.relation_labels}
    for label, description in zip(family.labels, family.descriptions, strict=True):
        assert not words & set(description.lower().replace(",", "").split()), description
        assert not [name for name in names - {label} if name in description], description


def test_a_base_loads_like_any_llama(made: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made), load_tokenizer(str(made))
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.vocab_size == len(tokenizer) <= 1503
    assert not model.config.tie_word_embeddings and model.config.use_cache
    record = files.read_json(made / "run_record.json", "record")
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["losses"][-1] < record["losses"][0] - 1, "it learned something"
    for text in ("Ada Ashley has mother", "日本 é\n\tx  y", "1. 1976 </s> <unk>"):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text and 0 not in ids
    assert len(tokenizer("1976", add_special_tokens=False)["input_ids"]) == 5, "digits one by one, after the space"
    for answer in ("True", "False"):
        assert len(tokenizer(answer, add_special_tokens=False)["input_ids"]) == 1
    add_code_tokens(tokenizer, CodeShape(64, 3))
    reload_check(tokenizer, CodeShape(64, 3))


def test_one_seed_one_base(made: Path, tmp_path: Path) -> None:
    run(tmp_path / "same", steps=2)
    run(tmp_path / "again", steps=2)
    run(tmp_path / "other", steps=2, seed=1)
    digests = [files.sha256_file(tmp_path / name / "model.safetensors") for name in ("same", "again", "other")]
    assert digests[0] == digests[1] != digests[2]
    same = [files.sha256_file(folder / "tokenizer.json") for folder in (tmp_path / "same", made)]
    assert same[0] == same[1]


def test_parameters_by_flags() -> None:
    """1M to 100M: the count in closed form, V D embeddings twice, 4 D^2 + 3 D F per layer, and the norms."""
    args = make_tiny_base.parse_args(["--width", "640", "--layers", "14", "--heads", "10"])
    with torch.device("meta"):
        model = make_tiny_base.build_model(args, 16000)
    D, F, N = 640, 1728, 14
    assert sum(p.numel() for p in model.parameters()) == 2 * 16000 * D + N * (4 * D * D + 3 * D * F + 2 * D) + D
    assert 80e6 < sum(p.numel() for p in model.parameters()) < 100e6


def test_queries_and_keys_begin_smaller() -> None:
    args = make_tiny_base.parse_args(["--width", "64", "--layers", "2", "--heads", "4"])
    model = make_tiny_base.build_model(args, 500)
    spread = {
        key.split(".")[-2]: float(value.detach().std()) for key, value in model.named_parameters() if "_proj" in key
    }
    assert spread.pop("q_proj") == pytest.approx(0.0125, rel=0.1) == spread.pop("k_proj")
    assert len(spread) == 5 and list(spread.values()) == pytest.approx([0.125] * 5, rel=0.1)


def test_bad_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Command) -> None:
    (tmp_path / "mine").write_text("x")
    monkeypatch.setattr(make_tiny_base, "train", lambda *_: pytest.fail("trained for nothing"))
    for words, problem in {
        ("--width", "100", "--heads", "3"): "must be a multiple of twice --heads 3",
        ("--vocab_size", "100"): "must be 300 or more",
        ("--steps", "-1"): "must be 0 or more",
        ("--epochs", "inf"): "--epochs must be above 0 and finite, got inf",
        ("--block", "1"): "must be 2 or more",
        ("--seed", str(2**63)): "less than 2**63",
        ("--out", str(tmp_path / "mine")): "is a file, expected a folder",
        ("--out", str(tmp_path)): "holds files that this script did not write",
        ("--out", str(tmp_path / "new"), "--dataset", "/nowhere"): "/nowhere",
        ("--out", str(tmp_path / "new"), "--device", "cuda:99"): "--device cuda:99 is not there",
        ("--out", "."): "--out . is replaced as a whole, and you are in it",
    }.items():
        assert_refused(shell(make_tiny_base, *words), problem)


def test_a_loss_that_is_not_finite_ends_the_run_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the loss is not finite at step \d+; lower --lr"):
        run(tmp_path / "base", steps=40, lr=1e30)
    assert not list(tmp_path.iterdir())


def test_a_second_run_is_refused_before_it_has_trained(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_tiny_base, "train", lambda *_: pytest.fail("trained for nothing"))
    with pytest.raises(InputError, match="--overwrite"):
        run(made)
    with files.exclusive_lock(tmp_path / "base.lock"), pytest.raises(InputError, match="another run is writing"):
        run(tmp_path / "base")
