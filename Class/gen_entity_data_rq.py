"""Tasks about entities, facts, codes and questions, each into a folder of its own.

    python Class/gen_entity_data_rq.py                                        all four, with the newest codes
    python Class/gen_entity_data_rq.py --tasks knowledge_reasoning question_answering --no_codes

entity_representation  name -> codes, codes -> name, both -> description
knowledge_reasoning    predict a tail, complete a triple (head or relation), validate a triple: as many True as False
code_understanding     levels shared at a position, a hidden code: computed from the codes
question_answering     questions over one relation in words, answered by all known answers

The first and the third hold out entities, a tenth each for validation and test (a mix shows their names and codes in
prompts of other tasks). The others hold out facts: a training row rests on training triples only, one of validation or
test on triples of its split only, and a question of validation or test is made only where every known answer is of its
split.

A row whose prompt holds its answer by chance (equal names, a loop) is left out and counted.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class import prompts
from Class.codes import escape_name
from Class.gen_fb_data_rq import make_splits
from Class.gen_lp_data_rq import Parts, disjoint_parts
from Class.rows import Row, make_row, write_task
from Class.source import Ints, Source, add_flags, check_flags, open_source, triple_keys
from common.errors import CommandParser, InputError, run_command
from common.files import command
from data.knowledge_graph import KnowledgeGraph, TrueTails, true_tails

SPLITS = ("train", "validation", "test")
HELD_OUT = 0.1  # of the entities, for validation and for test each
MAX_ANSWERS = 20  # of a question

Draft = Row | None  # None: there is no such row for this item
Maker = Callable[[int, np.random.Generator], Draft]


class Kind(NamedTuple):
    """One kind of row: its items (arguments of ``make``) in one split."""

    task_type: str
    items: Ints
    make: Maker


def holds_answer(prompt: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers occurs in the prompt between word boundaries."""
    return any(
        answer in prompt and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", prompt) is not None for answer in answers
    )


def rows_of(task: str, split: str, kinds: Sequence[Kind], seed: int, count: Counter[str]) -> Iterator[Row]:
    """The rows of all kinds in turn (train: shuffled); ``count`` gets what was left out.

    ``make`` returns the fields of a row; ``answers``, where given, are the texts that the prompt must not hold.
    """
    order = np.concatenate([
        np.stack([np.full(len(kind.items), number), np.arange(len(kind.items))], axis=1)
        for number, kind in enumerate(kinds)
    ])  # fmt: skip
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    order = rng.permutation(order) if split == "train" else order[np.lexsort((order[:, 0], order[:, 1]))]
    number = 0
    for which, i in order.tolist():
        kind = kinds[which]
        fields = kind.make(int(kind.items[i]), rng)
        if fields is None:
            count[f"{kind.task_type}: not possible"] += 1
            continue
        answers = fields.pop("answers", [fields["output"]])
        if holds_answer(fields["instruction"], answers):
            count[f"{kind.task_type}: the prompt would hold the answer"] += 1
            continue
        yield make_row(id=f"{task}-{split}-{number}", task_type=kind.task_type, split=split, **fields)
        number += 1


# ---------------------------------------------------------------- entities


def entity_parts(num_entities: int, seed: int) -> dict[str, Ints]:
    """The ids of the entities of each split, at random, one at least in each. InputError where there are not three."""
    if num_entities < len(SPLITS):
        raise InputError(f"the data set has {num_entities} entities, too few to hold some out; give another --dataset")
    order = np.random.default_rng([seed, 8]).permutation(num_entities)
    n = max(1, round(HELD_OUT * num_entities))
    return {"train": np.sort(order[2 * n :]), "validation": np.sort(order[:n]), "test": np.sort(order[n : 2 * n])}


def entity_kinds(source: Source, part: Ints) -> list[Kind]:
    """Name, codes and description of the entities of ``part``; no codes -> name for codes that entities share."""
    kg, names = source.kg, source.shown
    descriptions = [escape_name(text.strip()) for text in kg.descriptions]
    assert source.codes is not None
    _, inverse, sharing = np.unique(
        source.codes.reshape(len(source.codes), -1), axis=0, return_inverse=True, return_counts=True
    )
    alone = sharing[inverse.ravel()] == 1
    described = np.array([bool(text) for text in descriptions], dtype=bool)

    def row(e: int, prompt: str, output: str) -> Row:
        return {"instruction": prompt, "output": output, "truth": [kg.entities[e]]}

    return [
        Kind("name_to_codes", part, lambda e, _: row(e, prompts.name_to_codes(names[e]), source.code_texts[e])),
        Kind("codes_to_name", part[alone[part]],
             lambda e, _: row(e, prompts.codes_to_name(source.code_texts[e]), names[e])),
        Kind("explain_codes", part[described[part]],
             lambda e, _: row(e, prompts.explain_codes(names[e], source.entity_texts[e]), descriptions[e])),
    ]  # fmt: skip


