"""Files of triples in five formats, each also packed with gzip, turned into the lines of a ``train.txt``.

.txt           head TAB relation TAB tail; read as it is
.tsv, .csv     a table with three columns, or with a header line that names three of its columns; quotes as in CSV
.nt, .ttl      RDF: N-Triples and Turtle, read by rdflib; names are IRIs, literals are no entities

``docs/DATA.md`` says what happens with unusual content.
"""

from __future__ import annotations

import csv
import gzip
import io
import logging
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import InputError
from data.names import header_columns

FORMATS = ("txt", "tsv", "csv", "nt", "ttl")
ENDINGS = tuple(f".{name}{packed}" for name in FORMATS for packed in ("", ".gz"))  # the order of preference
# what files of a split are called; also behind a common prefix: wikidata5m_transductive_train.txt, x-valid.txt
SPLIT_NAMES = {
    "train": ("train",),
    "valid": ("valid", "dev", "val", "validation"),
    "test": ("test",),
    "valid_neg": ("valid_neg",),
    "test_neg": ("test_neg",),
}
INSTALL = "pip install rdflib==7.6.0"
NO_BASE = "http://base.invalid/"  # in front of relative IRIs while Turtle is parsed
RDFS, SCHEMA = "http://www.w3.org/2000/01/rdf-schema#", "http://schema.org/"
LABELS = (f"{RDFS}label", "http://www.w3.org/2004/02/skos/core#prefLabel", f"{SCHEMA}name")
DESCRIPTIONS = (f"{RDFS}comment", f"{SCHEMA}description")
PLAIN_LINE = re.compile(r"[ \t]*" + r"[ \t]+".join([r'<([^:\s"<>\\]+:[^\s"<>\\]*)>'] * 3) + r"[ \t]*\.[ \t\r]*(?:#.*)?")
Triple = tuple[str, str, str]


class Content(NamedTuple):
    """A file of triples as a ``train.txt`` would hold them."""

    text: bytes  # head TAB relation TAB tail, one line each, UTF-8
    lines: Sequence[int] | None = None  # the file's line of each; None: the same
    notes: Sequence[str] = ()  # what was left out
    labels: Mapping[str, str] = MappingProxyType({})  # of RDF
    descriptions: Mapping[str, str] = MappingProxyType({})


# ---------------------------------------------------------------- which files


class GraphFiles(NamedTuple):
    """Where a graph's triples are: canonical name (train.txt) -> file; with train alone, the graph is to be split."""

    name: str
    folder: Path | None  # of the optional files
    splits: dict[str, Path]
    unread: Sequence[str] = ()  # other files of the same split


def ending(name: str) -> str | None:
    """The ending of a file of triples, such as .nt.gz; None for other files."""
    return next((end for end in ENDINGS if name.lower().endswith(end)), None)


def stem(path: Path) -> str:
    """The name without the ending: graph of graph.nt.gz."""
    return path.name[: -len(ending(path.name) or path.suffix) or None]


def find_files(path: Path) -> GraphFiles | None:
    """The files of the graph at ``path``, a folder or one file; None for a folder without triples in these formats.

    Raises InputError where several files could be meant, or a file has another ending.
    """
    if not path.is_file():
        return _in_folder(path)
    if ending(path.name) is None:
        raise InputError(f"--dataset {path} is a file, expected a folder or a file that ends with {', '.join(ENDINGS)}")
    try:
        whole = _in_folder(path.resolve().parent)
    except InputError:  # of other graphs in the same folder
        whole = None
    if whole and path.name in {file.name for file in whole.splits.values()} and "valid.txt" in whole.splits:
        raise InputError(f"--dataset {path} is one of the splits in {path.parent}; give the folder")
    if whole and list(whole.splits) == ["train.txt"] and stem(path) == "train":
        return whole._replace(splits={"train.txt": path}, unread=())
    return GraphFiles(stem(path), None, {"train.txt": path})


def _in_folder(folder: Path) -> GraphFiles | None:
    files: dict[str, dict[str, str]] = {}  # name without the ending -> ending -> name
    for name in sorted(path.name for path in folder.iterdir()):
        end = ending(name)
        if end and not name.startswith("."):
            files.setdefault(name[: -len(end)], {})[end] = name
    splits, unread = {}, []
    prefix = _prefix(folder, files)
    for split, words in SPLIT_NAMES.items():
        there = [files.get(f"{prefix}{word}", {}) for word in words]
        found = [names[end] for names in there for end in ENDINGS if end in names]
        if found:
            splits[f"{split}.txt"] = folder / found[0]
            unread += [f"{name} is not read: {found[0]} is" for name in found[1:]]
    if not splits:
        single = [name for names in files.values() for end, name in names.items() if not end.startswith(".txt")]
        if len(single) != 1:
            return None
        splits = {"train.txt": folder / single[0]}
    return GraphFiles(folder.resolve().name, folder, splits, unread)


