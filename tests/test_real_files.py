"""Files as people have them: odd white space, quotes, headers, orders, layouts of JSON, tiny graphs.

docs/DATA.md has a row for each case here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from Class import check_leaks, gen_lp_data_rq
from Class.candidates import Candidates, read_candidates, write_candidates
from Class.prompts import link_prediction, prediction
from Class.rows import make_row, need_fields, read_rows, split_path, write_rows
from Class.source import Source
from common.config import parse_config
from common.errors import InputError
from data.embed_text import embed_tfidf, sharing_nothing
from data.knowledge_graph import KnowledgeGraph
from model.inputs import load_graph, load_text

TRAIN = "ada\tknows\tbob\nbob\tknows\tcid\ncid\tlikes\tdee\ndee\tlikes\tada\n"
GRAPH = {"train.txt": TRAIN, "valid.txt": "ada\tlikes\tcid\n", "test.txt": "bob\tlikes\tdee\n"}


def write(folder: Path, files: Mapping[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def refused(folder: Path, *words: str) -> str:
    """The one line with which the folder is rejected; it has these words."""
    with pytest.raises(InputError) as error:
        KnowledgeGraph.load(folder)
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
    return line


# ---------------------------------------------------------------- 1: names and white space


def test_names_in_several_spellings_are_refused_unless_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of spelling: tests/faults/test_odd_files.py."""
    folder = write(tmp_path / "g", {**GRAPH, "test.txt": '"bob"\t"likes"\t"dee"\n'})
    refused(folder, ".txt:", "spellings", "such as")
    assert KnowledgeGraph.load(folder, keep_names=True).num_entities > 4
    assert "spellings" in capsys.readouterr().err


@pytest.mark.parametrize("train", [TRAIN.replace("ada", "ada "), TRAIN.replace("bob", '"bob"')])
def test_odd_names_that_split_nothing_are_reported(
    tmp_path: Path, train: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"train.txt": train, "valid.txt": "cid\tlikes\tcid\n", "test.txt": "dee\tlikes\tdee\n"}
    folder = write(tmp_path / "g", files)
    assert KnowledgeGraph.load(folder).num_entities == 4
    assert "1 entity names" in capsys.readouterr().err
    KnowledgeGraph.load(folder)
    assert capsys.readouterr().err == "", "once per process"


@pytest.mark.parametrize("header", ["head\trelation\ttail", "Subject\tPredicate\tObject", '"h"\t"r"\t"t"'])
def test_a_header_line_is_refused_and_a_real_use_of_its_words_is_not(tmp_path: Path, header: str) -> None:
    folder = write(tmp_path / "g", {name: f"{header}\n{text}" for name, text in GRAPH.items()})
    refused(folder, "train.txt:1", "header", "2 more")
    relation = header.split("\t")[1]
    write(folder, {name: f"{header}\n{text}bob\t{relation}\tada\n" for name, text in GRAPH.items()})
    assert relation in KnowledgeGraph.load(folder).relations
    assert KnowledgeGraph.load(write(tmp_path / "k", {n: f"{header}\n{t}" for n, t in GRAPH.items()}), keep_names=True)


def test_a_first_line_of_names_that_occur_nowhere_else_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: f"Person\tVerb\tThing\n{text}" for name, text in GRAPH.items()}
    assert KnowledgeGraph.load(write(tmp_path / "g", files)).num_entities == 6
    assert capsys.readouterr().err.count("may be a header") == 3
    KnowledgeGraph.load(write(tmp_path / "plain", GRAPH))
    assert "header" not in capsys.readouterr().err


# ---------------------------------------------------------------- 2: the order of rows


