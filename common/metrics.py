"""Checks that hold for metrics of any model: bounds, identities between metrics, whole counts.

Every check raises InputError with the file and the field, so that a damaged or edited number never reaches a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import InputError

HITS = ("hits@1", "hits@3", "hits@10")
RANKING = ("mrr", *HITS)
CLASSIFICATION = ("accuracy", "precision", "recall", "f1")
SLACK = 1e-9  # rounding of the sums behind the metrics
WHOLE = 1e-4  # rounding of a fraction times its count, which is a number of queries


def impossible(path: Path, field: str, found: str, expected: str) -> InputError:
    """The one-line error about an impossible value."""
    return InputError(f"{path}: {field} {found}, expected {expected}; the record is damaged, repeat its run")


def number(path: Path, field: str, value: Any) -> float:
    """A finite number (not a bool)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise impossible(path, field, f"is {value!r}", "a finite number")
    return float(value)


def share(path: Path, field: str, value: Any) -> float:
    """A number in [0, 1]."""
    found = number(path, field, value)
    if not 0 <= found <= 1:
        raise impossible(path, field, f"is {found}", "a number from 0 to 1")
    return found


def check_ranking(path: Path, field: str, metrics: Mapping[str, Any], slack: float = SLACK) -> None:
    """Check MRR and Hits@1/3/10 of one set of ranks; tied candidates share their mean rank.

    0 <= H@1 <= H@3 <= H@10 <= 1. Ranks are 1 or at least 1.5, in steps of a half, hence
    H@1 + (H@3 - H@1) / 3 + (H@10 - H@3) / 10 <= MRR and
    MRR <= H@1 + (H@3 - H@1) / 1.5 + (H@10 - H@3) / 3.5 + (1 - H@10) / 10.5.
    With ``count``, every Hits@k is a whole number of queries. ``slack``: rounding of the numbers.
    """
    mrr, *hits = (share(path, f"{field}.{name}", metrics.get(name)) for name in RANKING)
    one, three, ten = hits
    for (low, low_name), (high, high_name) in zip(
        zip(hits, HITS, strict=True), list(zip(hits, HITS, strict=True))[1:], strict=False
    ):
        if low > high + SLACK:
            raise impossible(path, f"{field}.{low_name}", f"is {low}", f"at most {high_name} = {high}")
    least = one + (three - one) / 3 + (ten - three) / 10
    most = one + (three - one) / 1.5 + (ten - three) / 3.5 + (1 - ten) / 10.5
    if not least - slack <= mrr <= most + slack:
        raise impossible(
            path, f"{field}.mrr", f"is {mrr}", f"between {least:.6f} and {most:.6f}, which Hits@1/3/10 imply"
        )
    if "count" in metrics:
        count = number(path, f"{field}.count", metrics["count"])
        for value, name in zip(hits, HITS, strict=True):
            if abs(value * count - round(value * count)) > WHOLE:
                raise impossible(path, f"{field}.{name}", f"is {value}", f"a whole number of {count:.0f} queries")


def check_directions(path: Path, field: str, metrics: Mapping[str, Any]) -> None:
    """Check that head and tail queries are half each, and that the metrics are the mean of the two."""
    head, tail = metrics.get("head"), metrics.get("tail")
    if not isinstance(head, Mapping) or not isinstance(tail, Mapping) or "count" not in head or "count" not in tail:
        return
    counts = [number(path, f"{field}.{side}.count", part["count"]) for side, part in (("head", head), ("tail", tail))]
    whole = number(path, f"{field}.count", metrics.get("count"))
    if sum(counts) != whole or counts[0] != counts[1]:
        raise impossible(
            path, f"{field}.count", f"is {whole:.0f}", f"twice head = {counts[0]:.0f} and tail = {counts[1]:.0f}"
        )
    for name in RANKING:
        mean = (number(path, f"{field}.head.{name}", head[name]) + number(path, f"{field}.tail.{name}", tail[name])) / 2
        if abs(mean - metrics[name]) > 1e-6:
            raise impossible(path, f"{field}.{name}", f"is {metrics[name]}", f"{mean}, the mean of head and tail")


def check_all_rankings(path: Path, field: str, value: Any) -> None:
    """``check_ranking`` and ``check_directions`` for every set of metrics inside ``value``; empty sets hold null."""
    if not isinstance(value, Mapping):
        return
    if "mrr" in value and "hits@1" in value and any(value[name] is not None for name in RANKING if name in value):
        check_ranking(path, field, value)
        check_directions(path, field, value)
    for key, inner in value.items():
        check_all_rankings(path, f"{field}.{key}", inner)


def check_classification(path: Path, field: str, metrics: Mapping[str, Any], slack: float = 1e-6) -> None:
    """Check accuracy, precision, recall and F1 of one confusion matrix: bounds, whole counts, agreement.

    Precision, recall and F1 are null if their denominator is 0.
    """
    accuracy = share(path, f"{field}.accuracy", metrics.get("accuracy"))
    values = {name: metrics.get(name) for name in CLASSIFICATION[1:]}
    for name, value in values.items():
        if value is not None:
            share(path, f"{field}.{name}", value)
    precision, recall, f1 = values["precision"], values["recall"], values["f1"]
    if precision and recall:
        harmonic = 2 * precision * recall / (precision + recall)
        if f1 is None or abs(f1 - harmonic) > slack:
            raise impossible(path, f"{field}.f1", f"is {f1}", f"{harmonic}, which precision and recall imply")
    if "count" not in metrics or "positives" not in metrics:
        return
    count, positives = (number(path, f"{field}.{name}", metrics[name]) for name in ("count", "positives"))
    if not 0 <= positives <= count:
        raise impossible(path, f"{field}.positives", f"is {positives:.0f}", f"at most count = {count:.0f}")
    if recall is not None and precision:
        hit = recall * positives
        wrong = hit / precision - hit
        implied = (hit + count - positives - wrong) / count
        if abs(hit - round(hit)) > WHOLE:
            raise impossible(path, f"{field}.recall", f"is {recall}", f"a whole number of {positives:.0f} positives")
        if abs(implied - accuracy) > slack:
            raise impossible(
                path, f"{field}.accuracy", f"is {accuracy}", f"{implied}, which precision and recall imply"
            )


def check_count(path: Path, field: str, found: Any, expected: int, meaning: str) -> None:
    """Check a number of queries against the data set."""
    if number(path, field, found) != expected:
        raise impossible(path, field, f"is {found}", f"{expected} ({meaning})")
