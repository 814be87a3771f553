"""Metrics from the answers alone: no model, no data set, in seconds.

    cd lora_training && python score_answers.py                        answers.jsonl, as inference.py leaves it
    cd lora_training && python score_answers.py --answers other/answers.jsonl --output metrics.json
    cd lora_training && python score_answers.py --against other/answers.jsonl           what the difference is, how sure

Link prediction. The rank of the truth among its candidates, ties at their mean, other right answers left out; a query
whose truth is not among the candidates keeps ``candidate_rank``, its rank by the model that chose them (a search over
all entities has no such model behind it: what it does not find counts as never found). Candidates without a score (free
text, a narrow search) keep their listed order below the others. Where answers differ in length, sum and per-token mean
of the log-likelihood are two rankings: the one with the higher validation MRR is used.
Candidates that were scored without their list (inference.py --decode predict) are ranked by their scores alone, and
once more by score and place in the list together (``with_order``): two weights, fitted on validation alone.
Judgements. True where log P(True) - log P(False) exceeds a threshold: the one with the best validation accuracy, of
equally good ones the nearest to 0. Metrics at 0 stand beside it.
The rest. Exact matches; lines of an answer may come in any order.

An answer that does not parse counts as wrong everywhere (rank infinite, judgement turned round) and is counted.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, run_command
from common.files import parse_json, sha256_file, write_json
from lora_training.paired import Difference, paired

Answer = dict[str, Any]
Metrics = dict[str, Any]
Splits = dict[str, list[Answer]]  # by split
Differences = dict[str, dict[str, dict[str, Difference]]]  # by task type, split and row

HERE = Path(__file__).resolve().parent
TRUE, FALSE = "True", "False"
HITS = (1, 3, 10)
LARGEST = sys.float_info.max  # JSON may hold whole numbers beyond it
JUDGEMENTS = ("triple_classification", "validate_triple")  # an entity of another task may be named True
OWN, WITH_ORDER = "own", "with_order"  # ranks by an answer's scores, and by scores and places together
SEARCHED = "constrained_all"  # candidates are what a search over all entities found, not what a prompt listed
# every line of answers.jsonl has them all
FIELDS = ("id", "task_type", "split", "direction", "decode", "candidates", "scores", "tokens", "truth",
          "candidate_rank", "text", "expected", "parsed")  # fmt: skip


# ---------------------------------------------------------------- answers.jsonl


class AnswerFile(NamedTuple):
    """What a file of answers holds."""

    answers: list[Answer]
    end: int  # bytes up to the end of the last complete line: what follows was torn by an interruption


def read_answers(path: str | Path) -> AnswerFile:
    """The complete lines of answers.jsonl; a last line without its newline is left out.

    Raises InputError, with the line, for anything else that is no answer and for an id that comes twice in a split.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"answers file {path} does not exist; write it: cd lora_training && python inference.py")
    answers: list[Answer] = []
    seen: set[tuple[str, str]] = set()
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                answer = parse_json(line)
            except ValueError as error:
                raise InputError(f"{path}:{number}: not one JSON answer per line ({error})") from error
            if not isinstance(answer, dict):
                raise InputError(
                    f"{path}:{number}: a {type(answer).__name__} is no answer; write it anew: inference.py"
                )
            missing = [field for field in FIELDS if field not in answer]
            if missing:
                raise InputError(f"{path}:{number}: an answer lacks {', '.join(missing)}; write it anew: inference.py")
            wrong = _wrong_field(answer)
            if wrong:
                raise InputError(f"{path}:{number}: {wrong} does not fit the answer; write it anew: inference.py")
            key = (answer["split"], answer["id"])
            if key in seen:
                raise InputError(f"{path}:{number}: {key[1]} of {key[0]} is answered twice")
            seen.add(key)
            answers.append(answer)
            end += len(line)
    return AnswerFile(answers, end)


