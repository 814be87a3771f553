"""Link prediction data: the paper's protocol, lists without other answers, and leaks that are found when planted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from Class import check_leaks, gen_lp_data_rq
from Class.candidates import Candidates, find_rows, read_candidates, write_candidates
from Class.codes import load_codes, parse_codes
from Class.gen_lp_data_rq import disjoint_parts, make_lists
from Class.rows import FILE_STEMS, read_rows, write_rows
from common.errors import InputError
from common.files import ROOT, read_json
from data.knowledge_graph import KnowledgeGraph, with_inverse
from model.export import top_of_scores
from tests.test_instructions import FAMILY, parse_entity, write_codes, write_graph

Rows = dict[str, list[dict[str, Any]]]


def export(kg: KnowledgeGraph, folder: Path, count: int = 20) -> dict[str, Path]:
    """Lists of a scorer that knows the training split by heart and guesses the rest, the truth near the top."""
    M, R = kg.num_entities, kg.num_relations
    train, rest = torch.zeros(M * 2 * R, M), torch.randn(M * 2 * R, M, generator=torch.Generator().manual_seed(0))
    for h, r, t in with_inverse(kg.train, R).tolist():
        train[h * 2 * R + r, t] = 20
    for h, r, t in with_inverse(np.concatenate([kg.valid, kg.test]), R).tolist():
        rest[h * 2 * R + r, t] += 0.1 * ((h + t) % 33)
    scores = train + rest
    paths = {}
    for split in ("train", "valid", "test"):
        paths[split] = folder / f"{split}.npz"
        found = top_of_scores(lambda h, r: scores[h * 2 * R + r], kg, split, count, ("train", "valid"), 512, "cpu")
        write_candidates(paths[split], found, kg)
    return paths


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory, family: KnowledgeGraph) -> dict[str, Path]:
    return export(family, tmp_path_factory.mktemp("lists"))


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codes(FAMILY, tmp_path_factory.mktemp("codes"), (4, 64, 3))


def written(out: Path, task: str) -> Rows:
    return {split: list(read_rows(out / task / f"{stem}.json")) for split, stem in FILE_STEMS.items()}


def generate(out: Path, *words: str | Path) -> Rows:
    gen_lp_data_rq.main([*map(str, words), "--out_dir", str(out)])
    return written(out, "link_prediction")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, lists: dict[str, Path], codes: Path) -> tuple[Path, Rows]:
    out = tmp_path_factory.mktemp("valid")
    return out, generate(out, "--codes", codes, "--candidates", lists["valid"], lists["test"])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, lists: dict[str, Path], codes: Path) -> tuple[Path, Rows]:
    out = tmp_path_factory.mktemp("train")
    return out, generate(out, "--codes", codes, "--candidates", *lists.values(), "--from", "train")


def facts(rows: list[dict[str, Any]]) -> set[tuple[str, ...]]:
    return {tuple(row["triple"]) for row in rows}


def raw(kg: KnowledgeGraph, triples: np.ndarray) -> set[tuple[str, ...]]:
    return {(kg.entities[h], kg.relations[r], kg.entities[t]) for h, r, t in triples.tolist()}


def test_the_papers_splits(family: KnowledgeGraph, tuned: tuple[Path, Rows], first: tuple[Path, Rows]) -> None:
    rows = tuned[1]
    assert len(rows["test"]) == 2 * len(family.test) and facts(rows["test"]) == raw(family, family.test)
    assert Counter(row["direction"] for row in rows["test"]) == dict.fromkeys(("head", "tail"), len(family.test))
    parts = disjoint_parts(family, 0)
    assert len(parts.validation) + len(parts.tuning) == len(family.valid)
    assert abs(len(parts.validation) - 0.1 * len(family.valid)) <= 1
    assert facts(rows["validation"]) == raw(family, parts.validation) and len(rows["validation"]) == 2 * len(
        parts.validation
    )
    assert facts(rows["train"]) <= raw(family, parts.tuning) and facts(first[1]["train"]) <= raw(family, family.train)
    assert first[1]["validation"] == rows["validation"] and first[1]["test"] == rows["test"]
    ends = [{frozenset(fact[::2]) for fact in facts(rows[split])} for split in ("train", "validation")]
    assert not ends[0] & ends[1], "a pair of entities is in one part, whatever the direction and the relation"
    assert not np.array_equal(disjoint_parts(family, 1).validation, parts.validation)


def test_splits_that_share_triples_are_cut_apart(tmp_path: Path) -> None:
    graph = write_graph(
        tmp_path / "g", train=["a r b", "b r c", "c r d"], valid=["b r c", "a r d", "d r a", "c r a"],
        test=["a r b", "c r a"],
    )  # fmt: skip
    kg = KnowledgeGraph.load(graph)
    parts = disjoint_parts(kg, 0)
    assert raw(kg, parts.train) == {("c", "r", "d")} and raw(kg, parts.test) == {("a", "r", "b"), ("c", "r", "a")}
    valid = [raw(kg, parts.tuning), raw(kg, parts.validation)]
    assert set.union(*valid) == {("b", "r", "c"), ("a", "r", "d"), ("d", "r", "a")}
    assert any({("a", "r", "d"), ("d", "r", "a")} <= part for part in valid)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory, lists: dict[str, Path], codes: Path) -> tuple[Path, Rows]:
    out = tmp_path_factory.mktemp("ranked")
    words: list[str | Path] = ["--codes", codes, "--candidates", lists["valid"], lists["test"]]
    return out, generate(out, *words, "--candidate_order", "ranked")


def test_lists_are_shuffled_unless_they_are_to_be_ranked(
    tuned: tuple[Path, Rows], ranked: tuple[Path, Rows], lists: dict[str, Path], family: KnowledgeGraph
) -> None:
    order = {"tuned": "shuffled", "ranked": "ranked"}
    for name, folder in (("tuned", tuned[0]), ("ranked", ranked[0])):
        stats = read_json(folder / "link_prediction" / "dataset_stats.json", "stats")
        assert stats["candidate_order"] == dict.fromkeys(("train", "validation", "test"), order[name])
    assert check_leaks.check(ranked[0]) == []
    for split in ("train", "validation", "test"):
        changed = 0
        for one, row in zip(tuned[1][split], ranked[1][split], strict=True):
            assert sorted(one["candidates"]) == sorted(row["candidates"]) and one["output"] == row["output"]
            changed += one["candidates"] != row["candidates"]
        at = Counter(row["candidates"].index(row["truth"][0]) for row in tuned[1][split]
                     if row["truth"][0] in row["candidates"])  # fmt: skip
        assert changed == len(tuned[1][split]) and check_leaks.chi_square_z([at[i] for i in range(20)]) < 4
    given = read_candidates([lists["test"]], family)
    rows = find_rows(given, with_inverse(family.test, 16).reshape(2, -1, 3).swapaxes(0, 1).reshape(-1, 3), family)
    best = [family.entities[given.ids[row, 0]] for row in rows]
    assert [row["candidates"][0] for row in ranked[1]["test"]] == best, "the candidate model's order"


def test_what_a_row_says(family: KnowledgeGraph, ranked: tuple[Path, Rows], codes: Path) -> None:
    numbers = load_codes(codes).numpy()
    row_of = {name: i for i, name in enumerate(family.entities)}
    for row in ranked[1]["train"][:200] + ranked[1]["test"][:200]:
        head, relation, tail = row["triple"]
        given, truth = (head, tail) if row["direction"] == "tail" else (tail, head)
        word = family.relation_labels[family.relations.index(relation)]
        word = word if row["direction"] == "tail" else f"inverse of {word}"
        lines = row["instruction"].split("\n")
        assert lines[1] == f"Query: ({family.labels[row_of[given]]} | {word} | ?)"
        shown = [parse_entity(line) for line in lines[4:-1]]
        assert [name for name, _ in shown] == [family.labels[row_of[name]] for name in row["candidates"]]
        for (_, own), name in zip(shown, row["candidates"], strict=True):
            assert np.array_equal(own, numbers[row_of[name]])
        assert lines[4].count(":") == 0, "compact by default: 21 entities must fit"
        answers = [parse_codes(line.split(" ", 1)[1]) for line in row["output"].split("\n")]
        best = [truth, *(name for name in row["candidates"] if name != truth)][:3]
        assert row["truth"][0] == truth and len(row["candidates"]) == 20
        assert [answer.tolist() for answer in answers] == [numbers[row_of[name]].tolist() for name in best]


@pytest.mark.parametrize("with_codes", [True, False])
def test_predicted_rows_are_the_query_and_the_truth(
    lists: dict[str, Path], codes: Path, tmp_path: Path, with_codes: bool
) -> None:
    """--without_lists adds what the lists' rows ask without their lists, answered by the truth alone."""
    which: list[str | Path] = ["--codes", codes] if with_codes else ["--no_codes", "--dataset", FAMILY]
    words = [*which, "--candidates", *lists.values(), "--num_candidates", "4"]
    parts = {
        source: (generate(tmp_path / source, *words, "--from", source, "--no-drop_unlisted"),
                 generate(tmp_path / f"{source}_more", *words, "--from", source, "--without_lists"),
                 written(tmp_path / f"{source}_more", "tail_prediction"))
        for source in (("train", "valid") if with_codes else ("valid",))
    }  # fmt: skip
    for whole, dropped, alone in parts.values():
        assert dropped["test"] == whole["test"] and dropped["validation"] == whole["validation"]
        listed = [row["triple"] for row in whole["train"] if row["truth"][0] in row["candidates"]]
        assert [row["triple"] for row in dropped["train"]] == listed, "lists are what they are without the flag"
        for split in ("train", "validation", "test"):
            assert len(alone[split]) == len(whole[split]) > 0
            for one, row in zip(alone[split], whole[split], strict=True):
                lines = row["instruction"].split("\n")
                given, word = lines[1][8:-5].split(" | ")
                assert one["instruction"] == f"What completes this?\n{lines[2][6:] if with_codes else given} {word}"
                assert one["output"] == row["output"].split("\n")[0].removeprefix("1. ")
                assert one["truth"] == row["truth"][:1]
                assert one["triple"] == row["triple"] and one["candidates"] is None


