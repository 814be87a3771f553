"""Metrics computed from the answers alone: no model and no data set are loaded.

    cd lora_training && python score_answers.py                        answers.jsonl, as inference.py writes it
    cd lora_training && python score_answers.py --answers other/answers.jsonl --output metrics.json
    cd lora_training && python score_answers.py --against other/answers.jsonl     paired difference and standard error

Link prediction. The filtered rank of the truth among its candidates; ties get their mean rank. If the truth is not
listed, its rank by the candidate model (``candidate_rank``) is used; a search over all entities has no such rank, so
its truth counts as never found. Candidates without a score (free text) follow the others in their listed order. If
candidates differ in length, sum and per-token mean of the log-likelihoods give two rankings; the one with the higher
validation MRR is used. Three baselines are printed with each result: copying the first candidate, a random choice
(expected value), and the recall of the lists (the share that contain the truth). ``permuted``: metrics over other
orders of each list (inference.py --permute).

Triple classification. True if log P(True) - log P(False) exceeds a threshold: the one with the best validation
accuracy (ties: the nearest to 0). Metrics at threshold 0 are also given.

Other tasks. Exact match; the lines of an answer may be in any order.

An answer that cannot be parsed counts as wrong everywhere (infinite rank, wrong label) and is counted.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, content_of, run_command
from common.files import command, output_file, parse_json, sha256_file, write_json

Answer = dict[str, Any]
Metrics = dict[str, Any]
Splits = dict[str, list[Answer]]  # by split
Floats = NDArray[np.float64]

HERE = Path(__file__).resolve().parent
TRUE, FALSE = "True", "False"
HITS = (1, 3, 10)
NAMES = ("mrr", "hits@1", "hits@3", "hits@10", "accuracy", "precision", "recall", "f1", "exact_match")  # printed
BASELINES = {
    "candidate_model": "candidate model", "as_listed": "copy the first candidate", "random": "random choice",
}  # fmt: skip
CLASSIFICATIONS = ("triple_classification", "validate_triple")  # in other tasks an entity may be named True
SEARCHED = "constrained_all"  # --decode whose candidates are the results of a search over all entities
# every line of answers.jsonl has these; newer ones also triple, candidate_order and permuted
FIELDS = ("id", "task_type", "split", "direction", "decode", "candidates", "scores", "tokens", "truth",
          "candidate_rank", "text", "expected", "parsed")  # fmt: skip


# ---------------------------------------------------------------- answers.jsonl


class AnswerFile(NamedTuple):
    """Contents of a file of answers."""

    answers: list[Answer]
    end: int  # bytes up to the end of the last complete line


def read_answers(path: str | Path) -> AnswerFile:
    """The complete lines of answers.jsonl; a last line without its newline (an interrupted write) is left out.

    Raises InputError, with the line number, for any other line that is no answer and for an id repeated in a split.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"answers file {path} does not exist; write it: {command('lora_training/inference.py')}")
    answers: list[Answer] = []
    seen: set[tuple[str, str]] = set()
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            with content_of(f"{path}:{number}", "answer", "run inference.py again"):
                answer = parse_json(line)
                key = (answer["split"], answer["id"])
                missing = [field for field in FIELDS if field not in answer]
                lists = [answer[name] for name in ("candidates", "scores", "tokens") if answer.get(name)]
                numbers = (value for values in lists[1:] for value in values)
                if missing:
                    raise ValueError(f"it lacks {', '.join(missing)}")
                if key in seen:
                    raise ValueError(f"{key[1]} of {key[0]} is answered twice")
                if not isinstance(answer["truth"], list) or len(set(map(len, lists))) > 1:
                    raise ValueError("truth is no list, or candidates, scores and tokens differ in length")
                if not all(value is None or math.isfinite(value) for value in numbers):
                    raise ValueError("scores or tokens are not finite")
            seen.add(key)
            answers.append(answer)
            end += len(line)
    return AnswerFile(answers, end)


# ---------------------------------------------------------------- link prediction


def rank_of(answer: Answer) -> float:
    """Filtered rank of the truth by the answer's scores, or its ``candidate_rank`` if it is not listed."""
    truth, candidates = answer["truth"][0], answer["candidates"]
    if not answer["parsed"]:
        return math.inf
    if truth not in candidates:
        return math.inf if answer["decode"] == SEARCHED else known_rank(answer)
    at, others = candidates.index(truth), set(answer["truth"][1:])
    scores = answer["scores"]
    rank = 1.0
    for place, (name, score) in enumerate(zip(candidates, scores, strict=True)):
        if place == at or name in others:
            continue
        if score is None:
            rank += scores[at] is None and place < at
        elif scores[at] is None or score > scores[at]:
            rank += 1
        elif score == scores[at]:
            rank += 0.5
    return rank


