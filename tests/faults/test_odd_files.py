"""Generated graphs and rows with the oddities of real files: each is refused, reported, or makes no difference.

A case is a kind of oddity, a format and a seed. One case of each kind runs by default, drawn with a fixed seed; all run
with ``-m slow``. docs/DATA.md has a row for each kind.
"""

from __future__ import annotations

import gzip
import json
import random
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from Class.rows import longest_rows, read_rows
from common.errors import InputError
from data.knowledge_graph import SPLITS, KnowledgeGraph

Triple = tuple[str, str, str]
Graph = dict[str, list[Triple]]
SECONDS = 5.0  # processor time
REFUSED, REPORTED, SAME, KEPT = "refused", "reported", "the same graph", "the same names, nothing said"
PLACE = "od'd $HOME & #1 {x} 北京"  # the folder's name
WORDS = ("Zoé", "Ångström", "北京", "naïve café", "São Paulo", "plain", "O'Hara", "C++", "x_y", "Đà Nẵng")


class Kind(NamedTuple):
    """An oddity: what becomes of the names, of each file's text, of the folder, and what is expected."""

    expected: str
    names: Callable[[Graph, random.Random], Graph] | None = None
    texts: Sequence[Callable[[str, str, str], str]] = ()
    words: Sequence[str] = ()  # in the message
    ends: Sequence[str] = (".txt", ".tsv", ".csv")
    folder: Callable[[Path, Graph, random.Random], None] = lambda folder, graph, rng: None


def in_split(split: str, change: Callable[[str], str]) -> Callable[[Graph, random.Random], Graph]:
    """Change all names of one split."""

    def apply(graph: Graph, rng: random.Random) -> Graph:
        return graph | {split: [(change(h), r, change(t)) for h, r, t in graph[split]]}

    return apply


def some_name(change: Callable[[str], str]) -> Callable[[Graph, random.Random], Graph]:
    """Change one name everywhere but in the first triple that has it."""

    def apply(graph: Graph, rng: random.Random) -> Graph:
        name = rng.choice([h for h, _, _ in graph["train"]])
        rows = [(change(h) if h == name else h, r, change(t) if t == name else t) for h, r, t in graph["train"]]
        first = next(i for i, (h, _, _) in enumerate(graph["train"]) if h == name)
        rows[first] = graph["train"][first]
        return graph | {"train": [*rows, (change(name), "rel 0", name)]}

    return apply


def everywhere(change: Callable[[str], str]) -> Callable[[Graph, random.Random], Graph]:
    def apply(graph: Graph, rng: random.Random) -> Graph:
        return {split: [(change(h), r, change(t)) for h, r, t in rows] for split, rows in graph.items()}

    return apply


def ids(change: Callable[[list[str], random.Random], list[str]]) -> Callable[[Path, Graph, random.Random], None]:
    """Write entity2id.txt with the names in random order, changed."""

    def add(folder: Path, graph: Graph, rng: random.Random) -> None:
        names = change(rng.sample(names_of(graph), len(names_of(graph))), rng)
        lines = [f"{name}\t{i}\n" for i, name in enumerate(names)]
        (folder / "entity2id.txt").write_text("".join([f"{len(names)}\n"] * rng.randrange(2) + lines), encoding="utf-8")

    return add


def with_other_order(folder: Path, graph: Graph, rng: random.Random) -> None:
    ids(lambda names, rng: names)(folder, graph, rng)
    lines = [f"{i}\t{name}\n" for i, name in enumerate(reversed(names_of(graph)))]
    (folder / "entities.dict").write_text("".join(lines), encoding="utf-8")


def rename(end: str) -> Callable[[Path, Graph, random.Random], None]:
    """Give the training file an ending that is not read."""

    def apply(folder: Path, graph: Graph, rng: random.Random) -> None:
        next(folder.glob("train*")).rename(folder / f"train{end}")

    return apply


def special(graph: Graph, rng: random.Random) -> Graph:
    """Other characters between the words of each name."""
    sign = rng.choice(("|", " | ", "$", "&", "#", "{}", "%s", "\\n", "`x`", "*", "~", "<CODE>"))
    return everywhere(lambda name: name.replace(" ", sign))(graph, rng)


