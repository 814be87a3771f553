"""Paired comparison of two sets of answers to the same queries: mean difference and its standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


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