def known_rank(answer: Answer) -> float:
    """Rank of the truth by the candidate model; infinite if unknown."""
    return math.inf if answer["candidate_rank"] is None else float(answer["candidate_rank"])


def listed_rank(answer: Answer) -> float:
    """Rank of the truth in the order of the list: the baseline that copies the first candidate."""
    scores = [-place for place in range(len(answer["candidates"]))]
    return rank_of(answer | {"scores": scores, "tokens": None, "parsed": True})


def per_token(answer: Answer) -> Answer:
    """The answer with scores divided by their numbers of tokens, where these differ."""
    if not answer["scores"] or not answer["tokens"]:
        return answer
    pairs = zip(answer["scores"], answer["tokens"], strict=True)
    return answer | {"scores": [None if score is None else score / size for score, size in pairs], "tokens": None}


def ranking_metrics(ranks: Sequence[float]) -> Metrics:
    """MRR and Hits@1/3/10 of ranks, which may be infinite; None for no ranks."""
    values = np.asarray(ranks, dtype=np.float64)
    found: Metrics = {"mrr": float((1 / values).mean()) if len(values) else None}
    return found | {f"hits@{k}": float((values <= k).mean()) if len(values) else None for k in HITS}


@functools.cache
def _random_order(count: int) -> Floats:
    """Expected MRR and Hits@1/3/10 of the truth at a random place among ``count`` candidates."""
    return np.array(list(ranking_metrics(range(1, count + 1)).values()))


def random_metrics(answers: Sequence[Answer]) -> Metrics:
    """Expected metrics if the order of each list were random; a truth that is not listed keeps ``candidate_rank``."""
    found = []
    for answer in answers:
        others = set(answer["truth"][1:])
        if answer["truth"][0] in answer["candidates"]:
            found.append(_random_order(sum(name not in others for name in answer["candidates"])))
        else:
            found.append(np.array(list(ranking_metrics([known_rank(answer)]).values())))
    means = np.mean(found, axis=0).tolist()
    return dict(zip(ranking_metrics([]), means, strict=True))


def permuted_metrics(answers: Sequence[Answer], lengths: str | None) -> Metrics | None:
    """Metrics over K other orders of each list; None unless all answers have them.

    ``mean`` and the standard deviations are over the K orders; ``first_changes``: share of (query, order) pairs whose
    best candidate is not that of the row's own order.
    """
    orders = min(len(answer.get("permuted") or ()) for answer in answers)
    if not orders:
        return None

    def best(answer: Answer) -> str | None:
        scores = [-math.inf if score is None else score for score in answer["scores"] or ()]
        return answer["candidates"][int(np.argmax(scores))] if scores else None

    own = normalized(answers, lengths)
    runs, changes = [], 0
    for k in range(orders):
        scores = [answer["permuted"][k] for answer in answers]
        others = normalized(
            [one | {"scores": some, "parsed": some is not None} for one, some in zip(answers, scores, strict=True)],
            lengths,
        )
        runs.append(list(ranking_metrics([rank_of(other) for other in others]).values()))
        changes += sum(best(other) != best(answer) for other, answer in zip(others, own, strict=True))
    spread = np.std(runs, axis=0, ddof=1).tolist() if orders > 1 else [None] * len(runs[0])
    names = list(ranking_metrics([]))
    return {
        "orders": orders, "mean": dict(zip(names, np.mean(runs, axis=0).tolist(), strict=True)),
        **{f"{name}_std": value for name, value in zip(names, spread, strict=True)},
        "first_changes": changes / (orders * len(answers)),
    }  # fmt: skip


def choose_lengths(splits: Splits) -> str | None:
    """The better of "sum" and "mean" per token by validation MRR; None if all candidates are equally long."""
    if all(answer["tokens"] is None for answers in splits.values() for answer in answers):
        return None
    validation = splits.get("validation", [])
    ways = (validation, map(per_token, validation))
    by_sum, by_mean = (ranking_metrics([rank_of(answer) for answer in way])["mrr"] for way in ways)
    return "mean" if validation and by_mean > by_sum else "sum"


def normalized(answers: Sequence[Answer], lengths: str | None) -> list[Answer]:
    """Answers with the scores that ``choose_lengths`` chose."""
    return [per_token(answer) if lengths == "mean" else answer for answer in answers]


def score_ranking(splits: Splits) -> dict[str, Metrics]:
    """Metrics of link prediction by split."""
    lengths = choose_lengths(splits)
    return {split: _score_lists(answers, lengths, "validation" in splits) for split, answers in splits.items()}