def _wrong_field(answer: Answer) -> str | None:
    """The first field that holds what no answer has, or does not fit the others."""

    def names(value: Any, least: int = 0) -> bool:
        return isinstance(value, list) and len(value) >= least and all(isinstance(name, str) for name in value)

    def numbers(value: Any, *others: type) -> bool:
        def number(item: Any) -> bool:
            return type(item) in (int, float) and abs(item) <= LARGEST

        return isinstance(value, list) and all(number(item) or type(item) in others for item in value)

    candidates, scores, tokens, rank = (answer[key] for key in ("candidates", "scores", "tokens", "candidate_rank"))
    size = len(candidates) if names(candidates) else -1
    good = {key: isinstance(answer[key], str) for key in ("task_type", "split", "decode", "text", "expected")} | {
        "id": type(answer["id"]) in (str, int),
        "direction": answer["direction"] in (None, "head", "tail"),
        "parsed": type(answer["parsed"]) is bool,
        "truth": names(answer["truth"], 1),
        "candidates": candidates is None or size >= 0,
        "scores": scores is None or (numbers(scores, type(None)) and len(scores) == size),
        "tokens": tokens is None or (numbers(tokens) and len(tokens) == size and all(n > 0 for n in tokens)),
        "candidate_rank": rank is None or (numbers([rank]) and rank >= 1),
        "triple": answer.get("triple") is None or (names(answer["triple"]) and len(answer["triple"]) == 3),
    }
    if good["truth"] and is_ranking(answer):
        good["candidates"], good["scores"] = size >= 0, good["scores"] and (scores is not None or not answer["parsed"])
    elif good["truth"] and is_judgement(answer) and answer["parsed"]:
        good["candidates"] = good["candidates"] and set(candidates or ()) == {TRUE, FALSE}
        good["scores"] = numbers(scores) and len(scores) == size
    return next((key for key, fits in good.items() if not fits), None)


# ---------------------------------------------------------------- link prediction


def rank_of(answer: Answer) -> float:
    """Rank of the truth by the answer's scores, merged with ``candidate_rank``; infinite where it is never found."""
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
    """The rank that the candidates' own model gave the truth; infinite where it is unknown."""
    return math.inf if answer["candidate_rank"] is None else float(answer["candidate_rank"])


def listed_rank(answer: Answer) -> float:
    """Rank of the truth as listed in the prompt, as if the first candidate were always copied."""
    scores = [-place for place in range(len(answer["candidates"]))]
    return rank_of(answer | {"scores": scores, "tokens": None, "parsed": True})


def ranking_metrics(ranks: Sequence[float]) -> Metrics:
    """MRR and Hits@1/3/10 of ranks, which may be infinite; None over no ranks."""
    values = np.asarray(ranks, dtype=np.float64)
    found: Metrics = {"mrr": float((1 / values).mean()) if len(values) else None}
    return found | {f"hits@{k}": float((values <= k).mean()) if len(values) else None for k in HITS}


def ranks_by_row(answers: Sequence[Answer], choice: Choice) -> dict[str, list[float]]:
    """Ranks of the truths of one split, in the answers' order: by the answers themselves (OWN) and by their rivals.

    ``candidate_model``: by the model that chose the candidates; ``as_listed``: the first candidate always copied;
    ``with_order``: by score and place together, where validation gave their weights.
    """
    own = [per_token(answer) for answer in answers] if choice.lengths == "mean" else answers
    found = {OWN: [rank_of(answer) for answer in own], "candidate_model": [known_rank(answer) for answer in answers]}
    if answers and answers[0]["decode"] != SEARCHED:
        found["as_listed"] = [listed_rank(answer) for answer in answers]
    if choice.weights is not None:
        found[WITH_ORDER] = [rank_of(with_order(answer, choice.weights)) for answer in own]
    return found


def score_ranking(splits: Splits) -> dict[str, Metrics]:
    """Metrics of link prediction by split; what there is to choose is chosen on validation."""
    choice = choose(splits)
    found = {}
    for split, answers in splits.items():
        by_row = ranks_by_row(answers, choice)
        ranks = by_row.pop(OWN)
        listed = [answer["truth"][0] in answer["candidates"] for answer in answers]
        found[split] = {
            **ranking_metrics(ranks),
            "count": len(answers),
            "parse_failures": sum(not answer["parsed"] for answer in answers),
            "truth_listed": sum(listed),
            "kept_candidate_rank": sum(
                not there and rank < math.inf for there, rank in zip(listed, ranks, strict=True)
            ),
            "never_found": sum(map(math.isinf, ranks)),
            **{
                direction: ranking_metrics(
                    [rank for rank, answer in zip(ranks, answers, strict=True) if answer["direction"] == direction]
                )
                for direction in ("head", "tail")
            },
            **{row: ranking_metrics(own) for row, own in by_row.items()},
        }
        if choice.lengths is not None:
            found[split] |= {"lengths": f"{choice.lengths} of log-likelihoods" if splits.get("validation")
                             else "sum of log-likelihoods (no validation answers to choose on)"}  # fmt: skip
            found[split] |= {
                "by_sum": ranking_metrics([rank_of(answer) for answer in answers]),
                "by_mean": ranking_metrics([rank_of(per_token(answer)) for answer in answers]),
            }
        if choice.weights is not None:
            found[split][WITH_ORDER] |= {"weights": choice.weights._asdict(), "weights_from": "validation"}
    return found


