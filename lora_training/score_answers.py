"""Metrics from the answers alone: no model, no data set, in seconds.

    cd lora_training && python score_answers.py                        answers.jsonl, as inference.py leaves it
    cd lora_training && python score_answers.py --answers other/answers.jsonl --output metrics.json

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run_record import CommandParser, InputError, parse_json, run_command, sha256_file, write_json

Answer = dict[str, Any]
Metrics = dict[str, Any]

HERE = Path(__file__).resolve().parent
TRUE, FALSE = "True", "False"
HITS = (1, 3, 10)
JUDGEMENTS = ("triple_classification", "validate_triple")  # an entity of another task may be named True
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
        return isinstance(value, list) and all(type(item) in (int, float, *others) for item in value)

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
        "candidate_rank": rank is None or (type(rank) in (int, float) and rank >= 1),
    }
    if good["truth"] and is_ranking(answer):
        good["candidates"], good["scores"] = size >= 0, good["scores"] and (scores is not None or not answer["parsed"])
    elif good["truth"] and is_judgement(answer) and answer["parsed"]:
        good["candidates"] = good["candidates"] and set(candidates or ()) == {TRUE, FALSE}
        good["scores"] = numbers(scores) and len(scores) == size
    return next((key for key, fits in good.items() if not fits), None)


# ---------------------------------------------------------------- link prediction


def rank_of(answer: Answer, per_token: bool = False) -> float:
    """Rank of the truth by the answer's scores, merged with ``candidate_rank``; infinite where it is never found."""
    truth, candidates = answer["truth"][0], answer["candidates"]
    if not answer["parsed"]:
        return math.inf
    if truth not in candidates:
        return math.inf if answer["decode"] == SEARCHED else known_rank(answer)
    at, others = candidates.index(truth), set(answer["truth"][1:])
    scores = answer["scores"]
    if per_token and answer["tokens"] is not None:
        scores = [None if s is None else s / n for s, n in zip(scores, answer["tokens"], strict=True)]
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


def score_ranking(splits: dict[str, list[Answer]]) -> dict[str, Metrics]:
    """Metrics of link prediction by split; the normalisation of unequal lengths is chosen on validation."""
    unequal = any(answer["tokens"] is not None for answers in splits.values() for answer in answers)
    by_mrr = {way: ranking_metrics([rank_of(answer, way == "mean") for answer in splits.get("validation", [])])["mrr"]
              for way in ("sum", "mean")}  # fmt: skip
    chosen = "mean" if unequal and by_mrr["mean"] is not None and by_mrr["mean"] > by_mrr["sum"] else "sum"
    found = {}
    for split, answers in splits.items():
        ranks = [rank_of(answer, chosen == "mean") for answer in answers]
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
            "candidate_model": ranking_metrics([known_rank(answer) for answer in answers]),
        }
        if answers[0]["decode"] != SEARCHED:
            found[split]["as_listed"] = ranking_metrics([listed_rank(answer) for answer in answers])
        if unequal:
            found[split] |= {"lengths": f"{chosen} of log-likelihoods" if by_mrr["sum"] is not None
                             else "sum of log-likelihoods (no validation answers to choose on)"}  # fmt: skip
            found[split] |= {
                f"by_{way}": ranking_metrics([rank_of(answer, way == "mean") for answer in answers])
                for way in ("sum", "mean")
            }
    return found


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


def as_ranked(splits: dict[str, list[Answer]], chosen: Metrics) -> dict[str, list[Answer]]:
    """Answers with the scores that rank them: per token where validation chose that (``score_ranking``)."""
    if not str(chosen.get("lengths", "")).startswith("mean"):
        return splits
    return {split: [_per_token(answer) for answer in answers] for split, answers in splits.items()}


def _per_token(answer: Answer) -> Answer:
    if not answer["scores"] or not answer["tokens"]:
        return answer
    pairs = zip(answer["scores"], answer["tokens"], strict=True)
    return answer | {"scores": [None if score is None else score / size for score, size in pairs], "tokens": None}


