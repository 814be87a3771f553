"""Case studies as the paper's Tables 8 to 10: single prompts, their candidates, the answer and the truth, as Markdown.

    python tables/case_studies.py                                        from lora_training/answers.jsonl
    python tables/case_studies.py --answers lora_training/lora_outputs/second/answers.jsonl --count 3 --out cases.md

Cases are chosen by rule, never by hand; of equally good ones the first of the file is taken.

Link prediction. Queries whose truth the LLM could choose, by the gain 1 / (rank by the LLM) - 1 / (rank by the
candidates' model): the highest above 0, the lowest below 0, and the first ones whose rank stayed.
Triple classification. By the distance of log P(True) - log P(False) from the validation threshold: the surest right
answers, the surest wrong ones, and those nearest to the threshold.

Answers are shown only with the run record that inference.py wrote beside them, and with the very rows they answer.
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

from Class.codes import CODE, END_CODE
from Class.instructions import Row, need_fields, read_rows
from Class.prompts import prediction
from common.errors import CommandParser, InputError, content_of, run_command
from common.files import read_json, write_text
from lora_training.inference import OUTPUT, answers_path, listed_candidates
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
from tables.rows import LINKS, TRIPLES, Record, answered_rows, check_scored, commit_words, common, lacks_record, shown

_CODES = re.compile(r"<CODE>((?:Q\d+_\d+[:|]?)+)</CODE>")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#])")
HEADS = {LINKS: "Link prediction", TRIPLES: "Triple classification"}


class Run(NamedTuple):
    """Answers with what they rest on."""

    path: Path  # of the answers
    record: Record
    metrics: dict[str, Any]  # task -> split -> metrics, scored from the answers
    rows: Path
    cases: dict[str, list[Case]]  # task -> all test answers, in the order of the rows


class Case(NamedTuple):
    """One row and its answer."""

    row: Row
    answer: Answer


class Pick(NamedTuple):
    """One kind of case and the cases of it, best first."""

    title: str
    rule: str
    cases: list[Case]


# ---------------------------------------------------------------- reading


def record_beside(answers: Path) -> Path:
    """The run record of a file of answers: the inverse of inference.py's ``answers_path``."""
    stem = answers.name.removesuffix(".answers.jsonl")
    record = answers.with_name(OUTPUT.name if answers.name == "answers.jsonl" else f"{stem}.json")
    if answers_path(record) != answers:
        raise InputError(f"--answers {answers} is no answers.jsonl or NAME.answers.jsonl, as inference.py names it")
    return record


def open_run(answers: Path, rows: Path | None = None) -> Run:
    """Answers, their record and their rows, checked against each other.

    ``rows``: the rows that were answered, where they lie elsewhere than the record says. Raises InputError where one
    of the three is missing, or belongs to another run.
    """
    found = read_answers(answers).answers
    path = record_beside(answers)
    if not path.is_file():
        raise InputError(f"--answers {answers} has no run record {path.name} beside it; finish the run: inference.py")
    record = read_json(path, "record")
    complete = (
        isinstance(record, dict) and {"answers", "metrics"} <= record.keys() and isinstance(record.get("model"), dict)
    )
    reason = lacks_record(record) or ("" if complete else "is no record of answers")
    if reason:
        raise InputError(f"{path} {reason}; --answers needs the record that inference.py wrote beside it")
    metrics = report(found)
    with content_of(path, "run record"):
        common(path, record)
        if sorted(record["answers"], key=key) != sorted(found, key=key):
            raise InputError(f"--answers {answers} are not the answers of {path.name} beside it; repeat inference.py")
        for task in (LINKS, TRIPLES):
            check_scored(path, task, record["metrics"].get(task, {}), record["answers"])
        rows = answered_rows(path, record, rows)
    by_key = {key(answer): answer for answer in found if answer["split"] == "test"}
    cases: dict[str, list[Case]] = {}
    for row in read_rows(rows):
        if (answer := by_key.get(key(row))) is not None:
            cases.setdefault(answer["task_type"], []).append(Case(row, answer))
    return Run(answers, record, metrics, rows, cases)


def key(row: Row | Answer) -> tuple[str, str]:
    """What makes a row or an answer the only one."""
    return row["split"], str(row["id"])


# ---------------------------------------------------------------- choosing


def by_mean(run: Run) -> bool:
    """Whether names of unequal length are ranked by their mean per token, as the metrics are."""
    return str(run.metrics[LINKS]["test"].get("lengths", "")).startswith("mean")


def gain(answer: Answer, mean: bool) -> float:
    """1 / rank by the LLM - 1 / rank by the candidates' model."""
    return 1 / rank_of(per_token(answer) if mean else answer) - 1 / known_rank(answer)


