"""Case studies as in the paper's Tables 8 to 10: single prompts, candidates, the answer and the truth, as Markdown.

    python tables/case_studies.py                                        from lora_training/answers.jsonl
    python tables/case_studies.py --answers lora_training/lora_outputs/second/answers.jsonl --count 3 --out cases.md

Cases are those of the highest and of the lowest value; ties are resolved by the order of the file. Link prediction, for
queries whose truth the LLM could choose: 1 / (rank by LLM) - 1 / (rank by candidate ranker). Triple classification:
distance of log P(True) - log P(False) from the validation threshold, negative for wrong answers.

Answers are shown only with the run record beside them and with the rows that they answer.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.prompts import prediction
from Class.rows import Row, need_fields, read_rows
from common.errors import CommandParser, InputError, at_least, content_of, run_command
from common.files import output_file, read_json, write_text
from lora_training.inference import OUTPUT, answers_path
from lora_training.score_answers import (
    SEARCHED,
    TRUE,
    Answer,
    known_rank,
    margin,
    per_token,
    rank_of,
    read_answers,
    report,
)
from tables.rows import LINKS, TRIPLES, Record, answered_rows, commit_words, common, shown

_CODES = re.compile(r"<CODE>((?:Q\d+_\d+[:|]?)+)</CODE>")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#])")
LIKELIHOOD = ("likelihood", "predict")  # --decode that scores candidates without their list


class Run(NamedTuple):
    """Answers, their record and the rows that they answer."""

    path: Path  # of the answers
    record: Record
    metrics: dict[str, Any]  # task -> split -> metrics, scored from the answers
    rows: Path
    cases: dict[str, list[Case]]  # task -> all test answers, in the order of the rows


class Case(NamedTuple):
    """One row and its answer."""

    row: Row
    answer: Answer


# ---------------------------------------------------------------- reading


def record_beside(answers: Path) -> Path:
    """The run record of a file of answers: the inverse of inference.py's ``answers_path``."""
    stem = answers.name.removesuffix(".answers.jsonl")
    return answers.with_name(OUTPUT.name if answers.name == "answers.jsonl" else f"{stem}.json")


def open_run(answers: Path, rows: Path | None = None) -> Run:
    """Answers, their record and their rows, checked against each other.

    ``rows``: the file of rows if it is not where the record says. Raises InputError if one of the three is missing or
    belongs to another run.
    """
    found = read_answers(answers).answers
    path = record_beside(answers)
    if not path.is_file() or path == answers:
        raise InputError(f"--answers {answers} has no run record {path.name} beside it; finish the run: inference.py")
    record = read_json(path, "record")
    with content_of(path, "run record"):
        common(path, record)
        if sorted(record["answers"], key=key) != sorted(found, key=key):
            raise InputError(f"--answers {answers} differ from the answers in {path.name}; repeat inference.py")
        model = record["model"]["base_model"]
        rows = answered_rows(path, record, rows)
    by_key = {key(answer): answer for answer in found if answer["split"] == "test"}
    cases: dict[str, list[Case]] = {}
    for row in read_rows(rows):
        if (answer := by_key.get(key(row))) is not None:
            cases.setdefault(answer["task_type"], []).append(Case(row, answer))
    return Run(answers, record | {"model": model}, report(found), rows, cases)


def key(row: Row | Answer) -> tuple[str, str]:
    """Identifies a row and its answer."""
    return row["split"], str(row["id"])


# ---------------------------------------------------------------- choosing


def by_mean(run: Run) -> bool:
    """Whether names of unequal length are ranked by the mean score per token, as in the metrics."""
    return str(run.metrics[LINKS]["test"].get("lengths", "")).startswith("mean")


def could_choose(answer: Answer) -> bool:
    """Whether the LLM could choose the truth and its rank by the candidate ranker is known."""
    listed = answer["decode"] == SEARCHED or answer["truth"][0] in answer["candidates"]
    return listed and answer["candidate_rank"] is not None


