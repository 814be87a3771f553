"""Triple classification data: what is sampled, what is given, what is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from Class import check_leaks, gen_fb_data_rq
from Class import source as sources
from Class.codes import load_codes, parse_codes
from Class.gen_fb_data_rq import make_splits, member, sample_negatives, training_ranges
from Class.rows import FILE_STEMS, read_rows
from Class.source import triple_keys
from common.errors import InputError
from common.files import ROOT
from data.knowledge_graph import KnowledgeGraph
from tests.test_instructions import FAMILY, write_codes, write_graph

PUBLIC = ROOT / "data" / "FB15k-237N"


def as_set(triples: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, triples.tolist()))


@pytest.mark.parametrize("ratio", [1, 5])
def test_sampled_negatives(family: KnowledgeGraph, ratio: int) -> None:
    ranges, known = training_ranges(family), np.sort(triple_keys(family.train, family))
    negatives, outside = sample_negatives(family.train, ratio, known, family, ranges, np.random.default_rng(0))
    assert negatives.shape == (len(family.train) * ratio, 3)
    assert not as_set(negatives) & as_set(family.train), "no training triple is called false"
    changed = negatives != np.repeat(family.train, ratio, axis=0)
    assert not changed[:, 1].any() and (changed[:, [0, 2]].sum(axis=1) == 1).all(), "exactly one end is replaced"
    # redrawing until the negative is new flips the coin again, which pulls the share towards the side with more room
    assert 0.45 < changed[:, 2].mean() < 0.55
    seen = [set(map(tuple, family.train[:, [1, end]].tolist())) for end in (0, 2)]
    inside = sum((r, h) in seen[0] and (r, t) in seen[1] for h, r, t in negatives.tolist())
    assert inside >= len(negatives) - outside and outside < 0.01 * len(negatives)


def test_draws_follow_the_relations_triples() -> None:
    """One triple between two ranges of 50 entities: each of the 49 new tails and the 49 new heads equally often; a tail
    of three triples three times as often as one of one."""
    kg = graph_of([[e, 0, 50 + e] for e in range(50)], 100, 1)
    known = np.sort(triple_keys(kg.train, kg))
    ranges = training_ranges(kg)
    negatives, _ = sample_negatives(kg.train[:1], 98_000, known, kg, ranges, np.random.default_rng(1))
    counts = Counter(map(tuple, negatives.tolist()))
    assert len(counts) == 98 and abs(check_leaks.chi_square_z(list(counts.values()))) < 4
    kg = graph_of([[0, 0, 4], [1, 0, 5], [2, 0, 5], [3, 0, 5], [1, 0, 6]], 7, 1)
    known = np.sort(triple_keys(kg.train, kg))
    negatives, _ = sample_negatives(kg.train[:1], 20_000, known, kg, training_ranges(kg), np.random.default_rng(1))
    tails = Counter(int(t) for h, _, t in negatives.tolist() if h == 0)
    assert tails.keys() == {5, 6} and abs(tails[5] / tails[6] - 3) < 0.2


def graph_of(train: list[list[int]], M: int, R: int, **splits: Any) -> KnowledgeGraph:
    names = [str(i) for i in range(M)]
    return KnowledgeGraph(
        name="g", entities=names, relations=[f"r{i}" for i in range(R)], train=np.array(train),
        valid=np.array(splits.get("valid", train)), test=np.array(splits.get("test", train)), labels=names,
        has_label=np.ones(M, dtype=bool), descriptions=[""] * M, relation_labels=[f"r{i}" for i in range(R)],
    )  # fmt: skip


def test_range_draws_come_from_the_relations_range() -> None:
    train = [[0, 0, 5], [1, 0, 6], [2, 0, 7], [9, 1, 9]]
    kg = graph_of(train, 10, 2)
    negatives, outside = sample_negatives(
        kg.train[:3], 40, np.sort(triple_keys(kg.train, kg)), kg, training_ranges(kg), np.random.default_rng(0)
    )
    assert outside == 0
    assert as_set(negatives) == {(h, 0, t) for h in (0, 1, 2) for t in (5, 6, 7)} - as_set(kg.train)


def test_where_the_range_is_full_all_entities_serve() -> None:
    full = [[h, 0, t] for h in (0, 1) for t in (2, 3)]
    kg = graph_of(full, 6, 1)
    known = np.sort(triple_keys(kg.train, kg))
    negatives, outside = sample_negatives(kg.train, 3, known, kg, training_ranges(kg), np.random.default_rng(0))
    assert outside == len(negatives) == 12 and not as_set(negatives) & as_set(kg.train)
    everything = graph_of([[h, 0, t] for h in range(3) for t in range(3)], 3, 1)
    with pytest.raises(InputError, match=r"no negative found for \(0, r0, 0\) of g"):
        sample_negatives(
            everything.train, 1, np.sort(triple_keys(everything.train, everything)), everything,
            training_ranges(everything), np.random.default_rng(0),
        )  # fmt: skip


def test_a_relation_that_training_lacks_is_sampled_from_all_entities() -> None:
    kg = graph_of([[0, 0, 1], [1, 0, 2]], 5, 2, valid=[[0, 1, 1]], test=[[3, 1, 4]])
    splits = make_splits(kg, 2, 0)
    assert splits["test"].outside == 1 and splits["test"].rows.labels.tolist() == [True, False]


def test_member_agrees_with_sets() -> None:
    rng = np.random.default_rng(0)
    keys, known = rng.integers(0, 50, 200), np.unique(rng.integers(0, 50, 20))
    assert member(keys, known).tolist() == [int(key) in set(known.tolist()) for key in keys]
    assert not member(keys, known[:0]).any()


def test_evaluation_negatives_are_false_and_new(family: KnowledgeGraph) -> None:
    splits = make_splits(family, 4, 0)
    facts = as_set(np.concatenate([family.train, family.valid, family.test]))
    negatives = {name: as_set(split.rows.triples[~split.rows.labels]) for name, split in splits.items()}
    assert not negatives["validation"] & facts and not negatives["test"] & facts
    assert not negatives["train"] & (negatives["validation"] | negatives["test"])
    assert not negatives["validation"] & negatives["test"]
    for name, source in (("train", family.train), ("validation", family.valid), ("test", family.test)):
        rows = splits[name].rows
        assert as_set(rows.triples[rows.labels]) == as_set(source)
        assert (~rows.labels).sum() == len(source) * (4 if name == "train" else 1)


def test_training_negatives_do_not_look_at_valid_and_test(family: KnowledgeGraph) -> None:
    """The sampler gives the same negatives whatever the held-out splits are: it cannot tell them apart."""
    other = KnowledgeGraph.load(FAMILY)
    other.valid, other.test = other.test[:5], other.valid[:5]
    first, second = make_splits(family, 3, 7)["train"], make_splits(other, 3, 7)["train"]
    assert np.array_equal(first.rows.triples, second.rows.triples)
    sampled = as_set(first.rows.triples[~first.rows.labels])
    assert sampled & as_set(np.concatenate([family.valid, family.test])), "held-out facts are among them, as they must"


def given_negatives(tmp_path: Path) -> Path:
    return write_graph(
        tmp_path / "data" / "given",
        train=["a r b", "b r c", "c r d", "d s a", "a s e"], valid=["a r c", "b r d"], test=["c r b", "d s e", "a r d"],
        valid_neg=["a r d", "a r d"], test_neg=["c r e", "c r e", "b s e", "e s e"],
    )  # fmt: skip


def generate(out: Path, *words: str | Path) -> dict[str, list[dict[str, Any]]]:
    gen_fb_data_rq.main([*map(str, words), "--out_dir", str(out)])
    return {split: list(read_rows(out / f"{stem}.json")) for split, stem in FILE_STEMS.items()}


def test_given_negatives_stand_as_they_are(tmp_path: Path) -> None:
    graph = given_negatives(tmp_path)
    rows = generate(tmp_path / "out", "--codes", write_codes(graph, tmp_path / "codes"), "--neg_ratio", "2")
    test = [(" ".join(row["triple"]), row["output"]) for row in rows["test"]]
    assert test == [
        ("c r b", "True"), ("c r e", "False"), ("d s e", "True"), ("c r e", "False"), ("a r d", "True"),
        ("b s e", "False"), ("e s e", "False"),
    ]  # fmt: skip
    assert [(" ".join(row["triple"]), row["output"]) for row in rows["validation"]] == [
        ("a r c", "True"), ("a r d", "False"), ("b r d", "True"), ("a r d", "False"),
    ]  # fmt: skip
    assert Counter(row["output"] for row in rows["train"]) == {"True": 5, "False": 10}
    stats = json.loads((tmp_path / "out" / "dataset_stats.json").read_text())
    assert stats["labelled"]["test"]["repeated_negatives"] == 1
    assert stats["labelled"]["validation"]["negatives_from"] == "given"


def test_rows_show_names_and_codes_of_their_triple(tmp_path: Path) -> None:
    path = write_codes(FAMILY, tmp_path / "codes", (2, 30, 3))
    kg, codes = KnowledgeGraph.load(FAMILY), load_codes(path).numpy()
    ids = {name: i for i, name in enumerate(kg.entities)}
    relations = {name: i for i, name in enumerate(kg.relations)}
    words = ["--neg_ratio", "1", "--limit", "40"]
    for code_format in ("spec", "compact"):
        rows = generate(tmp_path / code_format, "--codes", path, "--code_format", code_format, *words)
        assert {split: len(found) for split, found in rows.items()} == {"train": 40, "validation": 40, "test": 40}
        for row in rows["train"] + rows["test"]:
            h, r, t = ids[row["triple"][0]], relations[row["triple"][1]], ids[row["triple"][2]]
            lines = row["instruction"].split("\n")
            assert lines[1] == f"Triple: ({kg.labels[h]} | {kg.relation_labels[r]} | {kg.labels[t]})"
            for line, entity in ((lines[2], h), (lines[3], t)):
                name, code = line.split("</ENT> ")
                assert name.endswith(f"<ENT>{kg.labels[entity]}")
                assert np.array_equal(parse_codes(code), codes[entity])
            assert row["truth"] == [row["output"]] and row["input"] == "" and row["candidates"] is None
    without = generate(tmp_path / "no", "--dataset", FAMILY, "--no_codes", *words)
    plain = [(row["id"], row["triple"], row["output"]) for row in without["test"]]
    assert plain == [(row["id"], row["triple"], row["output"]) for row in rows["test"]], "the ablation: same triples"
    prompts = "\n".join(row["instruction"] for row in without["train"] + without["test"])
    assert not any(mark in prompts for mark in ("<CODE>", "<ENT>", "Q0_", "codes"))
    short = generate(tmp_path / "short", "--codes", path, "--short", *words)["test"]
    assert [(row["id"], row["triple"], row["output"]) for row in short] == plain
    for row in short:
        question, head, relation, tail = row["instruction"].replace("\n", " | ", 1).split(" | ")
        assert question == "True or False?" and relation == kg.relation_labels[relations[row["triple"][1]]]
        for text, entity in ((head, row["triple"][0]), (tail, row["triple"][2])):
            assert text.startswith(f"<ENT>{kg.labels[ids[entity]]}</ENT> ")
            assert np.array_equal(parse_codes(text.split("</ENT> ")[1]), codes[ids[entity]])


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    path = write_codes(FAMILY, tmp_path / "codes")

    def files(name: str, seed: int) -> list[bytes]:
        generate(tmp_path / name, "--codes", path, "--neg_ratio", "1", "--seed", str(seed))
        return [(tmp_path / name / f"{stem}.json").read_bytes() for stem in FILE_STEMS.values()]

    first, again, other = files("a", 1), files("b", 1), files("c", 2)
    assert first == again and first[0] != other[0] and first[1] != other[1]


def test_the_bundled_graph_has_no_leaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = write_codes(FAMILY, tmp_path / "codes")
    generate(tmp_path / "out", "--codes", codes, "--neg_ratio", "1")
    assert check_leaks.check(tmp_path / "out") == [], capsys.readouterr().out


def test_started_alone_without_codes_it_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources, "CODES_FOLDER", tmp_path)
    monkeypatch.setattr(sources, "DEMO_FOLDER", tmp_path)
    with pytest.raises(InputError, match=r"python .*run_rq\.py --dataset .*FB15k-237"):
        gen_fb_data_rq.main(["--out_dir", str(tmp_path / "out")])
    for words in (["--no_codes", "--codes", "x.pt"], ["--neg_ratio", "0"], ["--limit", "-1"]):
        with pytest.raises(SystemExit) as stopped:
            gen_fb_data_rq.main(words)
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("script", ["gen_fb_data_rq.py", "build_mix.py", "check_leaks.py"])
def test_help_is_quick_from_the_root_and_from_the_folder(script: str) -> None:
    for folder, path in ((ROOT, f"Class/{script}"), (ROOT / "Class", script)):
        done = subprocess.run([sys.executable, path, "--help"], cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "--" in done.stdout, done.stderr
    imported = subprocess.run(
        [sys.executable, "-c", f"import sys, Class.{script[:-3]}; print('torch' in sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert imported.stdout.strip() == "False", "torch is what makes a start slow"


@pytest.mark.slow
@pytest.mark.skipif(not PUBLIC.is_dir(), reason="needs: python data/download.py FB15k-237N")
def test_the_whole_of_fb15k_237n(tmp_path: Path) -> None:
    """Counts exact, under 60 s of a processor and 2 GB, in a process of its own."""
    path = write_codes(PUBLIC, tmp_path / "codes", (4, 1024, 4))
    command = [sys.executable, "Class/gen_fb_data_rq.py", "--codes", str(path), "--out_dir", str(tmp_path / "out")]
    before = os.times()
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    stats = json.loads((tmp_path / "out" / "dataset_stats.json").read_text())
    counts = stats["labelled"]
    assert (counts["train"]["positives"], counts["train"]["negatives"]) == (87_282, 1_396_512)
    assert stats["splits"]["train"]["rows"] == 87_282 + 1_396_512
    assert [counts[name][key] for name in ("validation", "test") for key in ("positives", "negatives")] == [
        7041, 7041, 8226, 8226,
    ]  # fmt: skip
    assert (counts["validation"]["repeated_negatives"], counts["test"]["repeated_negatives"]) == (143, 190)
    assert seconds < 60 and stats["peak_memory_mb"] < 2000, (seconds, stats["peak_memory_mb"])
