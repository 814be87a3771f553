"""Metrics from answers alone: closed forms, the ranking of stage 1, scikit-learn, and answers that do not parse."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from common.errors import InputError
from common.files import ROOT, read_json
from lora_training.score_answers import (
    best_threshold,
    by_task,
    classification_metrics,
    is_match,
    main,
    paired,
    per_token,
    rank_of,
    ranking_metrics,
    read_answers,
    report,
    values_by_query,
)
from model.ranking import rank_scores


def answer(**fields: Any) -> dict[str, Any]:
    """A line of answers.jsonl about link prediction, unless told otherwise."""
    base = {
        "id": "x-0", "task_type": "link_prediction", "split": "test", "direction": "tail", "decode": "score",
        "candidates": ["a", "b", "c"], "scores": [-1.0, -2.0, -3.0], "tokens": None, "truth": ["b"],
        "candidate_rank": 2.0, "text": "", "expected": "", "parsed": True,
    }  # fmt: skip
    return base | fields


def judged(number: int, split: str, true: bool, margin: float | None) -> dict[str, Any]:
    return answer(
        id=f"t-{number}", task_type="triple_classification", split=split, direction=None, candidate_rank=None,
        truth=["True" if true else "False"], candidates=["True", "False"], parsed=margin is not None,
        scores=None if margin is None else [margin, 0.0],
    )  # fmt: skip


def write(path: Path, answers: list[dict[str, Any]], torn: str = "") -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in answers) + torn)
    return path


# ---------------------------------------------------------------- link prediction


def test_ranks_are_those_of_stage_1() -> None:
    """Scores drawn from few values, other right answers left out: the same ranks as model/ranking.py."""
    rng = np.random.default_rng(0)
    names = [f"e{i}" for i in range(20)]
    for _ in range(200):
        scores = rng.integers(-6, 0, 20).astype(float)
        truth = rng.permutation(20)[: rng.integers(1, 5)].tolist()
        known = (torch.tensor([0, len(truth)]), torch.tensor(truth))
        expected = rank_scores(torch.tensor(scores)[None], torch.tensor(truth[:1]), known)
        found = rank_of(answer(candidates=names, scores=scores.tolist(), truth=[names[t] for t in truth]))
        assert found == float(expected[0])


def test_rules_of_the_rank() -> None:
    assert rank_of(answer()) == 2
    assert rank_of(answer(truth=["z"], candidate_rank=57.5)) == 57.5, "not among the candidates: the rank stays"
    assert rank_of(answer(truth=["z"], candidate_rank=None)) == math.inf
    assert rank_of(answer(truth=["z"], candidate_rank=57.5, decode="constrained_all")) == math.inf, "nothing to merge"
    assert rank_of(answer(parsed=False, candidate_rank=1.0)) == math.inf, "no answer gains nothing from the rank"
    assert rank_of(answer(scores=[None, None, -3.0])) == 3, "without a score: listed order, below the scored"
    assert rank_of(answer(scores=[None, None, -3.0], truth=["b", "a"])) == 2
    assert rank_of(answer(scores=[-5.0, None, None], truth=["a"])) == 1
    assert rank_of(answer(scores=[-1.0, -1.0, -1.0])) == 2
    assert rank_of(per_token(answer(scores=[-4.0, -6.0, -9.0], tokens=[2, 6, 3]))) == 1
    assert rank_of(answer(scores=[-4.0, -6.0, -9.0], tokens=[2, 6, 3])) == 2


def test_merged_metrics_by_hand() -> None:
    answers = [
        answer(id="0"),  # rank 2 of a list whose model said 2
        answer(id="1", scores=[-9.0, -1.0, -2.0], candidate_rank=3.0, direction="head"),  # 3 -> 1
        answer(id="2", truth=["z"], candidate_rank=25.0),  # stays 25
        answer(id="3", truth=["z"], candidate_rank=None),  # never found
        answer(id="4", parsed=False, scores=None, truth=["a"], candidate_rank=1.0),  # never found by this answer
    ]
    found = report(answers)["link_prediction"]["test"]
    assert found["mrr"] == pytest.approx((1 / 2 + 1 + 1 / 25) / 5)
    assert [found[f"hits@{k}"] for k in (1, 3, 10)] == pytest.approx([1 / 5, 2 / 5, 2 / 5])
    assert found["candidate_model"]["mrr"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 25 + 1) / 5)
    assert found["as_listed"]["hits@1"] == pytest.approx(1 / 5) and found["head"]["mrr"] == 1
    counts = {"count": 5, "parse_failures": 1, "truth_listed": 3, "kept_candidate_rank": 1, "never_found": 2}
    assert counts == {key: found[key] for key in counts}
    assert ranking_metrics([])["mrr"] is None and ranking_metrics([math.inf])["mrr"] == 0


def test_the_normalisation_of_lengths_is_chosen_on_validation() -> None:
    """Sum ranks the truth second, the mean first on validation, and the other way round in the second file."""
    mean_wins: dict[str, Any] = {"scores": [-4.0, -6.0, -9.0], "tokens": [2, 6, 3]}
    sum_wins: dict[str, Any] = {"scores": [-4.0, -3.0, -9.0], "tokens": [4, 1, 3]}
    for validation, way, mrr in ((mean_wins, "mean", 1.0), (sum_wins, "sum", 0.5)):
        found = report([answer(id="v", split="validation", **validation), answer(id="t", **mean_wins)])
        test = found["link_prediction"]["test"]
        assert test["lengths"] == f"{way} of log-likelihoods" and test["mrr"] == mrr
        assert test["by_mean"]["mrr"] == 1 and test["by_sum"]["mrr"] == 0.5
    alone = report([answer(**mean_wins)])["link_prediction"]["test"]
    assert alone["mrr"] == 0.5 and "no validation" in alone["lengths"]
    assert "lengths" not in report([answer()])["link_prediction"]["test"]


def test_an_entity_named_true_is_no_judgement() -> None:
    named = answer(
        task_type="codes_to_name", truth=["True"], candidates=None, scores=None, text="True", expected="True"
    )
    assert report([named])["codes_to_name"]["test"]["exact_match"] == 1
    assert "threshold" in report([judged(0, "test", True, 1.0)])["triple_classification"]["test"]


# ---------------------------------------------------------------- baselines and other orders


def test_baselines_of_a_list_by_hand() -> None:
    """Copying the first, a random order (expected), and the recall of the lists."""
    answers = [
        answer(id="0", candidate_order="shuffled"),  # b is second of three
        answer(id="1", truth=["a", "c"], candidate_order="shuffled"),  # c is right too: a first of two
        answer(id="2", truth=["z"], candidate_rank=4.0, candidate_order="shuffled"),
    ]
    found = report(answers)["link_prediction"]["test"]
    assert found["as_listed"]["mrr"] == pytest.approx((1 / 2 + 1 + 1 / 4) / 3)
    assert found["random"]["mrr"] == pytest.approx(((1 + 1 / 2 + 1 / 3) / 3 + (1 + 1 / 2) / 2 + 1 / 4) / 3)
    assert found["random"]["hits@1"] == pytest.approx((1 / 3 + 1 / 2 + 0) / 3) and found["random"]["hits@10"] == 1
    assert found["list_recall"] == pytest.approx(2 / 3) and found["candidate_order"] == "shuffled"
    rng = np.random.default_rng(0)
    drawn = [np.mean([1 / rank_of(one | {"scores": rng.permutation(3).tolist()}) for one in answers])
             for _ in range(4000)]  # fmt: skip
    assert np.mean(drawn) == pytest.approx(found["random"]["mrr"], abs=0.01)
    old = answer(decode="constrained_all", truth=["z"])  # of earlier versions: all entities, no list
    assert "random" not in report([old])["link_prediction"]["test"]


def test_other_orders_are_averaged() -> None:
    """Own ranks 2 and 1; in order 1 both are first, in order 2 ranks 3 and none (not parsed)."""
    answers = [
        answer(id="0", permuted=[[-3.0, -1.0, -4.0], [-1.0, -5.0, -2.0]]),
        answer(id="1", truth=["a"], permuted=[[-1.0, -2.0, -3.0], None]),
    ]
    found = report(answers)["link_prediction"]["test"]
    permuted = found["permuted"]
    assert permuted["orders"] == 2 and permuted["mean"]["mrr"] == pytest.approx((1 + (1 / 3 + 0) / 2) / 2)
    assert permuted["mrr_std"] == pytest.approx(np.std([1, 1 / 6], ddof=1))
    assert permuted["first_changes"] == pytest.approx(2 / 4), "b instead of a, and no answer"
    assert "permuted" not in report([answers[0], answer(id="2")])["link_prediction"]["test"]


# ---------------------------------------------------------------- judgements


def test_classification_metrics_are_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    margins, labels = rng.normal(size=500), rng.random(500) < 0.4
    for threshold in (-1.0, 0.0, 0.7):
        found = classification_metrics(margins.tolist(), labels.tolist(), threshold)
        p, r, f, _ = precision_recall_fscore_support(labels, margins > threshold, average="binary")
        expected = [accuracy_score(labels, margins > threshold), p, r, f]
        assert [found[name] for name in ("accuracy", "precision", "recall", "f1")] == pytest.approx(expected)
    # what does not parse is a miss where the truth is True and a false alarm where it is False
    found = classification_metrics([math.nan, math.nan, 1.0, -1.0], [True, False, True, False], 0.0)
    assert found == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert classification_metrics([-1.0], [False], 0.0) == {
        "accuracy": 1.0,
        "precision": None,
        "recall": None,
        "f1": None,
    }


def test_the_threshold_is_the_best_of_all_there_are() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        margins = rng.integers(-4, 5, 12) / 2 + 1
        labels = rng.random(12) < 0.5
        found = best_threshold(margins.tolist(), labels.tolist())
        accuracy = {t: float(((margins > t) == labels).mean()) for t in np.arange(-3, 5, 0.05).round(3).tolist()}
        best = max(accuracy.values())
        assert ((margins > found) == labels).mean() == best
        # up to half a step between margins, and a whole one beyond their ends
        assert all(abs(found) <= abs(t) + 1.001 for t, value in accuracy.items() if value == best)
    assert best_threshold([1.0, 2.0, 3.0], [True, True, True]) == 0
    assert best_threshold([1.0, 2.0, math.nan], [False, True, False]) == 1.5
    assert best_threshold([], []) == 0


def test_the_threshold_comes_from_validation_never_from_test() -> None:
    validation = [judged(i, "validation", i >= 5, float(i)) for i in range(10)]  # best cut: 4.5
    test = [judged(i, "test", i >= 3, float(i)) for i in range(10)]
    found = report([*validation, *test])["triple_classification"]
    assert found["validation"]["accuracy"] == 1 and found["test"]["threshold"] == 4.5
    assert found["test"]["accuracy"] == 0.8 and found["test"]["at_zero"]["accuracy"] == 0.8
    assert found["test"]["precision"] == 1 and found["test"]["recall"] == pytest.approx(5 / 7)
    alone = report(test)["triple_classification"]["test"]
    assert alone["threshold"] == 0 and alone["threshold_from"] == "none"
    free = [
        one | {"decode": "free", "scores": [-1.0, 0.0]} for one in validation
    ]  # always False, and wrong half the time
    assert report([*free, *test])["triple_classification"]["test"]["threshold"] == 0
    failed = report([*validation, judged(0, "test", True, None), judged(1, "test", True, 9.0)])
    counts = failed["triple_classification"]["test"]
    assert counts["parse_failures"] == 1 and counts["accuracy"] == 0.5


# ---------------------------------------------------------------- the rest, and the file


def test_exact_matches_and_failures() -> None:
    one = answer(task_type="one_hop_question", text=" b\na", expected="a\nb")
    assert is_match(one) and not is_match(one | {"text": "a"}) and not is_match(one | {"parsed": False})
    answers = [one | {"id": str(i)} for i in range(3)] + [one | {"id": "3", "parsed": False}]
    assert report(answers)["one_hop_question"]["test"] == {
        "exact_match": 0.75,
        "count": 4,
        "parse_failures": 1,
    }


def test_a_torn_last_line_is_left_out_and_other_faults_are_named(tmp_path: Path) -> None:
    whole = [answer(id=str(i)) for i in range(3)]
    path = write(tmp_path / "answers.jsonl", whole, torn='{"id": "3", "task_ty')
    found = read_answers(path)
    assert found.answers == whole and path.read_bytes()[: found.end].endswith(b"}\n")
    assert found.end == sum(len(json.dumps(one)) + 1 for one in whole)
    for lines, message in (
        ([*whole, whole[1]], r"4 .*1 of test is answered twice"),
        ([whole[0], {"id": "1", "split": "test"}], "2 .*lacks task_type"),
        ([whole[0], 5], "2 "),
        ([whole[0] | {"scores": [1.0]}], "1 .*differ in length"),
        ([whole[0] | {"truth": "b"}], "1 .*truth"),
        ([whole[0] | {"scores": "high"}], "1 "),
        ([whole[0] | {"id": [1]}], "1 "),
    ):
        with pytest.raises(InputError, match=rf"answers\.jsonl:{message}"):
            read_answers(write(path, lines))  # type: ignore[arg-type]
    path.write_text("{]\n")
    with pytest.raises(InputError, match=r"jsonl:1 is no complete answer"):
        read_answers(path)
    with pytest.raises(InputError, match="does not exist"):
        read_answers(tmp_path / "none.jsonl")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "answers.jsonl", [answer(), judged(0, "test", True, 1.0)])
    main(["--answers", str(path), "--output", str(tmp_path / "metrics.json")])
    written = read_json(tmp_path / "metrics.json", "metrics")["metrics"]
    assert written["link_prediction"]["test"]["mrr"] == 0.5
    out = capsys.readouterr().out
    assert "link_prediction test (1): mrr 0.5000" in out and "copy the first candidate" in out
    write(path, [answer(scores=["high", "low", "lower"])])
    with pytest.raises(InputError, match=r"answers\.jsonl"):
        main(["--answers", str(path)])
    path.write_text("")
    script = ROOT / "lora_training" / "score_answers.py"
    ended = subprocess.run([sys.executable, script, "--answers", path], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "no complete answer" in ended.stderr


def test_against_other_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks 1, 2, 3 and two right judgements of two, against ranks 2, 2, 2 and one."""
    lists = {1: [-2.0, -1.0, -3.0], 2: [-1.0, -2.0, -3.0], 3: [-1.0, -3.0, -2.0]}

    def file(name: str, ranks: tuple[int, ...], margins: tuple[float, ...]) -> Path:
        links = [answer(id=f"l-{i}", scores=lists[rank]) for i, rank in enumerate(ranks)]
        return write(tmp_path / name, [*links, *(judged(i, "test", True, m) for i, m in enumerate(margins))])

    ours, theirs = file("ours.jsonl", (1, 2, 3), (1.0, 2.0)), file("theirs.jsonl", (2, 2, 2), (1.0, -1.0))
    main(["--answers", str(ours), "--against", str(theirs), str(ours), "--output", str(tmp_path / "m.json")])
    said = capsys.readouterr().out
    assert f"link_prediction test, minus {theirs}: +0.1111 (standard error" in said
    written = read_json(tmp_path / "m.json", "metrics")["against"]
    judgement, links = sorted(written[str(theirs)]["differences"], key=lambda line: -line["mean"])
    worth = np.array([1 / 2, 0, 1 / 3 - 1 / 2])
    assert links["mean"] == pytest.approx(worth.mean()) and links["queries"] == 3
    assert links["error"] == pytest.approx(worth.std(ddof=1) / math.sqrt(3))
    assert judgement["mean"] == 0.5 and judgement["task_type"] == "triple_classification"
    assert [line["mean"] for line in written[str(ours)]["differences"]] == [0, 0]
    ours_of = [one | {"triple": ["a", "r", f"b{i}"]} for i, one in enumerate(read_answers(ours).answers)]
    negatives = write(tmp_path / "negatives.jsonl", [one | {"triple": ["a", "r", "c"]} for one in ours_of])
    with pytest.raises(InputError, match="triple_classification test: the queries differ"):
        main(["--answers", str(write(tmp_path / "with.jsonl", ours_of)), "--against", str(negatives)])
    fewer = file("fewer.jsonl", (1, 2), (1.0, 2.0))
    with pytest.raises(InputError, match="link_prediction test: the queries differ: 1 "):
        main(["--answers", str(ours), "--against", str(fewer)])
    other = write(tmp_path / "v.jsonl", [answer(split="validation")])
    with pytest.raises(InputError, match="no task and split in common"):
        main(["--answers", str(ours), "--against", str(other)])