def test_ranked_lists_of_a_model_that_knows_the_queries_are_refused(
    tmp_path: Path, family: KnowledgeGraph, lists: dict[str, Path], first: tuple[Path, Rows]
) -> None:
    known = read_candidates([lists["train"]], family)
    assert (known.ids[:, 0] == known.truth).mean() > 0.99, "the premise: the truth leads the ranked lists"
    at = Counter(row["candidates"].index(row["truth"][0]) for row in first[1]["train"])
    assert check_leaks.chi_square_z([at[i] for i in range(20)]) < 4
    with pytest.raises(SystemExit) as end:
        generate(tmp_path, "--from", "train", "--candidate_order", "ranked", "--candidates", *lists.values())
    assert end.value.code == 2


def test_ranks_are_read_off_lists_that_state_none(family: KnowledgeGraph) -> None:
    """Against the exported ranks, from lists over all entities, with scores (many ties) and without (none)."""
    for levels in (4, 10**6):
        table = torch.randint(0, levels, (97, family.num_entities), generator=torch.Generator().manual_seed(1)).float()

        def score(h: torch.Tensor, r: torch.Tensor, table: torch.Tensor = table) -> torch.Tensor:
            return table[(h * 31 + r) % 97]

        full = top_of_scores(score, family, "valid", family.num_entities, (), 512, "cpu")
        queries = with_inverse(family.valid, family.num_relations)
        bare = full._replace(rank=np.full(len(queries), np.nan), scores=full.scores if levels == 4 else None)
        rows = find_rows(bare, queries, family)
        if levels == 4:
            found = make_lists(bare, rows, queries, family, family.answers("train"), family.answers(), 20)
            assert np.array_equal(found.rank, full.rank)
        else:
            clear = np.array([len(set(table[i].tolist())) for i in range(97)]) == family.num_entities
            chosen = clear[(queries[:, 0] * 31 + queries[:, 1]) % 97]
            found = make_lists(bare, rows, queries, family, family.answers("train"), family.answers(), 20)
            assert chosen.sum() > 100 and np.array_equal(found.rank[chosen], full.rank[chosen])


