"""A knowledge graph in a folder or a file: read, checked, with its names and the known tails for filtered ranking.

Two forms of a folder are read. Names: ``train.txt``, ``valid.txt``, ``test.txt`` with tab-separated ``h r t`` per
line, or one of the other formats of ``data/formats.py``. The rows' order comes from ``entities.dict`` and
``relations.dict`` (``id TAB name``), else from ``entity2id.txt`` and ``relation2id.txt`` (``name TAB id``), else it is
that of the sorted names. OpenKE: ``train2id.txt``, ``valid2id.txt``, ``test2id.txt`` (first line a count, then
``h t r``) with ``entity2id.txt`` and ``relation2id.txt``. One file, or a folder without valid and test, is split by
``data/split.py``. ``data/README.md`` lists the optional files, ``docs/DATA.md`` what happens with unusual ones.

    python data/knowledge_graph.py data/family
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, run_command
from data.formats import Content, GraphFiles, as_lines, find_files, read_triples
from data.names import is_header, local_name, numbers_in_another_order, same_but_for_spelling, unusual
from data.split import Sizes, split_triples

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SPLITS = ("train", "valid", "test")
PUBLIC = (
    *("FB15k-237", "WN18RR", "FB15k-237N", "kinship", "umls", "nations"),
    *("CoDEx-S", "CoDEx-M", "CoDEx-L", "YAGO3-10", "NELL-995", "Wikidata5M"),
)
OPTIONAL = (
    "entities.dict",
    "relations.dict",
    "entity2id.txt",
    "relation2id.txt",
    "valid_neg.txt",
    "test_neg.txt",
    "entity2label.txt",
    "entity2text.txt",
    "FB15k_mid2name.txt",
    "entity2definition.txt",
    "relation2text.txt",
)
TRAIN_FILES = ("train.txt", "train2id.txt")


def train_hash(hashes: Mapping[str, Any]) -> Any:
    """The sha256 of the training split among a graph's, a record's or a checkpoint's input hashes; None without one."""
    return next((hashes[name] for name in TRAIN_FILES if name in hashes), None)


def with_inverse(triples: Ints, num_relations: int) -> Ints:
    """``[n, 3]`` -> ``[2n, 3]``: the triples, then (t, r + R, h) for each."""
    inverse = triples[:, ::-1].copy()
    inverse[:, 1] += num_relations
    return np.concatenate([triples, inverse])


@dataclass(frozen=True)
class TrueTails:
    """Known tails per query (h, r), inverse queries (r >= R) included, as CSR.

    ``keys [n]``: sorted distinct ``h * 2R + r``; the tails of ``keys[i]`` are
    ``targets[indptr[i]:indptr[i + 1]]``, sorted.
    """

    keys: Ints
    indptr: Ints
    targets: Ints
    num_relations: int

    def rows(self, h: ArrayLike, r: ArrayLike) -> Ints:
        """Position in ``keys`` of each query (h ``[B]``, r ``[B]``); -1 where the query has no known tail."""
        wanted = np.asarray(h, dtype=np.int64) * (2 * self.num_relations) + np.asarray(r, dtype=np.int64)
        if not len(self.keys):
            return np.full(wanted.shape, -1, dtype=np.int64)
        position = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        return np.where(self.keys[position] == wanted, position, -1).astype(np.int64)

    def of(self, h: Ints, r: Ints) -> tuple[Ints, Ints]:
        """CSR (indptr ``[B + 1]``, entities) of the known tails of each query (h ``[B]``, r ``[B]``), maybe none."""
        row = self.rows(h, r)
        begin = np.where(row >= 0, self.indptr[row], 0)
        size = np.where(row >= 0, self.indptr[row + 1] - begin, 0)
        indptr = np.concatenate([[0], np.cumsum(size)]).astype(np.int64)
        return indptr, self.targets[np.arange(indptr[-1]) + np.repeat(begin - indptr[:-1], size)]


