"""Mix tasks by weight into lora_data/train, validation and test_tasks.

    python Class/build_mix.py                                             every task that is there, each row once
    python Class/build_mix.py triple_classification=0.05 link_prediction=2

A weight is how often each training row of a task comes on average: 0.05 draws one row in twenty, 2 takes each twice.
Validation and test rows come once, whatever the weight; tasks not named are left out.

The tasks cut the same triples differently (link prediction tunes on most of the valid split), so a training row is
dropped when a test row of any task rests on its triple, and a validation row when a training or a test row does.
Negatives are no facts and are not compared.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.rows import (
    FILE_STEMS,
    LOCK,
    OUT_FOLDER,
    PREDICTED,
    STATS,
    Row,
    existing_split,
    parse_line,
    read_lines,
    row_triples,
    split_path,
    states_facts,
    train_command,
    write_rows,
)
from Class.source import Ints, codes_key
from common.errors import CommandParser, InputError, at_least, content_of, run_command
from common.files import command, exclusive_lock, output_folder, read_json, write_json
from common.record import make_record


def hashed_triples(row: Row) -> list[int]:
    """A 64-bit key per triple that the row rests on."""
    texts = ("\t".join(triple) for triple in row_triples(row))
    return [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") for text in texts]


def scan(path: Path, forbidden: set[int], facts: set[int], rng: np.random.Generator) -> tuple[Ints, int]:
    """Byte offsets of the rows of a file that rest on no ``forbidden`` fact, and how many others there are.

    Of the rows labelled False, the same share is left out at random as of those labelled True, which keeps the balance
    of labels. The kept rows' facts are added to ``facts``.
    """
    offsets, false, dropped, true_rows, true_dropped = [], [], 0, 0, 0
    for at, row in read_lines(path):
        keys = hashed_triples(row) if states_facts(row) else []
        is_true = row.get("truth") == ["True"]
        true_rows += is_true
        if forbidden and not forbidden.isdisjoint(keys):
            dropped += 1
            true_dropped += is_true
        else:
            offsets.append(at)
            false.append(row.get("truth") == ["False"])
            facts.update(keys)
    keep = np.ones(len(offsets), dtype=bool)
    if true_dropped:
        negatives = np.flatnonzero(false)
        keep[rng.permutation(negatives)[: round(len(negatives) * true_dropped / true_rows)]] = False
    return np.array(offsets, dtype=np.int64)[keep], dropped + int((~keep).sum())


def draw(count: int, weight: float, rng: np.random.Generator) -> Ints:
    """Row numbers, each ``weight`` times on average: its whole part for all, one more for a random part of them."""
    whole = int(weight)
    part = rng.permutation(count)[: round((weight - whole) * count)]
    return np.concatenate([np.repeat(np.arange(count), whole), part]).astype(np.int64)


def read_at(paths: list[Path], which: Ints, offsets: Ints) -> Iterator[Row]:
    """The rows at ``offsets`` of the files ``paths[which]``; a repeated row gets a new id."""
    copies: Counter[str] = Counter()
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "rb")) for path in paths]
        for number, offset in zip(which.tolist(), offsets.tolist(), strict=True):
            files[number].seek(offset)
            row = parse_line(files[number].readline().decode("utf-8-sig"), paths[number], 0)
            assert row is not None
            copies[row["id"]] += 1
            if copies[row["id"]] > 1:
                row["id"] = f"{row['id']}#{copies[row['id']]}"
            yield row


def read_tasks(folder: Path, weights: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The statistics of the tasks; InputError where one is not there or they rest on different codes."""
    there = sorted(path.parent.name for path in folder.glob(f"*/{STATS}"))
    absent = sorted(weights.keys() - set(there))
    if absent or not there:
        made = ", ".join(there) or "none; make one: python Class/gen_fb_data_rq.py"
        raise InputError(f"no data of task {', '.join(absent) or 'any'} in {folder}; there: {made}")
    tasks = {name: read_json(folder / name / STATS, "statistics") for name in weights or there}
    for name, stats in tasks.items():
        with content_of(folder / name / STATS, "statistics", "write the task again"):
            info = stats["codes"]
            wanted: dict[str, Any] = {"sha256": (str, type(None)), "shuffled": bool, "shuffle_seed": int}
            fits = all(isinstance(info[key], kind) for key, kind in wanted.items() if key in info)
            if not (fits and isinstance(info, dict) and isinstance(stats["dataset"], str)):
                raise ValueError("codes or dataset")
            stats.get("candidate_order", {}).items()
    codes = {name: codes_key(stats["codes"]) for name, stats in tasks.items()}
    if len(set(codes.values())) > 1:
        shown = ", ".join(
            f"{name}: {tasks[name]['codes'].get('file')}" + (f", shuffled by seed {seed}" if shuffled else "")
            for name, (_, shuffled, seed) in codes.items()
        )
        raise InputError(f"the tasks have different codes ({shown}); make them from one codes file")
    return tasks