def score_with_order(splits: dict[str, list[Answer]]) -> dict[str, Metrics]:
    """By split: metrics by ``with_order``, with the weights that validation's lists give."""
    weights = order_weights(scored_lists(splits.get("validation", [])))
    if weights is None:
        return {}
    return {
        split: ranking_metrics([rank_of(with_order(answer, weights)) for answer in answers])
        | {"weights": weights._asdict(), "weights_from": "validation"}
        for split, answers in splits.items()
    }


# ---------------------------------------------------------------- judgements


def margin(answer: Answer) -> float:
    """log P(True) - log P(False); NaN where the answer did not parse."""
    if not answer["parsed"]:
        return math.nan
    scores = dict(zip(answer["candidates"], answer["scores"], strict=True))
    return float(scores[TRUE] - scores[FALSE])


def classification_metrics(margins: Sequence[float], labels: Sequence[bool], threshold: float) -> Metrics:
    """Accuracy, precision, recall and F1 of ``margin > threshold``; NaN margins are wrong whatever the label is.

    Precision, recall and F1 are None where their denominator is 0.
    """
    values, true = np.asarray(margins, dtype=np.float64), np.asarray(labels, dtype=bool)
    said = np.where(np.isnan(values), ~true, values > threshold)
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


def score_judgements(splits: dict[str, list[Answer]]) -> dict[str, Metrics]:
    """Metrics of True/False tasks by split, at the validation threshold and at 0."""
    margins = {split: [margin(answer) for answer in answers] for split, answers in splits.items()}
    labels = {split: [answer["truth"] == [TRUE] for answer in answers] for split, answers in splits.items()}
    # a text says True or False and nothing in between: there is no threshold to choose
    tuned = any(answer["decode"] != "free" for answer in splits.get("validation", []))
    threshold = best_threshold(margins["validation"], labels["validation"]) if tuned else 0.0
    return {
        split: {
            **classification_metrics(margins[split], labels[split], threshold),
            "count": len(answers),
            "positives": sum(labels[split]),
            "parse_failures": sum(not answer["parsed"] for answer in answers),
            "threshold": threshold,
            "threshold_from": "validation" if tuned else "none",
            "at_zero": classification_metrics(margins[split], labels[split], 0.0),
        }
        for split, answers in splits.items()
    }


# ---------------------------------------------------------------- the rest


def is_match(answer: Answer) -> bool:
    """Whether the text is the expected one, its lines in any order."""

    def lines(text: str) -> list[str]:
        return sorted(line.strip() for line in text.strip().split("\n"))

    return bool(answer["parsed"]) and lines(answer["text"]) == lines(answer["expected"])


def score_texts(splits: dict[str, list[Answer]]) -> dict[str, Metrics]:
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


def report(answers: Iterable[Answer]) -> dict[str, dict[str, Metrics]]:
    """Task type -> split -> metrics."""
    tasks: dict[str, dict[str, list[Answer]]] = {}
    for answer in answers:
        tasks.setdefault(answer["task_type"], {}).setdefault(answer["split"], []).append(answer)
    found = {}
    for task, splits in sorted(tasks.items()):
        first = next(iter(splits.values()))[0]
        score: Callable[[dict[str, list[Answer]]], dict[str, Metrics]] = (
            score_ranking if is_ranking(first) else score_judgements if is_judgement(first) else score_texts
        )
        found[task] = score(splits)
        if is_ranking(first) and first["decode"] == "predict":
            ranked = as_ranked(splits, next(iter(found[task].values())))
            for split, metrics in score_with_order(ranked).items():
                found[task][split]["with_order"] = metrics
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
                ("with_order", "with the list's order"), ("candidate_model", "candidate model"),
                ("as_listed", "copy the listed order"),
            ):  # fmt: skip
                if rival in metrics:
                    print(f"    {name:22} {numbers(metrics[rival])}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="lora_training/score_answers.py", description=__doc__.split("\n")[0])
    parser.add_argument("--answers", type=Path, default=HERE / "answers.jsonl", metavar="FILE", help="by inference.py")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the metrics there too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    answers = read_answers(args.answers).answers
    if not answers:
        raise InputError(f"answers file {args.answers} holds no complete answer; go on with inference.py")
    found = report(answers)
    print_report(found)
    if args.output:
        write_json({"answers": {args.answers.name: sha256_file(args.answers)}, "metrics": found}, args.output)
        print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