def true_tails(triples: Ints, num_entities: int, num_relations: int) -> TrueTails:
    """The known tails of all queries in triples [n, 3]."""
    R, M = num_relations, num_entities
    edges = with_inverse(triples, R)
    pairs = np.unique((edges[:, 0] * (2 * R) + edges[:, 1]) * M + edges[:, 2])
    keys, start = np.unique(pairs // M, return_index=True)
    return TrueTails(keys, np.append(start, len(pairs)).astype(np.int64), pairs % M, R)


@dataclass
class KnowledgeGraph:
    """A validated graph: M entities, R relations, three splits of (h, r, t). Made by ``KnowledgeGraph.load``."""

    name: str
    entities: list[str]  # M raw names, row = id
    relations: list[str]  # R raw names
    train: Ints  # [n, 3]
    valid: Ints
    test: Ints
    labels: list[str]  # a readable name per entity, the raw name (of an IRI: its last part) where none exists
    has_label: Bools  # [M]
    descriptions: list[str]  # "" where none exists
    relation_labels: list[str]
    negative_splits: dict[str, Ints] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    input_hashes: dict[str, str] = field(default_factory=dict)
    degree: Ints = field(init=False)  # [M] training edges, both directions
    unseen: Bools = field(init=False)  # [M] in no training triple

    def train_digest(self, entities: int | None = None) -> str:
        """Hex digest of the training triples and all names; equal for both forms of files.

        ``entities``: of the graph of the first so many entities and of the triples among them (default: all).
        """
        count = self.num_entities if entities is None else entities
        names = "\n".join([*self.entities[:count], "", *self.relations]).encode()
        among = self.train[(self.train[:, [0, 2]] < count).all(1)]
        return hashlib.sha256(names + among.astype(np.int64).tobytes()).hexdigest()

    def __post_init__(self) -> None:
        ends = self.train[:, [0, 2]].ravel()
        self.degree = np.bincount(ends, minlength=self.num_entities).astype(np.int64)
        self.unseen = self.degree == 0

    @property
    def num_entities(self) -> int:
        return len(self.entities)

    @property
    def num_relations(self) -> int:
        """R, inverses not counted."""
        return len(self.relations)

    def split(self, name: str) -> Ints:
        """The triples ``[n, 3]`` of ``train``, ``valid`` or ``test``; InputError for another name."""
        if name not in SPLITS:
            raise InputError(f"split {name!r} does not exist; choose one of {', '.join(SPLITS)}")
        return {"train": self.train, "valid": self.valid, "test": self.test}[name]

    def negatives(self, split: str) -> Ints | None:
        """The known-false triples ``[n, 3]`` of ``{split}_neg.txt``: the file's order, repeats kept; None without."""
        self.split(split)
        return self.negative_splits.get(split)

    def answers(self, *splits: str) -> TrueTails:
        """The known tails of all queries in these splits (all three when none is named)."""
        triples = np.concatenate([self.split(name) for name in splits or SPLITS])
        return true_tails(triples, self.num_entities, self.num_relations)

    @classmethod
    def load(
        cls, path: str | Path, keep_names: bool = False, sizes: Sizes | None = None, test: bool = True
    ) -> KnowledgeGraph:
        """Read and check a folder or a file; ``report["warnings"]`` and notes go to stderr, once per process.

        ``keep_names``: accept names that differ in white space, quotes, BOM or Unicode form alone, and header lines in
        .txt. ``sizes``: of valid and test where there are none. ``test``: False leaves the files of the test split
        unread, and the split empty. ``input_hashes`` has the sha256 of each file, of a file
        in another format than .txt that of the train.txt (valid.txt, test.txt) with the same triples.
        Raises InputError with ``file:line``, what was found and what was expected.
        """
        source = _read_files(Path(path), test)
        reader = _Reader(source, keep_names, sizes, test)
        parts = reader.parts()
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in reader.raw.items()}
        for kind in ("note", "warning"):
            for text in parts["report"][f"{kind}s"]:
                line = f"{kind}: {path}: {text}"
                if line not in _PRINTED and os.environ.get("RANK", "0") == "0":
                    print(line, file=sys.stderr)
                _PRINTED.add(line)
        return cls(name=source.name, input_hashes=hashes, **parts)


_PRINTED: set[str] = set()  # notes and warnings that this process has printed


def train_sha256(path: Path) -> str | None:
    """``train_hash`` of the graph at ``path``, a folder or a file; None where there is none that can be read."""
    if not path.exists():
        return None
    names = ("train2id.txt",) if (path / "train2id.txt").is_file() else ("train.txt", "valid.txt")
    if all((path / name).is_file() for name in names):
        name = next(name for name in TRAIN_FILES if (path / name).is_file())
        return hashlib.sha256((path / name).read_bytes()).hexdigest()
    try:
        return train_hash(KnowledgeGraph.load(path, keep_names=True).input_hashes)
    except InputError:
        return None