def header(words: str) -> Callable[[str, str, str], str]:
    def add(split: str, end: str, text: str) -> str:
        return words.replace(" ", separator(end)) + "\n" + text

    return add


def facts_as_negatives(graph: Graph, rng: random.Random) -> Graph:
    return graph | {"test_neg": [*rng.sample(graph["train"], 3), graph["test"][0]]}


def names_of(graph: Graph) -> list[str]:
    return sorted({name for rows in graph.values() for h, _, t in rows for name in (h, t)})


def numbered(graph: Graph, rng: random.Random) -> Graph:
    number = {name: str(i) for i, name in enumerate(names_of(graph))}
    return {split: [(number[h], r, number[t]) for h, r, t in rows] for split, rows in graph.items()}


ANY = (".txt", ".tsv", ".csv", ".nt", ".ttl")
TABLES = (".tsv", ".csv")


def nfd(name: str) -> str:
    return unicodedata.normalize("NFD", name)


def quoted_row(line: str, end: str) -> str:
    return separator(end).join('"' + name.replace('"', '""') + '"' for name in line.split(separator(end))) + "\n"


def quoted(split: str, end: str, text: str) -> str:
    return "".join(quoted_row(line, end) for line in text.splitlines())


def joined(split: str, end: str, text: str) -> str:
    return text + "\ufeff" + text.split("\n")[0] + "\n"


def with_literal(split: str, end: str, text: str) -> str:
    return text + '<http://e/a> <http://e/age> "12" .\n'


def to(old: str, new: str, count: int = -1) -> Callable[[str, str, str], str]:
    return lambda split, end, text: text.replace(old, new.replace("SEPARATOR", separator(end)), count)


SPELLINGS = ("spellings",)
KINDS: dict[str, Kind] = {
    "spaces around tabs": Kind(REFUSED, in_split("valid", lambda name: f" {name} "), (), SPELLINGS, (".txt", ".tsv")),
    "a space behind one name": Kind(REFUSED, some_name(lambda name: f"{name} "), (), SPELLINGS),
    "two spaces in one name": Kind(REFUSED, some_name(lambda name: name.replace(" ", "  ")), (), SPELLINGS),
    "a no-break space": Kind(REFUSED, some_name(lambda name: f"{name}\u00a0"), (), SPELLINGS),
    "quotes in test": Kind(REFUSED, in_split("test", lambda name: f'"{name}"'), (), SPELLINGS, (".txt",)),
    "NFD in valid": Kind(REFUSED, in_split("valid", nfd), (), SPELLINGS),
    "a BOM in a name": Kind(REFUSED, some_name(lambda name: f"\ufeff{name}"), (), SPELLINGS),
    "files joined with a BOM": Kind(REFUSED, None, (joined,), SPELLINGS, (".txt",)),
    "a header in .txt": Kind(REFUSED, None, (header("head relation tail"),), (":1: found the header",), (".txt",)),
    "a header in a table": Kind(SAME, None, (header("Subject Predicate Object"),), (), TABLES),
    "a BOM at the start": Kind(SAME, None, (lambda split, end, text: "\ufeff" + text,), (), ANY),
    "Windows line ends": Kind(SAME, None, (to("\n", "\r\n"),), (), ANY),
    "no newline at the end": Kind(SAME, None, (lambda split, end, text: text.rstrip("\n"),), (), ANY),
    "all names quoted as CSV": Kind(SAME, None, (quoted,), (), TABLES),
    "spaces behind commas": Kind(SAME, None, (to(",", ", "),), (), (".csv",)),
    "semicolons": Kind(SAME, None, (to(",", ";"),), (), (".csv",)),
    "quotes around all names": Kind(REPORTED, everywhere(lambda name: f"'{name}'"), (), ("quotes",)),
    "decomposed letters everywhere": Kind(REPORTED, everywhere(nfd), (), ("decomposed",)),
    "numbers as names": Kind(REPORTED, numbered, (), ("numbers 0 to",)),
    "facts as negatives": Kind(REPORTED, facts_as_negatives, (), ("labelled True and False",)),
    "literals": Kind(REPORTED, None, (with_literal,), ("literal",), (".nt", ".ttl")),
    "an empty line": Kind(REFUSED, None, (to("\n", "\n\n", 1),), (":2: ",)),
    "an empty name": Kind(REFUSED, some_name(lambda name: ""), (), ("an empty name",)),
    "a fourth column": Kind(REFUSED, None, (to("\n", "SEPARATOR1\n"),), ("4 columns",)),
    "entity2id in another order": Kind(KEPT, folder=ids(lambda names, rng: names)),
    "entity2id without an entity": Kind(REFUSED, folder=ids(lambda names, rng: names[1:]), words=("entity2id",)),
    "entity2id with a name twice": Kind(
        REFUSED, folder=ids(lambda names, rng: names + names[:1]), words=("entity2id",)
    ),
    "entities.dict in another order": Kind(REFUSED, folder=with_other_order, words=("entity2id", "entities.dict")),
    "special characters": Kind(KEPT, special),
    "names that look like flags": Kind(KEPT, everywhere(lambda name: f"--{name}")),
    "a training file of another kind": Kind(REFUSED, folder=rename(".parquet"), words=("train.parquet",)),
    "a training file packed otherwise": Kind(REFUSED, folder=rename(".txt.bz2"), words=("train.txt.bz2",)),
    "a line of words": Kind(REFUSED, None, (lambda split, end, text: text + "no triple\n",), (), ANY),
}