def test_missing_lists_are_named(tmp_path: Path, lists: dict[str, Path], codes: Path) -> None:
    with pytest.raises(InputError, match=r"no list for 952 of 952 test queries \(test\); make them: python run_rq\.py"):
        generate(tmp_path, "--codes", codes, "--candidates", lists["valid"])
    assert not (tmp_path / "link_prediction").exists()


def test_same_seed_same_bytes(tmp_path: Path, lists: dict[str, Path], codes: Path) -> None:
    def data(name: str, *words: str) -> bytes:
        generate(
            tmp_path / name, "--codes", codes, "--candidates", lists["valid"], lists["test"], "--limit", "60", *words
        )
        return (tmp_path / name / "link_prediction" / "train.json").read_bytes()

    assert data("a") == data("b") != data("c", "--seed", "1")
    assert data("d", "--candidate_order", "ranked") != data("a")


def test_without_codes(tmp_path: Path, family: KnowledgeGraph, lists: dict[str, Path]) -> None:
    rows = generate(tmp_path, "--no_codes", "--dataset", FAMILY, "--candidates", lists["valid"], lists["test"])
    row = rows["test"][0]
    assert "<" not in row["instruction"] + row["output"]
    assert row["output"].split("\n")[0] == f"1. {family.labels[family.entities.index(row['truth'][0])]}"
    assert check_leaks.check(tmp_path) == []


