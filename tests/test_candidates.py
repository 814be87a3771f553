"""Candidate lists: what stage 1 exports against brute force, both forms of file, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from Class.candidates import (
    Candidates,
    entities_hash,
    find_rows,
    other_answers,
    read_candidates,
    write_candidates,
)
from common.errors import InputError
from data.knowledge_graph import KnowledgeGraph, with_inverse
from model.evaluation import evaluate_codes
from model.export import top_candidates, top_of_scores
from model.ranking import filtered_ranks
from model.RQGCN import CodeScorer
from tests.test_instructions import write_graph


def scores_of(kg: KnowledgeGraph, levels: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Scores that are a function of (h, r, t), of both signs, with many ties where ``levels`` is small."""
    t = torch.arange(kg.num_entities)
    return lambda h, r: (((h * 7919 + r * 104729)[:, None] * 31 + t * (t + 17)) % (2 * levels + 1) - levels).float() / 8


@pytest.mark.parametrize(("split", "levels"), [("valid", 3), ("test", 10_000)])
def test_lists_are_those_of_brute_force(family: KnowledgeGraph, split: str, levels: int) -> None:
    score = scores_of(family, levels)
    found = top_of_scores(score, family, split, 20, ("train", "valid"), 64, "cpu")
    queries = with_inverse(family.split(split), family.num_relations)
    known: dict[tuple[int, int], set[int]] = {}
    for name in ("train", "valid"):
        for h, r, t in with_inverse(family.split(name), family.num_relations).tolist():
            known.setdefault((h, r), set()).add(t)
    for i, (h, r, t) in list(enumerate(queries.tolist()))[::7]:
        row = score(torch.tensor([h]), torch.tensor([r]))[0].tolist()
        left_out = known.get((h, r), set()) - {t}
        best = sorted((e for e in range(family.num_entities) if e not in left_out), key=lambda e: (-row[e], e))[:20]
        assert found.ids[i].tolist() == best, "best first, equal scores by the lower id, the truth never left out"
        assert found.scores is not None and found.scores[i].tolist() == [row[e] for e in best]
    ranks = filtered_ranks(score, queries, family.answers(), family.num_relations)
    assert np.array_equal(found.rank, ranks)
    assert np.array_equal(found.queries, queries[:, :2]) and np.array_equal(found.truth, queries[:, 2])


def test_batches_and_short_lists(tmp_path: Path, family: KnowledgeGraph) -> None:
    score = scores_of(family, 3)
    one, other = (top_of_scores(score, family, "valid", 20, ("train",), batch, "cpu") for batch in (7, 1000))
    assert np.array_equal(one.ids, other.ids) and np.array_equal(one.rank, other.rank)
    little = KnowledgeGraph.load(write_graph(tmp_path / "g", train=["a r b", "a r c"], valid=["a r d"], test=["b r a"]))
    row = top_of_scores(scores_of(little, 3), little, "valid", 20, ("train",), 8, "cpu")
    assert set(row.ids[0].tolist()) == {0, 3, -1}, "b and c are known; padding stands at the end"
    assert (row.ids[0][-2:] == -1).all() and row.scores is not None and np.isnan(row.scores[0][-2:]).all()
    with pytest.raises(ValueError, match="NaN"):
        top_of_scores(lambda h, r: torch.full((len(h), 4), torch.nan), little, "valid", 3, ("train",), 8, "cpu")


def test_lists_from_codes_rank_as_stage_one_does(family: KnowledgeGraph) -> None:
    torch.manual_seed(0)
    scorer = CodeScorer(3, 8, 2, 4, 12, decoder="distmult").train()
    relations = torch.randn(2 * family.num_relations, 12)
    codes = torch.randint(0, 8, (family.num_entities, 3, 2))
    found = top_candidates(scorer, relations, codes, family, "valid", count=10)
    assert scorer.training and found.ids.shape == (2 * len(family.valid), 10)
    metrics = evaluate_codes(scorer, relations, codes, family, "valid")
    assert np.isclose((1 / found.rank).mean(), metrics["mrr"], rtol=0, atol=1e-9)
    assert found.info["split"] == "valid"


