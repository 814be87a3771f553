"""Entities, facts, codes and questions: every answer recomputed, splits apart, leaks found when planted."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from Class import build_mix, check_leaks, gen_entity_data_rq
from Class.codes import load_codes, parse_codes
from Class.gen_entity_data_rq import TASKS, entity_parts, holds_answer
from Class.gen_lp_data_rq import disjoint_parts
from Class.rows import FILE_STEMS, read_rows, row_triples, write_rows
from common.errors import InputError
from common.files import read_json
from data.knowledge_graph import KnowledgeGraph
from tests.test_instructions import FAMILY, parse_entity, write_codes, write_graph

Rows = dict[str, list[dict[str, Any]]]
SHAPE = (4, 16, 3)  # few codes, so that entities share some


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codes(FAMILY, tmp_path_factory.mktemp("codes"), SHAPE)


def read_task(out: Path, task: str) -> Rows:
    return {split: list(read_rows(out / task / f"{stem}.json")) for split, stem in FILE_STEMS.items()}


def generate(out: Path, *words: str | Path) -> dict[str, Rows]:
    gen_entity_data_rq.main([*map(str, words), "--out_dir", str(out)])
    return {task: read_task(out, task) for task in TASKS if (out / task).is_dir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, codes: Path) -> tuple[Path, dict[str, Rows]]:
    out = tmp_path_factory.mktemp("out")
    return out, generate(out, "--codes", codes)


def rows_of(made: tuple[Path, dict[str, Rows]], task_type: str, split: str) -> list[dict[str, Any]]:
    return [row for rows in made[1].values() for row in rows[split] if row["task_type"] == task_type]


def known(kg: KnowledgeGraph, *splits: str) -> set[tuple[str, ...]]:
    triples = np.concatenate([kg.split(split) for split in splits])
    return {(kg.entities[h], kg.relations[r], kg.entities[t]) for h, r, t in triples.tolist()}


# ---------------------------------------------------------------- entities


def test_entities_are_held_out(family: KnowledgeGraph, made: tuple[Path, dict[str, Rows]]) -> None:
    for task in ("entity_representation", "code_understanding"):
        found = {split: {row["truth"][0] for row in rows if row["truth"][0] in family.entities}
                 for split, rows in made[1][task].items()}  # fmt: skip
        assert not any(found[a] & found[b] for a, b in itertools.combinations(found, 2))
    parts = entity_parts(1000, 0)
    assert [len(parts[split]) for split in FILE_STEMS] == [800, 100, 100]
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(1000))


def test_names_codes_and_descriptions_belong_together(
    family: KnowledgeGraph, codes: Path, made: tuple[Path, dict[str, Rows]]
) -> None:
    numbers, row_of = load_codes(codes).numpy(), {name: i for i, name in enumerate(family.entities)}
    counts: Counter[str] = Counter()
    for row in made[1]["entity_representation"]["test"]:
        i = row_of[row["truth"][0]]
        prompt, kind = row["instruction"], row["task_type"]
        counts[kind] += 1
        if kind == "name_to_codes":
            assert f"'{family.labels[i]}'" in prompt and np.array_equal(parse_codes(row["output"]), numbers[i])
            continue
        text = prompt.split("\n")[1]
        assert row["output"] == (family.labels[i] if kind == "codes_to_name" else family.descriptions[i])
        if kind == "explain_codes":
            assert prompt.startswith(f"Explain the quantized representation of entity '{family.labels[i]}':\n<ENT>")
            name, shown = parse_entity(text)
            assert name == family.labels[i] and np.array_equal(shown, numbers[i])
        else:
            assert np.array_equal(parse_codes(text), numbers[i]) and family.labels[i] not in prompt
    assert counts == dict.fromkeys(("name_to_codes", "codes_to_name", "explain_codes"), 100)


def test_codes_that_two_entities_share_are_not_asked_for(tmp_path: Path) -> None:
    graph = write_graph(
        tmp_path / "g", train=[f"e{i} r e{i + 1}" for i in range(60)], valid=["e0 r e5"], test=["e1 r e9"]
    )
    path = write_codes(graph, tmp_path / "codes", (1, 8, 1))  # 61 entities, 8 codes: nearly all are shared
    numbers = load_codes(path).numpy().reshape(-1)
    source = gen_entity_data_rq.open_source(
        gen_entity_data_rq.parse_args(["--codes", str(path), "--dataset", str(graph), "--out_dir", str(tmp_path)])
    )
    kinds = {kind.task_type: kind.items for kind in gen_entity_data_rq.entity_kinds(source, np.arange(61))}
    counts = np.bincount(numbers, minlength=8)
    assert kinds["codes_to_name"].tolist() == [i for i in range(61) if counts[numbers[i]] == 1]
    assert len(kinds["name_to_codes"]) == 61


# ---------------------------------------------------------------- facts


def test_facts_come_from_their_split(family: KnowledgeGraph, made: tuple[Path, dict[str, Rows]]) -> None:
    allowed = {"train": known(family, "train"), "validation": known(family, "valid"), "test": known(family, "test")}
    everything = set().union(*allowed.values())
    for task in ("knowledge_reasoning", "question_answering"):
        for split, rows in made[1][task].items():
            for row in rows:
                facts = set(row_triples(row))
                if row["truth"] == ["False"]:
                    assert not facts & (allowed["train"] if split == "train" else everything)
                else:
                    assert facts and facts <= allowed[split]
    validation = {fact for rows in made[1].values() for row in rows["validation"] if row["truth"] != ["False"]
                  for fact in row_triples(row)}  # fmt: skip
    parts = disjoint_parts(family, 0)
    tuning = {(family.entities[h], family.relations[r], family.entities[t]) for h, r, t in parts.tuning.tolist()}
    assert validation and not validation & tuning, "link prediction tunes on those"


def test_reasoning_answers(family: KnowledgeGraph, codes: Path, made: tuple[Path, dict[str, Rows]]) -> None:
    numbers, label = load_codes(codes).numpy(), dict(zip(family.entities, family.labels, strict=True))
    words = dict(zip(family.relations, family.relation_labels, strict=True))
    for row in made[1]["knowledge_reasoning"]["test"]:
        h, r, t = row["triple"]
        if row["task_type"] == "validate_triple":
            assert f"({label[h]} | {words[r]} | {label[t]})" in row["instruction"]
            continue
        asked = {"tail": t, "head": h, None: r}[row["direction"]]
        shown = [label[h], words[r], label[t]]
        shown[[h, r, t].index(asked)] = "?"
        assert f"({' | '.join(shown)})" in row["instruction"] and row["truth"] == [asked]
        if row["direction"] is None:
            assert row["output"] == words[r]
        else:
            name, shown_codes = parse_entity(row["output"])
            assert name == label[asked] and np.array_equal(shown_codes, numbers[family.entities.index(asked)])
            assert label[asked] not in row["instruction"]
    kinds = Counter(row["direction"] for row in rows_of(made, "complete_triple", "train"))
    assert set(kinds) == {"head", None} and min(kinds.values()) > 0.45 * kinds.total()


def test_true_and_false_are_even(made: tuple[Path, dict[str, Rows]]) -> None:
    for split in FILE_STEMS:
        outputs = [row["output"] for row in rows_of(made, "validate_triple", split)]
        assert Counter(outputs) == dict.fromkeys(("True", "False"), len(outputs) // 2)
        if split != "train":  # whatever a limit cuts off
            assert outputs == ["True", "False"] * (len(outputs) // 2)


# ---------------------------------------------------------------- codes


def test_answers_about_codes_are_computed_from_them(
    family: KnowledgeGraph, codes: Path, made: tuple[Path, dict[str, Rows]]
) -> None:
    numbers = load_codes(codes).numpy()
    counts: Counter[str] = Counter()
    for row in made[1]["code_understanding"]["train"]:
        lines, kind = row["instruction"].split("\n"), row["task_type"]
        texts = [line.removeprefix("Entity: ") for line in lines if "<ENT>" in line]
        if kind == "hidden_level":
            name, text = re.fullmatch(r"<ENT>(.*)</ENT> (.*)", texts[0]).groups()  # type: ignore[union-attr]
            filled = parse_codes(text.replace("?", row["output"]))
            assert np.array_equal(filled, numbers[family.labels.index(name)]) and not holds_answer(
                text, [row["output"]]
            )
            counts["level " + row["output"][1]] += 1
            continue
        found = [parse_entity(text) for text in texts]
        for name, shown in found:
            assert np.array_equal(shown, numbers[family.labels.index(name)])
        position = int(lines[3].split(": ")[1])
        same = (found[0][1][position] == found[1][1][position]).tolist()
        assert row["output"] == f"{[*same, False].index(False)} of 3"
        counts[row["output"]] += 1
    assert all(counts[f"{n} of 3"] > 100 for n in range(3)) and all(counts[f"level {q}"] > 100 for q in range(3))


# ---------------------------------------------------------------- questions


def follow(facts: set[tuple[str, ...]], start: set[str], relation: str) -> set[str]:
    """All ends of ``relation`` (``~r``: against its direction) from ``start``, by brute force."""
    if relation.startswith("~"):
        return {h for h, r, t in facts if t in start and r == relation[1:]}
    return {t for h, r, t in facts if h in start and r == relation}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_answer_sets_are_complete(family: KnowledgeGraph, made: tuple[Path, dict[str, Rows]], split: str) -> None:
    splits = ["train"] if split == "train" else ["train", "valid", "test"]  # train knows nothing but itself
    facts, label = known(family, *splits), dict(zip(family.labels, family.entities, strict=True))
    words = {f"{way}{text}": f"{mark}{raw}" for raw, text in zip(family.relations, family.relation_labels, strict=True)
             for way, mark in (("", ""), ("inverse of ", "~"))}  # fmt: skip
    rows = made[1]["question_answering"][split]
    assert len(rows) > 10
    for row in rows[:150]:
        relation = words[re.search(r'"([^"]*)"', row["instruction"])[1]]  # type: ignore[index]
        start = label[re.search(r"<ENT>(.*?)</ENT>", row["instruction"])[1]]  # type: ignore[index]
        ends = follow(facts, {start}, relation)
        assert set(row["truth"]) == ends and len(row["truth"]) == len(ends) <= 20 and start not in ends
        assert row["output"].split("\n") == [family.labels[family.entities.index(name)] for name in row["truth"]]


def test_all_answers_or_no_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a has two r, one of them known to test alone; b has one r; the limit is two answers."""
    graph = write_graph(
        tmp_path / "data" / "g", train=["a r c", "b r c", "d s c", "d s b", "d s a"], valid=["e r d"],
        test=["a r d", "e s c"],
    )  # fmt: skip
    monkeypatch.setattr(gen_entity_data_rq, "MAX_ANSWERS", 2)
    rows = generate(tmp_path / "out", "--no_codes", "--dataset", graph, "--tasks", "question_answering")
    asked = {
        split: {
            (tuple(sorted(row_triples(row))), tuple(row["truth"]))
            for row in found
            if row["task_type"] == "one_hop_question"
        }
        for split, found in rows["question_answering"].items()
    }
    a, b = ("a", "r", "c"), ("b", "r", "c")
    assert ((a,), ("c",)) in asked["train"], "complete by all that training knows"
    assert ((a, b), ("a", "b")) in asked["train"] and not any(len(facts) > 2 for facts, _ in asked["train"])
    assert asked["test"] == {((("e", "s", "c"),), ("c",))}, (
        "training knows another answer of (a, r) and of the inverse (c, s), valid one of the inverse (d, r)"
    )