def separator(end: str) -> str:
    return "," if end == ".csv" else "\t"


def graph_of(seed: int) -> Graph:
    """A random graph in whose training split every name occurs."""
    rng = random.Random(seed)
    names = [f"é{rng.choice(WORDS)} {i}" for i in range(rng.randint(11, 30))]
    train = [(name, f"rel {i % 3}", names[(i + 1) % len(names)]) for i, name in enumerate(names)]
    others = [(rng.choice(names), f"rel {rng.randrange(3)}", rng.choice(names)) for _ in range(12)]
    return {"train": train, "valid": others[:6], "test": others[6:]}


def as_text(rows: list[Triple], end: str) -> str:
    if end in (".nt", ".ttl"):
        return "".join(" ".join(f"<http://e/{name.replace(' ', '_')}>" for name in row) + " .\n" for row in rows)
    return "".join(separator(end).join(row) + "\n" for row in rows)


def write(folder: Path, graph: Graph, end: str, kind: Kind, packed: bool, rng: random.Random) -> Path:
    folder.mkdir()
    for split, rows in graph.items():
        text = as_text(rows, end)
        for change in kind.texts:
            text = change(split, end, text)
        content = text.encode()
        path = folder / f"{split}{end}{'.gz' * packed}"
        path.write_bytes(gzip.compress(content) if packed else content)
    kind.folder(folder, graph, rng)
    return folder


def named(kg: KnowledgeGraph, split: str) -> list[Triple]:
    return [(kg.entities[h], kg.relations[r], kg.entities[t]) for h, r, t in kg.split(split)]


def all_cases() -> list[Any]:
    rng = random.Random(27)
    cases = []
    for name, kind in KINDS.items():
        every = [(end, packed, seed) for end in kind.ends for packed in (False, True) for seed in range(3)]
        chosen = rng.choice(every)
        for case in every:
            marks = [] if case == chosen else [pytest.mark.slow]
            cases.append(pytest.param(name, *case, marks=marks, id=f"{name}-{case[0]}{'.gz' * case[1]}-{case[2]}"))
    return cases


