"""Candidate lists for link prediction: their file and its checks. Stage 1 makes them in model/export.py.

    python run_rq.py --dataset D --eval_codes C.pt --checkpoint CK.pt --export_candidates FILE.npz --split valid

One row per query, from stage 1 or from any other model, in either of two forms of file. Entities and relations are
given by raw name (text) or by id (integers: the rows of the data set); JSON may mix both.

FILE.json    {"info": {...}, "rows": [{"query": ["ada_ashley", "father"], "direction": "tail", "truth": "max_ashley",
             "candidates": ["max_ashley", 17, ...], "scores": [9.1, 8.7, ...], "rank": 1.5}, ...]}
FILE.npz     query [n, 2], direction [n] ("tail" or "head"), candidates [n, C], and where known truth [n],
             scores [n, C], rank [n], info (JSON text); shorter lists end in -1 (names: in ""), an unknown rank is NaN

query        the entity that is given, and the relation in the data set's own direction
direction    the end that is to be predicted: "tail" is (query[0], query[1], ?), "head" is (?, query[1], query[0])
candidates   ranked, best first, without repeats
truth        (optional) the answer that this list is for: only other known answers were filtered out of it. A row
             without it serves every triple of its query; whatever is known of them is filtered by the reader
scores       (optional) higher is better, not rising along the list
rank         (optional) of the truth among all entities, filtered by the answers of all splits, ties at their mean
info         (optional) the origin: dataset, split, model, filter, ... Four keys have an effect: with "folds": 2 or
             more, or "split": "valid" or "test", the model was not trained on the triples of its queries.
             "entities_sha256" (written here) identifies the order of entities that ids refer to; a graph whose
             entities are named by numbers needs it for integers. "shuffled_codes": true marks a control
"""

from __future__ import annotations

import hashlib
import json
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
from common.files import atomic_path, parse_json, read_json, write_text
from data.knowledge_graph import KnowledgeGraph, TrueTails

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

ENDINGS = (".npz", ".json")
LARGEST = sys.float_info.max  # JSON may hold whole numbers beyond it
DIRECTIONS = ("tail", "head")
HELD_OUT_SPLITS = ("valid", "test")
UNPACKED_BYTES, UNPACKED_RATIO = 2**28, 100  # an archive beyond both was made to fill the memory


class Candidates(NamedTuple):
    """n ranked lists of at most C entities."""

    queries: Ints  # [n, 2]: entity, relation; R..2R-1 are the inverses, queries for the head
    truth: Ints  # [n], -1 where the list serves every triple of its query
    ids: Ints  # [n, C], best first, ending in -1
    scores: Floats | None  # [n, C], NaN where ids are -1
    rank: Floats  # [n], NaN where unknown
    held_out: Bools  # [n], the model was not trained on the query's triple
    info: dict[str, Any]


def check_ending(path: str | Path) -> Path:
    """InputError unless the file name ends in .npz or .json."""
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise InputError(f"candidates file {path} must end in {' or '.join(ENDINGS)}")
    return path


def entities_hash(kg: KnowledgeGraph) -> str:
    """Hex digest of the entity and relation names in the order of their ids."""
    return hashlib.sha256("\n".join([*kg.entities, "", *kg.relations]).encode()).hexdigest()


def is_held_out(info: dict[str, Any]) -> bool:
    """Whether ``info`` says that the model has not seen the triples of its queries."""
    folds = info.get("folds")
    return info.get("split") in HELD_OUT_SPLITS or (isinstance(folds, int) and folds >= 2)


# ---------------------------------------------------------------- write


