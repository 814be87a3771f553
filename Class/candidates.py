"""Candidate lists for link prediction: their file and its checks. Stage 1 makes them in model/export.py.

    python run_rq.py --dataset D --eval_codes C.pt --checkpoint CK.pt --export_candidates FILE.npz --split valid

One row per query. Stage 1 writes FILE.npz, with the ids of entities and relations (rows of the data set); the lists of
another model come as FILE.json, with raw names.

FILE.json    {"info": {...}, "rows": [{"query": ["ada_ashley", "father"], "direction": "tail", "truth": "max_ashley",
             "candidates": ["max_ashley", "tom_ford", ...], "scores": [9.1, 8.7, ...], "rank": 1.5}, ...]}
FILE.npz     query [n, 2], direction [n] ("tail" or "head"), candidates [n, C], info (JSON text), and where known
             truth [n], scores [n, C], rank [n]; shorter lists end in -1, an unknown rank is NaN

query        the entity that is given, and the relation in the data set's own direction
direction    the end that is to be predicted: "tail" is (query[0], query[1], ?), "head" is (?, query[1], query[0])
candidates   ranked, best first, without repeats
truth        (optional) the answer that this list is for: only other known answers were filtered out of it. A row
             without it serves every triple of its query; whatever is known of them is filtered by the reader
scores       (optional) higher is better, not rising along the list
rank         (optional) of the truth among all entities, filtered by the answers of all splits, ties at their mean
info         (optional in JSON) the origin: dataset, split, model, filter, ... "entities_sha256" (written here)
             identifies the order of entities that ids refer to. "shuffled_codes": true marks a control
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import InputError
from common.files import atomic_path, command, parse_json, read_json
from data.knowledge_graph import KnowledgeGraph, TrueTails

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LARGEST = sys.float_info.max  # JSON may hold whole numbers beyond it
DIRECTIONS = ("tail", "head")


class Candidates(NamedTuple):
    """n ranked lists of at most C entities."""

    queries: Ints  # [n, 2]: entity, relation; R..2R-1 are the inverses, queries for the head
    truth: Ints  # [n], -1 where the list serves every triple of its query
    ids: Ints  # [n, C], best first, ending in -1
    scores: Floats | None  # [n, C], NaN where ids are -1
    rank: Floats  # [n], NaN where unknown
    info: dict[str, Any]


def entities_hash(kg: KnowledgeGraph) -> str:
    """Hex digest of the entity and relation names in the order of their ids."""
    return hashlib.sha256("\n".join([*kg.entities, "", *kg.relations]).encode()).hexdigest()


# ---------------------------------------------------------------- write


def write_candidates(path: str | Path, candidates: Candidates, kg: KnowledgeGraph, **info: Any) -> None:
    """Write an .npz file; ``info`` adds to the lists' own. InputError for a folder that cannot be written."""
    relation = candidates.queries[:, 1]
    is_head = relation >= kg.num_relations
    arrays: dict[str, Any] = {
        "query": np.stack([candidates.queries[:, 0], relation % kg.num_relations], axis=1).astype(np.int32),
        "direction": np.array(DIRECTIONS)[is_head.astype(np.int64)],
        "truth": candidates.truth.astype(np.int32),
        "candidates": candidates.ids.astype(np.int32),
        "rank": candidates.rank,
        "info": np.array(json.dumps(candidates.info | info | {"entities_sha256": entities_hash(kg)})),
    }
    if candidates.scores is not None:
        arrays["scores"] = candidates.scores.astype(np.float32)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


# ---------------------------------------------------------------- read


def read_candidates(paths: Sequence[str | Path], kg: KnowledgeGraph) -> Candidates:
    """The lists of one or several files (of different splits), checked against ``kg``.

    ``info`` is that of the first file, with ``files``: the names of all. Raises InputError with file and row: unknown
    name or id, ids of another data set, repeated candidate, rising scores, rank below 1, a query of two
    lists (the same list twice counts once).
    """
    parts = [_read(Path(path), kg) for path in paths]
    C = max(part.ids.shape[1] for part in parts)
    scored = all(part.scores is not None for part in parts)

    def wide(array: NDArray[Any], fill: float) -> NDArray[Any]:
        return np.pad(array, [(0, 0), (0, C - array.shape[1])], constant_values=fill)

    merged = Candidates(
        np.concatenate([part.queries for part in parts]),
        np.concatenate([part.truth for part in parts]),
        np.concatenate([wide(part.ids, -1) for part in parts]),
        np.concatenate([wide(part.scores, np.nan) for part in parts if part.scores is not None]) if scored else None,
        np.concatenate([part.rank for part in parts]),
        parts[0].info | {"files": [Path(path).name for path in paths]},
    )
    # a triple that a data set repeats has its list as often
    _, first, place = np.unique(_keys(merged.queries, merged.truth, kg), return_index=True, return_inverse=True)
    same = first[place]
    other = (merged.ids != merged.ids[same]).any(axis=1) | (
        np.nan_to_num(merged.rank) != np.nan_to_num(merged.rank[same])
    )
    if other.any():
        raise InputError(
            f"--candidates {' '.join(map(str, paths))}: {int(other.sum())} queries have two lists; give each one once"
        )
    first.sort()
    queries, truth, ids, scores, rank, info = merged
    kept = None if scores is None else scores[first]
    return Candidates(queries[first], truth[first], ids[first], kept, rank[first], info)


