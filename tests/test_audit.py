"""tables/audit.py: the same answers in every format give the same metrics, and each planted fault is found."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from Class.gen_lp_data_rq import both_directions
from common.files import ROOT
from data.knowledge_graph import KnowledgeGraph, with_inverse
from lora_training.score_answers import report as scored
from tables import audit
from tables.audit_formats import name_key
from tests.conftest import Command, assert_refused

Rows = list[dict[str, Any]]
M = 30
NAMES = {20: "Twin Town", 21: "Twin Town"}


def label(entity: int) -> str:
    return NAMES.get(entity, f"Entity {entity}")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ring of 30 entities; e0 has two test answers of one relation, two entities share a name."""
    folder = tmp_path_factory.mktemp("graph")
    ring = [(i, "next_to", (i + 1) % M) for i in range(M)]
    test = [(0, "likes", 5), (0, "likes", 6), (1, "likes", 20), (2, "likes", 7), (3, "likes", 8), (4, "likes", 9)]
    splits = {"train": [*ring, (10, "likes", 11), (2, "likes", 12)], "valid": [(0, "likes", 13)], "test": test}
    for split, triples in splits.items():
        (folder / f"{split}.txt").write_text("".join(f"e{h}\t{r}\te{t}\n" for h, r, t in triples))
    (folder / "entities.dict").write_text("".join(f"{i}\te{i}\n" for i in range(M)))
    (folder / "entity2label.txt").write_text("".join(f"e{i}\t{label(i)}\n" for i in range(M)))
    return folder


class Queries:
    """The test queries of a graph and their known answers."""

    def __init__(self, folder: Path) -> None:
        self.kg = KnowledgeGraph.load(folder)
        self.all = with_inverse(self.kg.test, self.kg.num_relations)
        self.known, self.train = (
            self.tails(*splits) for splits in (("train", "valid", "test"), ("train", "valid"))
        )  # of each query

    def tails(self, *splits: str) -> list[set[int]]:
        indptr, ids = self.kg.answers(*splits).of(self.all[:, 0], self.all[:, 1])
        return [set(ids[indptr[i] : indptr[i + 1]].tolist()) for i in range(len(self.all))]


def dift_rows(folder: Path) -> Rows:
    """An answer to each test query. The list of (h, r, ?) is the same for all its truths; the truth is answered to
    every second query, the first candidate to the others."""
    queries = Queries(folder)
    kg, rng, rows = queries.kg, random.Random(0), []
    lists: dict[tuple[int, int], list[int]] = {}
    for number, (h, r, t) in enumerate(queries.all.tolist()):
        truths = sorted(queries.known[number] - queries.train[number])
        if (h, r) not in lists:
            others = [entity for entity in range(M) if entity not in queries.known[number] | {20, 21}]
            lists[h, r] = rng.sample([*truths, *rng.sample(others, 6 - len(truths))], 6)
        shown = lists[h, r]
        rank = 1 + sum(entity not in truths for entity in shown[: shown.index(t)])
        first = next(entity for entity in shown if entity == t or entity not in truths)
        names = [label(entity) for entity in shown]
        rows.append({
            "triplet": [f"e{h}", kg.relations[r % kg.num_relations], f"e{t}"], "inverse": r >= kg.num_relations,
            "rank": rank, "topk_ents": [f"e{entity}" for entity in shown], "topk_names": names, "choices": names,
            "target": label(t), "pred": label(t if number % 2 == 0 else first),
        })  # fmt: skip
    return rows


def audited(graph: Path, folder: Path, rows: Any, name: str = "prediction.json", **flags: Any) -> dict[str, Any]:
    """Write the answers, run the command, return its JSON report."""
    path = folder / name
    lines = "".join(json.dumps(row) + "\n" for row in rows) if name.endswith("l") else json.dumps(rows)
    path.write_text(lines)
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    out = folder / "audit.json"
    code = audit.main(["--dataset", str(graph), "--answers", str(path), "--json", str(out), *words])
    found = json.loads(out.read_text())
    assert found["exit_code"] == code
    return found


def count(found: dict[str, Any], words: str, part: str = "link_prediction") -> dict[str, Any]:
    """The finding whose name contains ``words``."""
    (one,) = [finding for finding in found[part]["findings"] if words in finding["name"]]
    return one


# ---------------------------------------------------------------- formats