def _prefix(folder: Path, files: Iterable[str]) -> str:
    """What stands before "train" in the files' names: nothing, or something that ends with - _ or a dot."""
    if "train" in files:
        return ""
    found = sorted(name[:-5] for name in files if name.endswith(("_train", "-train", ".train")))
    if len(found) > 1:
        raise InputError(
            f"data folder {folder} has several training files: {', '.join(f'{name}train' for name in found)}; keep one "
            "graph per folder"
        )
    return found[0] if found else ""


# ---------------------------------------------------------------- reading


def read_triples(path: Path) -> Content:
    """The content of a file of triples. Raises InputError with the file, the line, what was found and expected."""
    content = _unpacked(path)
    end = (ending(path.name) or ".txt").removesuffix(".gz")
    if end == ".txt":
        return Content(content)
    text = _decoded(path, content)
    if end in (".tsv", ".csv"):
        return _table(path, text, "\t" if end == ".tsv" else ",")
    return _rdf(path, text, end)


def _unpacked(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.name.lower().endswith(".gz") else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} cannot be unpacked: {error}; expected a whole file packed with gzip") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _decoded(path: Path, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise fault(path, line, repr(content[error.start : error.start + 1]), "UTF-8 text") from error
    if "\0" in text:
        raise fault(path, text[: text.index("\0")].count("\n") + 1, "a NUL byte", "UTF-8 text")
    if not text.strip():
        raise fault(path, 1, "an empty file", "at least one line")
    return text


def fault(path: Path, line: int, found: str, expected: str) -> InputError:
    """An error in the form of the graph reader's."""
    return InputError(f"{path}:{line}: found {found}, expected {expected}")


def as_lines(triples: Sequence[Triple]) -> bytes:
    """The content of a train.txt."""
    return "".join(f"{h}\t{r}\t{t}\n" for h, r, t in triples).encode()


# ---------------------------------------------------------------- tables


def _table(path: Path, text: str, separator: str) -> Content:
    """The triples of a table: its three columns, or those that a header line names."""
    columns = (0, 1, 2)
    rows = list(_rows(path, text, separator))
    header = header_columns(rows[0][1])
    notes = []
    if header and (len(rows[0][1]) > 3 or not _used_below(rows, header[1])):
        columns = header
        others = [word for i, word in enumerate(rows[0][1]) if i not in header]
        notes.append(
            f"{path.name}: 1 header line is not a triple: {separator.join(rows[0][1])!r}"
            + (f"; columns that are not read: {', '.join(others)}" if others else "")
        )
        rows = rows[1:]
        if not rows:
            raise fault(path, 1, "a header line alone", "at least one triple")
    width = len(rows[0][1]) if header and columns == header else 3
    triples = []
    for line, row in rows:
        if len(row) != width:
            what = "an empty line" if not row else f"{len(row)} column{'s' * (len(row) != 1)}"
            more = "" if header else " (other tables: a first line that names head, relation and tail)"
            raise fault(path, line, what, f"{width}, separated by {separator!r}: head relation tail{more}")
        triple = (row[columns[0]], row[columns[1]], row[columns[2]])
        for name in triple:
            if not name or "\t" in name or "\n" in name or "\r" in name:
                what = f"a tab or line break in the name {name[:60]!r}" if name else "an empty name"
                raise fault(path, line, what, "names without")
        triples.append(triple)
    return Content(as_lines(triples), [line for line, _ in rows], notes)