class Choice(NamedTuple):
    """What validation says of how answers are to be ranked."""

    lengths: str | None  # "sum" or "mean" per token of a candidate's log-likelihoods; None: all are equally long
    weights: Weights | None  # of score and place, for predictions


def choose(splits: Splits) -> Choice:
    """The better of sum and mean by validation MRR (the sum where there is no validation), and ``order_weights``."""
    validation = splits.get("validation", [])
    lengths = None
    if any(answer["tokens"] is not None for answers in splits.values() for answer in answers):
        means = [per_token(answer) for answer in validation]
        by_sum, by_mean = (ranking_metrics([rank_of(answer) for answer in way])["mrr"] for way in (validation, means))
        lengths = "mean" if validation and by_mean > by_sum else "sum"
        validation = means if lengths == "mean" else validation
    predicted = any(answer["decode"] == "predict" for answers in splits.values() for answer in answers)
    return Choice(lengths, order_weights(scored_lists(validation)) if predicted else None)


def per_token(answer: Answer) -> Answer:
    """An answer whose scores are means over their tokens, where they have several."""
    if not answer["scores"] or not answer["tokens"]:
        return answer
    pairs = zip(answer["scores"], answer["tokens"], strict=True)
    return answer | {"scores": [None if score is None else score / size for score, size in pairs], "tokens": None}


# ---------------------------------------------------------------- scores and the list's order


class Weights(NamedTuple):
    """``score * own score - place * log(place in the list)`` ranks candidates; neither is below 0."""

    score: float
    place: float


class Scored(NamedTuple):
    """A list of which one candidate is right."""

    scores: list[float]  # of its candidates, as listed
    right: int  # place of the right one, from 0


def scored_lists(answers: Iterable[Answer]) -> Iterator[Scored]:
    """The lists of link prediction whose candidates all have scores and whose truth is among them."""
    for answer in answers:
        scores, truth = answer["scores"], answer["truth"][0]
        if answer["parsed"] and scores and None not in scores and truth in answer["candidates"]:
            yield Scored(scores, answer["candidates"].index(truth))


def order_weights(lists: Iterable[Scored]) -> Weights | None:
    """The weights under which a choice among each list's candidates (a softmax over their scores) is likeliest.

    A conditional logit with a ridge of 0.01, by Newton's method: it is convex. Where one comes out below 0, which says
    that it misleads on validation, it is 0, and the other 1. None where no list can be used.
    """
    inputs, right = [], []
    for found in lists:
        inputs.append(np.array([[score, -math.log(place)] for place, score in enumerate(found.scores, 1)]))
        right.append(found.right)
    if not inputs:
        return None
    weights = np.zeros(2)
    for _ in range(50):
        slope, curve = -0.01 * weights, -0.01 * np.eye(2)
        for features, at in zip(inputs, right, strict=True):
            scores = features @ weights
            chances = np.exp(scores - scores.max())
            chances /= chances.sum()
            mean = chances @ features
            slope += features[at] - mean
            curve -= (features - mean).T * chances @ (features - mean)
        step = np.linalg.solve(curve, slope)
        weights = weights - step
        if np.abs(step).max() < 1e-9:
            break
    if weights.min() >= 0:
        return Weights(float(weights[0]), float(weights[1]))
    return Weights(0.0, 1.0) if weights[0] < weights[1] else Weights(1.0, 0.0)


def with_order(answer: Answer, weights: Weights) -> Answer:
    """An answer whose scores take the candidates' places into account."""
    if answer["scores"] is None:
        return answer
    scores = [
        None if score is None else weights.score * score - weights.place * math.log(place)
        for place, score in enumerate(answer["scores"], 1)
    ]
    return answer | {"scores": scores}


# ---------------------------------------------------------------- judgements


def margin(answer: Answer) -> float:
    """log P(True) - log P(False); NaN where the answer did not parse."""
    if not answer["parsed"]:
        return math.nan
    scores = dict(zip(answer["candidates"], answer["scores"], strict=True))
    return float(scores[TRUE] - scores[FALSE])


