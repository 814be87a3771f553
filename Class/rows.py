"""Rows of instruction data and their files: train, validation, test_tasks and dataset_stats.json.

Rows are streamed: no script holds a list of all rows in memory.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import InputError
from common.files import ROOT, atomic_path, command, exclusive_lock, parse_json, read_json, write_json
from common.record import make_record

if TYPE_CHECKING:
    from Class.source import Source

Row = dict[str, Any]

OUT_FOLDER = ROOT / "lora_training" / "lora_data"
FILE_STEMS = {"train": "train", "validation": "validation", "test": "test_tasks"}  # of the files
STATS, LOCK = "dataset_stats.json", "dataset_stats.lock"
PREDICTED = "tail_prediction"  # queries of link prediction without their candidates


# ---------------------------------------------------------------- rows


def make_row(
    instruction: str,
    output: str,
    *,
    id: str,
    task_type: str,
    split: str,
    triple: Sequence[str] | None = None,
    direction: str | None = None,
    candidates: Sequence[str] | None = None,
    truth: Sequence[str] | None = None,
    candidate_rank: float | None = None,
    head: str | None = None,
    relation: str | None = None,
    tail: str | None = None,
    head_codes: str | None = None,
    candidate_names: Sequence[str] | None = None,
    candidate_codes: Sequence[str] | None = None,
) -> Row:
    """One row: the Alpaca fields, what scoring needs, and what the prompt was built from. Unused keys are None.

    For scoring, by raw names. ``split``: train, validation or test. ``triple``: head, relation, tail in the data set's
    own direction; a row that rests on several triples has them one after another (6 names, 9, ...). ``direction``: the
    end to be predicted, ``head`` or ``tail``. ``candidates``: in the order of the prompt. ``truth``: the right answers,
    or ["True"] / ["False"]. ``candidate_rank``: the filtered rank of the truth in the model that chose the candidates.

    For the prompt, as it shows them. ``head``, ``relation``, ``tail``: a query for the head has the tail as ``head``,
    and the inverse relation. ``head_codes``: code text of ``head``. ``candidate_names``, ``candidate_codes``: names and
    code texts of ``candidates``. Code texts are None in data without codes.
    """
    row: Row = {"instruction": instruction, "input": "", "output": output, "id": id, "task_type": task_type,
                "split": split, "direction": direction, "candidate_rank": candidate_rank, "head": head,
                "relation": relation, "tail": tail, "head_codes": head_codes}  # fmt: skip
    lists = {"triple": triple, "candidates": candidates, "truth": truth, "candidate_names": candidate_names,
             "candidate_codes": candidate_codes}  # fmt: skip
    return row | {key: None if names is None else list(names) for key, names in lists.items()}


def need_fields(row: Row, *fields: str) -> Row:
    """The row itself. InputError where one of ``fields`` is missing or None, as in rows of earlier versions."""
    missing = [name for name in fields if row.get(name) is None]
    if missing:
        script = {"link_prediction": "gen_lp", PREDICTED: "gen_lp", "triple_classification": "gen_fb"}
        again = command(f"Class/{script.get(row.get('task_type', ''), 'gen_entity')}_data_rq.py")
        raise InputError(
            f"row {row.get('id', '?')} has no {' or '.join(missing)} (rows of earlier versions lack them); write it "
            f"again: {again}"
        )
    return row


def row_triples(row: Row) -> list[tuple[str, str, str]]:
    """The triples that a row rests on; none where ``triple`` does not apply."""
    names = row.get("triple") or []
    return [(names[i], names[i + 1], names[i + 2]) for i in range(0, len(names), 3)]


def states_facts(row: Row) -> bool:
    """False for a row whose triple is a negative: it is no fact."""
    return row.get("truth") != ["False"]


# ---------------------------------------------------------------- files


def split_path(folder: str | Path, split: str) -> Path:
    """The file of a split: train.json, validation.json or test_tasks.json."""
    return Path(folder) / f"{FILE_STEMS[split]}.json"


def existing_split(folder: str | Path, split: str) -> Path | None:
    """The split's file, or the same as JSON Lines (.jsonl); None where there is none."""
    path = split_path(folder, split)
    return next((file for file in (path, path.with_suffix(".jsonl")) if file.is_file()), None)


