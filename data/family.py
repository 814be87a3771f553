"""The bundled graph: a made-up family of four generations, the same bytes for the same seed.

    python data/family.py --out data/family --seed 7 --people 1000

Couples of the first generation have children; these marry children of other couples, or people from outside, and so
on, never a relative. (h, r, t) means: the r of h is t. All relations up to nephews follow from parents and marriages.
Valid and test hold only triples that one of RULES derives from the training split alone.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, at_least, run_command
from common.files import ROOT, command, output_folder, write_text

Triple = tuple[str, str, str]

# each pair: the relation to a man, to a woman
PAIRS = {
    "parent": ("father", "mother"),
    "spouse": ("husband", "wife"),
    "child": ("son", "daughter"),
    "sibling": ("brother", "sister"),
    "grandparent": ("grandfather", "grandmother"),
    "grandchild": ("grandson", "granddaughter"),
    "parent's sibling": ("uncle", "aunt"),  # and their spouse
    "sibling's child": ("nephew", "niece"),  # and the spouse's sibling's child
}
RELATIONS = [relation for pair in PAIRS.values() for relation in pair]

# kin <- first, second: the second of the first of x is x's kin (unless it is x). Each rule holds without exception,
# since people marry once, and nobody with a common ancestor; ``check`` verifies it on the graph.
_KIN_RULES = {
    "parent": [("parent", "spouse"), ("sibling", "parent")],
    "spouse": [("child", "parent")],
    "child": [("spouse", "child"), ("child", "sibling")],
    "sibling": [("parent", "child"), ("sibling", "sibling")],
    "grandparent": [("parent", "parent"), ("grandparent", "spouse"), ("sibling", "grandparent")],
    "grandchild": [("child", "child"), ("spouse", "grandchild"), ("grandchild", "sibling")],
    "parent's sibling": [("parent", "sibling"), ("parent's sibling", "spouse"), ("sibling", "parent's sibling")],
    "sibling's child": [("sibling", "child"), ("spouse", "sibling's child"), ("sibling's child", "sibling")],
}
RULES: dict[str, list[tuple[str, str]]] = {
    head: [(a, b) for first, second in bodies for a in PAIRS[first] for b in PAIRS[second] if b == PAIRS[second][sex]]
    for kin, bodies in _KIN_RULES.items()
    for sex, head in enumerate(PAIRS[kin])
}

MEN = """Adam Alan Albert Alec Arthur Basil Ben Bruno Carl Cecil Charles Clive Colin Daniel David Dennis Derek Edgar
Edwin Eric Felix Frank Fred George Gilbert Gordon Graham Harold Henry Howard Hugh Ivan Jack James John Julian Karl Keith
Leo Leonard Lewis Martin Max Miles Neil Nigel Oliver Oscar Owen Patrick Paul Peter Philip Ralph Robert Roger Simon
Stephen Thomas Victor Walter William"""
WOMEN = """Ada Agnes Alice Amy Anna Audrey Beatrice Bella Betty Carol Celia Clara Cora Daisy Della Doris Dora Edith
Eleanor Ella Emily Emma Esther Eva Fay Flora Frances Grace Greta Hannah Harriet Hazel Helen Hilda Ida Irene Iris Jane
Joan Judith Julia Kate Laura Lena Lily Lucy Mabel Maria Martha Mary Maud Nancy Nora Olive Pauline Rachel Rose Ruth Sarah
Sylvia Vera Violet"""
SURNAME_STARTS = (
    "Ash Barn Black Brad Brook Clay Cross Dun Fair Green Hart Hay Holl Kings Lang Marsh Red Stan Thorn Whit"
)
SURNAME_ENDS = "bourne by field ford ham ley man ton well wood"
SURNAMES = [start + end for start, end in product(SURNAME_STARTS.split(), SURNAME_ENDS.split())]
WORK = """architect baker beekeeper bookbinder botanist bricklayer carpenter cellist chemist clockmaker cook dentist
electrician engineer farmer fisher florist gardener geologist glazier goldsmith grocer joiner journalist judge lawyer
librarian mechanic midwife miller nurse optician organist painter pharmacist photographer pilot plumber potter printer
saddler sailor sculptor surveyor tailor teacher translator vet weaver zoologist"""
TOWNS = """Aldmouth Birchester Caldwick Dunmere Eastholm Fernleigh Glenport Harrowgate Inverloch Kelbridge Lowmarsh
Millhaven Northcliff Oakhurst Penrow Ravensea Saltwick Tarnside Upperby Westmoor"""


@dataclass(eq=False)
class Person:
    man: bool
    born: int
    name: str = ""
    surname: str = ""
    parents: list[Person] = field(default_factory=list)  # father, mother; empty for people from outside
    spouse: Person | None = None
    children: list[Person] = field(default_factory=list)

    def ancestors(self) -> set[Person]:
        """Self, parents, and theirs."""
        return {self}.union(*(parent.ancestors() for parent in self.parents))

    def kin(self, kind: str) -> list[Person]:
        """The people of one kind of PAIRS, by its definition (RULES only check it)."""
        siblings = [person for person in (self.parents[0].children if self.parents else []) if person is not self]
        if kind == "parent":
            return self.parents
        if kind == "spouse":
            return [self.spouse] if self.spouse else []
        if kind == "child":
            return self.children
        if kind == "sibling":
            return siblings
        if kind == "grandparent":
            return [old for parent in self.parents for old in parent.parents]
        if kind == "grandchild":
            return [young for child in self.children for young in child.children]
        if kind == "parent's sibling":
            by_blood = [person for parent in self.parents for person in parent.kin("sibling")]
            return by_blood + [person.spouse for person in by_blood if person.spouse]
        by_marriage = self.spouse.kin("sibling") if self.spouse else []
        return [child for person in siblings + by_marriage for child in person.children]


def make_people(people: int, rng: random.Random) -> list[Person]:
    """``people`` persons of four generations, no two with one name."""
    everyone: list[Person] = []
    surnames = SURNAMES.copy()
    rng.shuffle(surnames)
    taken: set[str] = set()

    def add(man: bool, born: int, parents: list[Person]) -> Person:
        person = Person(man, born, parents=parents)
        person.surname = parents[0].surname if parents else surnames[len(everyone) % len(surnames)]
        free = [first for first in (MEN if man else WOMEN).split() if f"{first} {person.surname}" not in taken]
        if not free:
            raise InputError(f"--people {people} is more than the lists of names allow; choose fewer")
        person.name = f"{rng.choice(free)} {person.surname}"
        taken.add(person.name)
        everyone.append(person)
        return person

    def marry(man: Person, woman: Person) -> tuple[Person, Person]:
        man.spouse, woman.spouse = woman, man
        return man, woman

    couples = [
        marry(add(True, 1910 + rng.randrange(12), []), add(False, 1910 + rng.randrange(12), []))
        for _ in range(max(2, round(people * 0.07)))
    ]
    for generation in range(2, 5):
        young = []
        for father, mother in couples:
            for _ in range(rng.randint(2, 3)):
                if len(everyone) < people:
                    child = add(rng.random() < 0.5, mother.born + rng.randint(21, 34), [father, mother])
                    father.children.append(child)
                    mother.children.append(child)
                    young.append(child)
        couples = []
        if generation == 4:
            break
        rng.shuffle(young)
        for person in young:
            if person.spouse:
                continue
            own = person.ancestors()
            match = [
                other for other in young if other.man != person.man and not other.spouse and not own & other.ancestors()
            ]
            if rng.random() < 0.5 and match:
                spouse = match[0]
            elif len(everyone) < people:
                spouse = add(not person.man, person.born + rng.randint(-4, 4), [])
            else:
                continue
            couples.append(marry(person, spouse) if person.man else marry(spouse, person))
    return everyone


def raw(person: Person) -> str:
    """``Anna Ashford`` -> ``anna_ashford``, the entity's name in the triples."""
    return person.name.lower().replace(" ", "_")


