"""Semi-inductive split: some entities are removed from a graph, to arrive later with some of their triples.

    python data/hold_out.py --dataset data/family --fraction 0.1 --seed 0 --out OUT

writes to OUT the graph without the held-out entities (train.txt, valid.txt, test.txt, in the order of the old ids) and

support_1.txt, support_3.txt, support_10.txt    that many training triples of each held-out entity, or all it has
support_all.txt                                 all of them; each of these files contains the one before
query.txt                                       the held-out entities' triples of valid and test
OUT_with_new/                                   a graph folder with everything: support_all in train, query.txt as test

As in Wikidata5M-SI (Kochsiek and Gemulla 2023, arXiv 2310.11917), these triples connect a held-out entity with a known
one; those of two held-out entities are left out, as are those of a relation that no training triple has any more.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, at_least, run_command
from common.files import command, output_folder, write_json, write_text
from data.knowledge_graph import SPLITS, Ints, KnowledgeGraph, add_keep_names

SUPPORT = (1, 3, 10)
TEXT_FILES = ("entity2label.txt", "entity2text.txt", "FB15k_mid2name.txt", "entity2definition.txt", "relation2text.txt")

Triple = tuple[str, str, str]


def write_triples(triples: Sequence[Triple], path: Path) -> None:
    """``h TAB r TAB t`` lines."""
    write_text("".join("\t".join(triple) + "\n" for triple in triples), path)


def write_graph(
    out: Path, source: Path, entities: Sequence[str], relations: Sequence[str], splits: Mapping[str, Sequence[Triple]]
) -> None:
    """A graph folder of the form with names; its text files are those of the folder ``source``."""
    for split, triples in splits.items():
        write_triples(triples, out / f"{split}.txt")
    for names, file in ((entities, "entities.dict"), (relations, "relations.dict")):
        write_text("".join(f"{i}\t{name}\n" for i, name in enumerate(names)), out / file)
    for file in TEXT_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, out / file)


def write_texts(out: Path, kg: KnowledgeGraph) -> None:
    """Labels and descriptions of a graph that had no text files beside it: RDF has them in the file itself."""
    if any((out / name).exists() for name in TEXT_FILES):
        return
    labels = [f"{name}\t{kg.labels[i]}\n" for i, name in enumerate(kg.entities) if kg.has_label[i]]
    texts = [f"{name}\t{text}\n" for name, text in zip(kg.entities, kg.descriptions, strict=True) if text]
    for file, lines in (("entity2label.txt", labels), ("entity2definition.txt", texts)):
        if lines:
            write_text("".join(lines), out / file)


def by_name(triples: Ints, kg: KnowledgeGraph) -> list[Triple]:
    """Triples [n, 3] -> their raw names."""
    return [(kg.entities[h], kg.relations[r], kg.entities[t]) for h, r, t in triples.tolist()]


def choose_entities(kg: KnowledgeGraph, fraction: float, seed: int) -> Ints:
    """Sorted ids of the held-out entities: a random part of those that are in training triples."""
    seen = np.flatnonzero(~kg.unseen)
    count = round(fraction * kg.num_entities)
    if not 0 < count < len(seen) - 1:
        raise InputError(
            f"--fraction {fraction} of the {kg.num_entities} entities of {kg.name} are {count}; expected at least 1, "
            f"and fewer than {len(seen) - 1}"
        )
    return np.sort(np.random.default_rng(seed).choice(seen, count, replace=False))


def supports(triples: Ints, held: Ints, seed: int) -> dict[str, Ints]:
    """``support_*`` of training triples [n, 3] with one held-out entity each, grouped by entity."""
    order = np.random.default_rng([seed, 1]).permutation(len(triples))
    of_entity = defaultdict(list)
    for i in order.tolist():
        h, _, t = triples[i]
        of_entity[int(h if h in held else t)].append(i)
    found = {}
    for name, count in [*((f"support_{k}", k) for k in SUPPORT), ("support_all", len(triples))]:
        rows = [row for entity in sorted(of_entity) for row in of_entity[entity][:count]]
        found[name] = triples[np.array(rows, dtype=np.int64)]
    return found


def hold_out(dataset: Path, fraction: float, seed: int, out: Path, keep_names: bool = False) -> dict[str, int]:
    """Write the files above; returns counts of what they hold. InputError where a split would have no triple."""
    kg = KnowledgeGraph.load(dataset, keep_names)
    held = choose_entities(kg, fraction, seed)
    ends = {split: np.isin(kg.split(split)[:, [0, 2]], held).sum(1) for split in SPLITS}
    known = {split: kg.split(split)[ends[split] == 0] for split in SPLITS}
    relations_left = np.unique(known["train"][:, 1])

    def usable(split: str) -> Ints:
        triples = kg.split(split)[ends[split] == 1]
        return triples[np.isin(triples[:, 1], relations_left)]

    support = supports(usable("train"), held, seed)
    with_support = np.unique(support["support_all"][:, [0, 2]])
    query = np.concatenate([usable("valid"), usable("test")])
    query = query[(np.isin(query[:, [0, 2]], held) <= np.isin(query[:, [0, 2]], with_support)).all(1)]
    for name, triples in [*known.items(), ("query", query)]:
        if not len(triples):
            raise InputError(f"--fraction {fraction} of {dataset} leaves no triple for {name}; choose another")
    old = [name for i, name in enumerate(kg.entities) if i not in set(held.tolist())]
    new = sorted(kg.entities[i] for i in held if i in with_support)
    named = {split: by_name(triples, kg) for split, triples in known.items()}
    write_graph(out, dataset, old, kg.relations, named)
    for name, triples in [*support.items(), ("query", query)]:
        write_triples(by_name(triples, kg), out / f"{name}.txt")
    everything = named | {"train": named["train"] + by_name(support["support_all"], kg), "test": by_name(query, kg)}
    write_graph(out / f"{out.name}_with_new", dataset, [*old, *new], kg.relations, everything)
    for folder in (out, out / f"{out.name}_with_new"):
        write_texts(folder, kg)
    counts = {
        "known_entities": len(old), "new_entities": len(new), "without_support": len(held) - len(new),
        **{name: len(triples) for name, triples in [*known.items(), *support.items(), ("query", query)]},
        "of_two_new_entities": int(sum((ends[split] == 2).sum() for split in SPLITS)),
    }  # fmt: skip
    write_json({"dataset": kg.name, "fraction": fraction, "seed": seed, **counts}, out / "hold_out.json")
    return counts


def main() -> None:
    parser = CommandParser(prog="data/hold_out.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", type=Path, required=True, help="graph folder or file")
    add_keep_names(parser)
    parser.add_argument("--fraction", type=float, default=0.1, help="part of the entities to hold out")
    parser.add_argument("--seed", type=at_least(0), default=0, help="random seed")
    parser.add_argument("--out", type=output_folder, required=True, help="folder to write")
    args = parser.parse_args()
    if args.out.resolve() == args.dataset.resolve():
        raise InputError(f"--out {args.out} is the folder of --dataset; choose another")
    if not 0 < args.fraction < 1:
        raise InputError(f"--fraction {args.fraction}: expected one in (0, 1)")
    counts = hold_out(args.dataset, args.fraction, args.seed, args.out, args.keep_names)
    print(f"{args.out}: " + ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items()))
    train = command("run_rq.py", "--dataset", args.out)
    print(
        f"next: {train}\n"
        f"      {train} --eval_codes CODES.pt --checkpoint CK.pt "
        f"--encode {shlex.quote(str(args.out / 'support_all.txt'))} --encoded OUT.pt"
    )


if __name__ == "__main__":
    run_command(main)