def test_what_is_compared_is_what_is_reported() -> None:
    """The means of every task's values are its metrics, with lengths and thresholds chosen on validation."""
    unequal = answer(id="u", scores=[-4.0, -6.0, -9.0], tokens=[2, 6, 3])
    links = [unequal | {"id": "v", "split": "validation"}, unequal, answer(id="w", truth=["z"])]
    judgements = [judged(i, split, i >= 4, float(i)) for i in range(9) for split in ("validation", "test")]
    text = answer(task_type="codes_to_name", scores=None, candidates=None, text="b\na", expected="a\nb")
    texts = [text, text | {"id": "y", "text": "c"}]
    for made, metric in ((links, "mrr"), (judgements, "accuracy"), (texts, "exact_match")):
        ((_, splits),) = by_task(made).items()
        for split, values in values_by_query(splits).items():
            metrics = report(made)[made[0]["task_type"]][split]
            assert len(values) == metrics["count"]
            assert np.mean(list(values.values())) == pytest.approx(metrics[metric])


def test_names_that_the_terminal_cannot_show_are_escaped(tmp_path: Path) -> None:
    path = write(tmp_path / "answers.jsonl", [answer(task_type="名字", text="a", expected="a")])
    words = [sys.executable, str(ROOT / "lora_training" / "score_answers.py"), "--answers", str(path)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0 and r"\u540d\u5b57 test (1" in ended.stdout


# ---------------------------------------------------------------- paired differences


def test_mean_over_error_is_scipys_paired_t() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 300))
    names = [f"q{i}" for i in range(300)]
    found = paired([dict(zip(names, a, strict=True))], [dict(zip(reversed(names), b[::-1], strict=True))])
    assert found.error is not None and found.queries == 300
    assert found.mean / found.error == pytest.approx(ttest_rel(a, b).statistic)
    assert found.mean == pytest.approx(a.mean() - b.mean()) == found.runs[0]