def codes(entity: int) -> str:
    return f"[CODE{entity}] [CODE{entity + 100}]"


def ssqr_rows(rows: Rows) -> Rows:
    """Candidates with their codes in the prompt; the answer is the codes of one entity."""
    ids = {name: i for i, name in enumerate(map(label, range(M)))}
    found = []
    for row in rows:
        h, r, t = row["triplet"]
        relation = "inverse relation of " * row["inverse"] + r.replace("_", " ")
        listed = "".join(f"{name}, {codes(ids[name])}\n" for name in row["topk_names"])
        prompt = (f"The query triplet is ({label(int(h[1:]))}, {relation}, ?).\nThe candidates and their codes are as "
                  f"follows:\n{listed}\nGive three.")  # fmt: skip
        found.append({"prompt": prompt, "answer": codes(ids[label(int(t[1:]))]),
                      "predict": f"1, {codes(ids[row['pred']])}"})  # fmt: skip
    return found


def test_one_set_of_answers_in_every_format(graph: Path, tmp_path: Path) -> None:
    rows = dift_rows(graph)
    dift = audited(graph, tmp_path, {"prediction": rows})["link_prediction"]
    prompts = [f"query {i}: {row['triplet']}" for i, row in enumerate(rows)]
    lists = [
        {"instruction": prompt, "input": "", "output": row["target"], "rank": row["rank"],
         "topk_names": row["topk_names"], "metadata": {"triplet": row["triplet"], "inverse": str(row["inverse"])}}
        for prompt, row in zip(prompts, rows, strict=True)
    ]  # fmt: skip
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    said = [{"prompt": prompt, "output": row["pred"].upper()} for prompt, row in zip(prompts, rows, strict=True)]
    random.Random(1).shuffle(said)  # rows are matched by their prompts
    gsquant = audited(graph, tmp_path, said, "predictions.jsonl", lists=tmp_path / "test.jsonl")["link_prediction"]
    ssqr = audited(graph, tmp_path, ssqr_rows(rows), "ssqr.json")["link_prediction"]
    assert dift["metrics"] == gsquant["metrics"] == ssqr["metrics"]
    assert dift["metrics"]["count"] == 12 and 0.5 < dift["metrics"]["mrr"] < 1
    for found in (dift, gsquant, ssqr):
        assert not any(finding["count"] for finding in found["findings"]), found["findings"]
        assert found["test_only"] == {"queries": 2, "listable": 2, "listed": 2}


def our_rows(graph: Path, seed: int, size: int = 8) -> Rows:
    """answers.jsonl with scores from few values, so that there are ties; other right answers are in some lists."""
    queries, rng = Queries(graph), random.Random(seed)
    kg, rows = queries.kg, []
    in_turn = both_directions(kg.test, kg.num_relations).tolist()
    places = {(h, r, t): place for place, (h, r, t) in enumerate(in_turn)}
    for number, (h, r, t) in enumerate(queries.all.tolist()):
        shown = rng.sample(sorted(set(range(kg.num_entities)) - queries.train[number] - {t}), size)
        shown[rng.randrange(size)] = t if rng.random() < 0.8 else shown[0]
        shown = list(dict.fromkeys(shown))
        right = [entity for entity in shown if entity in queries.known[number] and entity != t]
        rows.append({
            "id": f"link_prediction-test-{places[h, r, t]}", "task_type": "link_prediction", "split": "test",
            "decode": "score",
            "direction": "head" if r >= kg.num_relations else "tail", "triple": None, "tokens": None,
            "candidates": [kg.entities[e] for e in shown], "scores": [-float(rng.randrange(4)) for _ in shown],
            "truth": [kg.entities[e] for e in [t, *right]], "candidate_rank": float(rng.randint(9, 19)), "text": "",
            "expected": "", "parsed": True,
        })  # fmt: skip
    return rows


@pytest.mark.parametrize("folder", ["", "data/family"])
def test_our_answers_pass_with_the_metrics_of_score_answers(graph: Path, tmp_path: Path, folder: str) -> None:
    data = ROOT / folder if folder else graph
    rows = our_rows(data, seed=3)
    found = audited(data, tmp_path, rows, "answers.jsonl")
    expected = scored(rows)["link_prediction"]["test"]
    for name in ("mrr", "hits@1", "hits@3", "hits@10"):
        assert found["link_prediction"]["metrics"][name] == pytest.approx(expected[name])
        for side in ("head", "tail"):
            assert found["link_prediction"]["metrics"][side][name] == pytest.approx(expected[side][name])
        baseline = found["link_prediction"]["baselines"]["candidate ranker"][name]
        assert baseline == pytest.approx(expected["candidate_model"][name])
    assert found["exit_code"] == 0
    findings = [one for one in found["link_prediction"]["findings"] if "only the test split" not in one["name"]]
    assert not any(finding["count"] for finding in findings), "lists here are random, so that one is left out"