# ---------------------------------------------------------------- names

SHOWN_MATCHES = 12


class NameIndex:
    """Rows by raw name, else by one of the lists ``names``, exactly, else ignoring case."""

    def __init__(self, raw: Sequence[str], names: Sequence[Sequence[str]]) -> None:
        self.raw, self.names = raw, names
        exact: dict[str, set[int]] = defaultdict(set)
        folded: dict[str, set[int]] = defaultdict(set)
        for column in names:
            for i, name in enumerate(column):
                exact[name].add(i)
                folded[name.casefold()].add(i)
        self.rows = {name: {i} for i, name in enumerate(raw)}, exact, folded

    def find(self, word: str, what: str, flag: str = "") -> int:
        """The row of a name. ``what`` is "entity" or "relation", ``flag`` the flag with the word.

        InputError lists the matches of an ambiguous name (by the first list of ``names``), or names that contain the
        word where there is no match.
        """
        prefix = f"{flag}: " if flag else ""
        for rows, key in zip(self.rows, (word, word, word.casefold()), strict=True):
            found = sorted(rows.get(key, ()))
            if len(found) == 1:
                return found[0]
            if found:
                matches = show_names(found, self.names[0], self.raw)
                raise InputError(
                    f"{prefix}{what} {word!r} is ambiguous, {len(found)} match: {matches}; give one in full"
                )
        part = word.casefold()
        near = sorted({i for column in self.names for i, name in enumerate(column) if part in name.casefold()})
        raise InputError(
            f"{prefix}no {what} is called {word!r}"
            + (f"; near: {show_names(near, self.names[0], self.raw)}" if near else "")
        )


def find_name(word: str, raw: Sequence[str], names: Sequence[Sequence[str]], what: str, flag: str = "") -> int:
    """``NameIndex.find``, for a single name."""
    return NameIndex(raw, names).find(word, what, flag)


def show_names(rows: Sequence[int], names: Sequence[str], raw: Sequence[str]) -> str:
    """The first of these rows as ``name [raw name]``, and how many more there are."""
    more = f" and {len(rows) - SHOWN_MATCHES} more" if len(rows) > SHOWN_MATCHES else ""
    return ", ".join(f"{names[i]} [{raw[i]}]" for i in rows[:SHOWN_MATCHES]) + more


# ---------------------------------------------------------------- the files


class _Source(NamedTuple):
    """A graph's files as they were read."""

    path: Path  # as given
    name: str
    folder: Path | None  # of all but the triples
    raw: dict[str, bytes]  # canonical name, such as train.txt -> content
    files: dict[str, Path]  # of triples in other files than FOLDER/train.txt, ...
    lines: dict[str, Sequence[int]]  # of these, where the number of a line differs
    notes: list[str]


def _read_files(path: Path, test: bool = True) -> _Source:
    """Read the files of a graph, all or (``test`` False) all but those of the test split; InputError where a required
    one is missing."""
    fetch = f"python data/download.py {path.name if path.name in PUBLIC else 'NAME'}"
    if not path.exists():
        raise InputError(
            f"data folder {path} does not exist; a public data set ({', '.join(PUBLIC)}) comes by: {fetch}"
        )
    splits = SPLITS if test else SPLITS[:-1]
    openke = [f"{split}2id.txt" for split in splits] + ["entity2id.txt", "relation2id.txt"]
    if path.is_dir() and not (path / "train.txt").exists() and (path / openke[0]).exists():
        missing = [name for name in openke if not (path / name).exists()]
        if missing:
            raise InputError(f"data folder {path} has no {', '.join(missing)}; {_instead(path, openke, fetch)}")
        skipped = ["entities.dict", "relations.dict", "valid_neg.txt", "test_neg.txt"]
        names = [*openke, *(name for name in OPTIONAL if name not in [*skipped, *openke] and (path / name).exists())]
        return _Source(path, path.resolve().name, path, {name: _bytes(path / name) for name in names}, {}, {}, [])
    found = find_files(path)
    missing = [f"{split}.txt" for split in SPLITS if found is None or f"{split}.txt" not in found.splits]
    if not test and missing == ["test.txt"]:
        missing = []
    if found is None or ("train.txt" in missing) or len(missing) == 1:
        names = [f"{split}.txt" for split in SPLITS]
        raise InputError(f"data folder {path} has no {', '.join(missing)}; {_instead(path, names, fetch)}")
    if not test:
        for name in ("test.txt", "test_neg.txt"):
            found.splits.pop(name, None)
    return _read_formats(path, found)