@pytest.mark.parametrize("count", ["", "4\n"])
def test_entity2id_beside_train_gives_the_order(tmp_path: Path, count: str) -> None:
    ids = {"entity2id.txt": f"{count}dee\t0\ncid\t1\nbob\t2\nada\t3\n", "relation2id.txt": "likes 0\nknows 1\n"}
    kg = KnowledgeGraph.load(write(tmp_path / "g", GRAPH | ids))
    assert kg.entities == ["dee", "cid", "bob", "ada"] and kg.relations == ["likes", "knows"]
    assert kg.train[0].tolist() == [3, 1, 2]
    refused(write(tmp_path / "short", GRAPH | {"entity2id.txt": "dee\t0\n"}), "train.txt:1", "entity2id.txt")
    dictionary = {"entities.dict": "0\tada\n1\tbob\n2\tcid\n3\tdee\n"}
    refused(write(tmp_path / "two", GRAPH | ids | dictionary), "entity2id.txt:1", "entities.dict")


def numbers(folder: Path) -> Path:
    lines = [f"{i}\tr\t{(i + 1) % 12}\n" for i in range(12)]
    return write(folder, {"train.txt": "".join(lines), "valid.txt": "0\tr\t5\n", "test.txt": "3\tr\t9\n"})


def test_numbers_as_names_are_reported_and_never_taken_for_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kg = KnowledgeGraph.load(numbers(tmp_path / "g"))
    assert kg.entities[:3] == ["0", "1", "10"] and "0, 1, 10, 11" in capsys.readouterr().err
    path = tmp_path / "lists.json"
    row = {"query": ["3", "r"], "direction": "tail", "candidates": [9, 2]}
    path.write_text(json.dumps({"rows": [row]}))
    with pytest.raises(InputError, match="as text"):
        read_candidates([path], kg)
    np.savez(tmp_path / "x.npz", query=np.array([[3, 0]]), direction=np.array(["tail"]), candidates=np.array([[9, 2]]))
    with pytest.raises(InputError, match="info"):
        read_candidates([tmp_path / "x.npz"], kg)
    path.write_text(json.dumps({"rows": [row | {"candidates": ["9", "2"]}]}))
    lists = read_candidates([path], kg)
    assert [kg.entities[i] for i in lists.ids[0]] == ["9", "2"]
    write_candidates(tmp_path / "own.npz", lists, kg)
    assert read_candidates([tmp_path / "own.npz"], kg).ids.tolist() == lists.ids.tolist(), "ids that we wrote are safe"


def test_names_beside_text_embeddings_give_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entities = ["a", "b", "c"]
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.save(tmp_path / "text.npy", rows)
    plain = load_text(tmp_path / "text.npy", 3, entities)
    assert plain is not None and plain.tolist() == rows.tolist()
    assert "no text.entities.txt" in (said := capsys.readouterr().out) and "a, b, ..." in said, "the order is stated"
    (tmp_path / "text.entities.txt").write_text("c\nb\na\n")
    named = load_text(tmp_path / "text.npy", 3, entities)
    assert named is not None and named.tolist() == rows[::-1].tolist()
    assert "names in text.entities.txt" in capsys.readouterr().out
    part = load_text(tmp_path / "text.npy", 2, ["b", "c"])
    assert part is not None and part.tolist() == [rows[1].tolist(), rows[0].tolist()], "rows of other entities are left"
    for names in ("c\nb\n", "c\nb\nb\n", "c\nb\nx\n"):
        (tmp_path / "text.entities.txt").write_text(names)
        with pytest.raises(InputError, match=r"text\.entities\.txt"):
            load_text(tmp_path / "text.npy", 3, entities)


# ---------------------------------------------------------------- 3: negatives that are facts