def write_candidates(path: str | Path, candidates: Candidates, kg: KnowledgeGraph, **info: Any) -> None:
    """Write either form by the file's ending, ids in ``.npz`` and names in ``.json``; ``info`` adds to the lists' own.

    Raises InputError for another ending or a folder that cannot be written.
    """
    path = check_ending(path)
    info = candidates.info | info | {"entities_sha256": entities_hash(kg)}
    entity, relation = candidates.queries.T
    is_head = relation >= kg.num_relations
    relation = relation % kg.num_relations
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {
            "query": np.stack([entity, relation], axis=1).astype(np.int32),
            "direction": np.array(DIRECTIONS)[is_head.astype(np.int64)],
            "truth": candidates.truth.astype(np.int32),
            "candidates": candidates.ids.astype(np.int32),
            "rank": candidates.rank,
            "info": np.array(json.dumps(info)),
        }
        if candidates.scores is not None:
            arrays["scores"] = candidates.scores.astype(np.float32)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)
        return
    lines = []
    for i in range(len(entity)):
        ids = candidates.ids[i][candidates.ids[i] >= 0].tolist()
        row: dict[str, Any] = {
            "query": [kg.entities[entity[i]], kg.relations[relation[i]]],
            "direction": DIRECTIONS[int(is_head[i])],
            "candidates": [kg.entities[e] for e in ids],
        }
        if candidates.truth[i] >= 0:
            row["truth"] = kg.entities[candidates.truth[i]]
        if candidates.scores is not None:
            row["scores"] = candidates.scores[i, : len(ids)].tolist()
        if not np.isnan(candidates.rank[i]):
            row["rank"] = float(candidates.rank[i])
        lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False))
    head = json.dumps(info, ensure_ascii=False, allow_nan=False)
    write_text(f'{{"info": {head},\n"rows": [\n' + ",\n".join(lines) + "\n]}\n", path)


# ---------------------------------------------------------------- read


def read_candidates(paths: Sequence[str | Path], kg: KnowledgeGraph) -> Candidates:
    """The lists of one or several files (of different splits or folds), checked against ``kg``.

    ``info`` is that of the first file, with ``files``: the names of all. Raises InputError with file and row: unknown
    name or id, ids of another data set, repeated candidate, rising scores, rank below 1, a query of two
    lists (the same list twice counts once).
    """
    parts = [_read(check_ending(path), kg) for path in paths]
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
        np.concatenate([part.held_out for part in parts]),
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
    queries, truth, ids, scores, rank, held_out, info = merged
    kept = None if scores is None else scores[first]
    return Candidates(queries[first], truth[first], ids[first], kept, rank[first], held_out[first], info)


def _read(path: Path, kg: KnowledgeGraph) -> Candidates:
    if not path.exists():
        raise InputError(
            f"candidates file {path} does not exist; stage 1 writes one: python run_rq.py --eval_codes CODES.pt "
            f"--checkpoint CK.pt --split SPLIT --export_candidates {path}"
        )
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


def _check_info(path: Path, info: Any, kg: KnowledgeGraph, by_id: bool) -> dict[str, Any]:
    """``info``, if ids (``by_id``) can refer to ``kg``. Raises InputError where they are ambiguous, or of others."""
    if not isinstance(info, dict):
        raise InputError(f"candidates file {path}: info is a {type(info).__name__}, expected an object")
    written = info.get("entities_sha256")
    if by_id and written is not None and written != entities_hash(kg):
        raise InputError(
            f"candidates file {path} has ids of {info.get('dataset')}, whose entities and relations are not those of "
            f"{kg.name} ({kg.num_entities} and {kg.num_relations}) in the same order; export them from {kg.name}"
        )
    if by_id and written is None:
        other = next((i for i, name in enumerate(kg.entities) if name.isdecimal() and name != str(i)), None)
        if other is not None:
            raise InputError(
                f"candidates file {path} has integers, and {kg.name} has entities named by numbers (row {other} is "
                f"{kg.entities[other]!r}): they may be names or rows; write names as text"
            )
    return info


def _unknown(path: Path, row: int, what: str, value: Any, size: int, kg: KnowledgeGraph) -> InputError:
    return InputError(
        f"candidates file {path}: row {row}: {what} {value!r} is none of {kg.name}, expected a raw name or an id in "
        f"0..{size - 1}"
    )


