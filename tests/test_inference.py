"""Answers of a tiny LLaMA with an adapter: likelihoods by hand, resumed bytes, searches, free text, refused inputs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from Class import build_mix, gen_entity_data_rq, gen_fb_data_rq, gen_lp_data_rq
from Class.codes import load_codes
from Class.prompts import prediction
from Class.rows import read_rows, write_rows
from common.errors import InputError
from common.files import ROOT, read_json, write_json
from data.knowledge_graph import KnowledgeGraph
from lora_training import ask, inference, make_tiny_base, merge_adapter
from lora_training.adapters import RECORD, load_adapted, read_saved
from lora_training.base_model import load_base, load_tokenizer
from lora_training.code_tokens import (
    CodeShape,
    add_code_tokens,
    read_codes_info,
    resize_model,
    save_tokenizer,
    trainable_rows,
)
from lora_training.inference import (
    Listed,
    candidate_lines,
    listed_candidates,
    permuted_rows,
    read_numbered,
)
from lora_training.make_tiny_base import train_tokenizer
from lora_training.memory import enough_memory
from lora_training.prompts import encode_answer, encode_prompt, prompt_text
from lora_training.score_answers import report
from tables import audit
from tests.test_gen_lp import export
from tests.test_instructions import write_codes

SHAPE = (3, 8, 2)  # L, K, Q
RESULTS = "inference_results.json"
Rows = list[dict[str, Any]]


class World(NamedTuple):
    """Data, base model and adapters of one tiny graph."""

    folder: Path
    kg: KnowledgeGraph
    codes: Path
    mix: Path  # lora_data of all tasks, with codes
    named: Path  # the same of link prediction and classification, without codes
    base: Path
    adapter: Path
    named_adapter: Path


def save_adapter(base: Path, data: Path, folder: Path) -> Path:
    """An untrained adapter whose B and new rows are drawn, so that it changes every logit."""
    from peft import LoraConfig, get_peft_model

    info = read_codes_info(data / "train.json")
    tokenizer = load_tokenizer(str(base))
    size = len(tokenizer)
    shape = None if info["file"] is None else CodeShape(info["num_code"], info["num_quantizers"])
    ids = add_code_tokens(tokenizer, shape)
    model = load_base(str(base), torch.float32)
    resize_model(model, tokenizer, 0)
    rows = trainable_rows(model, ids) if ids else None
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", trainable_token_indices=rows, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    torch.manual_seed(5)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            weight.data = torch.randn_like(weight) * (0.5 if "lora" in name else 1.0)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    save_tokenizer(tokenizer, folder, shape)
    record = {"codes": info, "base_model": str(base), "base_vocabulary": size, "vocabulary": len(tokenizer)}
    write_json(record, folder / RECORD)
    return folder


def save_base(folder: Path, texts: list[str], size: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(texts, size)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, ring: Path, ring_kg: KnowledgeGraph) -> World:
    folder = tmp_path_factory.mktemp("lora")
    codes = write_codes(ring, folder / "codes", SHAPE)
    lists = export(ring_kg, folder, count=6)
    mix, named = folder / "lora_data", folder / "named_data"
    for out, words in ((mix, ["--codes", str(codes)]), (named, ["--no_codes"])):
        words = [*words, "--dataset", str(ring), "--out_dir", str(out)]
        gen_lp_data_rq.main([*words, "--candidates", str(lists["valid"]), str(lists["test"])])
        gen_fb_data_rq.main([*words, "--neg_ratio", "1"])
        gen_entity_data_rq.main(words)
        build_mix.main(["--out_dir", str(out)])
    texts = [prompt_text(row) + row["output"] for row in read_rows(named / "train.json")]
    base = save_base(folder / "base", texts, 400)
    adapters = [save_adapter(base, data, folder / name) for data, name in ((mix, "adapter"), (named, "named_adapter"))]
    return World(folder, ring_kg, codes, mix, named, base, adapters[0], adapters[1])


def run(
    world: World, out: Path, *words: str | int | Path, data: Path | None = None, adapter: Path | None = None
) -> Rows:
    """inference.py over the test tasks of ``data``; the lines of answers.jsonl."""
    data, adapter = data or world.mix, adapter or world.adapter
    flags = ["--lora_adapter", adapter, "--test_data", data / "test_tasks.json", "--output", out / RESULTS]
    inference.main([str(word) for word in (*flags, "--device", "cpu", "--max_new_tokens", "6", *words)])
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def scored(world: World) -> tuple[Path, Rows]:
    out = world.folder / "scored"
    return out, run(world, out, "--base_model", world.base)


def of(answers: Rows, task: str, split: str = "test") -> Rows:
    return [answer for answer in answers if answer["task_type"] == task and answer["split"] == split]


def rows_by_id(data: Path, stem: str = "test_tasks") -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in read_rows(data / f"{stem}.json")}


def likelihoods(model: Any, tokenizer: Any, row: dict[str, Any], answers: list[str], end: bool = False) -> np.ndarray:
    """log P of each answer's text, with or without its end token, by one forward each."""
    prompt, found = encode_prompt(row, tokenizer), []
    for answer in answers:
        ids = encode_answer(answer, tokenizer, end)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
        found.append(float(logits.log_softmax(-1)[torch.arange(len(ids)), ids].sum()))
    return np.array(found)