# ---------------------------------------------------------------- the whole


def test_prompts_do_not_hold_their_answers(made: tuple[Path, dict[str, Rows]]) -> None:
    assert holds_answer("x Mexico y", ["Mexico"]) and holds_answer("a|b (c)", ["(c)"])
    assert not holds_answer("x Mexicos y", ["Mexico"]) and not holds_answer("Q1_23", ["Q1_2"])
    for task in ("entity_representation", "question_answering"):
        for split, rows in made[1][task].items():
            for row in rows:
                assert not holds_answer(row["instruction"], row["output"].split("\n")), (split, row["id"])


def test_no_leaks_apart_and_mixed(made: tuple[Path, dict[str, Rows]]) -> None:
    out = made[0]
    assert check_leaks.check(out) == []
    build_mix.main(["--out_dir", str(out)])
    assert check_leaks.check(out) == []
    stats = read_json(out / "dataset_stats.json", "stats")
    assert not any(count for dropped in stats["dropped"].values() for count in dropped.values())


@pytest.mark.parametrize("plant", ["answer", "fact", "label", "twice"])
def test_planted_leaks_are_found(tmp_path: Path, made: tuple[Path, dict[str, Rows]], plant: str) -> None:
    task = "question_answering" if plant in ("answer", "twice") else "knowledge_reasoning"
    rows = {split: part[:600] for split, part in read_task(made[0], task).items()}
    if plant == "answer":
        one = rows["train"][5]
        one["instruction"] += f"\n{one['output']}"
    elif plant == "twice":
        rows["test"].append(rows["test"][0])
    elif plant == "fact":
        rows["train"].append(next(row for row in rows["test"] if row["direction"] == "tail") | {"id": "planted"})
    else:
        rows["validation"] = [row for row in rows["validation"] if row["output"] != "False"]
    for split, stem in FILE_STEMS.items():
        write_rows(tmp_path / task / f"{stem}.json", rows[split])
    words = {"answer": "state their answer", "fact": "facts in both train and test", "label": "expected both",
             "twice": "ids occur twice"}  # fmt: skip
    faults = check_leaks.check(tmp_path)
    assert len(faults) == 1 and words[plant] in faults[0]