def judgements(margins: Sequence[float], labels: Sequence[bool], threshold: float) -> NDArray[np.bool_]:
    """What is said of each triple: True where its margin exceeds the threshold, the wrong thing where it is NaN."""
    values, true = np.asarray(margins, dtype=np.float64), np.asarray(labels, dtype=bool)
    return np.where(np.isnan(values), ~true, values > threshold)


def classification_metrics(margins: Sequence[float], labels: Sequence[bool], threshold: float) -> Metrics:
    """Accuracy, precision, recall and F1 of ``margin > threshold``; NaN margins are wrong whatever the label is.

    Precision, recall and F1 are None where their denominator is 0.
    """
    true = np.asarray(labels, dtype=bool)
    said = judgements(margins, labels, threshold)
    hit, wrong, missed = int((said & true).sum()), int((said & ~true).sum()), int((~said & true).sum())

    def share(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    return {
        "accuracy": share(int((said == true).sum()), len(true)), "precision": share(hit, hit + wrong),
        "recall": share(hit, hit + missed), "f1": share(2 * hit, 2 * hit + wrong + missed),
    }  # fmt: skip


def best_threshold(margins: Sequence[float], labels: Sequence[bool]) -> float:
    """The threshold of the best accuracy of ``margin > threshold``, NaN margins left out.

    Thresholds tried: 0, the middle between any two neighbouring margins, and one beyond either end. Of equally good
    ones the nearest to 0 is taken, and of two equally near the lower.
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


def score_judgements(splits: Splits) -> dict[str, Metrics]:
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
    """Whether the triple to be judged is true."""
    return bool(answer["truth"] == [TRUE])


def chosen_threshold(splits: Splits) -> float | None:
    """``best_threshold`` of validation; None where there is none to choose: no validation, or texts, which say True or
    False and nothing in between."""
    validation = splits.get("validation", [])
    if all(answer["decode"] == "free" for answer in validation):
        return None
    return best_threshold([margin(answer) for answer in validation], [is_true(answer) for answer in validation])


# ---------------------------------------------------------------- the rest


def is_match(answer: Answer) -> bool:
    """Whether the text is the expected one, its lines in any order."""

    def lines(text: str) -> list[str]:
        return sorted(line.strip() for line in text.strip().split("\n"))

    return bool(answer["parsed"]) and lines(answer["text"]) == lines(answer["expected"])


def score_texts(splits: Splits) -> dict[str, Metrics]:
    """Exact matches and parse failures by split, as counts and shares."""
    found = {}
    for split, answers in splits.items():
        n = len(answers)
        failures = sum(not answer["parsed"] for answer in answers)
        found[split] = {"exact_match": sum(map(is_match, answers)) / n, "count": n,
                        "parse_failures": failures, "parse_failure_rate": failures / n}  # fmt: skip
    return found


# ---------------------------------------------------------------- all tasks


def is_judgement(row: Answer) -> bool:
    """Whether a row or an answer judges a triple."""
    return row["task_type"] in JUDGEMENTS and row.get("truth") in ([TRUE], [FALSE])


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
    """An answer that stands for its task."""
    return next(iter(splits.values()))[0]


def report(answers: Iterable[Answer]) -> dict[str, dict[str, Metrics]]:
    """Task type -> split -> metrics."""
    found = {}
    for task, splits in by_task(answers).items():
        first = first_of(splits)
        score = score_ranking if is_ranking(first) else score_judgements if is_judgement(first) else score_texts
        found[task] = score(splits)
    return found


def query_of(answer: Answer) -> str:
    """What tells queries apart: ids count rows, so those of another cut of valid or of other negatives are the same."""
    what = answer.get("triple") if is_judgement(answer) else None  # answers of before have no triple
    return f"{answer['id']} ({', '.join(what or answer['truth'][:1])})"


def worths(splits: Splits) -> dict[str, dict[str, dict[str, float]]]:
    """Split -> row -> what each answer, by id and truth, adds to the mean that its task is measured by.

    Reciprocal ranks for link prediction (rows as in ``ranks_by_row``), whether it is right for the rest.
    """
    first, threshold, found = first_of(splits), 0.0, {}
    if is_ranking(first):
        choice = choose(splits)
    elif is_judgement(first):
        threshold = chosen_threshold(splits) or 0.0
    for split, answers in splits.items():
        if is_ranking(first):
            rows = {row: [1 / rank for rank in ranks] for row, ranks in ranks_by_row(answers, choice).items()}
        elif is_judgement(first):
            labels = [is_true(answer) for answer in answers]
            said = judgements([margin(answer) for answer in answers], labels, threshold).tolist()
            rows = {OWN: [float(one == label) for one, label in zip(said, labels, strict=True)]}
        else:
            rows = {OWN: [float(is_match(answer)) for answer in answers]}
        asked = [query_of(answer) for answer in answers]
        found[split] = {row: dict(zip(asked, values, strict=True)) for row, values in rows.items()}
    return found


def differences(answers: Iterable[Answer], others: Iterable[Answer]) -> Differences:
    """What ``answers`` have above ``others``, for the tasks and splits that both hold.

    Of link prediction's rows, those that are the LLM's. Raises ValueError where they hold nothing in common, or where
    one was asked other queries of a split.
    """
    theirs, found = by_task(others), Differences()
    for task, splits in by_task(answers).items():
        first, second = worths(splits), worths(theirs[task]) if task in theirs else {}
        for split in (split for split in first if split in second):
            for row in (OWN, WITH_ORDER):
                if row in first[split] and row in second[split]:
                    rows = found.setdefault(task, {}).setdefault(split, {})
                    try:
                        rows[row] = paired([first[split][row]], [second[split][row]])
                    except ValueError as error:
                        raise ValueError(f"{task} {split}: {error}") from error
    if not found:
        raise ValueError("no task and split in common")
    return found


def print_report(found: dict[str, dict[str, Metrics]]) -> None:
    """One line per task and split, and the rivals of link prediction below it."""

    def numbers(metrics: Metrics) -> str:
        return "  ".join(
            f"{name} {'-' if metrics[name] is None else format(metrics[name], '.4f')}"
            for name in ("mrr", "hits@1", "hits@3", "hits@10", "accuracy", "precision", "recall", "f1", "exact_match")
            if name in metrics
        )

    for task, splits in found.items():
        for split, metrics in splits.items():
            more = (
                f"  threshold {metrics['threshold']:+.4f} ({metrics['threshold_from']})"
                if "threshold" in metrics
                else ""
            )
            more += f"  {metrics['lengths']}" if "lengths" in metrics else ""
            print(
                f"{task} {split} ({metrics['count']:,}): {numbers(metrics)}{more}  "
                f"{metrics['parse_failures']} did not parse"
            )
            for rival, name in (
                (WITH_ORDER, "with the list's order"), ("candidate_model", "candidate model"),
                ("as_listed", "copy the listed order"),
            ):  # fmt: skip
                if rival in metrics:
                    print(f"    {name:22} {numbers(metrics[rival])}")


def against_file(answers: Iterable[Answer], path: Path) -> list[dict[str, Any]]:
    """``differences`` to a file of answers, printed. InputError where the two cannot be compared."""
    try:
        found = differences(answers, read_answers(path).answers)
    except ValueError as error:
        raise InputError(f"--against {path}: {error}; give answers to the same rows of data") from error
    lines = []
    for task, splits in found.items():
        for split, rows in splits.items():
            for row, difference in rows.items():
                way = " with the list's order" if row == WITH_ORDER else ""
                print(f"{task} {split}{way}, minus {path}: {difference}, {difference.queries:,} queries")
                lines.append({"task_type": task, "split": split, "row": row, **difference._asdict()})
    return lines


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="lora_training/score_answers.py", description=__doc__.split("\n")[0])
    parser.add_argument("--answers", type=Path, default=HERE / "answers.jsonl", metavar="FILE", help="by inference.py")
    parser.add_argument(
        "--against", type=Path, nargs="+", default=[], metavar="FILE", help="other answers to the same queries"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the metrics there too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    answers = read_answers(args.answers).answers
    if not answers:
        raise InputError(f"answers file {args.answers} holds no complete answer; go on with inference.py")
    found = report(answers)
    print_report(found)
    against = {str(path): against_file(answers, path) for path in args.against}
    if args.output:
        hashes = {args.answers.name: sha256_file(args.answers)}
        compared = {path: {"sha256": sha256_file(Path(path)), "differences": lines} for path, lines in against.items()}
        write_json({"answers": hashes, "metrics": found, "against": compared}, args.output)
        print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
