"""The comparison of LLMs with and without codes: its rows, the refitted model, what a repeated command does again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import run_rq
from Class import gen_lp_data_rq
from Class.candidates import Candidates, write_candidates
from Class.gen_lp_data_rq import both_directions, disjoint_parts
from Class.rows import Row, make_row, split_path, write_rows
from Class.source import open_source
from common.errors import InputError
from common.files import read_json, write_json
from common.steps import Step
from data.knowledge_graph import KnowledgeGraph
from lora_training import ask, compare_llm, inference, make_tiny_base, train_lora
from lora_training.code_tokens import refuse_other_codes
from lora_training.compare_llm import (
    DECODER,
    RANKER,
    RECIPE,
    ROWS,
    SHUFFLED,
    VARIANTS,
    WITH,
    Places,
    RowResult,
    read_ranks,
    read_recipe,
    resume_tuning,
    seed_rows,
    seed_steps,
    summary,
    write_refit,
)
from lora_training.score_answers import report
from tables.results import collect
from tests.test_instructions import write_codes

N = 4  # candidates that the toy rows list


# ---------------------------------------------------------------- a toy seed


def rows_of(kg: KnowledgeGraph, split: str = "test") -> list[Row]:
    """Rows of a split: the truth is last among N candidates, its rank by the ranker is N."""
    made = []
    triples = kg.test if split == "test" else kg.valid
    for i, (h, r, t) in enumerate(both_directions(triples, kg.num_relations).tolist()):
        tail = r < kg.num_relations
        triple = (h, r, t) if tail else (t, r - kg.num_relations, h)
        others = [e for e in range(kg.num_entities) if e != t][: N - 1]
        made.append(make_row(
            "?", "1. x", id=f"link_prediction-{split}-{i}", task_type="link_prediction", split=split,
            triple=[kg.entities[triple[0]], kg.relations[triple[1]], kg.entities[triple[2]]],
            direction="tail" if tail else "head", candidates=[kg.entities[e] for e in [*others, t]],
            truth=[kg.entities[t]], candidate_rank=float(N),
        ))  # fmt: skip
    return made


def scores_at(place: int) -> list[float]:
    """Scores of N candidates that put the last one at ``place``, the others in their order."""
    return [-2.0 * k for k in range(N - 1)] + [1.0 - 2 * (place - 1)]


def answered(rows: list[Row], place: Callable[[int], int]) -> dict[str, Any]:
    """A record of answers that rank the truth of test row i at ``place(i)``, 1 to N, and validation's at 1.

    Lists are shuffled (reversed).
    """
    answers = []
    for i, row in enumerate(rows):
        scores = scores_at(place(i) if row["split"] == "test" else 1)[::-1]
        own = {key: row[key] for key in ("id", "task_type", "split", "direction", "truth", "candidate_rank")}
        own |= {"candidates": row["candidates"][::-1], "candidate_order": "shuffled"}
        found = {"decode": "likelihood", "scores": scores, "tokens": None, "text": "", "expected": "", "parsed": True}
        answers.append(own | found)
    return {"answers": answers, "metrics": report(answers)}


def export(kg: KnowledgeGraph, path: Path, rank: float) -> None:
    """Lists of the test queries, in reverse order, whose truths have this ``rank``."""
    queries = both_directions(kg.test, kg.num_relations)[::-1]
    n = len(queries)
    lists = Candidates(queries[:, :2], queries[:, 2], np.tile([1, 0], (n, 1)), None, np.full(n, rank), {})
    write_candidates(path, lists, kg)


def fill(kg: KnowledgeGraph, places: Places, better: int = 0) -> None:
    """What the steps of one seed leave, as far as rows need it: the truth of LLM v is at N - 1 - v for most rows."""
    rows = rows_of(kg)
    for level, variant in enumerate(VARIANTS):
        write_json(answered(rows, lambda i, v=level: 1 if i < better else N - 1 - v), places.results(variant))  # type: ignore[misc]
    write_rows(split_path(places.rows(WITH), "test"), rows)
    export(kg, places.candidates("coded_test"), 2)


def test_rows_come_from_the_answers_and_the_codes_lists(ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    places = Places(tmp_path / "seed_0")
    fill(ring_kg, places)
    found = seed_rows(places, ring_kg, tmp_path, tmp_path / "seed_0" / "y.json")
    assert tuple(found) == ROWS
    expected = {RANKER: 1 / N, DECODER: 1 / 2}
    expected |= {variant.row: 1 / (N - 1 - level) for level, variant in enumerate(VARIANTS)}
    assert {name: one.metrics["mrr"] for name, one in found.items()} == pytest.approx(expected)
    assert {one.metrics["count"] for one in found.values()} == {2 * len(ring_kg.test)}
    assert found[DECODER].record == "seed_0/y.json"
    assert found[WITH.row].record == found[RANKER].record == "seed_0/with_codes/inference_results.json"


def test_other_queries_are_refused(ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    places = Places(tmp_path)
    fill(ring_kg, places)
    write_json(answered(rows_of(ring_kg)[1:], lambda i: 1), places.results(SHUFFLED))
    with pytest.raises(InputError, match="other queries"):
        seed_rows(places, ring_kg, tmp_path, tmp_path / "y.json")
    fill(ring_kg, places)
    write_rows(split_path(places.rows(WITH), "test"), rows_of(ring_kg)[1:])
    with pytest.raises(InputError, match="other rows"):
        seed_rows(places, ring_kg, tmp_path, tmp_path / "y.json")


def test_mean_and_spread_are_those_of_the_seeds() -> None:
    values = {0: 0.5, 1: 0.7, 4: 0.9}
    by_seed = {
        seed: {
            name: RowResult(f"{seed}", {"mrr": mrr, "hits@1": mrr, "hits@3": 1.0, "hits@10": 1.0}, {}) for name in ROWS
        }
        for seed, mrr in values.items()
    }
    rows = summary(by_seed)
    assert [row["row"] for row in rows] == list(ROWS)
    assert rows[0]["mean"]["mrr"] == pytest.approx(0.7) and rows[0]["std"]["mrr"] == pytest.approx(0.2)
    assert rows[0]["std"]["hits@3"] == 0 and rows[0]["records"] == {"0": "0", "1": "1", "4": "4"}
    assert summary({0: by_seed[0]})[0]["std"] == dict.fromkeys(("mrr", "hits@1", "hits@3", "hits@10"))


# ---------------------------------------------------------------- the refitted candidate model


def test_the_rival_learns_what_the_llm_is_tuned_on(ring: Path, ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    def named(kg: KnowledgeGraph, triples: np.ndarray) -> set[tuple[str, ...]]:
        return {(kg.entities[h], kg.relations[r], kg.entities[t]) for h, r, t in triples.tolist()}

    write_refit(ring_kg, tmp_path / "ring_refit", seed=3)
    refit = KnowledgeGraph.load(tmp_path / "ring_refit")
    parts = disjoint_parts(ring_kg, 3)
    assert refit.entities == ring_kg.entities and refit.relations == ring_kg.relations
    assert len(parts.tuning) and named(refit, refit.train) == named(ring_kg, ring_kg.train) | named(
        ring_kg, parts.tuning
    )
    assert named(refit, refit.valid) == named(ring_kg, parts.validation)
    assert np.array_equal(refit.test, ring_kg.test), "same ids, same order"
    cuts = set()
    for seed in range(4):
        write_refit(ring_kg, tmp_path / f"cut_{seed}", seed)
        cuts.add(tuple(sorted(named(refit, KnowledgeGraph.load(tmp_path / f"cut_{seed}").valid))))
    assert len(cuts) > 1, "the seed chooses the cut"


def test_lists_follow_the_rows(ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    rows, queries = rows_of(ring_kg), both_directions(ring_kg.test, ring_kg.num_relations)
    n = len(queries)
    ranks, order = np.arange(1.0, n + 1), np.random.default_rng(0).permutation(n)
    ids = np.tile([1, 0], (n, 1))
    lists = Candidates(queries[order, :2], queries[order, 2], ids, None, ranks[order], {})
    write_candidates(tmp_path / "all.npz", lists, ring_kg)
    found = read_ranks(tmp_path / "all.npz", rows[3:9], ring_kg)
    assert found == {row["id"]: rank for row, rank in zip(rows[3:9], ranks[3:9].tolist(), strict=True)}
    write_candidates(tmp_path / "bare.npz", lists._replace(rank=np.full(n, np.nan)), ring_kg)
    few = Candidates(lists.queries[:5], lists.truth[:5], ids[:5], None, lists.rank[:5], {})
    write_candidates(tmp_path / "few.npz", few, ring_kg)
    for name in ("bare", "few"):
        with pytest.raises(InputError, match=rf"{name}\.npz"):
            read_ranks(tmp_path / f"{name}.npz", rows, ring_kg)


# ---------------------------------------------------------------- steps


def test_every_step_has_flags_that_its_script_knows(ring: Path, ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    parsers: dict[str, Callable[[list[str]], Any]] = {
        "run_rq.py": run_rq.parse_config, "Class/gen_lp_data_rq.py": gen_lp_data_rq.parse_args,
        "lora_training/make_tiny_base.py": make_tiny_base.parse_args,
        "lora_training/train_lora.py": train_lora.parse_args, "lora_training/inference.py": inference.parse_args,
    }  # fmt: skip
    steps = seed_steps(ring_kg, ring, tmp_path / "ring_refit", Places(tmp_path), RECIPE, seed=5)
    by_name = {one.name.split("/")[-1]: one for one in steps}
    assert len(by_name) == len(steps)
    made = {path for one in steps for path in one.outputs}
    assert len(made) == sum(len(one.outputs) for one in steps), "no two steps write the same file"
    seeded = set()
    for name, one in by_name.items():
        args = parsers[one.words[0]]([*one.words, *one.more()][1:])
        if getattr(args, "seed", None) == 5:
            seeded.add(name)
    init = {
        name: one.words[one.words.index("--code_init") + 1] for name, one in by_name.items()
        if "--code_init" in one.words
    }  # fmt: skip
    lists, stage1 = by_name["refit"], by_name["codes"]
    for model in (lists, stage1):
        assert str(tmp_path / "ring_refit") in model.words, "codes, lists and LLMs rest on the same facts"
    listed = {by_name[f"lists_{split}"].words[4] for split in ("train", "valid", "test")}
    assert listed == {str(lists.outputs[0])} != {str(stage1.outputs[0])}, "lists and codes are of two models"
    named = [word for name, one in by_name.items() for word in one.words
             if word.endswith("_rq.pt") and name.endswith("_data")]  # fmt: skip
    assert named and set(named) == {str(stage1.outputs[0])}
    assert init == {f"{name}_tuning": str(stage1.outputs[2]) for name in ("with_codes", "shuffled_codes")}
    unseeded = by_name.keys() - seeded
    assert all(name.startswith("lists_") or name.endswith("_answers") for name in unseeded)


def test_interrupted_tuning_continues_from_its_checkpoint(tmp_path: Path) -> None:
    assert resume_tuning(tmp_path) == ["--overwrite"]
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "trainer_state.json").write_text("{}")
    assert resume_tuning(tmp_path) == ["--overwrite"], "killed before the checkpoint was complete"
    (tmp_path / "checkpoint-7" / "seconds.json").write_text("{}")
    assert resume_tuning(tmp_path) == ["--resume_from_checkpoint", "last"]


# ---------------------------------------------------------------- the command


def test_comparison_is_written_and_tables_pass_it_over(
    ring: Path,
    ring_kg: KnowledgeGraph,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_llm.py"])
    asked: list[int] = []

    def run_steps(steps: list[Step], marks: Path) -> dict[str, float]:
        asked.append(len(steps))
        return {step.name: 1.0 for step in steps}

    monkeypatch.setattr(compare_llm, "run_steps", run_steps)
    out = tmp_path / "out"
    for seed in (0, 2):
        fill(ring_kg, Places(out / f"seed_{seed}"), better=seed)
    words = ["--dataset", str(ring), "--seeds", "0", "2", "--out", str(out)]
    compare_llm.main(words)
    assert asked == [2 * 16], "every step of both seeds"
    found = read_json(out / "comparison.json", "comparison")
    assert [row["row"] for row in found["rows"]] == list(ROWS) and found["dataset"] == "ring"
    by_row = {row["row"]: row for row in found["rows"]}
    n = 2 * len(ring_kg.test)
    first = {"0": 1 / (N - 1), "2": (2 + (n - 2) / (N - 1)) / n}
    values = {seed: metrics["mrr"] for seed, metrics in by_row[VARIANTS[0].row]["seeds"].items()}
    assert values == pytest.approx(first)
    assert by_row[VARIANTS[0].row]["mean"]["mrr"] == pytest.approx(sum(first.values()) / 2)
    differences = {(one["row"], one["minus"]): one for one in found["differences"]}
    gained = differences[WITH.row, VARIANTS[0].row]
    assert gained["runs"].keys() == {"0", "2"} and gained["queries"] == n
    for row, minus in differences:
        expected_gain = by_row[row]["mean"]["mrr"] - by_row[minus]["mean"]["mrr"]
        assert differences[row, minus]["mean"] == pytest.approx(expected_gain)
    assert gained["error"] > 0, "two queries are answered alike by both"
    said = capsys.readouterr().out
    assert "±" in said and f"{WITH.row} - {VARIANTS[0].row}" in said
    (tmp_path / "alone").mkdir()
    (out / "comparison.json").rename(tmp_path / "alone" / "comparison.json")
    assert collect([tmp_path / "alone"]) == []


def test_a_recipe_file_replaces_single_flags(tmp_path: Path) -> None:
    write_json({"tuning": {"epochs": 2}}, tmp_path / "r.json")
    recipe = read_recipe(tmp_path / "r.json")
    assert recipe["tuning"] == RECIPE["tuning"] | {"epochs": 2} and recipe["base"] == RECIPE["base"]
    assert compare_llm.flags({"lr": 0.1, "on": True, "off": False}) == ["--lr", "0.1", "--on"]
    assert compare_llm.stem_of("ring", {"seq_len": 2, "num_code": 8, "quantizer": "vq"}) == "ring_2_8"
    write_json({"third": {}}, tmp_path / "r.json")
    with pytest.raises(InputError, match="part 'third'"):
        read_recipe(tmp_path / "r.json")


def test_shuffled_codes_are_found_again_by_their_seed(ring: Path, tmp_path: Path) -> None:
    """What a model was tuned on says which codes to open: its own circle, not that of seed 0."""
    codes = write_codes(ring, tmp_path / "codes", (3, 8, 2))
    made = {
        seed: open_source(argparse.Namespace(
            codes=codes, dataset=ring, no_codes=False, shuffle_codes=True, code_format="spec", seed=seed,
                keep_names=False,
        ))
        for seed in (0, 5)
    }  # fmt: skip
    for seed, source in made.items():
        again = ask.open_codes(source.codes_info, codes, ring)
        assert source.codes_info["shuffle_seed"] == seed and again.code_texts == source.code_texts
    assert made[0].code_texts != made[5].code_texts
    with pytest.raises(InputError, match="shuffled by seed 0"):
        refuse_other_codes(made[0].codes_info, made[5].codes_info, "the model", "the rows")