def make_triples(everyone: list[Person]) -> list[Triple]:
    """All triples of all people, sorted."""
    return sorted(
        {
            (raw(person), PAIRS[kind][0 if other.man else 1], raw(other))
            for person in everyone
            for kind in PAIRS
            for other in person.kin(kind)
        }
    )


def derive(triples: Iterable[Triple]) -> set[Triple]:
    """The triples that one application of RULES to these gives."""
    tails: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for h, r, t in triples:
        tails[h][r].add(t)
    return {
        (h, relation, t)
        for h in list(tails)
        for relation, bodies in RULES.items()
        for first, second in bodies
        for middle in tails[h].get(first, ())
        for t in tails[middle].get(second, ())
        if t != h
    }


def split_triples(triples: list[Triple], rng: random.Random) -> dict[str, list[Triple]]:
    """train/valid/test: about 8% are held out, half for each, all derivable from train, all entities in train."""
    order = triples.copy()
    rng.shuffle(order)
    held = order[: round(0.08 * len(order))]
    train = order[len(held) :]
    derivable = derive(train)
    seen = {entity for h, _, t in train for entity in (h, t)}
    back = [triple for triple in held if triple not in derivable or not {triple[0], triple[2]} <= seen]
    returned = set(back)
    held = [triple for triple in held if triple not in returned]
    half = len(held) // 2
    return {"train": train + back, "valid": held[:half], "test": held[half:]}