def test_our_answers_that_cannot_be_read(graph: Path, tmp_path: Path) -> None:
    """They keep the ranker's rank here and count as never found in score_answers.py, which is no inflation."""
    rows = our_rows(graph, seed=3)
    for row in rows:
        row |= {"parsed": False, "scores": None, "text": "nonsense"}
    found = audited(graph, tmp_path, rows, "answers.jsonl")
    part = found["link_prediction"]
    assert found["exit_code"] == 0 and part["own_rule"]["mrr"] == 0
    assert part["metrics"] == part["baselines"]["candidate ranker"]
    assert count(found, "answers that are not entities")["count"] == 12


def test_a_search_over_all_entities_has_no_lists(graph: Path, tmp_path: Path) -> None:
    rows = our_rows(graph, seed=3)
    for row in rows:
        row |= {"decode": "constrained_all"}
    found = audited(graph, tmp_path, rows, "answers.jsonl")["link_prediction"]
    listed = [row for row in rows if row["truth"][0] in row["candidates"]]
    expected = scored(listed)["link_prediction"]["test"]["mrr"] * len(listed) / len(rows)
    assert found["metrics"]["mrr"] == pytest.approx(expected + 0.25 / 30, abs=0.25 / 200)  # the others: the worst rank
    assert found["lists"]["lists"] == 0 and found["lists"]["recall"] is None


def test_shared_codes_are_a_tie(graph: Path, tmp_path: Path) -> None:
    rows = ssqr_rows(dift_rows(graph))
    before = audited(graph, tmp_path, rows, "ssqr.json")["link_prediction"]["metrics"]["mrr"]
    first = rows[0]
    truth = first["predict"].partition(", ")[2]
    other = next(line for line in first["prompt"].splitlines() if "[CODE" in line and truth not in line)
    first["prompt"] = first["prompt"].replace(other.partition(", ")[2], truth)
    found = audited(graph, tmp_path, rows, "ssqr.json")
    finding = count(found, "by name or code")
    after = found["link_prediction"]["metrics"]["mrr"]
    assert before - after == pytest.approx((1 - 1 / 1.5) / 12) == finding["change"] and found["exit_code"] == 1


def test_our_queries_from_the_rows_file(graph: Path, tmp_path: Path) -> None:
    """Answers under other ids need --lists; with it, the report is the same."""
    rows, kg = our_rows(graph, seed=3), KnowledgeGraph.load(graph)
    expected = audited(graph, tmp_path, rows, "answers.jsonl")["link_prediction"]["metrics"]
    triples = [[kg.entities[h], kg.relations[r], kg.entities[t]] for h, r, t in [*kg.test.tolist(), *kg.test.tolist()]]
    lists = [{"id": f"x-{i + 50}", "triple": triple} for i, triple in enumerate(triples)]
    renamed = [row | {"id": one["id"]} for row, one in zip(rows, lists, strict=True)]
    (tmp_path / "test_tasks.json").write_text(json.dumps(lists))
    found = audited(graph, tmp_path, renamed, "answers.jsonl", lists=tmp_path / "test_tasks.json")
    assert found["link_prediction"]["metrics"] == expected


# ---------------------------------------------------------------- planted faults


def at(rows: Rows, head: str, tail: str) -> dict[str, Any]:
    return next(row for row in rows if row["triplet"][::2] == [head, tail])


def drop(rows: Rows) -> None:
    del rows[3]


def repeat(rows: Rows) -> None:
    rows.append(dict(rows[2]))


def foreign(rows: Rows) -> None:
    rows.append(rows[0] | {"triplet": ["e3", "next_to", "e4"]})


def filter_lists(rows: Rows) -> None:
    for tail, other in (("e5", "e6"), ("e6", "e5")):
        row = at(rows, "e0", tail)
        place = row["topk_ents"].index(other)
        for key in ("topk_ents", "topk_names"):
            row[key] = row[key][:place] + row[key][place + 1 :]
        row["choices"], row["pred"] = row["topk_names"], row["target"]