def gains(run: Run) -> list[tuple[Case, float]]:
    """Queries with 1 / rank by the LLM - 1 / rank by the candidate ranker."""
    mean = by_mean(run)
    cases = [case for case in run.cases[LINKS] if could_choose(case.answer)]
    ranks = [rank_of(per_token(case.answer) if mean else case.answer) for case in cases]
    return [(case, 1 / rank - 1 / known_rank(case.answer)) for case, rank in zip(cases, ranks, strict=True)]


def confidences(run: Run) -> list[tuple[Case, float]]:
    """Triples with the distance of their margin from the threshold, negative where the answer is wrong."""
    threshold = run.metrics[TRIPLES]["test"]["threshold"]
    found = []
    for case in run.cases[TRIPLES]:
        if case.answer["parsed"]:
            above = margin(case.answer) - threshold
            correct = (above > 0) == (case.answer["truth"] == [TRUE])
            found.append((case, abs(above) if correct else -abs(above)))
    return found


def pick(valued: Sequence[tuple[Case, float]], sign: int, count: int) -> list[Case]:
    """The ``count`` cases of the highest positive value (``sign`` 1) or the lowest negative one (-1)."""
    order = sorted(valued, key=lambda item: -sign * item[1])
    return [case for case, value in order if sign * value > 0][:count]


# ---------------------------------------------------------------- printing


def short_codes(text: str) -> str:
    """All codes cut to their first position, with the number of the others: ``<CODE>Q0_5:Q1_9 …+3</CODE>``."""

    def cut(match: re.Match[str]) -> str:
        positions = re.findall(r"Q0_\d+(?:[:|]?Q[1-9]\d*_\d+)*", match[1])
        return match[0] if len(positions) < 2 else f"<CODE>{positions[0]} …+{len(positions) - 1}</CODE>"

    return _CODES.sub(cut, text)


def plain(text: str) -> str:
    """Text with Markdown's special characters escaped, on one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def block(text: str) -> str:
    """A code block around any text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}\n"


def rank_text(rank: float) -> str:
    """A rank; it is infinite for a truth that was not found."""
    return "not found" if math.isinf(rank) else f"{rank:,g}"


def question(row: Row) -> str:
    """The query or the triple of a row, by names."""
    need_fields(row, "head", "relation")
    what, end = ("Query", "?") if row["task_type"] == LINKS else ("Triple", row["tail"])
    return f"{what}: ({row['head']} | {row['relation']} | {end})"


def exchange(case: Case) -> str:
    """Prompt and answer; with --decode likelihood: the query without candidates and the best three by score."""
    prompt, what = case.row["instruction"], "Answer"
    if case.answer["decode"] in LIKELIHOOD:
        prompt, what = prediction(need_fields(case.row, "head", "relation")), "Best by score"
    unparsed = "" if case.answer["parsed"] else " (could not be parsed)"
    answer = block(short_codes(case.answer["text"]))
    return f"Prompt:\n\n{block(short_codes(prompt))}\n{what}{unparsed}:\n\n{answer}\n"


def link_case(case: Case, mean: bool) -> str:
    """A query: the ranks of its truth, prompt and answer, the candidates by score."""
    row, answer = case
    names = dict(zip(row["candidates"], row["candidate_names"], strict=True))
    truth, *others = answer["truth"]
    ranked = per_token(answer) if mean else answer
    scores = ranked["scores"] or [None] * len(answer["candidates"])
    lines = [f"| by score | candidate | {'score per token' if mean else 'score'} | |", "| ---: | --- | ---: | --- |"]
    order = sorted(range(len(scores)), key=lambda i: math.inf if (value := scores[i]) is None else -value)
    for place, i in enumerate(order, 1):
        name, score = answer["candidates"][i], "" if scores[i] is None else f"{scores[i]:.3f}"
        remark = "truth" if name == truth else "another correct answer, not counted" if name in others else ""
        lines.append(f"| {place} | {plain(names.get(name, name))} | {score} | {remark} |")
    before, after = known_rank(answer), rank_of(ranked)
    return (
        f"Truth: {plain(names.get(truth, truth))}. Rank by the candidate ranker: {rank_text(before)}, "
        f"by the LLM: {rank_text(after)}.\n\n{exchange(case)}" + "\n".join(lines) + "\n"
    )