def test_lists_of_another_model(tmp_path: Path, family: KnowledgeGraph, codes: Path) -> None:
    """A JSON file by names, one list per query for all its triples, without ranks or scores."""
    rows: list[dict[str, Any]] = []
    for h, r, _ in np.unique(with_inverse(np.concatenate([family.valid, family.test]), 16), axis=0).tolist():
        row = {
            "query": [family.entities[h], family.relations[r % 16]],
            "direction": "tail" if r < 16 else "head",
            "candidates": family.entities[h % 900 : h % 900 + 60],
        }
        if row not in rows[-1:]:
            rows.append(row)
    (tmp_path / "other.json").write_text(json.dumps({"info": {"model": "x"}, "rows": rows}))
    found = generate(tmp_path / "out", "--codes", codes, "--candidates", tmp_path / "other.json", "--no-drop_unlisted")
    assert len(found["test"]) == 952 and all(len(row["candidates"]) == 20 for row in found["test"])
    stats = read_json(tmp_path / "out" / "link_prediction" / "dataset_stats.json", "stats")["queries"]["test"]
    unknown = sum(row["candidate_rank"] is None for row in found["test"])
    assert unknown == stats["candidate_rank_unknown"] > 800 and stats["candidate_model"]["mrr"] < 0.05


def test_lists_that_hold_nothing_but_known_answers_are_refused(
    tmp_path: Path, family: KnowledgeGraph, codes: Path
) -> None:
    """A list by query alone, of the tails that training knows: nothing is left to choose from."""
    known: dict[tuple[int, int], list[int]] = {}
    for h, r, t in with_inverse(family.train, 16).tolist():
        known.setdefault((h, r), []).append(t)
    rows = [
        {
            "query": [family.entities[h], family.relations[r % 16]],
            "direction": "tail" if r < 16 else "head",
            "candidates": [family.entities[e] for e in known.get((h, r), [0])[:3]],
        }
        for h, r in np.unique(with_inverse(np.concatenate([family.valid, family.test]), 16)[:, :2], axis=0).tolist()
    ]
    (tmp_path / "known.json").write_text(json.dumps({"rows": rows}))
    with pytest.raises(InputError, match=r"--candidates.*longer lists"):
        generate(tmp_path / "out", "--codes", codes, "--candidates", tmp_path / "known.json")
    assert not list((tmp_path / "out").rglob("dataset_stats.json")), "what is unfinished is not taken for data"