def _read_formats(path: Path, found: GraphFiles) -> _Source:
    """Read files of triples in any format, and the optional files beside them."""
    source = _Source(path, found.name, found.folder, {}, {}, {}, list(found.unread))
    labels: dict[str, dict[str, str]] = {"entity2label.txt": {}, "entity2definition.txt": {}}
    for name, file in found.splits.items():
        content = read_triples(file) if file.suffix != ".txt" else Content(_bytes(file))
        source.raw[name] = content.text
        if found.folder is None or file != found.folder / name:
            source.files[name] = file
        if content.lines is not None:
            source.lines[name] = content.lines
        source.notes.extend(content.notes)
        for texts, more in zip(labels.values(), (content.labels, content.descriptions), strict=True):
            texts.update(more)
    if found.folder is not None:
        optional = [name for name in OPTIONAL if not name.endswith("_neg.txt") and (found.folder / name).exists()]
        source.raw.update({name: _bytes(found.folder / name) for name in optional})
    for name, texts in labels.items():
        if texts:
            source.raw.setdefault(name, "".join(f"{key}\t{text}\n" for key, text in texts.items()).encode())
    return source


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _instead(folder: Path, required: list[str], fetch: str) -> str:
    """What the folder holds instead of the missing files, and the next step."""
    there = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    shown = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "") or "no file"
    return (
        f"it holds {shown}; expected {', '.join(required)} (or .tsv, .csv, .nt, .ttl, each also with .gz), or "
        f"train.txt alone, which is split by data/split.py; a public data set comes by: {fetch}"
    )