@pytest.fixture
def little(tmp_path: Path) -> KnowledgeGraph:
    return KnowledgeGraph.load(
        write_graph(tmp_path / "little", train=["a r b", "b r c", "c s d", "d s a"], valid=["a r c"], test=["b r d"])
    )


def same(a: Candidates, b: Candidates) -> bool:
    pairs: list[tuple[Any, Any]] = [(a.queries, b.queries), (a.truth, b.truth), (a.ids, b.ids), (a.rank, b.rank)]
    assert a.scores is not None and b.scores is not None
    pairs.append((a.scores, b.scores))
    return all(np.array_equal(x, y, equal_nan=x.dtype.kind == "f") for x, y in pairs)


def test_files_come_back_as_they_went(tmp_path: Path, little: KnowledgeGraph) -> None:
    lists = [top_of_scores(scores_of(little, 5), little, split, 3, ("train",), 8, "cpu") for split in ("valid", "test")]
    paths = [tmp_path / f"{split}.npz" for split in ("valid", "test")]
    for path, part in zip(paths, lists, strict=True):
        write_candidates(path, part, little, model="mine")
        found = read_candidates([path], little)
        assert same(found, part) and found.info["model"] == "mine" and found.info["split"] == path.stem
    both = read_candidates(paths, little)
    assert len(both.ids) == 4 and np.array_equal(both.rank, np.concatenate([part.rank for part in lists]))
    assert same(read_candidates([paths[0], paths[0]], little), lists[0]), "a triple that is there twice"
    swapped = lists[0]._replace(ids=lists[0].ids[:, [1, 0, 2]], scores=None)
    write_candidates(tmp_path / "other.npz", swapped, little)
    with pytest.raises(InputError, match="2 queries have two lists"):
        read_candidates([paths[0], tmp_path / "other.npz"], little)


def test_lists_of_another_model_come_by_name(tmp_path: Path, little: KnowledgeGraph) -> None:
    rows = [
        {"query": ["a", "r"], "direction": "tail", "candidates": ["c", "d"]},
        {"query": ["c", "s"], "direction": "head", "truth": "d", "candidates": ["d"], "rank": 2.5},
    ]
    (tmp_path / "x.json").write_text(json.dumps({"rows": rows}))
    found = read_candidates([tmp_path / "x.json"], little)
    assert found.queries.tolist() == [[0, 0], [2, 3]] and found.truth.tolist() == [-1, 3]
    assert found.ids.tolist() == [[2, 3], [3, -1]] and np.isnan(found.rank[0]) and found.rank[1] == 2.5
    assert found.scores is None


def good_rows(**changes: Any) -> dict[str, Any]:
    return {"query": ["a", "r"], "direction": "tail", "candidates": ["c", "d"], "scores": [2, 1], "rank": 1} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": ["z", "r"]}, "query entity 'z' is no name of little"),
        ({"query": ["a", 1]}, "query relation 1 is no name"),
        ({"query": ["a"]}, "needs"),
        ({"direction": "up"}, "needs"),
        ({"candidates": ["c", 3]}, "candidate 3 is no name"),
        ({"candidates": ["c", "c"]}, "lists a candidate twice"),
        ({"scores": [1, 2]}, "scores that rise"),
        ({"scores": [1]}, "one per candidate"),
        ({"scores": ["1", 2]}, "one per candidate"),
        ({"rank": 0.5}, "rank below 1"),
        ({"rank": "1"}, "must be a number"),
        ({"rank": 10**400}, "must be a number"),
        ({"scores": [10**400, 1]}, "must be numbers, one per candidate"),
        ({"truth": "z"}, "truth 'z'"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, little: KnowledgeGraph, changes: dict[str, Any], words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"rows": [good_rows()]}))
    read_candidates([path], little)
    path.write_text(json.dumps({"rows": [good_rows(query=["b", "r"]), good_rows(**changes)]}))
    with pytest.raises(InputError, match=f"row 1.*{words}"):
        read_candidates([path], little)