@pytest.mark.parametrize(("fact", "split"), [("bob\tlikes\tdee", "test"), ("ada\tknows\tbob", "train")])
def test_negatives_that_are_facts_are_reported(
    tmp_path: Path, fact: str, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    KnowledgeGraph.load(write(tmp_path / "g", GRAPH | {"test_neg.txt": f"ada\tlikes\tbob\n{fact}\n"}))
    err = capsys.readouterr().err
    assert f"1 triples of test_neg.txt are also in {split}.txt" in err and "line 2" in err


def test_check_leaks_fails_for_a_triple_with_both_labels(tmp_path: Path) -> None:
    def judged(number: int, label: str, split: str, tail: int) -> dict[str, Any]:
        return make_row("x", label, id=f"{split}{number}", task_type="t", split=split, triple=["a", "r", f"{tail}"],
                        truth=[label])  # fmt: skip

    for name, negative, faults in (("apart", 99, 0), ("both", 1, 1)):
        folder = tmp_path / name
        folder.mkdir()
        for split, start in (("train", 10), ("test", 0)):
            rows = [judged(i, "True", split, start + i) for i in range(4)]
            rows.append(judged(9, "False", split, negative if split == "test" else 50))
            write_rows(split_path(folder, split), rows)
        found = [fault for fault in check_leaks.check_folder(folder)[0] if "True in" in fault]
        assert len(found) == faults


# ---------------------------------------------------------------- 4: JSON of other tools

PLAIN = [{"instruction": f"say {i}", "input": "", "output": f"word{i}"} for i in range(3)]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(PLAIN), json.dumps(PLAIN, indent=2), json.dumps(PLAIN, indent=0),
        "\ufeff" + json.dumps(PLAIN, indent=4),
        "\n".join(map(json.dumps, PLAIN)), "[\n" + ",\n".join(map(json.dumps, PLAIN)) + "\n]\n",
    ],
)  # fmt: skip
def test_any_layout_of_plain_rows_is_read_for_training(tmp_path: Path, text: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(text, encoding="utf-8")
    rows = list(read_rows(path, plain=True))
    assert [row["output"] for row in rows] == ["word0", "word1", "word2"] and len({row["id"] for row in rows}) == 3
    with pytest.raises(InputError, match="id and task_type"):
        list(read_rows(path))
    assert check_leaks.check_folder(tmp_path)[0] == []


@pytest.mark.parametrize("text", [
    '{"rows": []}', '{\n"a": 1\n}', '[{"instruction": "x"}]', "[1, 2]", '[{"a": 1}, ', "[null]",
    '[{"instruction": "x", "output": null}]', '[{"instruction": "x", "output": [1]}]',
])  # fmt: skip
def test_other_json_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"train\.json") as error:
        list(read_rows(path, plain=True))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- 5: scripts without spaces


def test_tfidf_reads_scripts_without_spaces() -> None:
    texts = ["北京大学物理系", "北京大学化学系", "上海火车站", "上海汽车站", "ภาษาไทย", "ภาษาลาว"]
    rows = embed_tfidf(texts, dim=6, seed=0)
    alike = rows @ rows.T
    for i, near in ((0, 1), (2, 3), (4, 5)):
        others = [alike[i, j] for j in range(6) if j not in (i, near)]
        assert alike[i, near] > 0.2 and alike[i, near] > max(others) + 0.1
    assert sharing_nothing(texts) == 0
    assert sharing_nothing(["one", "two", "three words here", "words"]) == 2


# ---------------------------------------------------------------- 6: special characters in labels


def test_a_prompt_is_built_from_fields_whatever_a_label_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = GRAPH | {"relation2text.txt": "knows\tknows | since\nlikes\tlikes\n"}
    kg = KnowledgeGraph.load(write(tmp_path / "g", files))
    from Class.codes import unique_names

    source = Source(kg, unique_names(kg))
    row = source.query_fields(0, 0, [1, 2])
    assert prediction(row).endswith("ada knows | since") and "(ada | knows | since | ?)" in link_prediction(row)
    assert "inverse of knows | since" in prediction(source.query_fields(0, kg.num_relations, [1]))
    changed = row | {"instruction": "Title\none more line\n" + link_prediction(row)}
    assert prediction(need_fields(changed, "head", "relation")) == prediction(row)
    with pytest.raises(InputError, match=r"gen_lp_data_rq\.py"):
        need_fields({"id": "x", "task_type": "link_prediction", "instruction": "as before"}, "head", "relation")