@pytest.mark.parametrize(("name", "end", "packed", "seed"), all_cases())
def test_an_oddity_is_refused_reported_or_harmless(
    tmp_path: Path, name: str, end: str, packed: bool, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, rng, graph = KINDS[name], random.Random(seed), graph_of(seed)
    odd = kind.names(graph, rng) if kind.names else graph
    folder = write(tmp_path / PLACE, odd, end, kind, packed, rng)
    plain = KnowledgeGraph.load(write(tmp_path / "plain", graph, end, Kind(SAME), False, rng))
    capsys.readouterr()
    began = time.process_time()
    if kind.expected == REFUSED:
        with pytest.raises(InputError) as error:
            KnowledgeGraph.load(folder)
        line = str(error.value)
        assert "\n" not in line and str(folder) in line and " expected " in line
        assert all(word in line for word in kind.words), line
    else:
        found = KnowledgeGraph.load(folder)
        if kind.expected == SAME:
            assert found.train_digest() == plain.train_digest() and found.entities == plain.entities
            assert all((found.split(split) == plain.split(split)).all() for split in SPLITS)
        elif kind.expected == KEPT:
            assert capsys.readouterr().err == "" and sorted(found.entities) == names_of(odd)
            assert {split: named(found, split) for split in SPLITS} == odd
        else:
            shown = capsys.readouterr().err
            assert "such as" in shown or "(" in shown
            assert all(word in shown for word in kind.words), shown
    assert time.process_time() - began < SECONDS


def test_a_tiny_file_is_split_without_leaks_or_refused(tmp_path: Path) -> None:
    """Of larger ones: tests/test_formats.py."""
    rng, refused, path = random.Random(0), 0, tmp_path / "tiny.txt"
    for _ in range(60):
        pool = WORDS[: rng.randint(1, 6)]
        triples = [(rng.choice(pool), f"rel {rng.randrange(2)}", rng.choice(pool)) for _ in range(rng.randint(1, 24))]
        path.write_text(as_text(triples, ".txt"), encoding="utf-8")
        try:
            kg = KnowledgeGraph.load(path)
        except InputError as error:
            assert "\n" not in str(error) and "tiny.txt" in str(error)
            refused += 1
            continue
        assert sorted(row for split in SPLITS for row in named(kg, split)) == sorted(set(triples))
        pairs = [{frozenset((h, t)) for h, _, t in named(kg, split)} for split in SPLITS]
        assert all(pairs) and not pairs[0] & pairs[1] and not pairs[0] & pairs[2] and not pairs[1] & pairs[2]
        assert not kg.unseen.any() and set(kg.train[:, 1]) == set(range(kg.num_relations))
    assert 0 < refused < 40


# ---------------------------------------------------------------- rows of instruction data

TEXTS = ("", "a\nb", ",", "[", "]", "},", '"', "\\", "\u2028", "北京", "\U0001f600", '"task_type": "x"', " {} ")


def layouts(rows: list[dict[str, Any]], rng: random.Random) -> dict[str, str]:
    ascii_only = rng.random() < 0.5
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    return {
        "array": json.dumps(rows, ensure_ascii=ascii_only),
        "dense": json.dumps(rows, ensure_ascii=ascii_only, separators=(",", ":")),
        "indented": json.dumps(rows, ensure_ascii=ascii_only, indent=rng.randrange(5)),
        "one per line": "[\n" + ",\n".join(lines) + "\n]\n",
        "JSON Lines": "\n".join(lines),
        "Windows lines": "\r\n".join(lines) + "\r\n",
        "with a BOM": "\ufeff" + "\n".join(lines) + "\n",
    }


@pytest.mark.parametrize("seed", range(12))
def test_rows_are_read_from_any_layout_and_a_cut_is_found(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = [
        {
            "instruction": "".join(rng.sample(TEXTS, 2)),
            "output": rng.choice(TEXTS),
            "id": i,
            "task_type": rng.choice("ab"),
        }
        for i in range(rng.randint(1, 40))
    ]
    path = tmp_path / "train.json"
    for layout, text in layouts(rows, rng).items():
        path.write_bytes(text.encode())
        assert list(read_rows(path)) == rows, layout
        few = list(longest_rows(path, count=2))
        assert {row["task_type"] for row in few} == {row["task_type"] for row in rows} and len(few) <= 4
        path.write_bytes(text.rstrip().encode()[: -rng.randint(1, 9)])
        with pytest.raises(InputError, match=r"train\.json") as error:
            list(read_rows(path))
        assert "\n" not in str(error.value), layout
