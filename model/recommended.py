"""Which settings a graph deserves, by what kept runs measured: run_rq.py --recipe auto, --num_quantizers auto.

Settings are those of the run on the graph nearest in size with the best valid MRR, of up to 16 codes per entity where
there is one, since an LLM reads them all in every prompt, and of no more code vectors than entities, since with more of
them even random codes name an entity (docs/LOG.md). K and the softmax are fitted to a graph of other sizes.

Levels: the record of the graph nearest in size (then nearest in L, then in K) says what each level added to valid MRR.
They are taken as long as each adds ``WORTH``: a level costs L tokens per entity in every prompt of the LLM. None is
recommended that no run has measured. A run cut short at q levels scores below one trained with q, so the rule errs
towards a level more. That codes suffice is no reason for a level: K ** L is beyond any graph at one
level already.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from common.errors import InputError
from common.files import ROOT, read_json

RECORDS = ROOT / "tables" / "records"
WORTH = 0.005  # valid MRR
UNMEASURED = 4  # RQCodebook's own default, where there is no record
EXACT_UP_TO = 100_000  # entities; above, a step of the exact softmax takes minutes (benchmarks/growth.py)
SAMPLED = 4096  # entities drawn per step there
MOST_CODES = 16  # per entity, that a recipe has where there is a choice
OTHER_INPUTS = math.log(8)  # a run with text, where there is none here, is as far as a graph of eight times the size
ORDINALS = {1: "1st", 2: "2nd", 3: "3rd"}


class Measured(NamedTuple):
    """What a kept run says about its levels."""

    graph: str
    entities: int
    positions: int
    num_code: int
    mrr: list[float]  # valid MRR decoded from the first 1, 2, ... Q levels
    path: Path
    args: Mapping[str, Any] = MappingProxyType({})  # its flags
    epochs: int = 0
    minutes: float = 0.0


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
            if not mrr or record["args"]["quantizer"] != "rq" or record["args"].get("codes_from"):
                continue
            entities, positions, levels = (int(n) for n in record["shape"])
            num_code = int(record["args"]["num_code"])
            if min(entities, positions, num_code) < 1 or levels != len(mrr):
                raise ValueError(f"shape {record['shape']} with {len(mrr)} scores by level")
            minutes, epochs = float(record["wall_seconds"]) / 60, int(record["epochs"])
            dataset, flags = str(record["dataset"]), dict(record["args"])
            found.append(Measured(dataset, entities, positions, num_code, mrr, path, flags, epochs, minutes))
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
    fitting, reason = fitting_codes(entities, num_code, runs)
    if fitting < num_code:
        reasons.append(f"{reason}: --num_code {fitting} keeps to what was measured")
    return Levels(number, reasons)


def fitting_codes(entities: int, num_code: int, runs: list[Measured]) -> tuple[int, str]:
    """The most codes, up to ``num_code``, that leave as many entities per code as some run had; and why."""
    fewest = min(runs, key=lambda run: run.entities / run.num_code)
    reason = (
        f"--num_code {num_code:,} is {entities / num_code:.1f} entities per code, no run here had fewer than "
        f"{fewest.entities / fewest.num_code:.1f} ({fewest.graph})"
    )
    if num_code * fewest.entities <= entities * fewest.num_code:
        return num_code, reason
    return max(2, 2 ** math.floor(math.log2(entities * fewest.num_code / fewest.entities))), reason


class Recipe(NamedTuple):
    """Settings for a graph and the lines that say why."""

    settings: dict[str, Any]  # flag of run_rq.py -> value
    reasons: list[str]


def recipe(
    entities: int, with_text: bool, standing: dict[str, Any], runs: list[Measured], one_level: bool = False
) -> Recipe:
    """Values for the flags of ``standing``, for a graph of M entities with or without text embeddings.

    ``standing``: flag -> the value that stands where a run's record has none. ``one_level``: for VQ, as many codes per
    entity, all of them positions, and z as wide. InputError without runs.
    """
    if not runs:
        raise InputError(f"--recipe auto: {RECORDS} holds no run to go by; give --recipe paper, or a --config")

    def distance(run: Measured) -> tuple[float, bool, bool, float]:
        size = abs(math.log(run.entities / entities)) + OTHER_INPUTS * (bool(run.args.get("text_emb")) != with_text)
        names = run.num_code * len(run.mrr) > run.entities
        return round(size, 6), run.positions * len(run.mrr) > MOST_CODES, names, -run.mrr[-1]

    run = min(runs, key=distance)
    settings = standing | {name: run.args[name] for name in standing if run.args.get(name) is not None}
    tokens, text = run.positions * len(run.mrr), " with text" if run.args.get("text_emb") else ""
    where = f"{run.path.relative_to(ROOT) if run.path.is_relative_to(ROOT) else run.path}"
    reasons = [
        f"the settings of {where}, measured on {run.graph}{text}, {run.entities:,} entities (here {entities:,}): "
        f"valid MRR {run.mrr[-1]:.3f} from {tokens} codes per entity, {run.epochs} epochs in {run.minutes:.0f} min"
    ]
    fitted: dict[str, Any] = {"epoch": run.epochs}
    if not with_text or "inputs" not in standing:  # one that is given says it all
        fitted["text_init"] = False
    if not with_text or "text_init" not in standing:
        fitted |= {"inputs": None, "text_neighbours": None}
    if one_level and standing.keys() >= {"seq_len", "code_dim"}:
        levels = len(run.mrr)
        fitted |= {"seq_len": tokens, "code_dim": max(1, settings["code_dim"] // levels)}
        reasons.append(f"one level: the {tokens} codes are positions, --seq_len {tokens}")
    fitting, reason = fitting_codes(entities, run.num_code, runs)
    if fitting < run.num_code and "num_code" in standing:
        fitted["num_code"] = fitting
        reasons.append(f"{reason}; --num_code {fitting} therefore")
    if entities > EXACT_UP_TO and "num_negatives" in standing:
        fitted |= {"num_negatives": SAMPLED, "encoder_every": encoder_pace(entities)}
        reasons.append(f"{entities:,} entities are too many for a softmax over all: --num_negatives {SAMPLED}")
    settings |= {name: value for name, value in fitted.items() if name in standing}
    changed = {name: value for name, value in settings.items() if value != standing[name]}
    reasons.append("in flags: " + shlex.join(word for pair in changed.items() for word in as_flag(*pair)))
    return Recipe(settings, reasons)


def as_flag(name: str, value: Any) -> list[str]:
    """``("lr", 0.005)`` -> ``["--lr", "0.005"]``; a switch has no value."""
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


def encoder_pace(entities: int) -> int:
    """Scorer steps per pass of the encoder on a large graph: a pass reads all of it, a step does not."""
    return max(64, 64 * entities // EXACT_UP_TO)


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