def other_twin(rows: Rows) -> None:
    row = at(rows, "e1", "e20")
    row["topk_ents"] = [name.replace("e20", "e21") for name in row["topk_ents"]]
    row |= {"rank": 12, "pred": "Twin Town"}


def both_twins(rows: Rows) -> None:
    row = at(rows, "e1", "e20")
    row["topk_ents"], row["topk_names"] = [*row["topk_ents"], "e21"], [*row["topk_names"], "Twin Town"]
    row["choices"], row["pred"] = row["topk_names"], "Twin Town"


def no_entity(rows: Rows) -> None:
    rows[4]["pred"] = "Atlantis"


def unknown_candidate(rows: Rows) -> None:
    rows[4]["topk_ents"][-1] = "e99"


def twice(rows: Rows) -> None:
    ents, names = rows[4]["topk_ents"], rows[4]["topk_names"]
    ents.append(ents[0])
    names.append(names[0])


FAULTS = [(drop, "missing queries", 1), (repeat, "repeated queries", 1), (foreign, "no query of the test", 1),
          (filter_lists, "only the test split knows", 2), (other_twin, "by name", 1), (both_twins, "by name", 1),
          (no_entity, "answers that are not entities", 1), (unknown_candidate, "candidates that are not", 1),
          (twice, "repeated candidates", 1)]  # fmt: skip