# ---------------------------------------------------------------- leaks


def replant(out: Path, tmp_path: Path, change: Any) -> list[str]:
    """The leaks found after ``change(rows)`` of a copy of the data."""
    folder = tmp_path / "link_prediction"
    folder.mkdir()
    rows: Rows = {}
    for split, stem in FILE_STEMS.items():
        rows[split] = list(read_rows(out / "link_prediction" / f"{stem}.json"))
    change(rows)
    for split, stem in FILE_STEMS.items():
        write_rows(folder / f"{stem}.json", rows[split])
    (folder / "dataset_stats.json").write_bytes((out / "link_prediction" / "dataset_stats.json").read_bytes())
    return check_leaks.check(tmp_path)


def test_no_leaks(tuned: tuple[Path, Rows], first: tuple[Path, Rows]) -> None:
    assert check_leaks.check(tuned[0]) == [] and check_leaks.check(first[0]) == []


def test_a_test_fact_in_training_is_found(tmp_path: Path, tuned: tuple[Path, Rows]) -> None:
    def turned(rows: Rows) -> None:
        """A head query of a test triple whose tail query alone stays in test."""
        rows["train"].append(rows["test"].pop(1) | {"id": "planted"})

    assert replant(tuned[0], tmp_path, turned) == ["link_prediction: 1 facts in both train and test"]


def test_a_truth_at_the_top_is_found(tmp_path: Path, first: tuple[Path, Rows]) -> None:
    def sort(rows: Rows) -> None:
        for row in rows["train"]:
            row["candidates"].sort(key=lambda name: name != row["truth"][0])

    faults = replant(first[0], tmp_path, sort)
    assert len(faults) == 2 and "should be shuffled" in faults[1] + faults[0]
    assert any("trained on the training queries" in fault for fault in faults)


def test_a_marked_truth_is_found(tmp_path: Path, tuned: tuple[Path, Rows]) -> None:
    def hint(rows: Rows) -> None:
        for row in rows["test"]:
            row["instruction"] += "\nHint: " + row["output"].split("\n")[0][3:]

    faults = replant(tuned[0], tmp_path, hint)
    assert len(faults) == 1 and "one answer more often" in faults[0]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "data" / "FB15k-237").is_dir(), reason="FB15k-237 is not in data/")
def test_every_query_of_fb15k_237(tmp_path: Path) -> None:
    kg = KnowledgeGraph.load(ROOT / "data" / "FB15k-237")
    paths = []
    for split in ("valid", "test"):
        paths.append(tmp_path / f"{split}.npz")
        queries = with_inverse(kg.split(split), kg.num_relations)
        ids = (np.arange(len(queries))[:, None] + np.arange(40)) % kg.num_entities
        lists = Candidates(
            queries[:, :2], queries[:, 2], ids, None, np.full(len(queries), 99.0),
            {"split": split},
        )  # fmt: skip
        write_candidates(paths[-1], lists, kg)
    rows = generate(tmp_path, "--no_codes", "--dataset", ROOT / "data" / "FB15k-237", "--candidates", *paths,
                    "--no-drop_unlisted")  # fmt: skip
    assert len(rows["test"]) == 40_932 and len(rows["train"]) + len(rows["validation"]) == 2 * 17_535
