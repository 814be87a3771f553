"""Look for leaks in instruction data; exit code 1 where one is found.

    python Class/check_leaks.py lora_training/lora_data

Checked for the folder's own three files and for each task folder in it:
- answers in prompts: an output that occurs in its prompt where no candidates are listed; a first answer that occurs
  more often than the answers listed with it; True more often than False, or the reverse
- triples: a fact in two splits, whatever the direction or the task; a triple that is False in one split and True in
  another or the same. Sampled training negatives may be validation or test facts (sampling must not look at these):
  they are counted
- the position of the truth among the candidates: uniform where the statistics call the order shuffled; not first far
  more often in training than in test, as in lists of a model that was trained on the queries
- labels: both occur, and neither is rare in validation and test
- ids that occur twice
Between task folders, test facts must be new to all training and validation rows; a validation fact may be a training
fact of another task, and build_mix.py then leaves it out.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.build_mix import hashed_triples
from Class.prompts import FALSE, TRUE
from Class.rows import FILE_STEMS, OUT_FOLDER, STATS, Row, existing_split, read_rows, states_facts
from common.errors import CommandParser, InputError, content_of, run_command
from common.files import command, read_json

# names may contain "True" or "Mexico" by chance: a leak is systematic, so this share of a task's rows is accepted
MENTION_SHARE = 0.02
RARE_LABEL = 0.10
FIRST_SHARE = 0.2  # training and test lists of one model may differ by this in how often they begin with the truth
CHI_SQUARE_Z = 5.0  # a uniform order exceeds this normal score once in three million

_TRUE, _FALSE = re.compile(rf"\b{TRUE}\b"), re.compile(rf"\b{FALSE}\b")
_FIRST_ANSWERS = re.compile(r"^([0-9]+)\. (.+)$", re.MULTILINE)


@dataclass
class Task:
    """Counts over the rows of one task type in one split."""

    rows: int = 0
    stated: int = 0  # the output is a separate part of the prompt
    mentioned: int = 0  # the output occurs in the prompt between word boundaries
    marked: int = 0  # the right answer occurs more often than the others
    labels: Counter[str] = field(default_factory=Counter)
    positions: dict[int, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))  # by list length


@dataclass
class Split:
    """Counts, facts and ids of one file."""

    tasks: dict[str, Task] = field(default_factory=lambda: defaultdict(Task))
    facts: set[int] = field(default_factory=set)
    negatives: set[int] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)
    repeated_ids: int = 0


def answer_in_prompt(prompt: str, output: str) -> tuple[bool, bool]:
    """Whether the output occurs in the prompt as a separate part, and whether between word boundaries.

    A separate part is a whole line, or is between quotes, bars, brackets, colons or <ENT> and <CODE> marks: "Mexico" is
    none of "Mexico City".
    """
    at = prompt.find(output)
    stated = mentioned = False
    while at >= 0 and output:
        before, after = prompt[:at], prompt[at + len(output) :]
        mentioned |= not (before[-1:].isalnum() and output[0].isalnum()) and not (
            after[:1].isalnum() and output[-1].isalnum()
        )
        stated |= bool(re.search(r"(^|[\n\"'>(\[]|[|:] )$", before) and re.match(r"($|[\n\"'<)\],]| [|])", after))
        at = prompt.find(output, at + 1)
    return stated, mentioned


def marks_answer(prompt: str, output: str) -> bool:
    """Whether the first numbered answer of ``output`` occurs more often in the prompt than each of the others."""
    answers = [match[2] for match in _FIRST_ANSWERS.finditer(output)]
    counts = [prompt.count(answer) for answer in answers]
    return len(counts) > 1 and counts[0] > max(counts[1:])


def count_row(row: Row, split: Split) -> None:
    """Add one row to its split."""
    task = split.tasks[row["task_type"]]
    prompt, output = f"{row['instruction']}\n{row.get('input') or ''}", row["output"]
    candidates, truth = row.get("candidates"), row.get("truth") or []
    task.rows += 1
    if truth in ([TRUE], [FALSE]):
        task.labels[truth[0]] += 1
        true, false = len(_TRUE.findall(prompt)), len(_FALSE.findall(prompt))
        task.marked += true != false
    elif candidates:
        task.marked += marks_answer(prompt, output)
        if truth and truth[0] in candidates:
            task.positions[len(candidates)][candidates.index(truth[0])] += 1
    else:
        stated, mentioned = answer_in_prompt(prompt, output)
        task.stated += stated
        task.mentioned += mentioned
    (split.facts if states_facts(row) else split.negatives).update(hashed_triples(row))
    split.repeated_ids += row["id"] in split.ids
    split.ids.add(row["id"])


def chi_square_z(counts: list[int]) -> float:
    """Normal score of the chi-square statistic of counts against a uniform distribution (Wilson and Hilferty)."""
    k, expected = len(counts) - 1, sum(counts) / len(counts)
    statistic = sum((count - expected) ** 2 for count in counts) / expected
    return float(((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / (2 / (9 * k)) ** 0.5)


def task_faults(split_name: str, name: str, task: Task, order: str | None) -> list[str]:
    """The leaks within one task's rows of one split; prints what was counted."""
    faults = []
    where = f"{split_name}, {name}"
    notes = [f"{task.rows:,} rows"]
    if task.stated:
        faults.append(f"{where}: {task.stated:,} of {task.rows:,} prompts state their answer")
    for count, what in ((task.mentioned, "mention their answer"), (task.marked, "hold one answer more often")):
        if count:
            notes.append(f"{count:,} prompts {what}")
        chance = MENTION_SHARE * task.rows
        if count > chance + 3 * (chance * (1 - MENTION_SHARE)) ** 0.5:  # three standard deviations, for few rows
            faults.append(f"{where}: {count:,} of {task.rows:,} prompts {what} (by chance: up to {MENTION_SHARE:.0%})")
    if task.labels:
        share = task.labels[TRUE] / task.labels.total()
        notes.append(f"{share:.1%} True")
        least = min(share, 1 - share)
        if least == 0 or (split_name != "train" and least < RARE_LABEL):
            faults.append(f"{where}: labels {dict(task.labels)}, expected both{', neither rare' * (least > 0)}")
    for length, positions in sorted(task.positions.items()):
        counts = [positions[i] for i in range(length)]
        notes.append(f"truth among {length} candidates ({order or 'order not stated'}): first {counts[0]:,}, "
                     f"last {counts[-1]:,} of {sum(counts):,}")  # fmt: skip
        if order == "shuffled" and length > 1 and sum(counts) >= 5 * length and chi_square_z(counts) > CHI_SQUARE_Z:
            faults.append(f"{where}: the order should be shuffled, but the truth is at {counts} of {length} candidates")
    print(f"  {split_name:10} {name}: {'; '.join(notes)}")
    return faults