def triple_case(case: Case, threshold: float) -> str:
    """A triple: truth, answer and confidence, prompt."""
    value = margin(case.answer)
    return (
        f"Truth: {case.answer['truth'][0]}. Answer: {value > threshold}, log P(True) - log P(False) = {value:+.3f}, "
        f"threshold {threshold:+.3f}.\n\n{exchange(case)}"
    )


def page(run: Run, count: int) -> str:
    """The whole text. InputError if no task of Tables 8 to 10 was answered."""
    record, parts = run.record, []
    if LINKS in run.cases:
        mean, valued = by_mean(run), gains(run)
        parts.append(
            f"## Link prediction\n\n{answered(run, LINKS)}; for {len(valued):,} the LLM could choose the truth.\n"
        )
        for sign, title in ((1, "Rank improved most"), (-1, "Rank fell most")):
            parts += section(title, pick(valued, sign, count), lambda case: link_case(case, mean))
    if TRIPLES in run.cases:
        threshold, valued = run.metrics[TRIPLES]["test"]["threshold"], confidences(run)
        parts.append(f"## Triple classification\n\n{answered(run, TRIPLES)}.\n")
        for sign, title in ((1, "Most confident correct answer"), (-1, "Most confident wrong answer")):
            parts += section(title, pick(valued, sign, count), lambda case: triple_case(case, threshold))
    if not parts:
        raise InputError(f"--answers {run.path} contain no test row of {LINKS} or {TRIPLES}; make some: inference.py")
    model = Path(str(record["model"])).name
    return (
        "# Case studies\n\n"
        f"From {plain(str(shown(run.path)))} (model {plain(model)}, {plain(record['device'])}, {record['finished']}, "
        f"commit {commit_words(record['git_commit'])}), rows {plain(str(shown(run.rows)))}. Chosen by the rules in "
        "tables/case\\_studies.py. Codes are cut to their first position: `…+3` stands for three more.\n\n"
        + "\n".join(parts)
    )


def answered(run: Run, task: str) -> str:
    """How many rows of a task were answered."""
    answers = [case.answer for case in run.cases[task]]
    unparsed = sum(not answer["parsed"] for answer in answers)
    return f"{len(answers):,} test rows answered, {unparsed:,} could not be parsed"


def section(title: str, cases: Sequence[Case], show: Callable[[Case], str]) -> list[str]:
    """One kind of case."""
    parts = [f"### {title}\n" + ("" if cases else "\nNone.\n")]
    return parts + [
        f"#### {plain(question(case.row))}\n\nRow {plain(str(case.row['id']))}. {show(case)}" for case in cases
    ]


# ---------------------------------------------------------------- the command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="tables/case_studies.py", description=__doc__.split("\n")[0])
    parser.add_argument("--answers", type=Path, default=answers_path(OUTPUT), metavar="FILE.jsonl",
                        help="by inference.py, its run record beside it")  # fmt: skip
    parser.add_argument("--rows", type=Path, metavar="FILE", help="the test rows (default: where the record says)")
    parser.add_argument("--count", type=at_least(1), default=1, metavar="N", help="cases of each kind")
    parser.add_argument("--out", type=output_file, metavar="FILE.md", help="write there (default: the terminal)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    text = page(open_run(args.answers, args.rows), args.count)
    if args.out is None:
        print(text, end="")
        return
    write_text(text, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_command(main)