def _rows(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Line and fields of each row. A .csv may also be separated by semicolons or tabs: its first line decides."""
    first = text.partition("\n")[0]
    if separator == "," and first.count(",") < 2:
        separator = next((other for other in (";", "\t") if first.count(other) > 1), ",")
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=separator != "\t"
    )
    line = 1
    try:
        for row in reader:
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise fault(path, line, f"a row that is no CSV ({error})", 'names with a quote as "say ""x"""') from error


def _used_below(rows: Sequence[tuple[int, list[str]]], column: int) -> bool:
    """Whether the first row's relation is also used in another row: then it is a triple."""
    relation = rows[0][1][column]
    return any(len(row) > column and row[column] == relation for _, row in rows[1:])


# ---------------------------------------------------------------- RDF


class _SameLabels(dict[str, Any]):
    """For rdflib: a blank node's id is its label in the file, in place of a random one."""

    def get(self, label: str, default: Any = None) -> str:
        return f"_:{label}"


class _Triples:
    """Collects what rdflib parses, in the file's order."""

    def __init__(self, path: Path) -> None:
        try:
            from rdflib.term import Literal
        except ModuleNotFoundError as error:
            raise InputError(f"{path} needs the package rdflib; run: {INSTALL}") from error
        logging.getLogger("rdflib.term").setLevel(logging.ERROR)  # it warns of unusual IRIs, which are names here
        self.literal = Literal
        self.found: list[tuple[Any, Any, Any]] = []

    def triple(self, s: Any, p: Any, o: Any) -> None:
        self.found.append((s, p, o))


def _rdf(path: Path, text: str, end: str) -> Content:
    lines: list[int] | None = None
    notes: list[str] = []
    texts: tuple[dict[str, str], dict[str, str]] = ({}, {})
    if end == ".nt":
        triples, literals, lines = _n_triples(path, text)
    else:
        triples, literals = _turtle(path, text)
    skipped = _read_texts(literals, texts)
    if skipped:
        example = " ".join(skipped[0])[:120]
        notes.append(f"{path.name}: {len(skipped)} triples with a literal as object are left out, such as {example!r}")
    if not triples:
        raise fault(path, 1, "no triple of three resources", "at least one")
    return Content(as_lines(triples), lines, notes, *texts)


def _n_triples(path: Path, text: str) -> tuple[list[Triple], list[tuple[Triple, str | None]], list[int]]:
    """Triples, triples whose object is a literal with its language, and the lines of the former.

    Blank nodes keep their label, so that it means the same node in all files of a folder. Lines of three plain IRIs are
    matched by a pattern, which is 20 times as fast.
    """
    triples: list[Triple] = []
    literals: list[tuple[Triple, str | None]] = []
    lines: list[int] = []
    sink: _Triples | None = None
    for number, line in enumerate(text.split("\n"), 1):
        plain = PLAIN_LINE.fullmatch(line)
        if plain:
            triples.append((plain[1], plain[2], plain[3]))
            lines.append(number)
            continue
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if sink is None:
            sink = _Triples(path)
            from rdflib.exceptions import ParserError
            from rdflib.plugins.parsers.ntriples import W3CNTriplesParser

            parser = W3CNTriplesParser(sink=sink)  # type: ignore[arg-type]
        parser.line = line.removesuffix("\r")
        try:
            parser.parseline(bnode_context=_SameLabels())
        except (ParserError, ValueError) as error:
            raise fault(path, number, repr(line[:80]), "a line <IRI> <IRI> <IRI> . (N-Triples)") from error
        if sink.found:
            s, p, o = sink.found.pop()
            triple = (str(s), str(p), str(o))
            if isinstance(o, sink.literal):
                literals.append((triple, o.language))
            else:
                triples.append(triple)
                lines.append(number)
    return triples, literals, lines


def _turtle(path: Path, text: str) -> tuple[list[Triple], list[tuple[Triple, str | None]]]:
    """Triples and triples whose object is a literal with its language.

    Blank nodes are numbered in the order of the file, with the file's name: they are other nodes than another file's.
    Relative IRIs stay relative.
    """
    sink = _Triples(path)
    from rdflib import BNode, Graph

    class Recorder(Graph):
        def add(self, triple: Any) -> Any:
            sink.triple(*triple)
            return self

    try:
        Recorder().parse(data=text, format="turtle", publicID=NO_BASE)
    except Exception as error:  # rdflib raises errors of many types
        line = int(getattr(error, "lines", 0)) + 1
        reason = getattr(error, "_why", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise fault(path, line, f"no Turtle ({str(reason)[:120]})", "RDF in Turtle") from error
    blank: dict[Any, str] = {}

    def name(node: Any) -> str:
        if isinstance(node, BNode):
            return blank.setdefault(node, f"_:{stem(path)}{len(blank) + 1}")
        return str(node).removeprefix(NO_BASE)

    triples, literals = [], []
    for s, p, o in sink.found:
        if isinstance(o, sink.literal):
            literals.append(((name(s), name(p), str(o)), o.language))
        else:
            triples.append((name(s), name(p), name(o)))
    return triples, literals


def _read_texts(
    literals: Sequence[tuple[Triple, str | None]], texts: tuple[dict[str, str], dict[str, str]]
) -> list[Triple]:
    """Put labels and descriptions into ``texts``: English or without a language first. Returns the other triples."""
    others = []
    for (s, p, o), _ in sorted(literals, key=lambda row: not (row[1] or "en").startswith("en")):
        kinds = [kind for kind, known in zip(texts, (LABELS, DESCRIPTIONS), strict=True) if p in known]
        if kinds:
            kinds[0].setdefault(s, " ".join(o.split()))
        else:
            others.append((s, p, o))
    return others
