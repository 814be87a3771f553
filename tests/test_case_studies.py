"""Case studies: the cases that the rules choose, their text, and refusals of answers without record or rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from Class import prompts
from Class.codes import print_codes
from Class.rows import Row, make_row, write_rows
from common.errors import InputError
from common.files import read_json, sha256_file, write_json
from lora_training.inference import answers_path, make_answer
from lora_training.score_answers import Answer, report
from tables import case_studies
from tables.case_studies import Case, open_run, page, pick_links, pick_triples, short_codes
from tables.rows import LINKS, TRIPLES

NAMES = ["Ada | \\ `x`", "Bo*b*", "<b>Cy</b>", "Di", "Eve"]


def codes(entity: int, code_format: str = "spec") -> str:
    return print_codes(np.array([[entity, 1], [2, 3], [4, 5]]), code_format)


def link(number: int, rank: float | None, truth: list[str], with_codes: bool = True) -> Row:
    """A query over five candidates e0 to e4, named NAMES."""
    fields: Row = {
        "head": f"Head {number}", "relation": "knows", "head_codes": codes(9) if with_codes else None,
        "candidate_names": NAMES, "candidate_codes": [codes(i) for i in range(5)] if with_codes else None,
    }  # fmt: skip
    return make_row(
        prompts.link_prediction(fields), "1. ?", id=f"l-{number}", task_type=LINKS, split="test",
        triple=["h", "r", truth[0]], direction="tail", candidates=[f"e{i}" for i in range(5)], truth=truth,
        candidate_rank=rank, **fields,
    )  # fmt: skip


def triple(number: int, truth: str, split: str = "test") -> Row:
    text = prompts.classification(
        "A", "knows", f"B{number}", f"<ENT>A</ENT> {codes(1)}", f"<ENT>B</ENT> {codes(2)}", True
    )
    return make_row(
        text,
        truth,
        id=f"t-{number}",
        task_type=TRIPLES,
        split=split,
        triple=["a", "r", "b"],
        truth=[truth],
        head="A",
        relation="knows",
        tail=f"B{number}",
    )


def ranked(row: Row, scores: list[float | None], **more: Any) -> Answer:
    return make_answer(row, "score", scores=scores, text=prompts.numbered([codes(1), codes(0)]), **more)


def classified(row: Row, margin: float) -> Answer:
    scores = [margin, 0.0]
    return make_answer(row, "score", candidates=["True", "False"], scores=scores, text=str(margin > 0))


LINK_ROWS = [
    link(0, 2.0, ["e0"]),  # 2 -> 1: gain 1/2
    link(1, 4.0, ["e1", "e3"]),  # 4 -> 1: gain 3/4, the other right answer e3 has a better score
    link(2, 1.0, ["e2"]),  # 1 -> 3: loss
    link(3, 1.0, ["e3"]),  # 1 -> 5: greater loss
    link(4, 30.0, ["far"]),  # not among the candidates: could not be chosen
    link(5, 3.0, ["e4"]),  # stays, first of the two
    link(6, 1.0, ["e0"]),  # stays
]
LINK_SCORES: list[list[float | None]] = [
    [-1, -2, -3, -4, -5], [-3, -2, -4, -1, -5], [-1, -2, -3, -4, -5], [-1, -2, -3, None, -4], [-1, -2, -3, -4, -5],
    [-1, -2, -9, -8, -3], [-1, -2, -3, -4, -5],
]  # fmt: skip
TRIPLE_ROWS = [triple(0, "True"), triple(1, "False"), triple(2, "False"), triple(3, "True")]
MARGINS = [3.0, -5.0, 2.0, 0.5]  # right, right, wrong, right at a threshold of 0


def leave(folder: Path, rows: list[Row], found: list[Answer]) -> Path:
    """What inference.py leaves of these answers; the path of answers.jsonl."""
    folder.mkdir(exist_ok=True)
    write_rows(folder / "test_tasks.json", rows)
    answers = folder / "answers.jsonl"
    answers.write_text("".join(json.dumps(answer) + "\n" for answer in found))
    write_json(
        {
            "args": {"test_data": str(folder / "test_tasks.json")}, "seed": None, "git_commit": "c" * 40 + "+changes",
            "device": "cpu (1 threads)", "finished": "2026-01-01", "wall_seconds": 1.0,
            "inputs": {"test_tasks.json": sha256_file(folder / "test_tasks.json")},
            "model": {"base_model": "models/tiny"}, "metrics": report(found), "answers": found[::-1],
        },
        folder / "inference_results.json",
    )  # fmt: skip
    return answers


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    links = [ranked(row, scores) for row, scores in zip(LINK_ROWS, LINK_SCORES, strict=True)]
    classifications = [classified(row, margin) for row, margin in zip(TRIPLE_ROWS, MARGINS, strict=True)]
    return leave(tmp_path / "run", [*LINK_ROWS, *TRIPLE_ROWS], [*classifications, *links])


def ids(cases: list[Case]) -> list[str]:
    assert all(case.row["id"] == case.answer["id"] for case in cases)
    return [case.row["id"] for case in cases]


# ---------------------------------------------------------------- rules


def test_links_are_picked_by_gain(answers: Path) -> None:
    better, worse, same = pick_links(open_run(answers), 9)
    assert (ids(better.cases), ids(worse.cases), ids(same.cases)) == (["l-1", "l-0"], ["l-3", "l-2"], ["l-5", "l-6"])
    assert all(pick.rule.startswith("2 of 6 ") for pick in (better, worse, same))
    assert [ids(pick.cases) for pick in pick_links(open_run(answers), 1)] == [["l-1"], ["l-3"], ["l-5"]]


def test_triples_are_picked_by_the_distance_from_the_threshold(answers: Path) -> None:
    right, wrong, unsure = pick_triples(open_run(answers), 9)
    assert ids(right.cases) == ["t-1", "t-0", "t-3"] and ids(wrong.cases) == ["t-2"]
    assert ids(unsure.cases) == ["t-3", "t-2", "t-0", "t-1"]


def test_the_threshold_is_the_one_of_validation(tmp_path: Path) -> None:
    """Validation says that True begins at 2.5: the answer of margin 2 is right there, that of 0.5 wrong."""
    tuning = [triple(10, "True", "validation"), triple(11, "False", "validation")]
    found = [classified(row, margin) for row, margin in zip([*tuning, *TRIPLE_ROWS], [2.9, 2.1, *MARGINS], strict=True)]
    run = open_run(leave(tmp_path, TRIPLE_ROWS, found))
    right, wrong, _ = pick_triples(run, 9)
    assert ids(wrong.cases) == ["t-3"] and ids(right.cases) == ["t-1", "t-0", "t-2"]
    assert "threshold +2.500" in page(run, 1) and "Row t-10" not in page(run, 9)


def test_names_of_unequal_length_rank_as_the_metrics_do(tmp_path: Path) -> None:
    """Sum puts e0 before e1, the mean per token e1 first; validation prefers the mean."""
    rows = [link(0, 2.0, ["e1"], with_codes=False)]
    tuned = rows[0] | {"split": "validation"}
    scores, lengths = [-2.0, -3.0, -9.0, -9.0, -9.0], [1, 3, 1, 1, 1]
    found = [ranked(row, list(scores), tokens=lengths) for row in (*rows, tuned)]
    run = open_run(leave(tmp_path, rows, found))
    assert [ids(pick.cases) for pick in pick_links(run, 1)] == [["l-0"], [], []]
    text = page(run, 1)
    assert "by the LLM: 1." in text and "| score per token |" in text and "| -1.000 | truth |" in text


# ---------------------------------------------------------------- the page


def test_a_case_shows_ranks_candidates_and_truth(answers: Path) -> None:
    text = page(open_run(answers), 1)
    case = text[text.index("### Best improvement") : text.index("### Worst loss")]
    assert "Query: (Head 1 \\| knows \\| ?)" in case and "Row l-1." in case
    assert "Truth: Bo\\*b\\*. Rank by the candidate ranker: 4, by the LLM: 1." in case
    table = [line for line in case.splitlines() if line.startswith("| ")][2:]
    assert table == [
        "| 1 | 4 | Di | `Q0_3:Q1_1 …+2` | -1.000 | another correct answer, not counted |",
        "| 2 | 2 | Bo\\*b\\* | `Q0_1:Q1_1 …+2` | -2.000 | truth |",
        "| 3 | 1 | Ada \\| \\\\ \\`x\\` | `Q0_0:Q1_1 …+2` | -3.000 |  |",
        "| 4 | 3 | \\<b\\>Cy\\</b\\> | `Q0_2:Q1_1 …+2` | -4.000 |  |",
        "| 5 | 5 | Eve | `Q0_4:Q1_1 …+2` | -5.000 |  |",
    ]
    assert "1. <CODE>Q0_1:Q1_1 …+2</CODE>\n2. <CODE>Q0_0:Q1_1 …+2</CODE>" in case, "the answer, cut as the prompt is"
    assert "Answer: True, log P(True) - log P(False) = +2.000, threshold +0.000" in text
    assert "7 test rows answered, 0 could not be parsed; for 6 the LLM could choose the truth." in text
    assert "commit ccccccccc+changes), rows" in text, "what ran was not that commit's"
    assert page(open_run(answers), 1) == text


def test_codes_are_cut_visibly() -> None:
    for form, kept in (("spec", "Q0_7:Q1_1"), ("compact", "Q0_7Q1_1")):
        assert (
            short_codes(f"a {codes(7, form)} b {codes(7, form)}")
            == f"a <CODE>{kept} …+2</CODE> b <CODE>{kept} …+2</CODE>"
        )
    one = print_codes(np.array([[3, 1]]))
    vq = print_codes(np.array([[3], [12], [5]]), "compact")
    assert (
        short_codes(one) == one
        and short_codes(vq) == "<CODE>Q0_3 …+2</CODE>"
        and short_codes("Q0_1|Q0_2") == "Q0_1|Q0_2"
    )


def test_a_truth_that_a_search_did_not_find_has_no_rank(tmp_path: Path) -> None:
    row = link(0, 2.0, ["e0"])
    found = make_answer(row, "constrained_all", candidates=["z9", "e3"], scores=[-1.0, -2.0], text="1. x")
    text = page(open_run(leave(tmp_path, [row], [found])), 1)
    assert "by the LLM: not found" in text and "| 1 |  | z9 |  | -1.000 |  |" in text and "| 2 | 4 | Di |" in text


# ---------------------------------------------------------------- refusals and the command


def change_record(answers: Path, **fields: Any) -> None:
    path = answers.with_name("inference_results.json")
    write_json(read_json(path, "record") | fields, path)


def refused(answers: Path, word: str, rows: Path | None = None) -> None:
    """open_run ends with one line that contains ``word``."""
    with pytest.raises(InputError) as error:
        open_run(answers, rows)
    assert word in str(error.value) and "\n" not in str(error.value)


def test_answers_without_record_or_rows_are_refused(answers: Path, tmp_path: Path) -> None:
    rows, record = answers.with_name("test_tasks.json"), answers.with_name("inference_results.json")
    moved = rows.rename(tmp_path / "elsewhere.json")
    refused(answers, "does not exist")
    assert open_run(answers, moved).cases
    (tmp_path / "others.json").write_text("[]")
    refused(answers, "others.json", tmp_path / "others.json")
    moved.rename(rows)
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[1:]))
    refused(answers, "inference_results.json")
    answers.write_text("".join(lines))
    content = read_json(record, "record")
    content["metrics"][LINKS]["test"]["hits@1"] = 1.0
    write_json(content, record)
    refused(answers, "metrics.link_prediction.test.hits@1")
    others: list[Any] = [{"metrics": {}, "args": {}}, []]
    for other in others:
        write_json(other, record)
        refused(answers, "inference_results.json")
    record.unlink()
    refused(answers, "inference_results.json")


@pytest.mark.parametrize("odd", [None, 3, "x", [1], {"a": 1}], ids=repr)
@pytest.mark.parametrize("field", ["args", "inputs", "model", "metrics", "answers", "device", "git_commit", "seed"])
def test_a_damaged_record_is_one_line(answers: Path, field: str, odd: Any) -> None:
    fits = {"git_commit": (None, "x"), "seed": (None, 3), "device": ("x",), "model": ({"a": 1},)}
    path = answers.with_name("inference_results.json")
    write_json(read_json(path, "record") | {field: odd}, path)
    if odd in fits.get(field, ()):
        assert page(open_run(answers), 1)
        return
    refused(answers, "inference_results.json")


def test_records_are_found_by_the_names_inference_gives(tmp_path: Path) -> None:
    for name in ("inference_results.json", "other.json"):
        assert case_studies.record_beside(answers_path(tmp_path / name)) == tmp_path / name
    with pytest.raises(InputError):
        case_studies.record_beside(tmp_path / "mine.jsonl")


def test_the_command(answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case_studies.main(["--answers", str(answers), "--out", str(tmp_path / "cases.md"), "--count", "2"])
    text = (tmp_path / "cases.md").read_text(encoding="utf-8")
    assert (
        text == page(open_run(answers), 2)
        and text.startswith("# Case studies\n")
        and "wrote" in capsys.readouterr().out
    )
    case_studies.main(["--answers", str(answers), "--count", "2"])
    assert capsys.readouterr().out == text
    with pytest.raises(SystemExit):
        case_studies.parse_args(["--count", "0"])
    with pytest.raises(InputError):
        case_studies.main(["--answers", str(tmp_path / "none" / "answers.jsonl")])
