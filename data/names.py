"""Checks of names: several spellings of one name, header lines, numbers as names, and the order of rows in a file."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from common.errors import InputError

# first lines that name the columns; a line is a header if each of its words is of its column's set
HEADER_WORDS = (
    {"head", "subject", "source", "from", "h", "s", "head_id", "subject_id", "entity1", "node1", "start_id"},
    {"relation", "predicate", "edge", "property", "label", "r", "p", "rel", "relation_id", "type"},
    {"tail", "object", "target", "to", "t", "o", "tail_id", "object_id", "entity2", "node2", "end_id"},
)


# what decides the order of a graph's rows
ROW_ORDER = "that of entities.dict or entity2id.txt, else the sorted names"

# names that ``plain_name`` may change: others are not looked at, which is faster
_ODD = re.compile(r"""[^\x20-\x7e]|  |^[ "']| $""")


def plain_name(name: str) -> str:
    """The name in Unicode form NFC, without BOMs, repeated or outer white space, and quotes around it."""
    name = " ".join(unicodedata.normalize("NFC", name.replace("\ufeff", "").replace("\u200b", " ")).split())
    if len(name) > 2 and name[0] == name[-1] and name[0] in "\"'":
        name = name[1:-1].strip()
    return name


def same_but_for_spelling(names: Sequence[str]) -> list[list[str]]:
    """Groups of names that ``plain_name`` makes equal: they are probably one entity, written in several ways."""
    plain = [plain_name(name) if _ODD.search(name) else name for name in names]
    if len(set(plain)) == len(names):
        return []
    groups: dict[str, list[str]] = defaultdict(list)
    for name, key in zip(names, plain, strict=True):
        groups[key].append(name)
    return [group for group in groups.values() if len(group) > 1]


def unusual(names: Sequence[str]) -> list[str]:
    """Names that ``plain_name`` changes."""
    return [name for name in names if _ODD.search(name) and plain_name(name) != name]


def local_name(name: str) -> str:
    """The readable part of an IRI, with spaces for its separators; any other name as it is."""
    if not name.startswith(("http://", "https://", "urn:")):
        return name
    part = unquote(re.split(r"[/#:]", name.rstrip("/#"))[-1])
    return " ".join(part.replace("_", " ").split()) or name


def is_header(h: str, r: str, t: str) -> bool:
    """Whether a line names the columns, such as "head relation tail"."""
    return header_columns([h, r, t]) == (0, 1, 2)


def header_columns(words: Sequence[str]) -> tuple[int, int, int] | None:
    """The columns of head, relation and tail by a header line; None where a line does not name each of them once."""
    plain = [word.strip().strip("\"'<#?:").lower() for word in words]
    found = [[i for i, word in enumerate(plain) if word in known] for known in HEADER_WORDS]
    if any(len(columns) != 1 for columns in found):
        return None
    return found[0][0], found[1][0], found[2][0]


def numbers_in_another_order(names: Sequence[str]) -> bool:
    """Whether the names are "0".."M-1", but name i is not in row i."""
    numbers = [str(i) for i in range(len(names))]
    return list(names) != numbers and set(names) == set(numbers)


def row_names(path: Path) -> Path:
    """The file of names beside a file of rows: NAME.entities.txt beside NAME.npy, one raw name per row."""
    return path.with_name(f"{path.stem}.entities.txt")


def rows_by_name(path: Path, size: int, entities: Sequence[str], flag: str) -> NDArray[np.int64] | None:
    """The row of each entity in ``path`` (``size`` rows), by the names beside it; None where there are no names.

    Raises InputError where the names are not as many as the rows, are repeated, or lack an entity.
    """
    file = row_names(path)
    if not file.is_file():
        return None
    try:
        names = file.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {path}: its names {file} cannot be read: {error}") from error
    row = {name: i for i, name in enumerate(names)}
    if len(names) != size or len(row) != size:
        raise InputError(f"{flag} {path} has {size} rows, {file} has {len(row)} distinct names in {len(names)} lines")
    absent = [name for name in entities if name not in row]
    if absent:
        raise InputError(f"{flag} {path}: {file} lacks {len(absent)} entities of --dataset, such as {absent[0]!r}")
    return np.array([row[name] for name in entities], dtype=np.int64)