# ---------------------------------------------------------------- scoring


def test_the_audit_reads_these_answers(world: World, scored: tuple[Path, Rows], ring: Path, tmp_path: Path) -> None:
    """Queries by the rows' ids alone; the metrics are those of score_answers.py."""
    flags = ["--dataset", ring, "--answers", scored[0] / "answers.jsonl", "--json", tmp_path / "audit.json"]
    audit.main([str(flag) for flag in flags])
    found = json.loads((tmp_path / "audit.json").read_text())["link_prediction"]
    expected = report(scored[1])["link_prediction"]["test"]
    assert found["metrics"]["mrr"] == pytest.approx(expected["mrr"]) and found["metrics"]["count"] == expected["count"]
    assert not any(one["count"] for one in found["findings"] if "queries" in one["name"])


def test_scores_are_the_likelihoods_of_the_unmerged_adapter(world: World, scored: tuple[Path, Rows]) -> None:
    saved = read_saved(world.adapter)
    model, rows = load_adapted(saved, str(world.base), torch.float32), rows_by_id(world.mix)
    codes = load_codes(world.codes).numpy()
    ranked = of(scored[1], "link_prediction")
    assert len(ranked) == 2 * len(world.kg.test) and all(answer["tokens"] is None for answer in ranked)
    for answer in ranked[:4]:
        row = rows[answer["id"]]
        texts = []
        for name in row["candidates"]:
            pairs = codes[world.kg.entities.index(name)].tolist()
            texts.append("1. <CODE>" + "".join(f"Q0_{a}Q1_{b}" for a, b in pairs) + "</CODE>")
        expected = likelihoods(model, saved.tokenizer, row, texts)
        found = np.array(answer["scores"])
        # sums of about -140 in float32, once merged and once not
        assert np.allclose(found - found[0], expected - expected[0], atol=4e-3), "up to what all candidates share"
        best = [texts[i] for i in np.argsort(-expected)[:3]]
        assert answer["text"].split("\n") == [f"{n}. {text[3:]}" for n, text in enumerate(best, 1)]
        assert answer["candidates"] == row["candidates"] and answer["candidate_rank"] == row["candidate_rank"]
    for answer in of(scored[1], "triple_classification")[:6]:
        expected = likelihoods(model, saved.tokenizer, rows[answer["id"]], ["True", "False"])
        assert np.allclose(answer["scores"], expected, atol=1e-3) and answer["candidates"] == ["True", "False"]


def test_every_row_is_answered_once_and_validation_where_it_decides(world: World, scored: tuple[Path, Rows]) -> None:
    out, answers = scored
    assert sorted(a["id"] for a in answers if a["split"] == "test") == sorted(rows_by_id(world.mix))
    of_validation = {a["task_type"] for a in answers if a["split"] == "validation"}
    assert of_validation == {"triple_classification", "validate_triple"}
    results = read_json(out / RESULTS, "results")
    assert [a["id"] for a in results["answers"] if a["split"] == "test"] == list(rows_by_id(world.mix)), (
        "the file's order"
    )
    metrics = results["metrics"]
    assert metrics["triple_classification"]["test"]["threshold_from"] == "validation"
    assert metrics["link_prediction"]["test"]["count"] == len(of(answers, "link_prediction"))
    assert "validation" not in metrics["link_prediction"] and results["codes"]["file"] == world.codes.name
    assert {"exact_match", "parse_failures"} <= metrics["hidden_level"]["test"].keys()