def _score_lists(answers: Sequence[Answer], lengths: str | None, validated: bool) -> Metrics:
    """Metrics of one split's lists and of the baselines; ``validated``: ``lengths`` was chosen on validation."""
    ranks = [rank_of(answer) for answer in normalized(answers, lengths)]
    listed = [answer["truth"][0] in answer["candidates"] for answer in answers]
    orders = {answer.get("candidate_order") for answer in answers}
    found = {
        **ranking_metrics(ranks),
        "count": len(answers),
        "candidate_order": orders.pop() if len(orders) == 1 else "mixed",
        "parse_failures": sum(not answer["parsed"] for answer in answers),
        "truth_listed": sum(listed),
        "kept_candidate_rank": sum(not there and rank < math.inf for there, rank in zip(listed, ranks, strict=True)),
        "never_found": sum(map(math.isinf, ranks)),
    }
    for side in ("head", "tail"):
        pairs = zip(ranks, answers, strict=True)
        found[side] = ranking_metrics([rank for rank, answer in pairs if answer["direction"] == side])
    found["candidate_model"] = ranking_metrics([known_rank(answer) for answer in answers])
    if answers[0]["decode"] != SEARCHED:
        found["as_listed"] = ranking_metrics([listed_rank(answer) for answer in answers])
        found["random"] = random_metrics(answers)
        found["list_recall"] = sum(listed) / len(answers)
    permuted = permuted_metrics(answers, lengths)
    found |= {"permuted": permuted} if permuted else {}
    if lengths is not None:
        found["lengths"] = f"{lengths} of log-likelihoods"
        found["lengths"] += "" if validated else " (no validation answers to choose on)"
        found["by_sum"] = ranking_metrics([rank_of(answer) for answer in answers])
        found["by_mean"] = ranking_metrics([rank_of(per_token(answer)) for answer in answers])
    return found


# ---------------------------------------------------------------- triple classification


def margin(answer: Answer) -> float:
    """log P(True) - log P(False); NaN if the answer could not be parsed."""
    if not answer["parsed"]:
        return math.nan
    scores = dict(zip(answer["candidates"], answer["scores"], strict=True))
    return float(scores[TRUE] - scores[FALSE])


def predicted_labels(margins: Sequence[float], labels: Sequence[bool], threshold: float) -> NDArray[np.bool_]:
    """``margin > threshold`` for each triple; the wrong label where the margin is NaN."""
    values, true = np.asarray(margins, dtype=np.float64), np.asarray(labels, dtype=bool)
    return np.where(np.isnan(values), ~true, values > threshold)