def could_choose(answer: Answer) -> bool:
    """Whether the LLM could have found the truth, and its rank without the LLM is known."""
    listed = answer["decode"] == SEARCHED or answer["truth"][0] in answer["candidates"]
    return listed and answer["candidate_rank"] is not None


def pick_links(run: Run, count: int) -> list[Pick]:
    """Gains, losses and queries that stayed."""
    mean = by_mean(run)
    cases = [case for case in run.cases[LINKS] if could_choose(case.answer)]
    gains = [gain(case.answer, mean) for case in cases]

    def best(fits: Callable[[float], bool], order: Callable[[float], float]) -> list[Case]:
        chosen = [place for place, value in enumerate(gains) if fits(value)]
        return [cases[place] for place in sorted(chosen, key=lambda place: order(gains[place]))[:count]]

    return [
        Pick("Best improvement", f"{share(gains, lambda x: x > 0)} rank higher by the LLM; highest gain first",
             best(lambda x: x > 0, lambda x: -x)),
        Pick("Worst loss", f"{share(gains, lambda x: x < 0)} rank lower by the LLM; greatest loss first",
             best(lambda x: x < 0, lambda x: x)),
        Pick("Unchanged", f"{share(gains, lambda x: x == 0)} keep their rank; first of the file first",
             best(lambda x: x == 0, lambda x: 0.0)),
    ]  # fmt: skip


def share(values: Sequence[float], fits: Callable[[float], bool]) -> str:
    """``3 of 20``: how many values fit."""
    return f"{sum(map(fits, values)):,} of {len(values):,}"


def pick_triples(run: Run, count: int) -> list[Pick]:
    """Sure and right, sure and wrong, unsure. Answers that did not parse have no margin and are left out."""
    threshold = run.metrics[TRIPLES]["test"]["threshold"]
    cases = [case for case in run.cases[TRIPLES] if case.answer["parsed"]]
    right = [case for case in cases if says_true(case.answer, threshold) == (case.answer["truth"] == [TRUE])]
    wrong = [case for case in cases if says_true(case.answer, threshold) != (case.answer["truth"] == [TRUE])]

    def sureness(case: Case) -> float:
        return abs(margin(case.answer) - threshold)

    def surest(chosen: list[Case]) -> list[Case]:
        return sorted(chosen, key=sureness, reverse=True)[:count]  # stable: ties stay in order

    total = f"of {len(cases):,}"
    return [
        Pick("Surest right answer", f"{len(right):,} {total} are right; farthest from the threshold first",
             surest(right)),
        Pick("Surest wrong answer", f"{len(wrong):,} {total} are wrong; farthest from the threshold first",
             surest(wrong)),
        Pick("Least sure answer", f"all {len(cases):,}; nearest to the threshold first",
             sorted(cases, key=sureness)[:count]),
    ]  # fmt: skip


def says_true(answer: Answer, threshold: float) -> bool:
    """What the answer says, as score_answers.py reads it."""
    return margin(answer) > threshold


# ---------------------------------------------------------------- printing