def test_names_are_scored_through_their_end_and_chosen_on_validation(world: World) -> None:
    answers = run(world, world.folder / "named", data=world.named, adapter=world.named_adapter)
    saved = read_saved(world.named_adapter)
    model, rows = load_adapted(saved, str(world.base), torch.float32), rows_by_id(world.named)
    ranked = of(answers, "link_prediction")
    uneven = [answer for answer in ranked if answer["tokens"] is not None]
    assert uneven and of(answers, "link_prediction", "validation")
    for answer in uneven[:3]:
        row = rows[answer["id"]]
        lines = row["instruction"].split("Candidates:\n")[1].split("\n")[:-1]
        expected = likelihoods(model, saved.tokenizer, row, [f"1. {line}\n" for line in lines])
        found = np.array(answer["scores"])
        assert np.allclose(found - found[0], expected - expected[0], atol=1e-3)
        lengths = [len(encode_answer(f"1. {line}\n", saved.tokenizer, end=False)) for line in lines]
        assert np.ptp(np.array(lengths) - np.array(answer["tokens"])) == 0, "all but what they share"
    metrics = read_json(world.folder / "named" / RESULTS, "results")["metrics"]["link_prediction"]
    best = max(("sum", "mean"), key=lambda way: metrics["validation"][f"by_{way}"]["mrr"])
    assert metrics["test"]["mrr"] == metrics["test"][f"by_{best}"]["mrr"]


def test_a_merged_model_answers_alike(world: World, scored: tuple[Path, Rows]) -> None:
    saved, merged = read_saved(world.adapter), world.folder / "merged"
    load_adapted(saved, str(world.base), torch.float32).merge_and_unload().save_pretrained(merged)
    save_tokenizer(saved.tokenizer, merged, saved.shape)
    write_json(saved.record, merged / RECORD)
    out = world.folder / "from_merged"
    flags = ["--base_model", merged, "--test_data", world.mix / "test_tasks.json", "--output", out / "r.json"]
    inference.main([str(word) for word in (*flags, "--limit", 20, "--max_new_tokens", 6, "--device", "cpu")])
    found = [json.loads(line) for line in (out / "r.answers.jsonl").read_text().splitlines()]
    expected = {(answer["split"], answer["id"]): answer for answer in scored[1]}
    assert any(answer["scores"] for answer in found)
    for answer in found:
        if answer["scores"]:
            assert np.allclose(answer["scores"], expected[answer["split"], answer["id"]]["scores"], atol=1e-3)


def test_a_base_model_alone_answers_what_has_no_codes(world: World) -> None:
    """Zero-shot rows of the tables: another model than the tuned one, asked alike."""
    out = world.folder / "zero"
    flags = ["--base_model", world.base, "--test_data", world.named / "test_tasks.json", "--output", out / "r.json"]
    inference.main([str(word) for word in (*flags, "--limit", 12, "--max_new_tokens", 4, "--device", "cpu")])
    metrics = read_json(out / "r.json", "results")["metrics"]
    assert sum(splits["test"]["count"] for splits in metrics.values() if "test" in splits) == 12


# ---------------------------------------------------------------- resume