def memorised_lists(splits: dict[str, Split]) -> list[str]:
    """Tasks whose training lists begin with the truth far more often than their test lists do."""
    faults = []
    for name in splits["train"].tasks.keys() & splits["test"].tasks.keys():
        shares, least = [], 100
        for split in ("train", "test"):
            positions = splits[split].tasks[name].positions.values()
            total = sum(counts.total() for counts in positions)
            shares.append(sum(counts[0] for counts in positions) / max(1, total))
            least = min(least, total)
        if least >= 100 and shares[0] > shares[1] + FIRST_SHARE:
            faults.append(f"train, {name}: the truth is first in {shares[0]:.0%} of the lists, in test in "
                          f"{shares[1]:.0%}: the candidate model was trained on the training queries")  # fmt: skip
    return faults


def candidate_order(stats: dict[str, Any], split: str) -> str | None:
    """``shuffled`` or ``ranked``, as the statistics of a task, or of a mix whose tasks agree, state it."""
    orders = {order.get(split) for order in stats.get("candidate_orders", {}).values() if order}
    orders.add(stats.get("candidate_order", {}).get(split))
    orders.discard(None)
    if not all(isinstance(order, str) for order in orders):
        raise ValueError("candidate_order")
    return orders.pop() if len(orders) == 1 else None


def check_folder(folder: Path) -> tuple[list[str], dict[str, Split]]:
    """The leaks within the three files of one folder, and their contents."""
    stats_path = folder / STATS
    stats = read_json(stats_path, "statistics") if stats_path.is_file() else {}
    with content_of(stats_path, "statistics", "write the task again"):
        orders = {split: candidate_order(stats, split) for split in FILE_STEMS}
    splits: dict[str, Split] = {}
    faults = []
    print(folder)
    for name in FILE_STEMS:
        path = existing_split(folder, name)
        if path is None:
            continue
        split = splits[name] = Split()
        for row in read_rows(path, plain=True):
            count_row(row, split)
        for task_name, task in split.tasks.items():
            faults += task_faults(name, task_name, task, orders[name])
        if split.repeated_ids:
            faults.append(f"{name}: {split.repeated_ids:,} ids occur twice")
    if {"train", "test"} <= splits.keys():
        faults += memorised_lists(splits)
    for a, b in combinations(splits, 2):
        shared = len(splits[a].facts & splits[b].facts)
        negatives = len(splits[a].negatives & splits[b].negatives)
        print(f"  {a} and {b}: {shared:,} facts and {negatives:,} negatives in both")
        if shared:
            faults.append(f"{shared:,} facts in both {a} and {b}")
    for a, b in product(splits, splits):
        both = len(splits[a].negatives & splits[b].facts)
        if both and a == "train" != b:  # sampling must not look at valid and test, so it meets some of their triples
            print(f"  {both:,} facts of {b} are negatives of train")
        elif both:
            faults.append(f"{both:,} triples are False in {a} and True in {b}")
    return [f"{folder.name}: {fault}" for fault in faults], splits


def check(root: Path) -> list[str]:
    """All leaks below ``root``, one line each. InputError where there is nothing to check."""
    if not root.is_dir():
        raise InputError(f"folder {root} does not exist; make data: {command('Class/gen_fb_data_rq.py')}")
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    folders = [folder for folder in folders if existing_split(folder, "train")]
    if not folders:
        raise InputError(
            f"no train.json or train.jsonl in {root} or its folders; make some: {command('Class/gen_fb_data_rq.py')}"
        )
    faults, read, inodes = [], {}, set()
    for folder in folders[::-1]:  # task folders first: the top may be hard links to one of them
        path = existing_split(folder, "train")
        assert path is not None
        inode = path.stat().st_ino
        if inode in inodes:
            print(f"{folder}\n  the files of a folder above")
            continue
        inodes.add(inode)
        found, splits = check_folder(folder)
        faults += found
        if folder != root:
            read[folder.name] = splits
    for a, b in ((a, b) for a in read for b in read if a != b):
        for split in ("train", "validation"):
            if split in read[a] and "test" in read[b]:
                shared = len(read[a][split].facts & read[b]["test"].facts)
                if shared:
                    faults.append(f"{shared:,} facts of {a}'s {split} are test facts of {b}")
    return faults


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(prog="Class/check_leaks.py", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=OUT_FOLDER, metavar="DIR", help="instruction data")
    faults = check(parser.parse_args(argv).folder)
    for fault in faults:
        print(f"LEAK {fault}")
    print(f"{len(faults)} leaks" if faults else "no leaks")
    return 1 if faults else 0


if __name__ == "__main__":
    run_command(main)