def test_bad_files_are_refused(tmp_path: Path, little: KnowledgeGraph, family: KnowledgeGraph) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(InputError, match=r"does not exist.*--export_candidates"):
        read_candidates([path], little)
    write_candidates(path, top_of_scores(scores_of(little, 5), little, "valid", 3, ("train",), 8, "cpu"), little)
    with pytest.raises(InputError, match=r"ids of little, .* not those of family"):
        read_candidates([path], family)
    content = path.read_bytes()
    for end in (0, 10, len(content) // 2, len(content) - 5):
        path.write_bytes(content[:end])
        with pytest.raises(InputError, match="cannot be read"):
            read_candidates([path], little)
    arrays: dict[str, Any] = {
        "query": np.zeros((1, 2), int),
        "direction": np.array(["tail"]),
        "candidates": np.array([[1, 2]]),
        "info": np.array(json.dumps({"entities_sha256": entities_hash(little)})),
    }
    np.savez(path, **arrays)
    read_candidates([path], little)
    for name, value, words in [
        ("query", np.zeros((1, 3), int), r"query is int64 \[1, 3\], expected ids \[1, 2\]"),
        ("candidates", np.array([[1, 9]]), "row 0 has an id outside"),
        ("candidates", np.array([[-1, 2]]), "gap"),
        ("direction", np.array(["up"]), "another direction"),
        ("candidates", np.array([[1.0, 2.0]]), "expected ids"),
        ("query", np.array([[{}, 1]], dtype=object), "cannot be read"),
        ("scores", np.array([[1.0, np.nan]]), "not finite"),
        ("scores", np.array([[1.0, 2.0]]), "rise"),
        ("info", np.array("{"), "info is no JSON"),
    ]:
        np.savez(path, **(arrays | {name: value}))
        with pytest.raises(InputError, match=words):
            read_candidates([path], little)
    np.savez(path, query=arrays["query"])
    with pytest.raises(InputError, match="lacks direction, candidates, info"):
        read_candidates([path], little)
    with pytest.raises(InputError, match=r"must end in \.npz or \.json"):
        read_candidates([tmp_path / "x.txt"], little)
    (tmp_path / "x.json").write_text('{"rows": []}')
    with pytest.raises(InputError, match="has no rows"):
        read_candidates([tmp_path / "x.json"], little)


def test_a_querys_own_list_comes_before_a_shared_one(little: KnowledgeGraph) -> None:
    lists = Candidates(
        np.array([[0, 0], [0, 0], [1, 0]]), np.array([-1, 2, 3]), np.array([[1], [2], [3]]), None, np.full(3, np.nan),
        {},
    )  # fmt: skip
    queries = np.array([[0, 0, 2], [0, 0, 1], [1, 0, 3], [1, 0, 2], [3, 3, 3]])
    assert find_rows(lists, queries, little).tolist() == [1, 0, 2, -1, -1]


def test_other_answers_agree_with_sets(family: KnowledgeGraph) -> None:
    queries = with_inverse(family.test, family.num_relations)[:200]
    ids = np.random.default_rng(0).integers(-1, family.num_entities, (200, 300))
    facts = {tuple(f) for f in with_inverse(family.train, family.num_relations).tolist()}
    expected = [
        [e >= 0 and e != t and (h, r, e) in facts for e in row]
        for (h, r, t), row in zip(queries.tolist(), ids.tolist(), strict=True)
    ]
    assert other_answers(ids, queries, family.answers("train"), family).tolist() == expected
    assert sum(map(sum, expected)) > 20