def short_codes(text: str) -> str:
    """Every code cut to its first position, and how many positions are left out: ``<CODE>Q0_5:Q1_9 …+3</CODE>``."""

    def cut(match: re.Match[str]) -> str:
        positions = re.findall(r"Q0_\d+(?:[:|]?Q[1-9]\d*_\d+)*", match[1])
        return match[0] if len(positions) < 2 else f"<CODE>{positions[0]} …+{len(positions) - 1}</CODE>"

    return _CODES.sub(cut, text)


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def block(text: str) -> str:
    """A code block around any text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}\n"


def rank_text(rank: float) -> str:
    """A rank, which is infinite for a truth that was not found."""
    return "never found" if math.isinf(rank) else f"{rank:,g}"


def question(row: Row) -> str:
    """The query or the triple of a row, by names."""
    need_fields(row, "head", "relation")
    what, end = ("Query", "?") if row["task_type"] == LINKS else ("Triple", row["tail"])
    return f"{what}: ({row['head']} | {row['relation']} | {end})"


def exchange(case: Case) -> str:
    """Prompt and answer; of candidates that were scored without their list, what was asked and the best three."""
    asked, said = case.row["instruction"], "Answer"
    if case.answer["decode"] == "predict":
        asked, said = prediction(need_fields(case.row, "head", "relation")), "Best by score"
    unread = "" if case.answer["parsed"] else " (it did not parse)"
    return f"Prompt:\n\n{block(short_codes(asked))}\n{said}{unread}:\n\n{block(short_codes(case.answer['text']))}\n"


def link_case(case: Case, mean: bool) -> str:
    """A query: the ranks of its truth, prompt and answer, the candidates by score."""
    row, answer = case
    listed = dict(zip(row["candidates"], listed_candidates(row), strict=True))
    names = {name: candidate.name for name, candidate in listed.items()}
    truth, *others = answer["truth"]
    ranked = per_token(answer) if mean else answer
    values = ranked["scores"] or [None] * len(answer["candidates"])
    lines = [f"| by score | listed | candidate | codes | {'score per token' if mean else 'score'} | |",
             "| ---: | ---: | --- | --- | ---: | --- |"]  # fmt: skip
    order = sorted(range(len(values)), key=lambda i: math.inf if (value := values[i]) is None else -value)
    for place, i in enumerate(order, 1):
        name, value = answer["candidates"][i], values[i]
        at = str(row["candidates"].index(name) + 1) if name in listed else ""
        codes = _CODES.fullmatch(listed[name].answer) if name in listed else None
        shown_codes = f"`{short_codes(codes[0])[len(CODE) : -len(END_CODE)]}`" if codes else ""
        score = "" if value is None else f"{value:.3f}"
        said = "truth" if name == truth else "another right answer, not counted" if name in others else ""
        lines.append(f"| {place} | {at} | {plain(names.get(name, name))} | {shown_codes} | {score} | {said} |")
    before, after = known_rank(answer), rank_of(ranked)
    return (
        f"Truth: {plain(names.get(truth, truth))}. Rank before (candidates' model): {rank_text(before)}, "
        f"after (LLM): {rank_text(after)}.\n\n{exchange(case)}" + "\n".join(lines) + "\n"
    )


def triple_case(case: Case, threshold: float) -> str:
    """A triple: truth, what was said and how surely, prompt and answer."""
    said = says_true(case.answer, threshold)
    return (
        f"Truth: {case.answer['truth'][0]}. Said: {said}, log P(True) - log P(False) = {margin(case.answer):+.3f} at a "
        f"threshold of {threshold:+.3f}.\n\n{exchange(case)}"
    )


def page(run: Run, count: int) -> str:
    """The whole text. InputError where no task of Tables 8 to 10 was answered."""
    record, parts = run.record, []
    if LINKS in run.cases:
        mean = by_mean(run)
        parts += section(run, LINKS, pick_links(run, count), lambda case: link_case(case, mean))
    if TRIPLES in run.cases:
        threshold = run.metrics[TRIPLES]["test"]["threshold"]
        parts += section(run, TRIPLES, pick_triples(run, count), lambda case: triple_case(case, threshold))
    if not parts:
        raise InputError(f"--answers {run.path} answer no test row of {LINKS} or {TRIPLES}; make some: inference.py")
    model = Path(str(record["model"].get("base_model"))).name
    return (
        "# Case studies\n\n"
        f"From {plain(str(shown(run.path)))} (model {plain(model)}, {plain(record['device'])}, {record['finished']}, "
        f"commit {commit_words(record['git_commit'])}), rows {plain(str(shown(run.rows)))}. Chosen by the rules at "
        "the head of tables/case\\_studies.py. Codes are cut to their first position: `…+3` stands for three more.\n\n"
        + "\n".join(parts)
    )


def section(run: Run, task: str, picks: Sequence[Pick], show: Callable[[Case], str]) -> list[str]:
    """One task: its counts, then every pick with its cases."""
    answers = [case.answer for case in run.cases[task]]
    unread = sum(not answer["parsed"] for answer in answers)
    text = f"## {HEADS[task]}\n\n{len(answers):,} test rows answered, {unread:,} answers did not parse"
    if task == LINKS:
        text += f"; the truth of {sum(map(could_choose, answers)):,} could be chosen"
    parts = [f"{text}.\n"]
    for pick in picks:
        parts.append(f"### {pick.title}\n\nRule: {pick.rule}.\n" + ("" if pick.cases else "\nThere is none.\n"))
        for case in pick.cases:
            parts.append(f"#### {plain(question(case.row))}\n\nRow {plain(str(case.row['id']))}. {show(case)}")
    return parts


# ---------------------------------------------------------------- the command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="tables/case_studies.py", description=__doc__.split("\n")[0])
    parser.add_argument("--answers", type=Path, default=answers_path(OUTPUT), metavar="FILE.jsonl",
                        help="by inference.py, its run record beside it")  # fmt: skip
    parser.add_argument("--rows", type=Path, metavar="FILE", help="the test rows (default: where the record says)")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="cases of each kind")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write there (default: the terminal)")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f"--count must be 1 or more, got {args.count}")
    return args


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