# ---------------------------------------------------------------- facts


def fact_kinds(source: Source, triples: Ints, judged: Ints, labels: Ints) -> list[Kind]:
    """Predict, complete and validate over ``triples`` [n, 3]; ``judged`` [m, 3] hold where ``labels`` [m] is 1."""
    kg, coded = source.kg, source.with_codes
    shown, texts, relations = source.shown, source.entity_texts, source.relations

    def fact(number: int, prompt: str, output: str, answers: list[str], truth: str, direction: str | None) -> Row:
        return {"instruction": prompt, "output": output, "answers": answers, "truth": [truth],
                "direction": direction, "triple": source.raw_triple(*triples[number].tolist())}  # fmt: skip

    def tail(number: int, _: np.random.Generator) -> Draft:
        h, r, t = triples[number].tolist()
        prompt = prompts.predict_tail(shown[h], relations[r], texts[h], coded)
        return fact(number, prompt, texts[t], [shown[t]], kg.entities[t], "tail")

    def complete(number: int, rng: np.random.Generator) -> Draft:
        h, r, t = triples[number].tolist()
        if rng.random() < 0.5:
            prompt = prompts.complete_head(relations[r], shown[t], texts[t], coded)
            return fact(number, prompt, texts[h], [shown[h]], kg.entities[h], "head")
        prompt = prompts.complete_relation(shown[h], shown[t], texts[h], texts[t], coded)
        return fact(number, prompt, relations[r], [relations[r]], kg.relations[r], None)

    def judge(number: int, _: np.random.Generator) -> Draft:
        h, r, t = judged[number].tolist()
        answer = prompts.TRUE if labels[number] else prompts.FALSE
        prompt = prompts.validate_triple(shown[h], relations[r], shown[t], texts[h], texts[t], coded)
        return {"instruction": prompt, "output": answer, "answers": [], "truth": [answer],
                "triple": source.raw_triple(h, r, t)}  # fmt: skip

    return [
        Kind("predict_tail", np.arange(len(triples)), tail),
        Kind("complete_triple", np.arange(len(triples)), complete),
        Kind("validate_triple", np.arange(len(judged)), judge),
    ]


def judged_triples(kg: KnowledgeGraph, parts: Parts, seed: int) -> dict[str, tuple[Ints, Ints]]:
    """Triples and labels per split, one negative per positive; those of valid that are not for validation are left out.

    True and False take turns. Where valid and test come with negatives, these are used.
    """
    found = {}
    kept = {"train": parts.train, "validation": parts.validation, "test": parts.test}
    for split, rows in make_splits(kg, 1, seed).items():
        triples, labels = rows.rows
        true, false = np.flatnonzero(labels), np.flatnonzero(~labels)
        own = np.isin(triple_keys(triples[true], kg), triple_keys(kept[split], kg))
        # validation and test have their negatives in the positives' order: those that go with what is kept
        true, false = true[own], false[own] if len(true) == len(false) else false[: int(own.sum())]
        chosen = np.stack([true[: len(false)], false], axis=1).ravel()
        found[split] = (triples[chosen], labels[chosen].astype(np.int64))
    return found


# ---------------------------------------------------------------- codes


def code_kinds(source: Source, part: Ints) -> list[Kind]:
    """Questions about the codes of the entities of ``part``; other entities in them are of ``part`` too."""
    assert source.codes is not None
    codes = source.codes
    L, Q = codes.shape[1:]
    own = codes[part]

    def prefix(e: int, rng: np.random.Generator) -> Draft:
        position = int(rng.integers(L))
        shared = (own[:, position] == codes[e, position]).cumprod(axis=1).sum(axis=1)
        shared[part == e] = -1
        counts = np.unique(shared[shared >= 0])
        if not len(counts):
            return None
        wanted = rng.choice(counts)  # uniform over counts: most pairs share nothing
        other = part[rng.choice(np.flatnonzero(shared == wanted))]
        prompt = prompts.shared_prefix(source.entity_texts[e], source.entity_texts[other], position)
        answer = f"{wanted} of {Q}"
        return {"instruction": prompt, "output": answer, "truth": [answer]}

    def hidden(e: int, rng: np.random.Generator) -> Draft:
        position, level = divmod(int(rng.integers(L * Q)), Q)
        token = f"Q{level}_{codes[e, position, level]}"
        masked, found = re.subn(rf"{token}(?![0-9])", "?", source.entity_texts[e])
        if found > 1:  # the same code at another position would show it
            return None
        return {"instruction": prompts.hidden_level(masked), "output": token, "truth": [token]}

    return [
        Kind("shared_prefix", part, prefix),
        Kind("hidden_level", part, hidden),
    ]