def need_candidates(path: Path) -> None:
    """InputError where a candidates file does not exist, or is of another kind: said before a graph is read."""
    if path.suffix not in (".npz", ".json"):
        raise InputError(f"candidates file {path} must end in .npz or .json")
    if not path.exists():
        raise InputError(
            f"candidates file {path} does not exist; stage 1 writes one: {command('run_rq.py')} --eval_codes "
            f"CODES.pt --checkpoint CK.pt --split SPLIT --export_candidates {shlex.quote(str(path))}"
        )


def _read(path: Path, kg: KnowledgeGraph) -> Candidates:
    need_candidates(path)
    found = _read_npz(path, kg) if path.suffix == ".npz" else _read_json(path, kg)
    if not len(found.ids):
        raise InputError(f"candidates file {path} has no rows")
    there = found.ids >= 0
    _refuse(path, (there[:, 1:] & ~there[:, :-1]).any(axis=1), "has a gap in its list: -1 may only stand at the end")
    order = np.sort(found.ids, axis=1)
    _refuse(path, ((order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)).any(axis=1), "lists a candidate twice")
    if found.scores is not None:
        _refuse(path, (~np.isfinite(found.scores) & there).any(axis=1), "has a score that is not finite")
        falls = np.where(there[:, 1:], found.scores[:, 1:] <= found.scores[:, :-1], True).all(axis=1)
        _refuse(path, ~falls, "has scores that rise along the list; rank it best first")
    _refuse(path, found.rank < 1, "has a rank below 1")
    _refuse(path, np.isinf(found.rank), "has a rank that is not finite")
    return found


def _refuse(path: Path, rows: ArrayLike, problem: str) -> None:
    bad = np.asarray(rows, dtype=bool)
    if bad.any():
        raise InputError(f"candidates file {path}: row {int(bad.argmax())} {problem} ({int(bad.sum())} such rows)")


def _load_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an archive with their shapes and types checked. Raises InputError."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with loaded as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (
        OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"candidates file {path} cannot be read as an .npz archive: {reason}") from error
    missing = [name for name in ("query", "direction", "candidates", "info") if name not in arrays]
    if missing:
        raise InputError(
            f"candidates file {path} lacks {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}"
        )
    n = len(arrays["query"]) if arrays["query"].ndim else 0
    C = arrays["candidates"].shape[1] if arrays["candidates"].ndim == 2 else 0
    kinds = {"ids": "iu", "text": "U", "numbers": "fiu"}
    for name, shape, kind in (
        ("query", (n, 2), "ids"), ("direction", (n,), "text"), ("candidates", (n, C), "ids"),
        ("truth", (n,), "ids"), ("scores", (n, C), "numbers"), ("rank", (n,), "numbers"), ("info", (), "text"),
    ):  # fmt: skip
        if name in arrays and (arrays[name].shape != shape or arrays[name].dtype.kind not in kinds[kind]):
            raise InputError(
                f"candidates file {path}: {name} is {arrays[name].dtype} {list(arrays[name].shape)}, expected {kind} "
                f"{list(shape)}"
            )
    return arrays