# ---------------------------------------------------------------- 8: tiny graphs


def lists_for(kg: KnowledgeGraph, folder: Path) -> list[str]:
    """Candidate files with every entity for every query of valid and test."""
    from data.knowledge_graph import with_inverse

    paths = []
    for split in ("valid", "test"):
        queries = with_inverse(kg.split(split), kg.num_relations)
        ids = np.tile(np.arange(kg.num_entities), (len(queries), 1))
        n = len(queries)
        lists = Candidates(queries[:, :2], queries[:, 2], ids, None, np.full(n, np.nan), {"split": split})
        write_candidates(folder / f"{split}.npz", lists, kg)
        paths.append(str(folder / f"{split}.npz"))
    return paths


@pytest.mark.parametrize(("pairs", "works"), [(6, True), (2, True), (1, False)])
def test_symmetric_pairs_in_valid_are_parted_or_nothing_is_written(tmp_path: Path, pairs: int, works: bool) -> None:
    valid = "".join(f"e{i}\ts\tf{i}\nf{i}\ts\te{i}\n" for i in range(pairs))
    train = "".join(f"e{i}\tr\tf{i}\nf{i}\tr\te{(i + 1) % pairs}\n" for i in range(pairs))
    folder = write(tmp_path / "g", {"train.txt": train, "valid.txt": valid, "test.txt": "e0\tr\te0\n"})
    kg = KnowledgeGraph.load(folder)
    out = tmp_path / "out"
    words = ["--dataset", str(folder), "--no_codes", "--out_dir", str(out), "--candidates", *lists_for(kg, tmp_path)]
    if works:
        gen_lp_data_rq.main(words)
        found = {
            split: list(read_rows(split_path(out / "link_prediction", split))) for split in ("train", "validation")
        }
        assert all(found.values())
        pairs_of = {s: {frozenset((r["triple"][0], r["triple"][2])) for r in rows} for s, rows in found.items()}
        assert not pairs_of["train"] & pairs_of["validation"]
    else:
        with pytest.raises(InputError, match="no train rows"):
            gen_lp_data_rq.main(words)
        assert not out.exists()


def test_a_graph_of_one_entity_is_refused_before_training(tmp_path: Path) -> None:
    folder = write(tmp_path / "g", dict.fromkeys(GRAPH, "a\tr\ta\n"))
    with pytest.raises(InputError, match="2 or more"):
        load_graph(parse_config(["--dataset", str(folder)]))
    with pytest.raises(InputError, match="at least 1 for valid"):
        KnowledgeGraph.load(write(tmp_path / "one", {"train.txt": "a\tr\ta\n"}))


# ---------------------------------------------------------------- 10: files of other kinds


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"train.txt": TRAIN, "test.txt": TRAIN}, ("no valid.txt", "it holds test.txt, train.txt", "data/split.py")),
        ({"valid.txt": TRAIN, "test.txt": TRAIN}, ("has no train.txt;", "it holds test.txt, valid.txt")),
        ({"facts.parquet": "", "readme": ""}, ("it holds facts.parquet, readme", ".csv, .nt, .ttl")),
        ({"train.tsv": TRAIN, "valid.tsv": "", "test.tsv": ""}, ("valid.tsv:1: found an empty file",)),
        ({"triples.nt": ""}, ("triples.nt:1: found an empty file",)),
        ({"train.txt.gz": "a"}, ("train.txt.gz cannot be unpacked",)),
        ({}, ("it holds no file",)),
    ],
)
def test_the_files_of_a_folder_that_cannot_be_read_are_named(
    tmp_path: Path, files: dict[str, str], words: tuple[str, ...]
) -> None:
    refused(write(tmp_path / "g", files), *words)