def check(triples: list[Triple], splits: dict[str, list[Triple]], people: int) -> None:
    """Check the graph's properties (see the module); InputError names the one that fails."""
    known = set(triples)
    train = set(splits["train"])
    held = splits["valid"] + splits["test"]
    properties = {
        "every rule is sound": derive(known) <= known,
        "every held-out triple follows from train": set(held) <= derive(train),
        "every person is in train": len({entity for h, _, t in train for entity in (h, t)}) == people,
        "the splits are disjoint and complete": sorted([*train, *held]) == triples,
        "every relation is in train": {r for _, r, _ in train} == set(RELATIONS),
        "something is held out": bool(splits["valid"] and splits["test"]),
    }
    for name, holds in properties.items():
        if not holds:
            raise InputError(
                f"the family graph of {people} people lacks a property: {name}; choose another --seed or more --people"
            )


def write_family(out: str | Path, seed: int = 7, people: int = 1000) -> dict[str, int]:
    """Write the graph's files to ``out``; returns the number of triples per split. Raises InputError."""
    rng = random.Random(seed)
    everyone = make_people(people, rng)
    triples = make_triples(everyone)
    splits = split_triples(triples, rng)
    check(triples, splits, people)
    by_name = sorted(everyone, key=raw)
    lines = {f"{split}.txt": ["\t".join(triple) for triple in rows] for split, rows in splits.items()}
    lines["entities.dict"] = [f"{i}\t{raw(person)}" for i, person in enumerate(by_name)]
    lines["relations.dict"] = [f"{i}\t{relation}" for i, relation in enumerate(RELATIONS)]
    lines["entity2label.txt"] = [f"{raw(person)}\t{person.name}" for person in by_name]
    lines["entity2definition.txt"] = [
        f"{raw(person)}\t{rng.choice(WORK.split())} in {rng.choice(TOWNS.split())}, born {person.born}"
        for person in by_name
    ]
    lines["relation2text.txt"] = [f"{relation}\thas {relation}" for relation in RELATIONS]
    for file, rows in lines.items():
        write_text("\n".join(rows) + "\n", Path(out) / file)
    return {split: len(rows) for split, rows in splits.items()}


def main() -> None:
    parser = CommandParser(prog="data/family.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=output_folder, default=ROOT / "data" / "family", help="folder to write")
    parser.add_argument("--seed", type=at_least(0), default=7, help="random seed")
    parser.add_argument("--people", type=at_least(1), default=1000, help="number of entities")
    args = parser.parse_args()
    counts = write_family(args.out, args.seed, args.people)
    shown = ", ".join(f"{split} {count}" for split, count in counts.items())
    print(f"{args.out}: {args.people} people, {len(RELATIONS)} relations, {shown} triples")
    print(f"next: {command('run_rq.py', '--dataset', args.out)}")


if __name__ == "__main__":
    run_command(main)