def test_an_interrupted_run_ends_in_the_same_bytes(
    world: World, scored: tuple[Path, Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (scored[0] / "answers.jsonl").read_bytes()
    plan = (scored[0] / "answers.jsonl.plan.json").read_bytes()
    lines = len(whole.splitlines())
    computed: list[int] = []
    answer = inference.Answerer.answer

    def counted(self: inference.Answerer, rows: Rows) -> Rows:
        computed.append(len(rows))
        return answer(self, rows)

    monkeypatch.setattr(inference.Answerer, "answer", counted)
    for share in (0.37, 0.9):  # somewhere within a line, and within a batch
        (tmp_path / "answers.jsonl").write_bytes(whole[: int(share * len(whole))])
        (tmp_path / "answers.jsonl.plan.json").write_bytes(plan)
        computed.clear()
        run(world, tmp_path, "--base_model", world.base)
        assert (tmp_path / "answers.jsonl").read_bytes() == whole
        assert 0 < sum(computed) < lines, "what was answered is not answered again"
    monkeypatch.setattr(inference, "load_model", lambda *_: pytest.fail("everything was answered"))
    run(world, tmp_path, "--base_model", world.base)
    again, first = (read_json(folder / RESULTS, "results") for folder in (tmp_path, scored[0]))
    assert again["answers"] == first["answers"] and again["metrics"] == first["metrics"]
    with pytest.raises(InputError, match=r"answers of another run \(batch_size 8 before, 3 now\)"):
        run(world, tmp_path, "--base_model", world.base, "--batch_size", "3")
    (tmp_path / "answers.jsonl").unlink()
    with pytest.raises(InputError, match="--overwrite"):
        run(world, tmp_path, "--base_model", world.base)


# ---------------------------------------------------------------- likelihood scoring


@pytest.mark.parametrize("with_codes", [True, False])
def test_candidates_are_predicted_from_the_query_alone(world: World, tmp_path: Path, with_codes: bool) -> None:
    """--decode likelihood: log P(answer, end | prompt of tail_prediction rows) of each candidate, by full passes."""
    data = world.mix if with_codes else world.named
    adapter = world.adapter if with_codes else world.named_adapter
    answers = of(run(world, tmp_path / "told", "--decode", "likelihood", data=data, adapter=adapter), "link_prediction")
    model = load_adapted(read_saved(adapter), str(world.base), torch.float32).merge_and_unload().eval()
    tokenizer, rows = read_saved(adapter).tokenizer, rows_by_id(data)
    end = tokenizer.eos_token
    assert len(answers) == 2 * len(world.kg.test)
    met = False
    for answer in answers:
        row = rows[answer["id"]]
        asked = {"instruction": prediction(row)}
        assert not any(f"{line}\n" in asked["instruction"] for line in row["candidates"]), "no list is shown"
        listed = [candidate.answer for candidate in listed_candidates(row)]
        expected = likelihoods(model, tokenizer, asked, listed, end=True)
        assert np.allclose(answer["scores"], expected, atol=4e-3) and answer["decode"] == "likelihood"
        met |= np.ptp(expected) > 0.1
        assert answer["text"].startswith(f"1. {listed[int(np.argmax(answer['scores']))]}")
        lengths = [len(encode_answer(text, tokenizer)) for text in listed]
        assert answer["tokens"] == (lengths if len(set(lengths)) > 1 else None), "for sum and mean of unequal lengths"
    assert end and met, "candidates must differ for this test to say anything"
    assert report(answers)["link_prediction"]["test"]["count"] == len(answers)


# ---------------------------------------------------------------- other orders of the lists


def test_other_orders_are_answered_and_mapped_back(world: World, tmp_path: Path) -> None:
    """Each score is that of the same candidate in the permuted prompt, which is built from the row's fields."""
    data = world.mix / "link_prediction"
    answers = run(world, tmp_path, "--permute", 2, "--limit", 6, data=data)
    saved = read_saved(world.adapter)
    model, rows = load_adapted(saved, str(world.base), torch.float32), rows_by_id(data)
    changed = 0
    for answer in answers:
        row = rows[answer["id"]]
        assert len(answer["permuted"]) == 2 and answer["candidate_order"] in ("ranked", "shuffled")
        again = list(permuted_rows(row, 2, seed=0))
        orders = [order for _, order in again]
        assert orders == [order for _, order in permuted_rows(row, 2, seed=0)], "seeded by the row's id"
        for (other, order), scores in zip(again, answer["permuted"], strict=True):
            assert sorted(order) == list(range(len(order)))
            assert other["candidates"] == [row["candidates"][i] for i in order]
            lines = [f"1. {codes}" for codes in row["candidate_codes"]]
            expected = likelihoods(model, saved.tokenizer, other, lines)
            assert np.allclose(np.array(scores) - scores[0], expected - expected[0], atol=4e-3)
            changed += order != sorted(order) and not np.allclose(scores, answer["scores"], atol=1e-2)
    assert changed, "the order must matter for this test to say anything"
    ids = list(rows)[:2]
    assert [o for _, o in permuted_rows(rows[ids[0]], 3, 0)] != [o for _, o in permuted_rows(rows[ids[1]], 3, 0)]
    results = read_json(tmp_path / RESULTS, "results")
    permuted = results["metrics"]["link_prediction"]["test"]["permuted"]
    assert permuted["orders"] == 2 and 0 <= permuted["first_changes"] <= 1
    assert results["candidate_order"]["test"] == answers[0]["candidate_order"]


def test_a_file_that_was_cut_off_is_an_error_beyond_the_limit(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "load_model", lambda *_: pytest.fail("weights were loaded"))
    whole = (world.mix / "test_tasks.json").read_bytes()
    (tmp_path / "test_tasks.json").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "dataset_stats.json").write_bytes((world.mix / "dataset_stats.json").read_bytes())
    with pytest.raises(InputError, match=r"test_tasks\.json"):
        run(world, tmp_path / "out", "--limit", 3, data=tmp_path)


def test_prompts_that_cannot_be_permuted_are_an_error(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edited prompt, and rows of earlier versions, which lack the fields."""
    monkeypatch.setattr(inference, "load_model", lambda *_: pytest.fail("weights were loaded"))
    data = world.mix / "link_prediction"
    (tmp_path / "dataset_stats.json").write_bytes((data / "dataset_stats.json").read_bytes())
    row = next(read_rows(data / "test_tasks.json"))
    for changes, word in (({"instruction": f"Hello! {row['instruction']}"}, "--permute"), ({"head": None}, "head")):
        write_rows(tmp_path / "test_tasks.json", [row | changes])
        with pytest.raises(InputError, match=word):
            run(world, tmp_path / "out", "--permute", 2, data=tmp_path)


# ---------------------------------------------------------------- text


def test_free_text_is_read_or_counted(world: World, tmp_path: Path) -> None:
    answers = run(world, tmp_path, "--decode", "free", "--permute", 1)
    assert all(answer["permuted"] == [None] for answer in of(answers, "link_prediction"))
    metrics = read_json(tmp_path / RESULTS, "results")["metrics"]
    for task in ("link_prediction", "triple_classification"):
        counts = metrics[task]["test"]
        assert counts["parse_failures"] == counts["count"] > 0, "six tokens of a random model are no answer"
    assert metrics["link_prediction"]["test"]["mrr"] == 0 and metrics["triple_classification"]["test"]["accuracy"] == 0


def test_what_counts_as_an_answer() -> None:
    listed = [Listed("a", "<CODE>Q0_1</CODE>"), Listed("b", "<CODE>Q0_2</CODE>"), Listed("c", "<CODE>Q0_1</CODE>")]
    first, second = "<CODE>Q0_1</CODE>", "<CODE>Q0_2</CODE>"
    assert read_numbered(f"1. {second}\n2. {first}\n3. {second}", listed) == [-1, 0, -1]
    assert read_numbered(f"1. {first}\nnonsense", listed) == [0, None, 0]
    assert read_numbered(f"1. <CODE>Q0_3</CODE>\n2. {first}", listed) is None and read_numbered("", listed) is None

    names = {"id": "x", "candidates": ["1", "2"], "candidate_names": ["a b", "c"]}
    coded = names | {"candidate_codes": [first, second]}
    assert listed_candidates(coded) == [Listed("a b", first), Listed("c", second)]
    assert listed_candidates(names) == [Listed("a b", "a b"), Listed("c", "c")]
    with pytest.raises(InputError):
        listed_candidates({"id": "x", "candidates": ["1", "2"]})


def test_the_line_of_a_name_ends_and_that_of_codes_has_ended(world: World) -> None:
    tokenizer = read_saved(world.adapter).tokenizer
    names = candidate_lines([Listed("a", "a"), Listed("a b", "a b")], tokenizer)
    newline = encode_answer("\n", tokenizer, end=False)[-1]
    assert all(line[-1] == newline for line in names) and len(names[0]) < len(names[1])
    assert candidate_lines([Listed("a", "a")], tokenizer)[0][-1] == tokenizer.eos_token_id
    coded = candidate_lines([Listed("a", "<CODE>Q0_1Q1_1</CODE>")], tokenizer)
    assert tokenizer.convert_ids_to_tokens(coded[0][-4:]) == ["<CODE>", "Q0_1", "Q1_1", "</CODE>"]


# ---------------------------------------------------------------- bad input


def test_bad_input_is_one_line_before_the_weights(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load_model", "load_base", "load_adapted", "sha256_file"):
        monkeypatch.setattr(inference, name, lambda *_: pytest.fail("weights were loaded, or whole files were read"))
    test = ["--test_data", world.mix / "test_tasks.json", "--output", tmp_path / "r.json"]
    adapter = ["--lora_adapter", world.adapter]
    other_base = save_base(tmp_path / "other_base", ["few words " * 9], 300)
    foreign, other_codes = (shutil.copytree(world.adapter, tmp_path / name) for name in ("foreign", "other_codes"))
    load_tokenizer(str(other_base)).save_pretrained(foreign)
    record = read_json(world.adapter / RECORD, "record")
    record["codes"]["sha256"] = "0" * 64
    write_json(record, other_codes / RECORD)
    long = tmp_path / "long" / "test_tasks.json"
    row = next(read_rows(world.mix / "test_tasks.json"))
    write_rows(long, [row | {"instruction": "word " * 3000, "task_type": "other", "truth": ["x"]}])
    shutil.copy(world.mix / "dataset_stats.json", long.parent)
    cases: list[tuple[list[Any], str]] = [
        ([*test], "--lora_adapter"),
        (["--lora_adapter", tmp_path / "none", *test], "none does not exist"),
        (["--base_model", tmp_path / "none", *test], "none does not exist"),
        (["--lora_adapter", foreign, *test], "foreign has "),
        ([*adapter, "--base_model", other_base, *test], "other_base"),
        (["--lora_adapter", other_codes, *test], "other_codes was made with"),
        (["--test_data", tmp_path / "none.json"], "none.json does not exist"),
        ([*adapter, *test, "--val_data", tmp_path / "none.json"], "none.json does not exist"),
        ([*adapter, "--test_data", world.named / "test_tasks.json"], "no codes"),
        (["--base_model", world.base, *test], "--base_model"),
        ([*adapter, "--test_data", long], "--max_new_tokens"),
        ([*adapter, *test, "--device", "cuda:77"], "--device cuda:77"),
        ([*adapter, "--test_data", world.mix / "triple_classification" / "test_tasks.json", "--decode", "likelihood"],
         "--decode likelihood"),
    ]  # fmt: skip
    for words, message in cases:
        with pytest.raises(InputError, match=re.escape(message)) as error:
            inference.main([str(word) for word in words])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "flag"),
    [(["--batch_size", "0"], "--batch_size"), (["--decode", "likelihood", "--permute", "2"], "--permute"),
     (["--output", "."], "--output"), (["--output", str(ROOT)], "--output")],
)  # fmt: skip
def test_flags_out_of_range_are_one_line(words: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        inference.parse_args(words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and flag in error and error.count("\n") == 1


def test_runs_may_share_a_folder(tmp_path: Path) -> None:
    names = [inference.answers_path(tmp_path / name).name for name in (RESULTS, "a.json", "b.json")]
    assert names == ["answers.jsonl", "a.answers.jsonl", "b.answers.jsonl"]


REFUSED = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB")


def test_a_lack_of_memory_is_one_line(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all commands that hold weights; train_lora.py has its own. Another error stays what it is."""

    def refuse(*_: Any, **__: Any) -> None:
        raise REFUSED

    adapter, base = ["--lora_adapter", str(world.adapter)], ["--width", "32", "--layers", "1", "--heads", "2"]
    family = ["--dataset", str(ROOT / "data" / "family")]
    for module, name, words, way in (
        (inference, "load_model", [*adapter, "--test_data", str(world.mix / "test_tasks.json"), "--output",
                                   str(tmp_path / "r.json")], "--batch_size below 8"),
        (ask, "load_model", ["--lora_adapter", str(world.named_adapter), *family, "--question", "Who?"],
         "fewer --beams than 20"),
        (merge_adapter, "merge", [*adapter, "--output_dir", str(tmp_path / "m")], "give --device cpu"),
        (make_tiny_base, "train", [*family, "--out", str(tmp_path / "b"), *base], "lower --batch 8, --block 512"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, refuse)
        with pytest.raises(InputError, match=rf"out of memory \(CUDA .* 6\.00 GiB\); .*{way}") as error:
            module.main(words)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "m").exists() and not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="shapes"), enough_memory("x"):
        raise ValueError("shapes do not fit")


@pytest.mark.parametrize("script", ["inference.py", "train_lora.py", "merge_adapter.py", "make_tiny_base.py"])
def test_help_loads_neither_torch_nor_transformers(script: str) -> None:
    code = (
        f"import runpy, sys\nsys.argv = [{script!r}, '--help']\n"
        f"try: runpy.run_path({script!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print('heavy:', sorted({'torch', 'transformers', 'peft'} & sys.modules.keys()), end.code)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "lora_training", capture_output=True, text=True)
    assert ended.stdout.strip().endswith("heavy: [] 0") and "default: " in ended.stdout
