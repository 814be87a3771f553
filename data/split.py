"""Split one file of triples, or a folder without valid and test, into train, valid and test.

    python data/split.py my.csv --out data/my
    python data/split.py graph.nt.gz --out data/graph --valid 2000 --test 0.05 --seed 1

Every entity and relation of valid and test occurs in train. Triples between the same two entities, in either direction
and of any relation, come into the same split: no triple has its inverse, its symmetric form or a duplicate relation in
another one (Toutanova and Chen 2015 made FB15k-237 from FB15k for this reason). Repeated triples are left out. The
split depends on the triples and the seed alone, not on their order or the file's format.
``run_rq.py --dataset my.csv`` makes the same split, with the default sizes, without writing it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, at_least, run_command

Ints = NDArray[np.int64]

MOST = 20_000  # triples of valid or test by default, as many as FB15k-237 has: enough for a standard error of .003


class Sizes(NamedTuple):
    """How a graph is split. A size is a part of the triples (below 1), their number, or None: a tenth, at most MOST."""

    valid: float | None = None
    test: float | None = None
    seed: int = 0

    def counts(self, n: int) -> tuple[int, int]:
        """Triples of valid and of test, of n."""
        wanted = [
            min(n // 10, MOST) if size is None else round(n * size) if size < 1 else int(size)
            for size in (self.valid, self.test)
        ]
        return max(wanted[0], 1), max(wanted[1], 1)


def split_triples(triples: Ints, M: int, R: int, sizes: Sizes, path: Path) -> dict[str, Ints]:
    """``[n, 3]`` triples of M entities and R relations -> train, valid, test, each sorted by (h, r, t).

    Groups of the triples between two entities are visited in random order; each goes to the one of valid and test that
    is further from its size, if its entities and relations stay in train. InputError where one of them gets none; it
    names ``path``.
    """
    packed = np.unique((triples[:, 0] * R + triples[:, 1]) * M + triples[:, 2])
    h, r, t = packed // (R * M), packed // M % R, packed % M
    pair = np.minimum(h, t) * M + np.maximum(h, t)
    order = np.argsort(pair, kind="stable")
    first = np.flatnonzero(np.diff(pair[order], prepend=-1))
    last = np.append(first[1:], len(order))
    ends = np.bincount(np.concatenate([h, t]), minlength=M)  # how often each entity occurs in train
    uses = np.bincount(r, minlength=R)
    wanted = sizes.counts(len(packed))
    found: tuple[list[int], list[int]] = ([], [])
    where = np.zeros(len(packed), dtype=np.int64)  # 0: train, 1: valid, 2: test
    for group in np.random.default_rng(sizes.seed).permutation(len(first)).tolist():
        least = min((0, 1), key=lambda i: len(found[i]) / wanted[i])
        if len(found[least]) >= wanted[least]:
            break
        rows = order[first[group] : last[group]].tolist()
        ends_lost = Counter([int(h[i]) for i in rows] + [int(t[i]) for i in rows])
        uses_lost = Counter(int(r[i]) for i in rows)
        if all(ends[e] > n for e, n in ends_lost.items()) and all(uses[e] > n for e, n in uses_lost.items()):
            found[least].extend(rows)
            where[rows] = least + 1
            for e, n in ends_lost.items():
                ends[e] -= n
            for e, n in uses_lost.items():
                uses[e] -= n
    if not all(found):
        raise InputError(
            f"{path} has {len(packed)} distinct triples; {sum(map(len, found))} can be taken from train so that all "
            "entities and relations stay in it and no pair of entities is in two splits; expected at least 1 for valid "
            "and 1 for test; give a larger graph, or a folder with train.txt, valid.txt and test.txt"
        )
    whole = np.stack([h, r, t], axis=1)
    return {name: whole[where == i] for i, name in enumerate(("train", "valid", "test"))}


# ---------------------------------------------------------------- the command


def size(word: str) -> float:
    """A part between 0 and 1, or a whole number of triples."""
    value = float(word)
    if not (0 < value < 1 or (value >= 1 and value == int(value))):
        raise argparse.ArgumentTypeError(f"{word} is neither a part between 0 and 1 nor a number of triples")
    return value


def main() -> None:
    from common.files import command, output_folder, write_json
    from common.record import make_record
    from data.hold_out import by_name, write_graph, write_texts
    from data.knowledge_graph import SPLITS, KnowledgeGraph, add_keep_names

    parser = CommandParser(prog="data/split.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="file of triples (.txt, .tsv, .csv, .nt, .ttl, also .gz) or a folder")
    parser.add_argument("--out", type=output_folder, required=True, metavar="DIR", help="folder to write")
    for split in ("valid", "test"):
        text = f"triples of {split}: a part, such as 0.1, or a number (default: a tenth, at most {MOST:,})"
        parser.add_argument(f"--{split}", type=size, metavar="SIZE", help=text)
    parser.add_argument("--seed", type=at_least(0), default=0, help="random seed")
    add_keep_names(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the split in --out")
    args = parser.parse_args()
    if args.out.resolve() in (args.file.resolve(), args.file.resolve().parent):
        raise InputError(f"--out {args.out} is where the triples are, and would hold both; choose another folder")
    if (args.out / "train.txt").exists() and not args.overwrite:
        raise InputError(f"--out {args.out} holds a graph; give --overwrite to replace it, or another folder")
    started = time.monotonic()
    kg = KnowledgeGraph.load(args.file, args.keep_names, Sizes(args.valid, args.test, args.seed))
    if "split" not in kg.report:
        raise InputError(f"{args.file} has valid and test already; give its training file alone to split that")
    splits = {split: by_name(kg.split(split), kg) for split in SPLITS}
    write_graph(args.out, args.file, kg.entities, kg.relations, splits)
    write_texts(args.out, kg)
    counts = {split: len(triples) for split, triples in splits.items()}
    facts = {"dataset": kg.name, "triples": counts, "trained_on": kg.train_digest(), **kg.report["split"]}
    write_json(make_record(vars(args), kg.input_hashes, time.monotonic() - started, **facts), args.out / "split.json")
    shown = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    print(f"{args.out}: {shown}; {kg.num_entities:,} entities and {kg.num_relations:,} relations, all in train")
    print(f"next: {command('run_rq.py', '--dataset', args.out)}")


if __name__ == "__main__":
    run_command(main)