# ---------------------------------------------------------------- questions


def question_kinds(source: Source, own: TrueTails, known: TrueTails) -> list[Kind]:
    """Questions over one relation whose answers are all ``own``; items are rows of ``own``.

    ``known``: all answers; a query with more of them than ``own`` has is left out.
    """
    kg, R = source.kg, source.kg.num_relations
    heads, relation = own.keys // (2 * R), own.keys % (2 * R)
    sizes, rows = np.diff(own.indptr), known.rows(heads, relation)
    complete = sizes == np.where(rows >= 0, np.diff(known.indptr)[rows], 0)

    def question(row: int, rng: np.random.Generator) -> Draft:
        h, r = int(heads[row]), int(relation[row])
        tails = own.targets[own.indptr[row] : own.indptr[row + 1]].tolist()
        facts = sorted((h, r, t) if r < R else (t, r - R, h) for t in tails)
        words = prompts.relation_text(source.relations[r % R], "tail" if r < R else "head")
        names = [source.shown[tail] for tail in tails]
        return {
            "instruction": prompts.question(source.entity_texts[h], words, int(rng.integers(len(prompts.QUESTIONS)))),
            "output": "\n".join(names),
            "answers": names,
            "triple": [name for fact in facts for name in source.raw_triple(*fact)],
            "truth": [kg.entities[tail] for tail in tails],
        }

    return [Kind("one_hop_question", np.flatnonzero(complete & (sizes <= MAX_ANSWERS)), question)]


# ---------------------------------------------------------------- command


def make_tasks(source: Source, seed: int) -> dict[str, Callable[[], dict[str, list[Kind]]]]:
    """Per task, a function that makes its kinds of each split."""
    kg = source.kg
    entities, facts = entity_parts(kg.num_entities, seed), disjoint_parts(kg, seed)
    triples = {"train": facts.train, "validation": facts.validation, "test": facts.test}

    def reasoning() -> dict[str, list[Kind]]:
        judged = judged_triples(kg, facts, seed)
        return {split: fact_kinds(source, triples[split], *judged[split]) for split in SPLITS}

    def questions() -> dict[str, list[Kind]]:
        own = {split: true_tails(triples[split], kg.num_entities, kg.num_relations) for split in SPLITS}
        # training uses its own triples only; in the others, a query with answers in another split is left out
        known = {"train": own["train"], "validation": kg.answers(), "test": kg.answers()}
        return {split: question_kinds(source, own[split], known[split]) for split in SPLITS}

    return {
        "entity_representation": lambda: {split: entity_kinds(source, entities[split]) for split in SPLITS},
        "knowledge_reasoning": reasoning,
        "code_understanding": lambda: {split: code_kinds(source, entities[split]) for split in SPLITS},
        "question_answering": questions,
    }


TASKS = ("entity_representation", "knowledge_reasoning", "code_understanding", "question_answering")
NEED_CODES = ("entity_representation", "code_understanding")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="Class/gen_entity_data_rq.py", description=__doc__.split("\n")[0])
    add_flags(parser)
    group = parser.add_argument_group("tasks")
    group.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to write")
    args = parser.parse_args(argv)
    check_flags(args, parser)
    if args.no_codes and set(args.tasks) <= set(NEED_CODES):
        parser.error(f"--no_codes: {', '.join(args.tasks)} need codes; leave out --no_codes")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    source = open_source(args)
    tasks = make_tasks(source, args.seed)
    for task in args.tasks:
        if args.no_codes and task in NEED_CODES:
            print(f"{task}: left out, it is about codes (--no_codes)")
            continue
        print(task)
        kinds = tasks[task]()
        counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        write_task(
            args.out_dir / task, task, args, source,
            {split: rows_of(task, split, kinds[split], args.seed, counts[split]) for split in SPLITS},
            lambda counts=counts: {"left_out": {split: dict(count) for split, count in counts.items()}},  # type: ignore[misc]
        )  # fmt: skip
        for split, count in counts.items():
            for what, number in sorted(count.items()):
                print(f"  {split:10} {number:,} rows left out of {what}")
    mix, check = command("Class/build_mix.py", "--out_dir", args.out_dir), command("Class/check_leaks.py", args.out_dir)
    print(f"next: {mix}, then {check}")


if __name__ == "__main__":
    run_command(main)
