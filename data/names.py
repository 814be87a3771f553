"""Checks of names: several spellings of one name, header lines, numbers as names, and the order of rows in a file."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import InputError

# first lines that name the columns; a line is a header if each of its words is of its column's set
HEADER_WORDS = (
    {"head", "subject", "source", "from", "h", "s", "head_id", "subject_id", "entity1", "node1"},
    {"relation", "predicate", "edge", "property", "label", "r", "p", "rel", "relation_id", "type"},
    {"tail", "object", "target", "to", "t", "o", "tail_id", "object_id", "entity2", "node2"},
)


def plain_name(name: str) -> str:
    """The name in Unicode form NFC, without BOMs, repeated or outer white space, and quotes around it."""
    name = " ".join(unicodedata.normalize("NFC", name.replace("\ufeff", "").replace("\u200b", " ")).split())
    if len(name) > 2 and name[0] == name[-1] and name[0] in "\"'":
        name = name[1:-1].strip()
    return name


def same_but_for_spelling(names: Sequence[str]) -> list[list[str]]:
    """Groups of names that ``plain_name`` makes equal: they are probably one entity, written in several ways."""
    plain = [name if name.isalnum() and name.isascii() else plain_name(name) for name in names]
    if len(set(plain)) == len(names):
        return []
    groups: dict[str, list[str]] = defaultdict(list)
    for name, key in zip(names, plain, strict=True):
        groups[key].append(name)
    return [group for group in groups.values() if len(group) > 1]


def unusual(names: Sequence[str]) -> list[str]:
    """Names that ``plain_name`` changes."""
    return [name for name in names if plain_name(name) != name]


def is_header(h: str, r: str, t: str) -> bool:
    """Whether a line names the columns, such as "head relation tail"."""
    columns = zip((h, r, t), HEADER_WORDS, strict=True)
    return all(word.strip().strip("\"'<#").lower() in words for word, words in columns)


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