def test_a_query_of_several_runs_is_one_observation() -> None:
    """The same answers three times over are no more certain than once."""
    rng = np.random.default_rng(1)
    first, second = ({f"q{i}": value for i, value in enumerate(rng.random(50))} for _ in range(2))
    once, thrice = paired([first], [second]), paired([first] * 3, [second] * 3)
    assert thrice.error == pytest.approx(once.error) and thrice.queries == 50 and len(thrice.runs) == 3
    opposed = paired([first, second], [second, first])
    assert opposed.mean == pytest.approx(0) and opposed.error == pytest.approx(0, abs=1e-12)
    assert opposed.runs == pytest.approx([once.mean, -once.mean])
    other = {f"p{i}": value for i, value in enumerate(first.values())}
    assert paired([first, other], [second, dict(zip(other, second.values(), strict=True))]).queries == 100


def test_other_queries_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="2 are in one set only, such as a"):
        paired([{"a": 1.0, "b": 0.5}], [{"c": 1.0, "b": 0.5}])
    with pytest.raises(ValueError, match="there are none"):
        paired([{}], [{}])
    with pytest.raises(ValueError, match="shorter"):
        paired([{"a": 1.0}], [])
    assert paired([{"a": 1.0}], [{"a": 0.5}]).error is None
    assert str(paired([{"a": 1.0}], [{"a": 0.5}])) == "+0.5000"