def _read_npz(path: Path, kg: KnowledgeGraph) -> Candidates:
    arrays = _load_npz(path)
    n, M = len(arrays["query"]), kg.num_entities
    try:
        info = parse_json(str(arrays["info"]))
    except ValueError as error:
        raise InputError(f"candidates file {path}: info is no JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(info, dict) or info.get("entities_sha256") != entities_hash(kg):
        origin = info.get("dataset") if isinstance(info, dict) else None
        raise InputError(
            f"candidates file {path} has ids of {origin}, whose entities and relations are not those of {kg.name} "
            f"({M} and {kg.num_relations}) in the same order; export them from {kg.name}"
        )
    _refuse(path, ~np.isin(arrays["direction"], DIRECTIONS), f"has another direction than {' or '.join(DIRECTIONS)}")
    query, ids = arrays["query"].astype(np.int64), arrays["candidates"].astype(np.int64)
    truth = arrays["truth"].astype(np.int64) if "truth" in arrays else np.full(n, -1)
    wrong = (query < 0).any(axis=1) | (query >= [M, kg.num_relations]).any(axis=1) | (truth < -1) | (truth >= M)
    _refuse(path, wrong | (ids < -1).any(axis=1) | (ids >= M).any(axis=1), f"has an id outside 0..{M - 1}")
    query[:, 1] += kg.num_relations * (arrays["direction"] == "head")
    return Candidates(
        query,
        truth,
        ids,
        arrays["scores"].astype(np.float64) if "scores" in arrays else None,
        arrays["rank"].astype(np.float64) if "rank" in arrays else np.full(n, np.nan),
        info,
    )


def _is_number(value: Any) -> bool:
    """Whether a value read from JSON is a number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= LARGEST


def _fault_of(row: Any) -> str | None:
    """What is wrong with the form of a JSON row; None where nothing is."""
    if not isinstance(row, dict):
        return f"is a {type(row).__name__}, expected an object"
    query, listed, scores = row.get("query"), row.get("candidates"), row.get("scores")
    if (
        not isinstance(query, list) or len(query) != 2 or row.get("direction") not in DIRECTIONS
        or not isinstance(listed, list)
    ):  # fmt: skip
        return 'needs "query": [entity, relation], "direction": "tail" or "head", "candidates": [...]'
    if scores is not None and not (
        isinstance(scores, list) and len(scores) == len(listed) and all(map(_is_number, scores))
    ):
        return "scores must be numbers, one per candidate"
    return None if row.get("rank") is None or _is_number(row["rank"]) else "rank must be a number"


def _read_json(path: Path, kg: KnowledgeGraph) -> Candidates:
    content = read_json(path, "candidates")
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise InputError(f'candidates file {path} holds no {{"rows": [...]}}')
    info = content.get("info", {})
    if not isinstance(info, dict):
        raise InputError(f"candidates file {path}: info is a {type(info).__name__}, expected an object")
    entity_row = {name: i for i, name in enumerate(kg.entities)}
    relation_row = {name: i for i, name in enumerate(kg.relations)}

    def row_of(number: int, name: Any, names: dict[str, int], what: str) -> int:
        found = names.get(name) if isinstance(name, str) else None
        if found is None:
            raise InputError(
                f"candidates file {path}: row {number}: {what} {name!r} is no name of {kg.name}; write names as text"
            )
        return found

    queries, truths, lists = [], [], []
    for number, row in enumerate(rows):
        fault = _fault_of(row)
        if fault is not None:
            raise InputError(f"candidates file {path}: row {number}: {fault}")
        entity, relation = row["query"]
        inverse = kg.num_relations * (row["direction"] == "head")
        relation = row_of(number, relation, relation_row, "query relation") + inverse
        queries.append([row_of(number, entity, entity_row, "query entity"), relation])
        truths.append(-1 if row.get("truth") is None else row_of(number, row["truth"], entity_row, "truth"))
        lists.append([row_of(number, value, entity_row, "candidate") for value in row["candidates"]])
    n, C = len(rows), max(map(len, lists), default=0)
    scored = all(row.get("scores") is not None for row in rows)
    padded = [row["scores"] + [np.nan] * (C - len(row["scores"])) for row in rows] if scored else []
    return Candidates(
        np.array(queries, dtype=np.int64).reshape(-1, 2),
        np.array(truths, dtype=np.int64),
        np.array([ids + [-1] * (C - len(ids)) for ids in lists], dtype=np.int64).reshape(n, C),
        np.array(padded, dtype=np.float64).reshape(n, C) if scored else None,
        np.array([np.nan if row.get("rank") is None else row["rank"] for row in rows], dtype=np.float64),
        info,
    )


# ---------------------------------------------------------------- use


def _keys(queries: Ints, truth: Ints, kg: KnowledgeGraph) -> Ints:
    """One integer per (entity, relation, truth or -1)."""
    return (queries[:, 0] * (2 * kg.num_relations) + queries[:, 1]) * (kg.num_entities + 1) + truth + 1


def find_rows(candidates: Candidates, queries: Ints, kg: KnowledgeGraph) -> Ints:
    """The row of the list for each query (h, r, t) [n, 3], r in 0..2R-1: its own, else its (h, r)'s; -1 for none."""
    keys = _keys(candidates.queries, candidates.truth, kg)
    order = np.argsort(keys)
    found = np.full(len(queries), -1)
    for truth in (np.full(len(queries), -1), queries[:, 2]):
        wanted = _keys(queries, truth, kg)
        place = order[np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)]
        found = np.where(keys[place] == wanted, place, found)
    return found


def other_answers(ids: Ints, queries: Ints, answers: TrueTails, kg: KnowledgeGraph) -> Bools:
    """Which of the listed ids [n, C] are known answers of their query (h, r, t) other than t itself."""
    indptr, known = answers.of(queries[:, 0], queries[:, 1])
    M = kg.num_entities
    if not len(known):
        return np.zeros(ids.shape, dtype=bool)
    keys = np.repeat(np.arange(len(queries)), np.diff(indptr)) * M + known  # ascending, as known tails are
    wanted = np.arange(len(queries))[:, None] * M + ids
    found: Bools = keys[np.searchsorted(keys, wanted).clip(max=len(keys) - 1)] == wanted
    return found & (ids >= 0) & (ids != queries[:, 2:])