@pytest.mark.parametrize(("plant", "words", "expected"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_fault_is_found(
    graph: Path, tmp_path: Path, plant: Callable[[Rows], None], words: str, expected: int
) -> None:
    rows = json.loads(json.dumps(dift_rows(graph)))
    plant(rows)
    found = audited(graph, tmp_path, rows)
    finding = count(found, words)
    assert finding["count"] == expected and len(finding["examples"]) == expected
    others = [one["name"] for one in found["link_prediction"]["findings"] if one["count"] and one != finding]
    assert not [name for name in others if "rule of" not in name], others
    if finding["change"] is not None and abs(finding["change"]) > audit.LIMIT:
        assert found["exit_code"] == 1 and finding["above_limit"]


def test_what_the_faults_change(graph: Path, tmp_path: Path) -> None:
    """By hand: the entity that only shares the truth's name is no hit; two entities of one name share their rank."""
    for plant, rank in ((other_twin, 12), (both_twins, 1.5)):
        rows = json.loads(json.dumps(dift_rows(graph)))
        plant(rows)
        found = audited(graph, tmp_path, rows)
        finding = count(found, "by name")
        assert finding["change"] == pytest.approx((1 - 1 / rank) / 12) and found["exit_code"] == 1
        own, ours = (found["link_prediction"][key]["mrr"] for key in ("own_rule", "metrics"))
        assert own - ours >= finding["change"] - 1e-9
    rows = json.loads(json.dumps(dift_rows(graph)))
    filter_lists(rows)
    found = audited(graph, tmp_path, rows)
    lost = [1 - 1 / at(rows, "e0", tail)["rank"] for tail in ("e5", "e6")]  # each hit is one of two right answers
    assert count(found, "only the test split knows")["change"] == pytest.approx(sum(lost) / 2 / 12)


def test_a_missing_query_has_the_worst_rank(graph: Path, tmp_path: Path) -> None:
    """30 entities, of which e12 (train) is another answer of (e2, likes, ?)."""
    rows = dift_rows(graph)
    whole = audited(graph, tmp_path, rows)["link_prediction"]["metrics"]["mrr"]
    one = at(rows, "e2", "e7")
    rank = 1 / audited(graph, tmp_path, [one])["link_prediction"]["own_rule"]["mrr"]
    left = audited(graph, tmp_path, [row for row in rows if row is not one])["link_prediction"]["metrics"]["mrr"]
    assert whole - left == pytest.approx((1 / rank - 1 / 29) / 12)
    (tmp_path / "test.json").write_text(json.dumps(rows))  # with the lists, the ranker's rank is known
    rest = [row for row in rows if row is not one]
    kept = audited(graph, tmp_path, rest, lists=tmp_path / "test.json")["link_prediction"]
    assert kept["metrics"]["mrr"] - left == pytest.approx((1 / one["rank"] - 1 / 29) / 12)
    assert count({"link_prediction": kept}, "missing")["count"] == 1


# ---------------------------------------------------------------- lists, two files


def test_baselines_and_the_place_of_the_truth(graph: Path, tmp_path: Path) -> None:
    rows = our_rows(ROOT / "data" / "family", seed=1)
    found = audited(ROOT / "data" / "family", tmp_path, rows, "answers.jsonl")["link_prediction"]
    expected = scored(rows)["link_prediction"]["test"]
    copied, bound = (found["baselines"][name] for name in ("copy the first candidate", "upper bound of the lists"))
    assert copied["mrr"] == pytest.approx(expected["as_listed"]["mrr"])
    listed = [row["truth"][0] in row["candidates"] for row in rows]
    assert found["lists"]["recall"] == pytest.approx(sum(listed) / len(rows))
    best = [1 if there else row["candidate_rank"] for there, row in zip(listed, rows, strict=True)]
    assert bound["mrr"] == pytest.approx(sum(1 / rank for rank in best) / len(rows))
    assert found["lists"]["p_uniform"] > 0.001
    for row in rows:
        row["candidates"].sort(key=lambda name, row=row: name != row["truth"][0])
    ordered = audited(ROOT / "data" / "family", tmp_path, rows, "answers.jsonl")["link_prediction"]["lists"]
    assert ordered["p_uniform"] < 1e-9 and ordered["mean_place"] == 1


def test_lists_without_any_test_answer(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no two rows share (h, r), it counts whether any test-only answer is listed, if enough are expected."""
    rows = json.loads(json.dumps(dift_rows(graph)))
    filter_lists(rows)
    rows.remove(at(rows, "e0", "e6"))
    assert count(audited(graph, tmp_path, rows), "only the test split knows")["count"] == 0
    monkeypatch.setattr(audit, "FEW", 1)
    assert count(audited(graph, tmp_path, rows), "only the test split knows")["count"] == 1
    plain = [row for row in dift_rows(graph) if row["triplet"][2] != "e6"]
    assert count(audited(graph, tmp_path, plain), "only the test split knows")["count"] == 0


def test_uniform_places() -> None:
    """Against scipy's chi-squared; the approximation is good to a few thousandths."""
    stats = pytest.importorskip("scipy.stats")
    for places in ([3] * 9 + [0, 1, 2] * 7, [0] * 12 + [1, 2, 3, 4] * 9, list(range(20)) * 3 + [1] * 4):
        size = max(places) + 1
        observed = [places.count(i) for i in range(size)]
        chi2, p = audit.uniform_test([(place, size) for place in places])
        expected = stats.chisquare(observed)
        assert chi2 == pytest.approx(expected.statistic) and p == pytest.approx(expected.pvalue, abs=0.01)
    assert audit.uniform_test([]) == (None, None)


def test_paired_difference(graph: Path, tmp_path: Path, shell: Command) -> None:
    rows = dift_rows(graph)
    worse = [row | {"pred": "Atlantis"} for row in rows]
    (tmp_path / "worse.json").write_text(json.dumps(worse))
    found = audited(graph, tmp_path, rows, against=tmp_path / "worse.json")
    mine, theirs = (audited(graph, tmp_path, each)["link_prediction"]["metrics"]["mrr"] for each in (rows, worse))
    pair = found["against"]
    assert pair["difference"] == pytest.approx(mine - theirs) and pair["queries"] == 12
    assert pair["interval_95"][0] < pair["difference"] < pair["interval_95"][1]
    (tmp_path / "worse.json").write_text(json.dumps(worse[1:]))
    words = ["--dataset", graph, "--answers", tmp_path / "prediction.json", "--against", tmp_path / "worse.json"]
    assert_refused(shell(audit, *words), "--against")


# ---------------------------------------------------------------- triple classification


def kopa_rows(graph: Path) -> Rows:
    kg = KnowledgeGraph.load(graph)
    found = []
    for h, r, t in kg.test.tolist():
        for tail, true in ((t, "True"), ((t + 9) % M, "False")):
            text = f"\nThe input triple: \n( {label(h)}, {kg.relation_labels[r]}, {label(tail)} )\n"
            found.append({"instruction": "Judge.", "input": text, "output": true, "embedding_ids": [h, r, tail],
                          "predict": true})  # fmt: skip
    return found


def test_triples_of_kopa(graph: Path, tmp_path: Path) -> None:
    rows = kopa_rows(graph)
    found = audited(graph, tmp_path, rows, "kopa.json")["triple_classification"]
    assert found["fixed_threshold"]["accuracy"] == 1 and found["label_balance"] == 0.5
    assert not any(finding["count"] for finding in found["findings"])
    faulty = [*rows, rows[0], rows[2] | {"output": "False"}, rows[5] | {"predict": "maybe"}]
    faulty[1] = rows[1] | {"predict": "maybe"}
    whole = audited(graph, tmp_path, faulty, "kopa.json")
    words = ("repeated", "both", "against", "neither")
    assert [count(whole, name, "triple_classification")["count"] for name in words] == [2, 2, 1, 2]
    part = whole["triple_classification"]
    assert part["own_rule"]["accuracy"] == pytest.approx(14 / 15)  # "maybe" counts as False there
    assert part["fixed_threshold"]["accuracy"] == pytest.approx(12 / 15)
    assert whole["exit_code"] == 1
    texts = [{"answer": row["output"], "predict": row["predict"]} for row in rows]
    (tmp_path / "triples.json").write_text(json.dumps([{k: row[k] for k in row if k != "predict"} for row in rows]))
    apart = audited(graph, tmp_path, texts, "said.json", lists=tmp_path / "triples.json")["triple_classification"]
    assert apart["fixed_threshold"]["accuracy"] == 1


def test_validated_threshold_of_our_answers(graph: Path, tmp_path: Path) -> None:
    """Margins are shifted by 2: threshold 0 says True to all, the validated one is right."""
    rows = []
    for split in ("validation", "test"):
        for i in range(10):
            true = i % 2 == 0
            rows.append({
                "id": f"t-{split}-{i}", "task_type": "triple_classification", "split": split, "direction": None,
                "decode": "score", "candidates": ["True", "False"], "scores": [3.0 if true else 1.0, 0.0],
                "tokens": None, "truth": [str(true)], "candidate_rank": None, "text": "", "expected": "",
                "parsed": True, "triple": [f"e{i}", "next_to", f"e{(i + (1 if true else 3)) % M}"],
            })  # fmt: skip
    found = audited(graph, tmp_path, rows, "answers.jsonl")["triple_classification"]
    assert found["count"] == 10 and found["fixed_threshold"]["accuracy"] == 0.5
    assert found["validated_threshold"]["accuracy"] == 1 and 1 <= found["threshold"] < 3


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("content", [
    "", "[]", "{", "[1]", "[{}]", '{"x": 1}', '[{"triplet": 3}]', '[{"triplet": ["a", "b", "c"]}]',
    '[{"triplet": ["e0", "likes", "e5"], "topk_ents": 4}]',
    '[{"triplet": ["e0", "likes", "e5"], "topk_ents": ["e1"], "topk_names": []}]',
    '[{"triplet": ["e0", "likes", "e5"], "topk_ents": [], "topk_names": [], "rank": "x"}]',
    '[{"prompt": "x", "output": "y"}]', '[{"embedding_ids": 4, "output": "maybe"}]', '[{"metadata": 3}]', "\x00",
])  # fmt: skip
def test_bad_input_is_one_line(graph: Path, tmp_path: Path, shell: Command, content: str) -> None:
    path = tmp_path / "answers.json"
    path.write_text(content)
    assert_refused(shell(audit, "--dataset", graph, "--answers", path), "answers.json")
    assert_refused(shell(audit, "--dataset", graph, "--answers", tmp_path / "none.json"), "--answers")


def test_the_report_does_not_replace_a_file_that_is_read(graph: Path, tmp_path: Path, shell: Command) -> None:
    paths = {flag: tmp_path / f"{flag}.json" for flag in ("answers", "lists", "against")}
    for path in paths.values():
        path.write_text(json.dumps(dift_rows(graph)))
    words = [word for flag, path in paths.items() for word in (f"--{flag}", path)]
    for flag, path in paths.items():
        before = path.read_bytes()
        outcome = shell(audit, "--dataset", graph, *words, "--json", tmp_path / "." / path.name)
        assert_refused(outcome, "--json", f"--{flag}")
        assert path.read_bytes() == before


def test_names_without_case_and_punctuation() -> None:
    assert name_key("  St. John's,  (Town) ") == name_key("st johns town") != name_key("st john")
