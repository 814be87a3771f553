"""Rows and their files; codes checked against record and data set; what is taken when nothing is said; mixes; leaks."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from Class import build_mix, check_leaks, gen_fb_data_rq
from Class import rows as row_files
from Class import source as sources
from Class.codes import code_files, code_stem, load_codes, parse_codes, save_codes
from Class.prompts import link_prediction, numbered
from Class.rows import FILE_STEMS, fill_top, make_row, read_rows, row_triples, write_rows
from Class.source import add_flags, fit_codes, open_source
from common.errors import InputError
from common.files import ROOT, command, write_json
from data.knowledge_graph import KnowledgeGraph
from lora_training import inference, train_lora

FAMILY = ROOT / "data" / "family"
HARD = ['say "hi"', "a|b", "<i>", "東京", "</ENT>", "Q0_1", "back\\slash", "line\u2028end"]


def write_graph(folder: Path, **splits: Iterable[str]) -> Path:
    """A graph folder from splits of "h r t" words; entities without a training triple are fine."""
    folder.mkdir(parents=True)
    for split, triples in splits.items():
        lines = ["\t".join(triple.split()) + "\n" for triple in triples]
        (folder / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def write_codes(
    graph: Path, out: Path, shape: tuple[int, int, int] = (3, 8, 2), quantizer: str = "rq", dataset: bool = True
) -> Path:
    """Random codes of a graph with the record that stage 1 would leave; for tests alone.

    ``dataset``: False as in a run without that flag.
    """
    kg = KnowledgeGraph.load(graph)
    L, K, Q = shape
    files = code_files(out, code_stem(kg.name, L, K, Q, quantizer))
    codes = torch.randint(0, K, (kg.num_entities, L, Q), generator=torch.Generator().manual_seed(0))
    outputs = save_codes(files, codes.squeeze(-1) if quantizer == "vq" else codes, kg.entities, None)
    args = {
        "dataset": str(graph) if dataset else None,
        "seq_len": L,
        "num_code": K,
        "num_quantizers": Q,
        "quantizer": quantizer,
    }
    write_json({"args": args, "inputs": kg.input_hashes, "outputs": outputs, "dataset": kg.name}, files.record)
    return files.codes


def parse_entity(text: str) -> tuple[str, np.ndarray]:
    """Name, as it is shown, and codes [L, Q] of ``<ENT>name</ENT> <CODE>...</CODE>``."""
    name, codes = re.fullmatch(r"<ENT>(.*)</ENT> (<CODE>.*</CODE>)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return name, parse_codes(codes)


def flags(*words: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args([str(word) for word in words])


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(
        tmp_path / "data" / "little",
        train=["a r b", "b r c", "c s d", "d s a"], valid=["a r c"], test=["b r d", "c r a"],
    )  # fmt: skip


@pytest.fixture
def codes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "codes_new"
    folder.mkdir()
    monkeypatch.setattr(sources, "CODES_FOLDER", folder)
    monkeypatch.setattr(sources, "DEMO_FOLDER", folder)
    return folder


# ---------------------------------------------------------------- files


def some_rows(count: int) -> Iterator[dict[str, Any]]:
    for i in range(count):
        name = HARD[i % len(HARD)]
        yield make_row(
            f"Who is {name}?\n\t{i}", name, id=f"x-{i}", task_type="x", split="train", triple=[name, "r", "t"]
        )


@pytest.mark.parametrize("file_format", ["json", "jsonl"])
def test_rows_come_back_as_they_went(tmp_path: Path, file_format: str) -> None:
    path = tmp_path / f"train.{file_format}"
    stats = write_rows(path, some_rows(20))
    rows = list(some_rows(20))
    assert list(read_rows(path)) == rows
    text = path.read_text(encoding="utf-8")
    assert (json.loads(text) if file_format == "json" else [json.loads(line) for line in text.split("\n")[:-1]]) == rows
    assert stats["rows"] == 20 and stats["bytes"] == path.stat().st_size and stats["task_types"] == {"x": 20}


def test_limit_and_empty(tmp_path: Path) -> None:
    assert write_rows(tmp_path / "train.json", some_rows(20), limit=7)["rows"] == 7
    assert write_rows(tmp_path / "validation.json", [])["rows"] == 0
    assert json.loads((tmp_path / "validation.json").read_text()) == []


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    write_rows(path, some_rows(5))
    before = path.read_bytes()

    def broken() -> Iterator[dict[str, Any]]:
        yield from some_rows(3)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_rows(path, broken())
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["train.json"]


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        write_rows(tmp_path / "train.json", some_rows(count))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small = peak(2_000)
    assert peak(20_000) < 1.5 * small


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    write_rows(path, some_rows(3))
    path.write_text(path.read_text(encoding="utf-8").replace('"id": "x-1", ', ""), encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(f"{path}:3: a row needs")):
        list(read_rows(path))


def test_rows_of_several_triples() -> None:
    row = make_row("i", "o", id="1", task_type="x", split="train", triple=["a", "r", "b", "b", "s", "c"])
    assert row_triples(row) == [("a", "r", "b"), ("b", "s", "c")]
    assert row_triples(make_row("i", "o", id="1", task_type="x", split="train")) == []


def test_the_link_prediction_prompt_has_the_papers_fields(graph: Path, codes_folder: Path) -> None:
    source = open_source(flags("--dataset", graph, "--codes", write_codes(graph, codes_folder)))
    prompt = link_prediction(source.query_fields(0, 0, [1, 2, 3]))
    lines = prompt.split("\n")
    assert "(a | r | ?)" in lines[1] and parse_entity(lines[2].removeprefix("Head: "))[0] == "a"
    assert [parse_entity(line)[0] for line in lines[4:7]] == ["b", "c", "d"]
    assert numbered(["x", "y"]) == "1. x\n2. y"


# ---------------------------------------------------------------- codes, record, data set


def test_codes_reach_the_text_they_belong_to(graph: Path, codes_folder: Path) -> None:
    path = write_codes(graph, codes_folder)
    for code_format in ("spec", "compact"):
        source = open_source(flags("--codes", path, "--code_format", code_format))
        assert source.kg.name == "little", "without --dataset, the codes' own data set is taken"
        expected = load_codes(path).numpy()
        for i, text in enumerate(source.entity_texts):
            name, codes = parse_entity(text)
            assert name == source.kg.entities[i] and np.array_equal(codes, expected[i])
    assert open_source(flags("--dataset", graph, "--no_codes")).entity_texts == ["a", "b", "c", "d"]


def test_a_record_without_the_dataset_flag_is_placed_by_name(graph: Path, codes_folder: Path) -> None:
    path = write_codes(graph, codes_folder, dataset=False)
    assert open_source(flags("--codes", path)).kg.name == "little", "data/ beside the codes' folder"


def test_vq_codes_are_one_level(graph: Path, codes_folder: Path) -> None:
    source = open_source(flags("--codes", write_codes(graph, codes_folder, (3, 8, 1), "vq")))
    assert source.codes is not None and source.codes.shape == (4, 3, 1)
    assert parse_entity(source.entity_texts[2])[1].shape == (3, 1)


def test_shuffled_codes_are_the_same_codes_elsewhere(graph: Path, codes_folder: Path) -> None:
    path = write_codes(graph, codes_folder, (6, 50, 2))
    source = open_source(flags("--codes", path, "--shuffle_codes", "--seed", "1"))
    true = load_codes(path).numpy()
    assert source.codes is not None and not np.array_equal(source.codes, true)
    assert sorted(map(str, source.codes.tolist())) == sorted(map(str, true.tolist()))


def test_codes_of_another_data_set_are_mapped_by_name(tmp_path: Path, graph: Path, codes_folder: Path) -> None:
    big = write_graph(
        tmp_path / "data" / "big",
        train=["d s a", "z s y", "c s d", "b r c", "a r b"], valid=["z r y"], test=["y r z"],
    )  # fmt: skip
    path = write_codes(big, codes_folder, (6, 50, 2))
    source = open_source(flags("--dataset", graph, "--codes", path))
    names = (codes_folder / "big_6_50_2_rq.entities.txt").read_text().split()
    assert source.codes is not None and len(names) == 6 and source.codes.shape == (4, 6, 2)
    for name, row in zip(source.kg.entities, source.codes, strict=True):
        assert np.array_equal(row, load_codes(path).numpy()[names.index(name)])
    assert "big (6 rows), mapped to little (4) by name" in source.codes_info["origin"]
    assert source.codes_info["in_their_training_split"] == {"valid_triples": 0, "test_triples": 0}


def test_codes_that_saw_the_test_triples_are_refused(tmp_path: Path, graph: Path, codes_folder: Path) -> None:
    seen = write_graph(
        tmp_path / "data" / "seen", train=["b r d", "c s a", "d s b"], valid=["a r c"], test=["c s d"]
    )  # fmt: skip
    path = write_codes(seen, codes_folder)
    with pytest.raises(InputError, match=r"seen.* holds 1 of the 2 test triples of little"):
        open_source(flags("--dataset", graph, "--codes", path))
    for file in seen.iterdir():  # without the data, it cannot be known
        file.unlink()
    with pytest.raises(InputError, match=r"trained on seen .* not found"):
        open_source(flags("--dataset", graph, "--codes", path))


def test_the_public_sets_are_judged_the_same_way(tmp_path: Path, codes_folder: Path) -> None:
    """The test split of one set moved into the training of the other, with other ids: refused, by name."""
    first = write_graph(tmp_path / "data" / "one", train=["m r n"], valid=["n r o"], test=["o r m"])
    other = write_graph(tmp_path / "data" / "two", train=["o r m", "k s m"], valid=["n s k"], test=["k s o"])
    assert sources.shared_triples(KnowledgeGraph.load(other), KnowledgeGraph.load(first)) == {
        "valid_triples": 0, "test_triples": 1,
    }  # fmt: skip


def rewrite(path: Path, codes: torch.Tensor) -> None:
    """Other codes under the same name, recorded as if stage 1 had written them."""
    files = code_files(path.parent, path.stem)
    record = json.loads(files.record.read_text())
    names = files.entities.read_text().splitlines()
    torch.save(codes, path)
    record["outputs"] |= {path.name: sources.sha256_file(path)}
    assert len(names) == 4
    write_json(record, files.record)


@pytest.mark.parametrize(
    "codes, words",
    [
        (torch.zeros(4, 3, 2), r"torch.float32 \[4, 3, 2\], expected torch.int64"),
        (torch.zeros(4, 3, 2, dtype=torch.int32), r"torch.int32 .* expected torch.int64"),
        (torch.zeros(5, 3, 2, dtype=torch.int64), r"\[5, 3, 2\], its names and record say \[4, 3, 2\]"),
        (torch.zeros(4, 2, 2, dtype=torch.int64), r"\[4, 2, 2\], its names and record say \[4, 3, 2\]"),
        (torch.zeros(4, 3, 1, dtype=torch.int64), r"\[4, 3, 1\], its names and record say \[4, 3, 2\]"),
        (torch.zeros(4, dtype=torch.int64), r"\[4\], expected torch.int64 \[M, L, Q\]"),
        (torch.full((4, 3, 2), 8), r"indices 8..8, expected 0..7"),
        (torch.full((4, 3, 2), -1), r"indices -1..-1, expected 0..7"),
    ],
)
def test_wrong_codes_are_refused_with_both_sides(
    graph: Path, codes_folder: Path, codes: torch.Tensor, words: str
) -> None:
    path = write_codes(graph, codes_folder)
    rewrite(path, codes)
    with pytest.raises(InputError, match=words):
        open_source(flags("--dataset", graph, "--codes", path))


def test_files_that_are_not_those_recorded_are_refused(tmp_path: Path, graph: Path, codes_folder: Path) -> None:
    path = write_codes(graph, codes_folder)
    kg = KnowledgeGraph.load(graph)
    names = path.with_suffix(".entities.txt")
    text = names.read_text()
    names.write_text(text.replace("b", "x"))
    with pytest.raises(InputError, match="sha256 differs"):
        fit_codes(path, kg, graph)
    names.write_text(text)
    fit_codes(path, kg, graph)
    other = write_graph(tmp_path / "data" / "other", train=["p r q"], valid=["q r p"], test=["q r q"])
    with pytest.raises(
        InputError, match=r"\(little, 4 entities\) has no row for 2 of the 2 entities of other, such as 'p'"
    ):
        open_source(flags("--dataset", other, "--codes", path))
    path.with_suffix(".json").unlink()
    with pytest.raises(InputError, match="has no record"):
        open_source(flags("--dataset", graph, "--codes", path))
    with pytest.raises(InputError, match="does not exist"):
        open_source(flags("--codes", tmp_path / "none.pt"))
    write_json({"mrr": 0.3}, path.with_suffix(".json"))
    with pytest.raises(InputError, match="no complete run record"):
        open_source(flags("--codes", path))
    with pytest.raises(InputError, match="holds no codes"):  # in codes_new/ such a file is skipped
        open_source(flags("--dataset", graph))


# ---------------------------------------------------------------- what is taken when nothing is said


def test_nothing_there_names_the_command(codes_folder: Path) -> None:
    with pytest.raises(InputError, match=r"holds no codes; make some: python .*run_rq.py --dataset .*FB15k-237"):
        open_source(flags())


def test_the_newest_fitting_codes_are_taken_and_named(
    tmp_path: Path, graph: Path, codes_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = write_codes(FAMILY, codes_folder)
    assert open_source(flags()).kg.name == "family", "the bundled graph's codes where nothing else is"
    old, new = write_codes(graph, codes_folder), write_codes(graph, codes_folder, (4, 8, 2))
    for age, path in enumerate([family, new, old]):  # the bundled graph's are the newest, and yet come last
        os.utime(path, (1e9 - age, 1e9 - age))
    capsys.readouterr()
    source = open_source(flags())
    assert source.codes_info["file"] == new.name
    assert f"codes: {new} (4 x 2 of 8), learned on little's own training split" in capsys.readouterr().out
    assert open_source(flags("--dataset", FAMILY)).codes_info["file"] == family.name
    os.utime(old, (2e9, 2e9))
    assert open_source(flags("--dataset", graph)).codes_info["file"] == old.name


# ---------------------------------------------------------------- mixes


def task(folder: Path, name: str, rows: dict[str, list[dict[str, Any]]], sha: str = "same", **stats: Any) -> None:
    for split, found in rows.items():
        write_rows(folder / name / f"{FILE_STEMS[split]}.json", found)
    write_json({"dataset": "g", "codes": {"file": sha, "sha256": sha}, **stats}, folder / name / "dataset_stats.json")


def fact(task_type: str, split: str, triple: str, truth: str = "True", number: int = 0) -> dict[str, Any]:
    return make_row(
        f"Is it so: {triple}?", truth, id=f"{task_type}-{split}-{number}-{triple}", task_type=task_type, split=split,
        triple=triple.split(), truth=[truth],
    )  # fmt: skip


def two_tasks(folder: Path) -> None:
    def rows(name: str, split: str, triples: Iterable[str]) -> list[dict[str, Any]]:
        found = list(triples)
        return [fact(name, split, t) for t in found] + [
            fact(name, split, f"not r {i}", "False") for i in range(len(found))
        ]

    a = {s: rows("a", s, t) for s, t in {"train": [f"a r {i}" for i in range(50)], "validation": ["v r 1", "v r 2"],
                                         "test": ["t r 1", "t r 2"]}.items()}  # fmt: skip
    b = {s: rows("b", s, t) for s, t in {"train": ["v r 1", "t r 2", *(f"b r {i}" for i in range(20))],
                                         "validation": ["v r 2"], "test": ["t r 1"]}.items()}  # fmt: skip
    task(folder, "a", a)
    task(folder, "b", b)


def mixed(folder: Path, *words: str) -> dict[str, list[dict[str, Any]]]:
    build_mix.main([*words, "--out_dir", str(folder)])
    return {split: list(read_rows(folder / f"{stem}.json")) for split, stem in FILE_STEMS.items()}


def test_a_mix_keeps_the_splits_apart(tmp_path: Path) -> None:
    two_tasks(tmp_path)
    rows = mixed(tmp_path)
    counts = {split: Counter(row["task_type"] for row in found) for split, found in rows.items()}
    # b's training loses "t r 2" to a's test; a's validation loses "v r 1" to b's training; a negative goes with each
    assert counts == {"train": {"a": 100, "b": 42}, "validation": {"a": 2, "b": 2}, "test": {"a": 4, "b": 2}}
    labels = Counter(row["truth"][0] for row in rows["validation"] if row["task_type"] == "a")
    assert labels == {"True": 1, "False": 1}
    facts = {s: {t for r in found if r["truth"] == ["True"] for t in row_triples(r)} for s, found in rows.items()}
    assert not facts["train"] & facts["test"] and not facts["validation"] & (facts["train"] | facts["test"])
    assert [row["task_type"] for row in rows["train"]] != sorted(row["task_type"] for row in rows["train"])
    assert check_leaks.check(tmp_path) == ["1 facts of b's train are test facts of a"]


def test_weights_count_rows(tmp_path: Path) -> None:
    two_tasks(tmp_path)
    rows = mixed(tmp_path, "a=2.5", "b=0.5", "--seed", "3")
    assert Counter(row["task_type"] for row in rows["train"]) == {"a": 250, "b": 21}
    assert Counter(Counter(row["id"].split("#")[0] for row in rows["train"] if row["task_type"] == "a").values()) == {
        2: 50, 3: 50,
    }  # fmt: skip
    assert len({row["id"] for row in rows["train"]}) == 271
    assert mixed(tmp_path, "a=2.5", "b=0.5", "--seed", "3") == rows
    assert mixed(tmp_path, "a=2.5", "b=0.5", "--seed", "4")["train"] != rows["train"]
    assert len(mixed(tmp_path, "a", "--limit", "9")["train"]) == 9


def test_what_is_said_to_come_next_reads_the_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path /= "a folder & more"
    tmp_path.mkdir()
    two_tasks(tmp_path)
    build_mix.main(["--out_dir", str(tmp_path)])
    words = shlex.split(capsys.readouterr().out.split("lora_training/train_lora.py ")[1])
    args = train_lora.parse_args(words)
    assert [args.train_data, args.val_data] == [tmp_path / "train.json", tmp_path / "validation.json"]
    assert args.train_data.is_file() and args.val_data.is_file()
    assert row_files.train_command(row_files.OUT_FOLDER) == command("lora_training/train_lora.py")


@pytest.mark.parametrize("folder", [".", "lora_training", "docs/figures"])
def test_a_printed_command_runs_from_the_present_folder(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / folder)
    python, script, name = shlex.split(command("Class/build_mix.py", Path("a b&c")))
    assert (python, name) == ("python", "a b&c") and Path(script).is_file()


def test_a_printed_command_runs_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(shlex.split(command("run_rq.py"))[1]).is_file()


def test_what_answers_next_reads_the_rows_beside_the_training_rows(tmp_path: Path) -> None:
    words = row_files.answer_command("--base_model", Path("m"), tmp_path / "train.jsonl").split()[2:]
    assert words == ["--base_model", "m"], "there are no rows to answer"
    write_rows(tmp_path / "test_tasks.jsonl", [fact("a", "test", "h r t")])
    words = row_files.answer_command("--base_model", Path("m"), tmp_path / "train.jsonl").split()[2:]
    assert inference.parse_args(words).test_data == tmp_path / "test_tasks.jsonl"


def test_a_mix_of_different_codes_is_refused(tmp_path: Path) -> None:
    two_tasks(tmp_path)
    task(tmp_path, "c", {"train": [fact("c", "train", "q r s")]}, sha="other")
    with pytest.raises(InputError, match=r"different codes.*a: same, b: same, c: other"):
        build_mix.main(["--out_dir", str(tmp_path)])
    codes = {"file": "same", "sha256": "same", "shuffled": True}
    for name, seed in (("a", 0), ("b", 0), ("c", 5)):
        write_json({"dataset": "g", "codes": codes | {"shuffle_seed": seed}}, tmp_path / name / "dataset_stats.json")
    with pytest.raises(InputError, match=r"b: same, shuffled by seed 0, c: same, shuffled by seed 5"):
        build_mix.main(["--out_dir", str(tmp_path)])
    assert build_mix.read_tasks(tmp_path, {"a": 1.0, "b": 1.0}).keys() == {"a", "b"}
    with pytest.raises(InputError, match=r"no data of task d in .*; there: a, b, c"):
        build_mix.main(["d=2", "--out_dir", str(tmp_path)])


def test_one_task_fills_the_top_but_not_over_a_mix(tmp_path: Path) -> None:
    two_tasks(tmp_path)
    assert fill_top(tmp_path / "a", tmp_path)
    assert (tmp_path / "train.json").read_bytes() == (tmp_path / "a" / "train.json").read_bytes()
    assert fill_top(tmp_path / "b", tmp_path)
    before = (tmp_path / "a" / "train.json").read_bytes()
    mixed(tmp_path)
    assert (tmp_path / "a" / "train.json").read_bytes() == before, "writing the mix must not reach through a hard link"
    mix = (tmp_path / "train.json").read_bytes()
    assert not fill_top(tmp_path / "a", tmp_path) and (tmp_path / "train.json").read_bytes() == mix
    (tmp_path / "dataset_stats.json").write_text("5")
    assert fill_top(tmp_path / "a", tmp_path), "damaged statistics are no mix"


# ---------------------------------------------------------------- leaks: each check finds what is planted


def leaks(folder: Path, rows: dict[str, list[dict[str, Any]]], **stats: Any) -> list[str]:
    task(folder, "t", rows, **stats)
    return check_leaks.check(folder)


def question(i: int, prompt: str, output: str, **more: Any) -> dict[str, Any]:
    return make_row(prompt, output, id=f"q{i}", task_type="q", split="train", **more)


def listed(i: int, position: int, extra: str = "") -> dict[str, Any]:
    names = [f"n{k}x" for k in range(5)]
    top = [names[position], *(name for name in names if name != names[position])][:3]
    prompt = "Candidates:\n" + "\n".join(names) + extra
    return question(i, prompt, numbered(top), candidates=names, truth=top[:1])


def test_stated_answers_are_found(tmp_path: Path) -> None:
    rows = [question(i, f"Where is {i}?", "Mexico") for i in range(100)]
    assert leaks(tmp_path / "1", {"train": rows}) == []
    rows[3] = question(3, "Where is Mexico City?", "Mexico")
    assert leaks(tmp_path / "2", {"train": rows}) == [], "a name within a name, once in a hundred rows"
    rows[3] = question(3, "Answer: Mexico", "Mexico")
    assert leaks(tmp_path / "3", {"train": rows}) == ["t: train, q: 1 of 100 prompts state their answer"]
    many = [question(i, f"Is Mexico here {i}?", "Mexico") for i in range(100)]
    assert any("100 of 100 prompts mention" in fault for fault in leaks(tmp_path / "4", {"train": many}))


def test_marked_answers_are_found(tmp_path: Path) -> None:
    plain = [listed(i, i % 5) for i in range(200)]
    assert leaks(tmp_path / "1", {"train": plain}, candidate_order={"train": "shuffled"}) == []
    marked = [listed(i, i % 5, f"\nHint: n{i % 5}x") for i in range(200)]
    assert any("one answer more often" in fault for fault in leaks(tmp_path / "2", {"train": marked}))
    judged = [fact("j", "train", f"a r {i}", ("True", "False")[i % 2]) for i in range(40)]
    assert leaks(tmp_path / "3", {"train": judged}) == []
    for row in judged:
        row["instruction"] += f" Hint: {row['output']}"
    assert any("40 of 40" in fault for fault in leaks(tmp_path / "4", {"train": judged}))


def test_a_truth_that_keeps_its_place_is_found(tmp_path: Path) -> None:
    first = [listed(i, 0 if i % 3 else i % 5) for i in range(300)]
    assert leaks(tmp_path / "1", {"train": first}, candidate_order={"train": "ranked"}) == []
    faults = leaks(tmp_path / "2", {"train": first}, candidate_order={"train": "shuffled"})
    assert len(faults) == 1 and "should be shuffled" in faults[0]


def test_the_chi_square_score_is_that_of_the_distribution() -> None:
    rng = np.random.default_rng(0)
    scores = [
        check_leaks.chi_square_z(np.bincount(rng.integers(0, 20, 2000), minlength=20).tolist()) for _ in range(400)
    ]
    assert abs(np.mean(scores)) < 0.2 and abs(np.std(scores) - 1) < 0.15


def test_labels_and_shared_facts_are_checked(tmp_path: Path) -> None:
    yes = [fact("j", "test", f"a r {i}") for i in range(30)]
    assert any("expected both" in fault for fault in leaks(tmp_path / "1", {"train": [], "test": yes}))
    rare = [*yes, fact("j", "test", "a r x", "False")]
    assert any("neither rare" in fault for fault in leaks(tmp_path / "2", {"train": [], "test": rare}))
    even = [fact("j", "test", f"a r {i}", ("True", "False")[i % 2]) for i in range(30)]
    train = [fact("j", "train", "a r 99", "True"), fact("j", "train", "a r 2", "False")]
    assert leaks(tmp_path / "3", {"train": train, "test": even}) == [], "negatives state no fact"
    contrary = [fact("j", "train", "a r 1", "True"), fact("j", "train", "a r 2", "False")]
    assert len(leaks(tmp_path / "4", {"train": contrary, "test": even})) == 1, "False in test, True in train"
    train = [fact("j", "train", "a r 2", "True"), fact("j", "train", "a r 98", "False")]
    assert leaks(tmp_path / "4", {"train": train, "test": even}) == ["t: 1 facts in both train and test"]
    assert any(
        "ids occur twice" in fault for fault in leaks(tmp_path / "5", {"train": [*train, train[0]], "test": even})
    )


def test_leaks_end_the_command_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task(tmp_path, "t", {"train": [question(0, "Answer: Mexico", "Mexico")]})
    assert check_leaks.main([str(tmp_path)]) == 1 and "LEAK t: train, q" in capsys.readouterr().out
    no_rows = write_graph(tmp_path / "g", train=["a r b"])
    with pytest.raises(InputError, match=r"no train\.json"):
        check_leaks.check(no_rows)


# ---------------------------------------------------------------- other readers


def test_datasets_loads_the_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    codes = write_codes(FAMILY, tmp_path / "codes")
    gen_fb_data_rq.main(["--codes", str(codes), "--out_dir", str(tmp_path / "out"), "--neg_ratio", "1"])
    files = {split: str(tmp_path / "out" / f"{stem}.json") for split, stem in FILE_STEMS.items()}
    loaded = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    for split in FILE_STEMS:
        assert list(loaded[split]) == list(read_rows(files[split]))