def _load_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an archive with their shapes and types checked. Raises InputError."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with loaded as archive:
            assert archive.zip is not None
            unpacked = sum(part.file_size for part in archive.zip.infolist())
            if unpacked > UNPACKED_BYTES and unpacked > UNPACKED_RATIO * path.stat().st_size:
                raise ValueError(f"{unpacked:,} bytes when unpacked")
            arrays = {name: archive[name] for name in archive.files}
    except (
        OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"candidates file {path} cannot be read as an .npz archive: {reason}") from error
    missing = [name for name in ("query", "direction", "candidates") if name not in arrays]
    if missing:
        raise InputError(
            f"candidates file {path} lacks {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}"
        )
    n = len(arrays["query"]) if arrays["query"].ndim else 0
    C = arrays["candidates"].shape[1] if arrays["candidates"].ndim == 2 else 0
    ids_or_names = "ids or names"
    kinds = {ids_or_names: "iuU", "text": "U", "numbers": "fiu"}
    for name, shape, kind in (
        ("query", (n, 2), ids_or_names), ("direction", (n,), "text"), ("candidates", (n, C), ids_or_names),
        ("truth", (n,), ids_or_names), ("scores", (n, C), "numbers"), ("rank", (n,), "numbers"), ("info", (), "text"),
    ):  # fmt: skip
        if name in arrays and (arrays[name].shape != shape or arrays[name].dtype.kind not in kinds[kind]):
            raise InputError(
                f"candidates file {path}: {name} is {arrays[name].dtype} {list(arrays[name].shape)}, expected {kind} "
                f"{list(shape)}"
            )
    return arrays


def _read_npz(path: Path, kg: KnowledgeGraph) -> Candidates:
    arrays = _load_npz(path)
    n = len(arrays["query"])
    by_id = arrays["query"].dtype.kind != "U" or arrays["candidates"].dtype.kind != "U"
    try:
        info = parse_json(str(arrays["info"])) if "info" in arrays else {}
    except ValueError as error:
        raise InputError(f"candidates file {path}: info is no JSON: {str(error).splitlines()[0]}") from error
    info = _check_info(path, info, kg, by_id)
    wrong = ~np.isin(arrays["direction"], DIRECTIONS)
    _refuse(path, wrong, f"has another direction than {' or '.join(DIRECTIONS)}")

    def ids(array: NDArray[Any], names: list[str], what: str, gaps: bool) -> Ints:
        if array.dtype.kind == "U":
            distinct, inverse = np.unique(array, return_inverse=True)
            row = {name: i for i, name in enumerate(names)} | ({"": -1} if gaps else {})
            found = np.array([row.get(name, -2) for name in distinct.tolist()], dtype=np.int64)
            result: Ints = found[inverse].reshape(array.shape)
        else:
            result = array.astype(np.int64)
        bad = (result < (-1 if gaps else 0)) | (result >= len(names))
        if bad.any():
            at = np.argwhere(bad)[0]
            raise _unknown(path, int(at[0]), what, array[tuple(at)].item(), len(names), kg)
        return result

    entity = ids(arrays["query"][:, 0], kg.entities, "query entity", False)
    relation = ids(arrays["query"][:, 1], kg.relations, "query relation", False)
    relation = relation + kg.num_relations * (arrays["direction"] == "head")
    return Candidates(
        np.stack([entity, relation], axis=1),
        ids(arrays["truth"], kg.entities, "truth", True) if "truth" in arrays else np.full(n, -1),
        ids(arrays["candidates"], kg.entities, "candidate", True),
        arrays["scores"].astype(np.float64) if "scores" in arrays else None,
        arrays["rank"].astype(np.float64) if "rank" in arrays else np.full(n, np.nan),
        np.full(n, is_held_out(info)),
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
    by_id = False
    entity_row = {name: i for i, name in enumerate(kg.entities)}
    relation_row = {name: i for i, name in enumerate(kg.relations)}

    def row_of(number: int, value: Any, names: dict[str, int], what: str) -> int:
        nonlocal by_id
        found = names.get(value, -1) if isinstance(value, str) else value if type(value) is int else -1
        by_id |= not isinstance(value, str)
        if not 0 <= found < len(names):
            raise _unknown(path, number, what, value, len(names), kg)
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
    info = _check_info(path, content.get("info", {}), kg, by_id)
    n, C = len(rows), max(map(len, lists), default=0)
    scored = all(row.get("scores") is not None for row in rows)
    padded = [row["scores"] + [np.nan] * (C - len(row["scores"])) for row in rows] if scored else []
    return Candidates(
        np.array(queries, dtype=np.int64).reshape(-1, 2),
        np.array(truths, dtype=np.int64),
        np.array([ids + [-1] * (C - len(ids)) for ids in lists], dtype=np.int64).reshape(n, C),
        np.array(padded, dtype=np.float64).reshape(n, C) if scored else None,
        np.array([np.nan if row.get("rank") is None else row["rank"] for row in rows], dtype=np.float64),
        np.full(n, is_held_out(info)),
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
