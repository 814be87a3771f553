"""How many residual levels a graph deserves, by what kept runs measured: ``run_rq.py --num_quantizers auto``.

The record of the graph nearest in size (then nearest in L, then in K) says what each level added to valid MRR. Levels
are taken as long as each adds ``WORTH``: a level costs L tokens per entity in every prompt of the LLM. None is
recommended that no run has measured. A run cut short at q levels scores below one trained with q, so the rule errs
towards a level more. That codes suffice is no reason for a level: K ** L is beyond any graph at one
level already.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from run_record import ROOT, InputError, read_json

RECORDS = ROOT / "tables" / "records"
WORTH = 0.005  # valid MRR
UNMEASURED = 4  # RQCodebook's own default, where there is no record
ORDINALS = {1: "1st", 2: "2nd", 3: "3rd"}


class Measured(NamedTuple):
    """What a kept run says about its levels."""

    graph: str
    entities: int
    positions: int
    num_code: int
    mrr: list[float]  # valid MRR decoded from the first 1, 2, ... Q levels
    path: Path


class Levels(NamedTuple):
    """A recommendation and the lines that say why."""

    number: int
    reasons: list[str]


def measured(records: Path = RECORDS) -> list[Measured]:
    """The residual runs among the kept records, in order of file names. InputError where one is damaged."""
    found = []
    for path in sorted(records.glob("*.json")):
        record = read_json(path, "record")
        try:
            mrr = [float(value) for value in record.get("valid_mrr_by_levels", [])]
            if not mrr or record["args"]["quantizer"] != "rq":
                continue
            entities, positions, levels = (int(n) for n in record["shape"])
            num_code = int(record["args"]["num_code"])
            if min(entities, positions, num_code) < 1 or levels != len(mrr):
                raise ValueError(f"shape {record['shape']} with {len(mrr)} scores by level")
            found.append(Measured(str(record["dataset"]), entities, positions, num_code, mrr, path))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"record {path} is damaged ({type(error).__name__}: {error}); restore it, or give --num_quantizers a "
                "number"
            ) from error
    return found


def worthwhile(mrr: list[float]) -> int:
    """The number of first levels of which each one after the first added ``WORTH`` or more."""
    gains = [after - before for before, after in pairwise(mrr)]
    return 1 + next((i for i, gain in enumerate(gains) if gain < WORTH), len(gains))


def recommend(entities: int, positions: int, num_code: int, runs: list[Measured]) -> Levels:
    """The number of levels for a graph of M entities with L positions and K codes, from ``measured`` runs.

    Also warns where K leaves fewer entities per code than any of the runs had.
    """
    if not runs:
        return Levels(UNMEASURED, [f"{UNMEASURED} levels (tables/records holds no run to go by)"])

    def distance(run: Measured) -> tuple[float, float, float]:
        pairs = ((run.entities, entities), (run.positions, positions), (run.num_code, num_code))
        a, b, c = (round(abs(math.log(there / here)), 6) for there, here in pairs)
        return a, b, c

    run = min(runs, key=distance)
    number = worthwhile(run.mrr)
    where = run.graph if run.entities == entities else f"{run.graph}, {run.entities:,} entities, the nearest measured"
    reasons = [
        f"{number} level{'s' * (number > 1)} ({entities:,} entities; on {where}, {_gains(run.mrr, number)}, record "
        f"{run.path.relative_to(ROOT) if run.path.is_relative_to(ROOT) else run.path})"
    ]
    fewest = min(runs, key=lambda run: run.entities / run.num_code)
    if num_code * fewest.entities > entities * fewest.num_code:
        fitting = max(2, 2 ** math.floor(math.log2(entities * fewest.num_code / fewest.entities)))
        reasons.append(
            f"--num_code {num_code:,} is {entities / num_code:.1f} entities per code, no run here had fewer than "
            f"{fewest.entities / fewest.num_code:.1f} ({fewest.graph}): --num_code {fitting} keeps to what was measured"
        )
    return Levels(number, reasons)


def _gains(mrr: list[float], number: int) -> str:
    """What the last level taken added, and the next one, where it was measured."""
    words = []
    if number > 1:
        words.append(f"the {_nth(number)} level still added {mrr[number - 1] - mrr[number - 2]:+.3f} valid MRR")
    if number < len(mrr):
        words.append(f"the {_nth(number + 1)} {mrr[number] - mrr[number - 1]:+.3f}")
    else:
        words.append("no run here had more")
    return ", ".join(words)


def _nth(number: int) -> str:
    return ORDINALS.get(number, f"{number}th")