class _Reader:
    """Turns the bytes of a folder's files into the parts of a KnowledgeGraph, and collects all faults."""

    def __init__(
        self, source: _Source, keep_names: bool = False, sizes: Sizes | None = None, test: bool = True
    ) -> None:
        self.source = source
        self.raw = source.raw
        self.keep_names = keep_names
        self.sizes, self.test = sizes, test
        self.columns: dict[str, tuple[list[str], list[str], list[str]]] = {}  # of the form with names
        self.faults: list[str] = []
        self.report: dict[str, Any] = {"form": "names" if "train.txt" in self.raw else "openke", "warnings": []}
        self.report["notes"] = source.notes

    def fault(self, file: str, line: int, found: object, expected: str) -> None:
        shown = found if isinstance(found, _Words) else repr(found if not isinstance(found, str) else found[:80])
        path = self.source.files.get(file) or (self.source.folder or self.source.path) / file
        if file in self.source.lines and line <= len(self.source.lines[file]):
            line = self.source.lines[file][line - 1]
        self.faults.append(f"{path}:{line}: found {shown}, expected {expected}")

    def check(self) -> None:
        """Raise the first fault, with the number of the others."""
        if self.faults:
            more = len(self.faults) - 1
            others = f" (and {more} more problem{'s' * (more > 1)})" if more else ""
            raise InputError(self.faults[0] + others)

    def parts(self) -> dict[str, Any]:
        read = self.read_openke if self.report["form"] == "openke" else self.read_names
        entities, relations, splits = read()
        if not self.test:
            splits["test"] = np.empty((0, 3), dtype=np.int64)
            self.raw.pop("test.txt", None)  # the split's of a single file
        self.check_spelling(entities, "entity")
        self.check_spelling(relations, "relation")
        self.check()
        self.count(len(entities), len(relations), splits)
        labels, has_label, descriptions = self.entity_names(entities)
        relation_labels = self.relation_names(relations)
        self.check()
        return {
            "entities": entities,
            "relations": relations,
            **{name: splits[name] for name in SPLITS},
            "negative_splits": {name.removesuffix("_neg"): t for name, t in splits.items() if name.endswith("_neg")},
            "labels": labels,
            "has_label": has_label,
            "descriptions": descriptions,
            "relation_labels": relation_labels,
            "report": self.report,
        }

    def splits_read(self) -> list[str]:
        """The splits that have a file."""
        return [stem for stem in SPLITS if stem in self.columns]

    # ---------------- lines

    def lines(self, file: str) -> list[str]:
        """The file's lines without their ends; faults: NUL, not UTF-8, empty lines, an empty file."""
        content = self.raw[file]
        if b"\0" in content:
            self.fault(file, content[: content.index(b"\0")].count(b"\n") + 1, _Words("a NUL byte"), "UTF-8 text")
            return []
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            # with a BOM, the decoder counts from behind it
            start = error.start + 3 * content.startswith(b"\xef\xbb\xbf")
            self.fault(file, content[:start].count(b"\n") + 1, content[start : start + 1], "UTF-8 text")
            return []
        if "\r" in text:
            text = text.replace("\r\n", "\n").removesuffix("\r")
        if not text.strip():
            self.fault(file, 1, _Words("an empty file"), "at least one line")
            return []
        lines = text.removesuffix("\n").split("\n")
        if "" in lines:
            for number, line in enumerate(lines, 1):
                if not line:
                    self.fault(file, number, _Words("an empty line"), "none")
            return []
        return lines

    def triple_names(self, file: str) -> tuple[list[str], list[str], list[str]]:
        lines = self.lines(file)
        good = True
        for number, tabs in enumerate([line.count("\t") for line in lines], 1):
            if tabs != 2:
                good = False
                self.fault(file, number, _columns(tabs + 1), "3, tab-separated: head relation tail")
        fields = "\t".join(lines).split("\t") if good and lines else []
        for position in [i for i, value in enumerate(fields) if not value] if "" in fields else []:
            self.fault(file, position // 3 + 1, _Words("an empty name"), "head TAB relation TAB tail")
        return fields[0::3], fields[1::3], fields[2::3]

    def number(self, file: str, line: int, text: str, below: int, what: str) -> int:
        """A decimal integer in 0..below-1; a fault and 0 otherwise."""
        if text.isascii() and text.isdigit() and len(text) < 18 and int(text) < below:
            return int(text)
        self.fault(file, line, text, f"{what} in 0..{below - 1}")
        return 0

    def id_names(self, file: str, rows: Iterable[tuple[int, str, str]], size: int) -> list[str]:
        """Names by id from (line, id, name) rows; faults: ids out of range (so no gaps), repeated ids or names."""
        names: list[str | None] = [None] * size
        first: dict[str, int] = {}
        for line, text, name in rows:
            index = self.number(file, line, text, size, "an id (as many as names, no gaps)")
            if not name:
                self.fault(file, line, _Words("an empty name"), "a name")
            elif name in first:
                self.fault(file, line, name, f"a name not yet given in line {first[name]}")
            elif names[index] is not None:
                self.fault(file, line, text, f"an id not yet given to {names[index]!r}")
            names[index] = name
            first.setdefault(name, line)
        return [name or "" for name in names]

    # ---------------- the form with names

    def read_names(self) -> tuple[list[str], list[str], dict[str, Ints]]:
        stems = [stem for stem in (*SPLITS, "valid_neg", "test_neg") if f"{stem}.txt" in self.raw]
        columns = {stem: self.triple_names(f"{stem}.txt") for stem in stems}
        self.columns = columns
        self.check()
        self.check_headers()
        entities, where_entity = self.row_order("entities.dict", "entity2id.txt")
        relations, where_relation = self.row_order("relations.dict", "relation2id.txt")
        self.check()
        if entities is None:
            where_entity = "an entity of the three splits"
            entities = sorted(
                {name for stem in self.splits_read() for column in (0, 2) for name in columns[stem][column]}
            )
            if numbers_in_another_order(entities):
                self.report["warnings"].append(
                    f"the entities are the numbers 0 to {len(entities) - 1}, but the rows are in the order of the "
                    f"text ({', '.join(entities[:4])}, ...); for another order give entities.dict or entity2id.txt"
                )
        if relations is None:
            where_relation = "a relation of the three splits"
            relations = sorted({name for stem in self.splits_read() for name in columns[stem][1]})
        entity_id = {name: i for i, name in enumerate(entities)}
        relation_id = {name: i for i, name in enumerate(relations)}
        splits = {}
        for stem, (h, r, t) in columns.items():
            ids = np.empty((len(h), 3), dtype=np.int64)
            for column, (names, lookup, expected) in enumerate(
                [(h, entity_id, where_entity), (r, relation_id, where_relation), (t, entity_id, where_entity)]
            ):
                found = [lookup.get(name, -1) for name in names]
                ids[:, column] = found
                if -1 in found:
                    for line in np.flatnonzero(ids[:, column] < 0):
                        self.fault(f"{stem}.txt", int(line) + 1, names[line], expected)
            splits[stem] = ids
        self.check()
        if "valid" not in splits:
            splits |= self.split_train(entities, relations, splits["train"])
        return entities, relations, splits

    def split_train(self, entities: list[str], relations: list[str], triples: Ints) -> dict[str, Ints]:
        """train, valid and test of the only triples that there are; the files' contents become theirs."""
        sizes = self.sizes or Sizes()
        path = self.source.files.get("train.txt", self.source.path)
        splits = split_triples(triples, len(entities), len(relations), sizes, path)
        for stem, ids in splits.items():
            self.raw[f"{stem}.txt"] = as_lines([(entities[h], relations[r], entities[t]) for h, r, t in ids.tolist()])
        repeated = len(triples) - sum(map(len, splits.values()))
        self.report["split"] = {"seed": sizes.seed, "repeated_triples_left_out": repeated}
        self.report["notes"].append(
            f"split by data/split.py with seed {sizes.seed} into "
            + " / ".join(f"{len(ids):,}" for ids in splits.values())
            + " triples of train / valid / test"
            + (f"; {repeated:,} repeated triples are left out" if repeated else "")
        )
        return splits

    def row_order(self, dictionary: str, name2id: str) -> tuple[list[str] | None, str]:
        """Names by id of the file that gives them, else None; a fault where two files give different orders."""
        by_id, by_name = self.dictionary(dictionary), None
        if name2id in self.raw:
            by_name = self.name_ids(name2id)
        if by_id is not None and by_name is not None and by_id != by_name and not self.faults:
            row = next((i for i, pair in enumerate(zip(by_id, by_name, strict=False)) if pair[0] != pair[1]), 0)
            self.fault(name2id, 1, _Words("another order"), f"that of {dictionary} (row {row} differs); remove one")
        found = by_name if by_id is None else by_id
        return found, f"a name in {dictionary if by_id is not None else name2id}"

    def name_ids(self, file: str) -> list[str]:
        """``name TAB id`` lines after an optional first line with their count -> names by id."""
        lines = self.lines(file)
        first = lines[0].split() if lines else []
        numbered = list(enumerate(lines, 1))
        if len(first) == 1 and first[0].isdecimal():
            numbered = self.counted_lines(file)
        rows = []
        for number, line in numbered:
            columns = line.split("\t") if "\t" in line else line.rsplit(" ", 1)
            if len(columns) == 2:
                rows.append((number, columns[1].strip(), columns[0]))
            else:
                self.fault(file, number, _columns(len(columns)), "2: name id")
        return self.id_names(file, rows, len(numbered))

    def check_headers(self) -> None:
        """A fault for each first line that names the columns, unless its relation is used elsewhere too; a warning for
        one whose three names occur in no other line."""
        if self.keep_names:
            return
        relations = {name for _, names, _ in self.columns.values() for name in names[1:]}
        for stem, (h, r, t) in self.columns.items():
            if len(r) < 2 or r[0] in relations:
                continue
            ends = [names for column in self.columns.values() for names in (column[0][1:], column[2][1:])]
            if not is_header(h[0], r[0], t[0]):
                if not any(name in names for name in (h[0], t[0]) for names in ends):
                    first = f"{h[0]!r} {r[0]!r} {t[0]!r}"[:120]
                    self.report["warnings"].append(
                        f"the first line of {stem} may be a header: its names {first} occur in no other line"
                    )
            else:
                words = _Words(f"the header {h[0]} {r[0]} {t[0]}"[:80])
                self.fault(f"{stem}.txt", 1, words, "a triple; remove the line, or give --keep_names")

    def check_spelling(self, names: list[str], what: str) -> None:
        """A fault where names differ in white space, quotes, BOM or Unicode form alone; a warning for odd names."""
        groups = same_but_for_spelling(names)
        if groups:
            odd = max(groups[0], key=lambda name: (len(name), name))
            example = " and ".join(map(ascii, groups[0][:2]))
            found = f"{len(groups)} {what} names in several spellings, such as {example}"
            if self.keep_names:
                self.report["warnings"].append(f"{found}; they are different entities or relations")
                return
            file, line = self.where(odd)
            self.fault(file, line, _Words(found), SPELLING)
        elif odd_names := unusual(names):
            self.report["warnings"].append(
                f"{len(odd_names)} {what} names have outer or repeated white space, quotes around them, a BOM or "
                f"decomposed letters, such as {odd_names[0]!a}; they are kept as they are"
            )

    def where(self, name: str) -> tuple[str, int]:
        """File and line of the first triple with the name, else of the file of names."""
        for stem, columns in self.columns.items():
            lines = [names.index(name) for names in columns if name in names]
            if lines:
                return f"{stem}.txt", min(lines) + 1
        return next(file for file in ("entity2id.txt", "relation2id.txt", "entities.dict") if file in self.raw), 1

    def dictionary(self, file: str) -> list[str] | None:
        """``id TAB name`` lines -> names by id; None where the file is absent."""
        if file not in self.raw:
            return None
        lines = self.lines(file)
        rows = []
        for number, line in enumerate(lines, 1):
            columns = line.split("\t")
            if len(columns) == 2:
                rows.append((number, columns[0], columns[1]))
            else:
                self.fault(file, number, _columns(len(columns)), "2, tab-separated: id name")
        return self.id_names(file, rows, len(lines))

    # ---------------- the OpenKE form

    def counted_lines(self, file: str) -> list[tuple[int, str]]:
        """(line number, line) after a first line that holds their count."""
        lines = self.lines(file)
        if lines:
            count = lines[0].strip()
            if not (count.isascii() and count.isdigit() and len(count) < 18):
                self.fault(file, 1, lines[0], "the number of lines that follow")
            elif int(count) != len(lines) - 1:
                self.fault(file, 1, _Words(f"count {int(count)}"), f"{len(lines) - 1}, the number of lines that follow")
            elif int(count) == 0:
                self.fault(file, 1, _Words("count 0"), "at least one line after the count")
        return list(enumerate(lines, 1))[1:]

    def read_openke(self) -> tuple[list[str], list[str], dict[str, Ints]]:
        for file in ("entity2id.txt", "relation2id.txt"):
            self.counted_lines(file)
        self.check()
        entities, relations = self.name_ids("entity2id.txt"), self.name_ids("relation2id.txt")
        self.check()
        splits = {}
        for split in [split for split in SPLITS if f"{split}2id.txt" in self.raw]:
            file = f"{split}2id.txt"
            triples = []
            for number, line in self.counted_lines(file):
                columns = line.split()
                if len(columns) != 3:
                    self.fault(file, number, _columns(len(columns)), "3: head tail relation")
                    continue
                h = self.number(file, number, columns[0], len(entities), "the head's id")
                t = self.number(file, number, columns[1], len(entities), "the tail's id")
                r = self.number(file, number, columns[2], len(relations), "the relation's id (third: h t r)")
                triples.append((h, r, t))
            splits[split] = np.array(triples, dtype=np.int64).reshape(-1, 3)
        self.check()
        return entities, relations, splits

    # ---------------- names and the report

    def texts(self, file: str) -> dict[str, str]:
        """``name TAB text`` lines -> text by raw name: white space collapsed, the first line of a repeated name."""
        found: dict[str, str] = {}
        if file not in self.raw:
            return found
        for number, line in enumerate(self.lines(file), 1):
            key, tab, text = line.partition("\t")
            if not tab:
                self.fault(file, number, _columns(1), "2, tab-separated: name text")
            found.setdefault(key, " ".join(text.split()))
        return found

    def entity_names(self, entities: list[str]) -> tuple[list[str], Bools, list[str]]:
        """Labels, whether a name file gave them, descriptions.

        A label comes from entity2label, else entity2text, else FB15k_mid2name. Where no other file gives names or
        descriptions and most lines of entity2text hold a comma, it is of the form "name, gloss" (WN18RR): the name
        ends at the first comma and the gloss is the description. Else its whole text is the name (FB15k-237).
        """
        files = ("entity2label.txt", "entity2text.txt", "FB15k_mid2name.txt", "entity2definition.txt")
        label, text, mid, definition = (self.texts(file) for file in files)
        if not label and not mid and not definition and 2 * sum(", " in value for value in text.values()) > len(text):
            split = {name: value.partition(", ") for name, value in text.items()}
            text = {name: value[0] for name, value in split.items()}
            definition = {name: value[2] for name, value in split.items()}
        mid = {name: " ".join(value.split("_")).strip() for name, value in mid.items()}
        found = [label.get(name) or text.get(name) or mid.get(name, "") for name in entities]
        descriptions = [definition.get(name, "") for name in entities]
        has_label = np.array([bool(name) for name in found], dtype=bool)
        own = set(entities)
        self.report["labels_missing"] = int((~has_label).sum())
        self.report["descriptions_missing"] = descriptions.count("")
        self.report["names_of_other_entities"] = len(
            (label.keys() | text.keys() | mid.keys() | definition.keys()) - own
        )
        labels = [name or local_name(raw) for name, raw in zip(found, entities, strict=True)]
        self.report["labels_shared"] = len(labels) - len(set(labels))
        return labels, has_label, descriptions

    def relation_names(self, relations: list[str]) -> list[str]:
        """relation2text, else the raw name, of an IRI its last part, with spaces for its separators."""
        text = self.texts("relation2text.txt")
        self.report["relation_labels_missing"] = sum(not text.get(name) for name in relations)
        separators = str.maketrans(dict.fromkeys("/_.-", " "))
        return [
            text.get(name) or " ".join(local_name(name).translate(separators).split()) or name for name in relations
        ]

    def count(self, M: int, R: int, splits: dict[str, Ints]) -> None:
        """Fill the report: sizes, repeated triples, triples shared by splits, what never occurs in training."""
        packed = {name: (t[:, 0] * R + t[:, 1]) * M + t[:, 2] for name, t in splits.items()}
        distinct = {name: np.unique(values) for name, values in packed.items()}
        seen = np.zeros(M, dtype=bool)
        seen[splits["train"][:, [0, 2]]] = True
        used = np.zeros(M, dtype=bool)
        for name in SPLITS:
            used[splits[name][:, [0, 2]]] = True
        seen_relations = np.unique(splits["train"][:, 1])
        self.report |= {
            "entities": M,
            "relations": R,
            "triples": {name: len(t) for name, t in splits.items()},
            "repeated_triples": {name: len(packed[name]) - len(distinct[name]) for name in splits},
            "shared_triples": {
                f"{a}/{b}": len(np.intersect1d(distinct[a], distinct[b], assume_unique=True))
                for a, b in combinations(SPLITS, 2)
            },
            "unseen_entities": int((~seen).sum()),
            "unused_entities": int((~used).sum()),
            "triples_with_unseen_entities": {
                name: int((~seen[splits[name][:, [0, 2]]]).any(axis=1).sum()) for name in ("valid", "test")
            },
            "unseen_relations": R - len(seen_relations),
        }
        for name in [name for name in splits if name.endswith("_neg")]:
            for split in SPLITS:
                both = np.intersect1d(distinct[name], distinct[split], assume_unique=True)
                if len(both):
                    line = int(np.flatnonzero(packed[name] == both[0])[0]) + 1
                    self.report["warnings"].append(
                        f"{len(both)} triples of {name}.txt are also in {split}.txt, such as line {line}: they are "
                        "labelled True and False"
                    )


SPELLING = "one spelling (white space, quotes, BOM, Unicode form) of each name; --keep_names takes them as they are"


class _Words(str):
    """A description of a fault, printed as it is; any other string found in a file is quoted."""


def _columns(count: int) -> _Words:
    return _Words(f"{count} column{'s' * (count != 1)}")


def add_keep_names(parser: argparse._ActionsContainer) -> None:
    """The flag of every script that loads a graph by its name."""
    parser.add_argument("--keep_names", action="store_true", help="names in several spellings are different names")


def main() -> None:
    parser = CommandParser(prog="data/knowledge_graph.py", description="Validate a graph and print what it holds.")
    parser.add_argument("folder", help="the folder, such as data/family, or a file")
    add_keep_names(parser)
    args = parser.parse_args()
    start = time.perf_counter()
    kg = KnowledgeGraph.load(args.folder, args.keep_names)
    seconds = time.perf_counter() - start
    print(f"{kg.name}: {kg.num_entities} entities, {kg.num_relations} relations, loaded in {seconds:.2f} s")
    for key, value in kg.report.items():
        if key in ("warnings", "notes"):  # printed by ``load``
            continue
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"  {key.replace('_', ' '):30} {shown}")
    h, r, t = kg.train[0]
    print(f"  first training triple          {kg.labels[h]} | {kg.relation_labels[r]} | {kg.labels[t]}")


if __name__ == "__main__":
    run_command(main)
