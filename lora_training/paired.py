"""How much better one set of answers is than another to the same queries, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """Of two means over the same queries, of reciprocal ranks (then of MRRs), of right answers, of exact matches."""

    mean: float
    error: float | None  # standard error over the queries; None for fewer than two
    runs: list[float]  # the difference in each run (seed)
    queries: int

    def __str__(self) -> str:
        spread = "" if self.error is None else f" (standard error {self.error:.4f})"
        return f"{self.mean:+.4f}{spread}"


def paired(first: Sequence[Mapping[str, float]], second: Sequence[Mapping[str, float]]) -> Difference:
    """first - second: one ``{query: worth of its answer}`` per run, both of the same queries in every run.

    A query that several runs answer is one observation, the mean of its differences: what the error covers is that
    other queries might have been asked. How runs differ (few, and each draws everything anew) is left to be seen in
    ``runs``. Raises ValueError where the two were not asked the same.
    """
    together: dict[str, list[float]] = {}
    runs = []
    for ours, theirs in zip(first, second, strict=True):
        if ours.keys() != theirs.keys() or not ours:
            alone = sorted(ours.keys() ^ theirs.keys())
            shown = f"{len(alone)} are asked by one alone, such as {alone[0]}" if alone else "there are none"
            raise ValueError(f"not the same queries: {shown}")
        differences = {query: worth - theirs[query] for query, worth in ours.items()}
        runs.append(float(np.mean(list(differences.values()))))
        for query, difference in differences.items():
            together.setdefault(query, []).append(difference)
    values = np.array([np.mean(found) for found in together.values()])
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Difference(float(np.mean(runs)), error, runs, len(values))