def write_rows(
    path: Path, rows: Iterable[Row], limit: int = 0, ready: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Stream rows into a JSON array, or JSON Lines (.jsonl), one row per line; ``limit`` 0 means all.

    The file appears when it is complete; ``ready`` is called just before. Returns counts: rows, bytes, rows per task
    type, and labels of rows that judge a triple.
    """
    array = path.suffix == ".json"
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    count = 0
    task_types: Counter[str] = Counter()
    judged: Counter[str] = Counter()
    with atomic_path(path) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="\n", buffering=1 << 20) as file:
            for row in itertools.islice(rows, limit or None):
                file.write(("[\n" if count == 0 else ",\n") + encode(row) if array else encode(row) + "\n")
                count += 1
                task_types[row["task_type"]] += 1
                if row.get("truth") in (["True"], ["False"]):
                    judged[row["output"]] += 1
            if array:
                file.write("\n]\n" if count else "[]\n")
        size = temporary.stat().st_size
        ready()
    stats: dict[str, Any] = {"file": path.name, "rows": count, "bytes": size, "task_types": dict(task_types)}
    if judged:
        stats["judged"] = dict(judged)
    return stats


def parse_line(line: str, path: Path, number: int, plain: bool = False) -> Row | None:
    """The row in one line of a file of ``write_rows``; None for its brackets. InputError for anything else.

    ``plain`` as in ``read_rows``.
    """
    text = line.strip().rstrip(",")
    if text in ("", "[", "]", "[]"):
        return None
    try:
        value = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path}:{number}: not one JSON row per line ({error})") from error
    return check_row(value, f"{path}:{number}", f"{path.stem}-{number}" if plain else None)


def check_row(row: Any, where: str, plain_id: str | None = None) -> Row:
    """A value read from JSON as a row; ``where``: file and place for the InputError.

    ``plain_id``: accept rows of only instruction, input and output, and give them this id.
    """
    if plain_id is not None and isinstance(row, dict) and {"instruction", "output"} <= row.keys():
        row = {"id": plain_id, "task_type": "instruction"} | row
    if not isinstance(row, dict) or not {"instruction", "output", "id", "task_type"} <= row.keys():
        needed = "instruction and output" if plain_id is not None else "instruction, output, id and task_type"
        raise InputError(f"{where}: a row needs {needed}")
    wrong = next((key for key, value in row.items() if key in _FIELDS and not _FIELDS[key](value)), None)
    if wrong is None:
        size = len(row.get("candidates") or ())
        parts = ("candidate_names", "candidate_codes")
        wrong = next((key for key in parts if row.get(key) is not None and len(row[key]) != size), None)
    if wrong is not None:
        raise InputError(f"{where}: {wrong} is {json.dumps(row[wrong])[:60]}, which no row has; write it again")
    return row


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


_FIELDS: dict[str, Callable[[Any], bool]] = {  # what a field may hold
    **dict.fromkeys(("instruction", "output", "task_type"), _is_text),
    **dict.fromkeys(("input", "head", "relation", "tail", "head_codes"), _is_text_or_none),
    **dict.fromkeys(("candidates", "truth", "candidate_names", "candidate_codes"), _is_names),
    "id": lambda value: type(value) in (str, int),
    "split": lambda value: value in list(FILE_STEMS),
    "direction": lambda value: value in (None, "head", "tail"),
    "triple": lambda value: _is_names(value) and len(value or ()) % 3 == 0,
    "candidate_rank": lambda value: value is None or (type(value) in (int, float) and value >= 1),
}


def read_lines(path: str | Path, plain: bool = False) -> Iterator[tuple[int, Row]]:
    """(offset in bytes, row) of a file of ``write_rows``, streamed; ``plain`` as in ``read_rows``.

    Raises InputError for a line that is no row, and for an array that does not end: the file was cut off.
    """
    path = Path(path)
    at, array, last = 0, False, b""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                row = parse_line(line.decode("utf-8-sig" if number == 1 else "utf-8"), path, number, plain)
                if row is not None:
                    yield at, row
                at += len(line)
                last = line.strip() or last
                array = array or (number == 1 and last.endswith(b"["))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"instruction data {path} cannot be read: {error}") from error
    if not at:
        raise InputError(f"{path} is empty; write it again")
    if array and last != b"]":
        raise InputError(f"{path}: its array does not end, so the file was cut off; write it again")


def longest_rows(path: Path, plain: bool = False, count: int = 16) -> Iterator[Row]:
    """The ``count`` longest rows of each task type, for checks before all rows are parsed; ``plain`` as in
    ``read_rows``."""
    longest: dict[Any, list[tuple[int, int, Any]]] = defaultdict(list)  # by task type: length, place, row or line

    def keep(task_type: Any, found: tuple[int, int, Any]) -> None:
        kept = longest[task_type]
        (heapq.heappush if len(kept) < count else heapq.heappushpop)(kept, found)

    if _is_other_layout(path):
        for number, row in enumerate(read_rows(path, plain), 1):
            keep(row["task_type"], (len(row["instruction"]), number, row))
    else:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                task_type = _TASK_TYPE.search(line)
                keep(task_type and task_type[1], (len(line), number, line))
    for _, number, value in sorted(itertools.chain(*longest.values()), key=lambda found: found[1]):
        found = value
        if isinstance(value, bytes):
            found = parse_line(value.decode("utf-8-sig", "replace"), path, number, plain)
        if found is not None:
            yield found


_TASK_TYPE = re.compile(rb'"task_type"\s*:\s*("[^"]*")')


def read_rows(path: str | Path, plain: bool = False) -> Iterator[Row]:
    """The rows of a JSON array of any layout or of JSON Lines. Files with one row per line are streamed.

    ``plain``: also accept rows of only instruction, input and output (for training; scoring needs more fields).
    Raises InputError with the file and the line or row.
    """
    path = Path(path)
    if not _is_other_layout(path):
        yield from (row for _, row in read_lines(path, plain))
        return
    values = read_json(path, "instruction data")
    if not isinstance(values, list):
        raise InputError(f"{path} holds a JSON {type(values).__name__}, expected an array of rows or JSON Lines")
    for number, value in enumerate(values, 1):
        yield check_row(value, f"{path}: row {number}", f"{path.stem}-{number}" if plain else None)


def _is_other_layout(path: Path) -> bool:
    """Whether a file is a JSON array, or one object, that does not have one row per line."""
    try:
        with open(path, "rb") as file:
            lines = (line.removeprefix(b"\xef\xbb\xbf").strip() for line in file)
            first, second = [*itertools.islice((line for line in lines if line), 2), b"", b""][:2]
    except OSError:
        return False  # read_lines reports it
    if first in (b"[", b"{"):
        return first == b"{" or not (second.rstrip(b",").endswith(b"}") or second in (b"", b"]"))
    return first.startswith(b"[") and first != b"[]"


def write_task(
    folder: Path,
    task: str,
    args: argparse.Namespace,
    source: Source,
    splits: Mapping[str, Iterable[Row]],
    notes: Callable[[], Mapping[str, Any]] = dict,
) -> dict[str, Any]:
    """Write the splits' files and dataset_stats.json of one task; returns what the latter holds.

    Nothing is written where a split has no rows (InputError). ``notes`` is called after the rows were written and adds
    to the statistics: counts, and ``candidate_order`` ({split: "shuffled" or "ranked"}) where rows have candidates.
    """
    streams: dict[str, Iterator[Row]] = {}
    for split, rows in splits.items():
        stream = iter(rows)
        first = next(stream, None)
        if first is None:
            raise InputError(f"task {task} has no {split} rows: {source.kg.name} is too small for it and these flags")
        streams[split] = itertools.chain([first], stream)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out_dir: cannot write {folder}: {error.strerror}; choose another folder") from error
    written = {}
    with exclusive_lock(folder / LOCK, "--out_dir"):
        for split, stream in streams.items():
            path = split_path(folder, split)
            # statistics mark a complete folder: they are removed before the first file is replaced
            written[split] = write_rows(path, stream, args.limit, lambda: (folder / STATS).unlink(missing_ok=True))
            print(f"  {split:10} {written[split]['rows']:>9,} rows  {path}")
        stats = make_record(
            vars(args), source.kg.input_hashes, time.monotonic() - source.started, task=task, dataset=source.kg.name,
            codes=source.codes_info, names=source.names_info, splits=written, **notes(),
        )  # fmt: skip
        write_json(stats, folder / STATS)
    return stats


def fill_top(task_folder: Path, out_dir: Path) -> bool:
    """Give the files that the LoRA stage reads the content of one task, by hard link where the disk can.

    A mix that build_mix.py wrote is left as it is: then nothing is done and False is returned.
    """
    stats_path = out_dir / STATS
    with exclusive_lock(out_dir / LOCK, "--out_dir"):
        before = read_json(stats_path, "statistics") if stats_path.is_file() else {}
        if isinstance(before, dict) and "mix" in before:
            return False
        stats_path.unlink(missing_ok=True)
        for split in FILE_STEMS:
            file, target = split_path(task_folder, split), split_path(out_dir, split)
            if not file.is_file():
                continue
            target.unlink(missing_ok=True)
            try:
                os.link(file, target)
            except OSError:
                with atomic_path(target) as temporary:
                    shutil.copyfile(file, temporary)
        write_json(read_json(task_folder / STATS, "statistics"), stats_path)
    return True


def train_command(out_dir: Path) -> str:
    """The command that tunes on the files of ``out_dir``; files that are not train_lora.py's default are named."""
    words: list[object] = []
    if out_dir.resolve() != OUT_FOLDER:
        words = ["--train_data", split_path(out_dir, "train"), "--val_data", split_path(out_dir, "validation")]
    return command("lora_training/train_lora.py", *words)


def answer_command(flag: str, model: Path, train_data: Path) -> str:
    """The command that answers the test rows beside ``train_data``; ``flag``: inference.py's for ``model``.

    A file of rows that is not inference.py's default is named.
    """
    words: list[object] = [flag, model]
    folder = train_data.parent
    if folder.name == PREDICTED:  # its queries are ranked over the lists beside it
        folder = folder.parent / "link_prediction"
        words += ["--decode", "likelihood"]
    rows = existing_split(folder, "test")
    if rows is not None and rows.resolve() != split_path(OUT_FOLDER, "test"):
        words += ["--test_data", rows]
    return command("lora_training/inference.py", *words)