def classification_metrics(margins: Sequence[float], labels: Sequence[bool], threshold: float) -> Metrics:
    """Accuracy, precision, recall and F1 of ``margin > threshold``; NaN margins are wrong for either label.

    Precision, recall and F1 are None where their denominator is 0.
    """
    true = np.asarray(labels, dtype=bool)
    predicted = predicted_labels(margins, labels, threshold)
    tp, fp, fn = int((predicted & true).sum()), int((predicted & ~true).sum()), int((~predicted & true).sum())

    def share(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    return {
        "accuracy": share(int((predicted == true).sum()), len(true)), "precision": share(tp, tp + fp),
        "recall": share(tp, tp + fn), "f1": share(2 * tp, 2 * tp + fp + fn),
    }  # fmt: skip


def best_threshold(margins: Sequence[float], labels: Sequence[bool]) -> float:
    """The threshold with the best accuracy of ``margin > threshold``; NaN margins are left out.

    Candidates: 0, the middle between any two neighbouring margins, and one beyond either end. Ties: the nearest to 0,
    then the lower.
    """
    values, true = np.asarray(margins, dtype=np.float64), np.asarray(labels, dtype=bool)
    values, true = values[~np.isnan(values)], true[~np.isnan(values)]
    if not len(values):
        return 0.0
    levels = np.unique(values)
    tried = np.unique(np.concatenate([[0.0, levels[0] - 1, levels[-1] + 1], (levels[1:] + levels[:-1]) / 2]))
    positive, negative = np.sort(values[true]), np.sort(values[~true])
    right = len(positive) - np.searchsorted(positive, tried, "right") + np.searchsorted(negative, tried, "right")
    good = tried[right == right.max()]
    return float(good[np.abs(good).argmin()])


def chosen_threshold(splits: Splits) -> float | None:
    """``best_threshold`` of validation; None without validation or for free text, which has no margins to choose by."""
    validation = splits.get("validation", [])
    if all(answer["decode"] == "free" for answer in validation):
        return None
    return best_threshold([margin(answer) for answer in validation], [is_true(answer) for answer in validation])


def score_classification(splits: Splits) -> dict[str, Metrics]:
    """Metrics of True/False tasks by split, at the validation threshold and at 0."""
    threshold = chosen_threshold(splits)
    found = {}
    for split, answers in splits.items():
        margins, labels = [margin(answer) for answer in answers], [is_true(answer) for answer in answers]
        found[split] = {
            **classification_metrics(margins, labels, threshold or 0.0),
            "count": len(answers),
            "positives": sum(labels),
            "parse_failures": sum(not answer["parsed"] for answer in answers),
            "threshold": threshold or 0.0,
            "threshold_from": "none" if threshold is None else "validation",
            "at_zero": classification_metrics(margins, labels, 0.0),
        }
    return found


def is_true(answer: Answer) -> bool:
    """Whether the triple that is classified is true."""
    return bool(answer["truth"] == [TRUE])


# ---------------------------------------------------------------- all tasks


def is_match(answer: Answer) -> bool:
    """Whether the text is the expected one, its lines in any order."""

    def lines(text: str) -> list[str]:
        return sorted(line.strip() for line in text.strip().split("\n"))

    return bool(answer["parsed"]) and lines(answer["text"]) == lines(answer["expected"])


def score_texts(splits: Splits) -> dict[str, Metrics]:
    """Exact matches by split."""
    return {
        split: {"exact_match": sum(map(is_match, answers)) / len(answers), "count": len(answers),
                "parse_failures": sum(not answer["parsed"] for answer in answers)}
        for split, answers in splits.items()
    }  # fmt: skip


def is_classification(row: Answer) -> bool:
    """Whether a row or an answer classifies a triple."""
    return row["task_type"] in CLASSIFICATIONS and row.get("truth") in ([TRUE], [FALSE])


def is_ranking(row: Answer) -> bool:
    """Whether a row or an answer ranks candidates."""
    return row["task_type"] == "link_prediction"


def by_task(answers: Iterable[Answer]) -> dict[str, Splits]:
    """Task type -> split -> its answers."""
    tasks: dict[str, Splits] = {}
    for answer in answers:
        tasks.setdefault(answer["task_type"], {}).setdefault(answer["split"], []).append(answer)
    return dict(sorted(tasks.items()))


def first_of(splits: Splits) -> Answer:
    """One answer of the task."""
    return next(iter(splits.values()))[0]


def report(answers: Iterable[Answer]) -> dict[str, dict[str, Metrics]]:
    """Task type -> split -> metrics."""
    found = {}
    for task, splits in by_task(answers).items():
        first = first_of(splits)
        score = (
            score_ranking if is_ranking(first) else score_classification if is_classification(first) else score_texts
        )
        found[task] = score(splits)
    return found


def print_report(found: dict[str, dict[str, Metrics]]) -> None:
    """One line per task and split; below link prediction, its baselines."""

    def numbers(metrics: Metrics) -> str:
        shown = {name: metrics[name] for name in NAMES if name in metrics}
        return "  ".join(f"{name} {'-' if value is None else format(value, '.4f')}" for name, value in shown.items())

    for task, splits in found.items():
        for split, metrics in splits.items():
            order = f", {metrics['candidate_order']} lists" if metrics.get("candidate_order") else ""
            words = [f"{task} {split} ({metrics['count']:,}{order}): {numbers(metrics)}"]
            if "threshold" in metrics:
                words.append(f"threshold {metrics['threshold']:+.4f} ({metrics['threshold_from']})")
            words += [metrics["lengths"]] if "lengths" in metrics else []
            print("  ".join([*words, f"{metrics['parse_failures']} could not be parsed"]))
            for row, name in BASELINES.items():
                if row in metrics:
                    print(f"    {name:25} {numbers(metrics[row])}")
            if "list_recall" in metrics:
                print(f"    {'recall of the list':25} {metrics['list_recall']:.4f}")
            if "permuted" in metrics:
                other = metrics["permuted"]
                spread = "" if other["mrr_std"] is None else f"  (standard deviation of mrr {other['mrr_std']:.4f})"
                name, changes = f"mean of {other['orders']} other orders", f"{other['first_changes']:.1%}"
                print(f"    {name:25} {numbers(other['mean'])}{spread}  the first answer changes in {changes}")


# ---------------------------------------------------------------- paired differences


class Difference(NamedTuple):
    """Difference of two means over the same queries: of MRRs, accuracies, or shares of exact matches."""

    mean: float
    error: float | None  # standard error over queries; None for fewer than two
    runs: list[float]  # the difference in each run (seed)
    queries: int

    def __str__(self) -> str:
        spread = "" if self.error is None else f" (standard error {self.error:.4f})"
        return f"{self.mean:+.4f}{spread}"


def paired(first: Sequence[Mapping[str, float]], second: Sequence[Mapping[str, float]]) -> Difference:
    """first - second: one ``{query: value}`` per run, both with the same queries in every run.

    A query in several runs is one observation, the mean of its differences: the standard error covers the choice of
    the queries, not the variation between runs, which ``runs`` shows. Raises ValueError if the queries differ.
    """
    by_query: dict[str, list[float]] = {}
    runs = []
    for ours, theirs in zip(first, second, strict=True):
        if ours.keys() != theirs.keys() or not ours:
            alone = sorted(ours.keys() ^ theirs.keys())
            shown = f"{len(alone)} are in one set only, such as {alone[0]}" if alone else "there are none"
            raise ValueError(f"the queries differ: {shown}")
        differences = {query: value - theirs[query] for query, value in ours.items()}
        runs.append(float(np.mean(list(differences.values()))))
        for query, difference in differences.items():
            by_query.setdefault(query, []).append(difference)
    values = np.array([np.mean(found) for found in by_query.values()])
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Difference(float(np.mean(runs)), error, runs, len(values))


def query_of(answer: Answer) -> str:
    """Identifies a query across files: ids number rows, so another cut of valid or other negatives repeat them."""
    triple = answer.get("triple") if is_classification(answer) else None  # answers of earlier versions have none
    return f"{answer['id']} ({', '.join(triple or answer['truth'][:1])})"


def values_by_query(splits: Splits) -> dict[str, dict[str, float]]:
    """Split -> query -> the value whose mean is the task's metric: reciprocal rank, or 1 if right and 0 if wrong."""
    first, found = first_of(splits), {}
    lengths = choose_lengths(splits) if is_ranking(first) else None
    threshold = chosen_threshold(splits) or 0.0 if is_classification(first) else 0.0
    for split, answers in splits.items():
        if is_ranking(first):
            values = [1 / rank_of(answer) for answer in normalized(answers, lengths)]
        elif is_classification(first):
            labels = [is_true(answer) for answer in answers]
            predicted = predicted_labels([margin(answer) for answer in answers], labels, threshold)
            values = (predicted == labels).astype(float).tolist()
        else:
            values = [float(is_match(answer)) for answer in answers]
        found[split] = dict(zip(map(query_of, answers), values, strict=True))
    return found


def differences(answers: Iterable[Answer], others: Iterable[Answer], path: Path) -> list[dict[str, Any]]:
    """Print and return the paired differences to the answers ``others`` of ``path``, for all tasks and splits in both.

    Raises InputError if there is none, or if a split's queries differ.
    """
    theirs, lines = by_task(others), []
    for task, splits in by_task(answers).items():
        first, second = values_by_query(splits), values_by_query(theirs[task]) if task in theirs else {}
        for split in (split for split in first if split in second):
            try:
                found = paired([first[split]], [second[split]])
            except ValueError as error:
                advice = "give answers to the same rows of data"
                raise InputError(f"--against {path}: {task} {split}: {error}; {advice}") from error
            print(f"{task} {split}, minus {path}: {found}, {found.queries:,} queries")
            lines.append({"task_type": task, "split": split, **found._asdict()})
    if not lines:
        raise InputError(f"--against {path}: no task and split in common; give answers to the same rows of data")
    return lines


# ---------------------------------------------------------------- command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="lora_training/score_answers.py", description=__doc__.split("\n")[0])
    parser.add_argument("--answers", type=Path, default=HERE / "answers.jsonl", metavar="FILE", help="by inference.py")
    parser.add_argument(
        "--against", type=Path, nargs="+", default=[], metavar="FILE", help="other answers to the same queries"
    )
    parser.add_argument("--output", type=output_file, metavar="FILE.json", help="also write the metrics to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    answers = read_answers(args.answers).answers
    if not answers:
        raise InputError(f"answers file {args.answers} contains no complete answer; continue inference.py")
    others = {path: read_answers(path).answers for path in args.against}
    with content_of(args.answers, "file of answers", "run inference.py again"):
        found = report(answers)
    print_report(found)
    against = {str(path): differences(answers, theirs, path) for path, theirs in others.items()}
    if args.output:
        hashes = {args.answers.name: sha256_file(args.answers)}
        compared = {path: {"sha256": sha256_file(Path(path)), "differences": lines} for path, lines in against.items()}
        write_json({"answers": hashes, "metrics": found, "against": compared}, args.output)
        print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