def task_weight(text: str) -> tuple[str, float]:
    """TASK=WEIGHT."""
    name, _, weight = text.partition("=")
    try:
        value = float(weight or "1")
    except ValueError:
        value = -1.0
    if not name or not 0 < value < 1000:
        raise argparse.ArgumentTypeError(f"expected TASK or TASK=WEIGHT with a weight above 0, got {text!r}")
    return name, value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="Class/build_mix.py", description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*", type=task_weight, metavar="TASK=WEIGHT", help="default: all, weight 1")
    parser.add_argument(
        "--out_dir", type=output_folder, default=OUT_FOLDER, metavar="DIR", help="holds one folder per task"
    )
    parser.add_argument(
        "--limit", type=at_least(0), default=0, metavar="N", help="at most N rows per file, at random (0: all)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the draw and of the order")
    args = parser.parse_args(argv)
    repeated = [name for name, count in Counter(name for name, _ in args.tasks).items() if count > 1]
    if repeated:
        parser.error(f"task {repeated[0]} is given twice; give one weight")
    return args


class Drawn(NamedTuple):
    """The rows that one split's file gets, and how many come of each task."""

    paths: list[Path]
    which: Ints  # [n], of paths
    offsets: Ints  # [n], in bytes
    counts: dict[str, int]  # rows by task, before --limit
    dropped: dict[str, int]  # rows by task that are left out


def draw_split(
    args: argparse.Namespace, split: str, weights: dict[str, float], forbidden: set[int], facts: set[int]
) -> Drawn:
    """The rows of one split and their order: random for train, else that of the tasks.

    ``forbidden`` and ``facts`` as in ``scan``. InputError where no task has such rows.
    """
    rng = np.random.default_rng([args.seed, list(FILE_STEMS).index(split)])
    paths: list[Path] = []
    which: list[Ints] = []
    offsets: list[Ints] = []
    counts: dict[str, int] = {}
    dropped: dict[str, int] = {}
    for name, weight in weights.items():
        path = existing_split(args.out_dir / name, split)
        if path is None:
            continue
        found, dropped[name] = scan(path, forbidden, facts, rng)
        chosen = draw(len(found), weight, rng) if split == "train" else np.arange(len(found))
        counts[name] = len(chosen)
        which.append(np.full(len(chosen), len(paths)))
        offsets.append(found[chosen])
        paths.append(path)
    if not paths:
        raise InputError(f"no task of {', '.join(weights)} has a {split} file in {args.out_dir}")
    order = rng.permutation(sum(map(len, which)))[: args.limit or None]
    if split != "train":
        order.sort()  # scored files keep the tasks' order
    if not len(order):
        raise InputError(f"no {split} row is left of {', '.join(weights)}; dropped as overlapping: {dropped}")
    return Drawn(paths, np.concatenate(which)[order], np.concatenate(offsets)[order], counts, dropped)


def write_mix(args: argparse.Namespace, drawn: dict[str, Drawn]) -> dict[str, dict[str, Any]]:
    """Write the splits' files and print their sizes; returns the statistics of ``write_rows`` by split."""
    splits = {}
    for split, plan in drawn.items():
        target = split_path(args.out_dir, split)
        rows = read_at(plan.paths, plan.which, plan.offsets)
        splits[split] = write_rows(target, rows, 0, lambda: (args.out_dir / STATS).unlink(missing_ok=True))
        counts = ", ".join(f"{name} {count:,}" for name, count in plan.counts.items())
        print(f"  {split:10} {splits[split]['rows']:>9,} rows  {target}  ({counts})")
        for name, count in plan.dropped.items():
            if count:
                print(
                    f"             {count:,} rows of {name} left out: another split has their triple (or their balance)"
                )
    return splits


def codes_of_queries(tasks: dict[str, Any]) -> dict[str, Any]:
    """``codes`` of a mix. Tasks may differ in their text form; ask.py and serve.py use the one of queries."""
    name = next((task for task in (PREDICTED, "link_prediction") if task in tasks), next(iter(tasks)))
    found: dict[str, Any] = tasks[name]["codes"]
    return found


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    args = parse_args(argv)
    given = dict(args.tasks)
    tasks = read_tasks(args.out_dir, given)
    weights = {name: given.get(name, 1.0) for name in tasks}
    facts: dict[str, set[int]] = {}
    drawn: dict[str, Drawn] = {}
    for split, others in (("test", ()), ("train", ("test",)), ("validation", ("test", "train"))):
        forbidden: set[int] = set().union(*(facts[other] for other in others))
        facts[split] = set()
        drawn[split] = draw_split(args, split, weights, forbidden, facts[split])
    with exclusive_lock(args.out_dir / LOCK, "--out_dir"):
        splits = write_mix(args, drawn)
        stats = make_record(
            {**vars(args), "tasks": weights}, {}, time.monotonic() - started, mix=weights,
            codes=codes_of_queries(tasks), splits=splits,
            dropped={split: plan.dropped for split, plan in drawn.items()},
            datasets={name: stats["dataset"] for name, stats in tasks.items()},
            code_formats={name: stats["codes"].get("code_format") for name, stats in tasks.items()},
            candidate_orders={name: stats.get("candidate_order", {}) for name, stats in tasks.items()},
        )  # fmt: skip
        write_json(stats, args.out_dir / STATS)
    print(f"next: {command('Class/check_leaks.py', args.out_dir)}, then {train_command(args.out_dir)}")


if __name__ == "__main__":
    run_command(main)