def test_same_seed_same_bytes(tmp_path: Path, codes: Path, made: tuple[Path, dict[str, Rows]]) -> None:
    generate(tmp_path / "a", "--codes", codes, "--limit", "200")
    generate(tmp_path / "b", "--codes", codes, "--limit", "200", "--seed", "1")
    for task in TASKS:
        first, other = read_task(tmp_path / "a", task), read_task(tmp_path / "b", task)
        assert first["train"] == made[1][task]["train"][:200] != other["train"]
    kinds = Counter(row["task_type"] for row in read_task(tmp_path / "a", "knowledge_reasoning")["train"])
    assert len(kinds) == 3 and min(kinds.values()) > 20, "a limit takes of every kind"


def test_without_codes(tmp_path: Path) -> None:
    rows = generate(tmp_path, "--no_codes", "--dataset", FAMILY, "--limit", "500")
    assert set(rows) == {"knowledge_reasoning", "question_answering"}
    assert not any("<" in row["instruction"] + row["output"] for split in rows.values() for row in split["test"])
    assert check_leaks.check(tmp_path) == []
    with pytest.raises(SystemExit):
        generate(tmp_path, "--no_codes", "--tasks", "code_understanding")


def test_two_entities_are_too_few(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "two", train=["a r b"], valid=["b r a"], test=["a r a"])
    codes = write_codes(graph, tmp_path / "codes", SHAPE)
    with pytest.raises(InputError, match="has 2 entities, too few to hold some out"):
        generate(tmp_path / "out", "--codes", codes, "--dataset", graph)
    assert {len(part) for part in entity_parts(3, 0).values()} == {1}
