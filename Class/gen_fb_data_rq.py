"""Triple classification: is (h, r, t) true? Rows of the paper's Table 7, answered by True or False.

    python Class/gen_fb_data_rq.py                                   with the newest codes of codes_new/
    python Class/gen_fb_data_rq.py --dataset data/FB15k-237N --no_codes

Training: every training triple, and --neg_ratio sampled negatives for each. Validation and test: the triples of
valid.txt and test.txt, and the negatives of valid_neg.txt and test_neg.txt as they are, repeated lines included;
a data set without these files gets one sampled negative per triple.

Negatives of FB15k-237N are adversarial: their entities occur with the relation in training more often than those of
the positives. Uniform negatives teach the opposite, so the replaced end is drawn from the relation's training range:
the entities at that end of its training triples, each as often as it occurs there (otherwise frequent entities would
be a sign of True). Where that gives none, it is drawn from all entities.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.prompts import FALSE, TRUE, classification, short_classification
from Class.rows import Row, fill_top, make_row, train_command, write_task
from Class.source import Ints, Source, add_flags, check_flags, open_source, triple_keys
from common.errors import CommandParser, InputError, at_least, run_command
from common.files import command
from data.knowledge_graph import KnowledgeGraph

TASK = "triple_classification"
RANGE_ROUNDS, ROUNDS = 100, 2000  # draws per negative before the range, then the whole search, is given up
CHUNK = 1 << 16


class Ranges(NamedTuple):
    """The entities at one end of each relation's training triples, once per triple, as CSR over relations."""

    keys: Ints  # sorted r * M + entity
    indptr: Ints  # [R + 1]


class Labelled(NamedTuple):
    """Triples and whether they hold."""

    triples: Ints  # [n, 3]
    labels: NDArray[np.bool_]  # [n]


class Split(NamedTuple):
    """One split's rows; how many negatives had to come from outside the range; whether negatives were sampled."""

    rows: Labelled
    outside: int
    sampled: bool


def member(keys: Ints, sorted_keys: Ints) -> NDArray[np.bool_]:
    """Which of ``keys [n]`` occur among the sorted ones."""
    if not len(sorted_keys):
        return np.zeros(len(keys), dtype=bool)
    return sorted_keys[np.searchsorted(sorted_keys, keys).clip(max=len(sorted_keys) - 1)] == keys


def training_ranges(kg: KnowledgeGraph) -> tuple[Ranges, Ranges]:
    """The heads and the tails of each relation's training triples."""

    def of(column: int) -> Ranges:
        keys = np.sort(kg.train[:, 1] * kg.num_entities + kg.train[:, column])
        return Ranges(keys, np.searchsorted(keys, np.arange(kg.num_relations + 1) * kg.num_entities).astype(np.int64))

    return of(0), of(2)


def sample_negatives(
    positives: Ints,
    ratio: int,
    known: Ints,
    kg: KnowledgeGraph,
    ranges: tuple[Ranges, Ranges],
    rng: np.random.Generator,
) -> tuple[Ints, int]:
    """``ratio`` negatives [n * ratio, 3] of each positive [n, 3]: head or tail replaced, with equal probability.

    ``known``: sorted keys (``triple_keys``) that are never drawn, those of the positives among them. ``ranges``: of
    ``training_ranges``. Also returns how many negatives found none there and came from all entities. Raises InputError
    where a positive has no negative at all.
    """
    M = kg.num_entities
    negatives = np.repeat(positives, ratio, axis=0)
    todo, outside = np.arange(len(negatives)), 0
    for turn in range(ROUNDS):
        if turn == RANGE_ROUNDS:
            outside = len(todo)
        drawn = positives[todo // ratio]
        at_tail = rng.random(len(todo)) < 0.5
        if turn >= RANGE_ROUNDS:
            new = rng.integers(0, M, len(todo))
        else:
            new = np.empty(len(todo), dtype=np.int64)
            for end, chosen in enumerate((~at_tail, at_tail)):
                relation = drawn[chosen, 1]
                start, stop = ranges[end].indptr[relation], ranges[end].indptr[relation + 1]
                # a relation without training triples has no range: it gets the positive's own end, to be drawn again
                position = start + (rng.random(len(relation)) * (stop - start)).astype(np.int64)
                found = ranges[end].keys[position.clip(max=len(ranges[end].keys) - 1)] % M
                new[chosen] = np.where(stop > start, found, drawn[chosen, 2 * end])
        drawn[at_tail, 2], drawn[~at_tail, 0] = new[at_tail], new[~at_tail]
        negatives[todo] = drawn
        todo = todo[member(triple_keys(drawn, kg), known)]
        if not len(todo):
            return negatives, outside
    h, r, t = positives[todo[0] // ratio]
    raise InputError(
        f"no negative found for ({kg.entities[h]}, {kg.relations[r]}, {kg.entities[t]}) of {kg.name}: nearly every "
        "other entity makes it true; use a data set where relations are sparser"
    )


def make_splits(kg: KnowledgeGraph, ratio: int, seed: int) -> dict[str, Split]:
    """The labelled triples of train (shuffled), validation and test (in the files' order, True and False in turn).

    Training negatives avoid training triples only: avoiding those of valid and test too would leak which they are.
    Sampled validation and test negatives are in no split, and in no sampled training negative.
    """
    ranges = training_ranges(kg)
    rng = np.random.default_rng([seed, 0])
    negatives, outside = sample_negatives(kg.train, ratio, np.sort(triple_keys(kg.train, kg)), kg, ranges, rng)
    triples = np.concatenate([kg.train, negatives])
    order = rng.permutation(len(triples))
    splits = {"train": Split(Labelled(triples[order], order < len(kg.train)), outside, True)}
    known = np.concatenate([triple_keys(part, kg) for part in (triples, kg.valid, kg.test)])
    for number, (split, name) in enumerate([("validation", "valid"), ("test", "test")], 1):
        positives, given, outside = kg.split(name), kg.negatives(name), 0
        if given is None:
            rng = np.random.default_rng([seed, number])
            given, outside = sample_negatives(positives, 1, np.unique(known), kg, ranges, rng)
        known = np.concatenate([known, triple_keys(given, kg)])
        order = np.argsort(np.concatenate([np.arange(len(positives)), np.arange(len(given))]), kind="stable")
        rows = Labelled(np.concatenate([positives, given])[order], order < len(positives))
        splits[split] = Split(rows, outside, kg.negatives(name) is None)
    return splits


def rows_of(source: Source, split: str, labelled: Labelled, short: bool = False) -> Iterator[Row]:
    """The split's rows, one by one; ``short``: with the prompt for small budgets."""
    shown, texts, relations = source.shown, source.entity_texts, source.relations
    number = 0
    for start in range(0, len(labelled.triples), CHUNK):
        part = slice(start, start + CHUNK)
        for (h, r, t), holds in zip(labelled.triples[part].tolist(), labelled.labels[part].tolist(), strict=True):
            answer = TRUE if holds else FALSE
            prompt = (
                short_classification(relations[r], texts[h], texts[t])
                if short
                else classification(shown[h], relations[r], shown[t], texts[h], texts[t], source.with_codes)
            )
            yield make_row(
                prompt,
                answer,
                id=f"{TASK}-{split}-{number}",
                task_type=TASK,
                split=split,
                triple=source.raw_triple(h, r, t),
                truth=[answer],
                head=shown[h],
                relation=relations[r],
                tail=shown[t],
            )
            number += 1


def negative_counts(kg: KnowledgeGraph, splits: dict[str, Split]) -> dict[str, dict[str, Any]]:
    """Per split: positives, negatives and their source, how many negatives are repeated."""
    found: dict[str, dict[str, Any]] = {}
    for name, split in splits.items():
        triples, labels = split.rows
        keys = triple_keys(triples[~labels], kg)
        found[name] = {
            "positives": int(labels.sum()),
            "negatives": len(keys),
            "negatives_from": "sampled" if split.sampled else "given",
            "repeated_negatives": len(keys) - len(np.unique(keys)),
            "negatives_from_outside_the_range": split.outside,
        }
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="Class/gen_fb_data_rq.py", description=__doc__.split("\n")[0])
    add_flags(parser)
    group = parser.add_argument_group("negatives")
    group.add_argument("--neg_ratio", type=at_least(1), default=16, help="sampled negatives per training triple")
    parser.add_argument("--short", action="store_true", help="a prompt of half the tokens, for small budgets")
    args = parser.parse_args(argv)
    check_flags(args, parser)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    source = open_source(args)
    kg = source.kg
    splits = make_splits(kg, args.neg_ratio, args.seed)
    counts = negative_counts(kg, splits)
    folder = args.out_dir / TASK
    write_task(
        folder, TASK, args, source,
        {name: rows_of(source, name, split.rows, args.short) for name, split in splits.items()},
        lambda: {"labelled": counts},
    )  # fmt: skip
    for name, count in counts.items():
        print(
            f"  {name:10} {count['positives']:,} positives, {count['negatives']:,} negatives "
            f"({count['negatives_from']}, {count['repeated_negatives']:,} repeated)"
        )
    if fill_top(folder, args.out_dir):
        print(f"wrote this task to {args.out_dir}/train.json, validation.json, test_tasks.json too")
        print(f"next: {train_command(args.out_dir)} (or mix tasks first: {command('Class/build_mix.py')})")
    else:
        print(f"{args.out_dir} holds a mix, which was not changed; mix again: {command('Class/build_mix.py')}")


if __name__ == "__main__":
    run_command(main)
