"""Rows of instruction data and their files: train, validation, test_tasks and dataset_stats.json.

Rows are streamed: no script holds a list of all rows in memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import InputError
from common.files import ROOT, atomic_path, exclusive_lock, parse_json, read_json, write_json
from common.record import make_record

if TYPE_CHECKING:
    from Class.source import Source

Row = dict[str, Any]

OUT_FOLDER = ROOT / "lora_training" / "lora_data"
FILE_STEMS = {"train": "train", "validation": "validation", "test": "test_tasks"}  # of the files
FORMATS = ("json", "jsonl")
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
    """One row: the Alpaca fields and what scoring needs. Every row has every key, None where it does not apply.

    ``split``: train, validation or test. ``triple``: raw names head, relation, tail, always in the data set's own
    direction; a row that rests on several triples has them one after another (6 names, 9, ...). ``direction``: the end
    that is asked for, ``head`` or ``tail``. ``candidates``: raw entity names as listed. ``truth``: the right answers as
    data, a list: raw entity names, or ["True"] / ["False"] where the row judges its triple. ``candidate_rank``: the
    truth's filtered rank in the model that chose the candidates.

    What the prompt was built from: ``head``, ``relation`` and ``tail`` as the prompt shows them (a query for the head
    gives the tail as ``head`` and names the inverse relation); ``head_codes``: the code text of ``head``;
    ``candidate_names`` and ``candidate_codes``: names and code texts of ``candidates``, in their order. Code texts are
    None in data without codes.
    """
    return {
        "instruction": instruction,
        "input": "",
        "output": output,
        "id": id,
        "task_type": task_type,
        "split": split,
        "triple": None if triple is None else list(triple),
        "direction": direction,
        "candidates": None if candidates is None else list(candidates),
        "truth": None if truth is None else list(truth),
        "candidate_rank": candidate_rank,
        "head": head,
        "relation": relation,
        "tail": tail,
        "head_codes": head_codes,
        "candidate_names": None if candidate_names is None else list(candidate_names),
        "candidate_codes": None if candidate_codes is None else list(candidate_codes),
    }


def need_fields(row: Row, *fields: str) -> Row:
    """The row itself. InputError where one of ``fields`` is missing or None, as in rows of earlier versions."""
    missing = [name for name in fields if row.get(name) is None]
    if missing:
        script = {"link_prediction": "gen_lp", PREDICTED: "gen_lp", "triple_classification": "gen_fb"}
        raise InputError(
            f"row {row.get('id', '?')} has no {' or '.join(missing)} (rows of earlier versions lack them); write it "
            f"again: python Class/{script.get(row.get('task_type', ''), 'gen_entity')}_data_rq.py"
        )
    return row


def row_triples(row: Row) -> list[tuple[str, str, str]]:
    """The triples that a row rests on; none where ``triple`` does not apply."""
    names = row.get("triple") or []
    return [(names[i], names[i + 1], names[i + 2]) for i in range(0, len(names), 3)]


def states_facts(row: Row) -> bool:
    """False for a row whose triple is a negative: it tells nothing about what holds."""
    return row.get("truth") != ["False"]


# ---------------------------------------------------------------- files


def split_path(folder: str | Path, split: str, file_format: str = "json") -> Path:
    """The file of a split: train, validation or test_tasks."""
    return Path(folder) / f"{FILE_STEMS[split]}.{file_format}"


def existing_split(folder: str | Path, split: str) -> Path | None:
    """The split's file in either format; None where there is none."""
    paths = [split_path(folder, split, file_format) for file_format in FORMATS]
    return next((path for path in paths if path.is_file()), None)


def write_rows(
    path: Path, rows: Iterable[Row], limit: int = 0, ready: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Stream rows into a JSON array or JSON lines (by the ending), one row per line; 0 as ``limit`` means all.

    ``ready`` is called when all rows are on the disk, just before the file that was there goes.

    The file appears when complete, and one of the other format goes. Returns counts: rows, bytes, rows per task type,
    outputs of rows that judge, longest and mean prompt and output in characters.
    """
    array = path.suffix == ".json"
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    count, prompt_sum, prompt_max, output_sum, output_max = 0, 0, 0, 0, 0
    task_types: Counter[str] = Counter()
    judged: Counter[str] = Counter()
    with atomic_path(path) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="\n", buffering=1 << 20) as file:
            for row in itertools.islice(rows, limit or None):
                file.write(("[\n" if count == 0 else ",\n") + encode(row) if array else encode(row) + "\n")
                count += 1
                prompt, output = len(row["instruction"]) + len(row.get("input") or ""), len(row["output"])
                prompt_sum, prompt_max = prompt_sum + prompt, max(prompt_max, prompt)
                output_sum, output_max = output_sum + output, max(output_max, output)
                task_types[row["task_type"]] += 1
                if row.get("truth") in (["True"], ["False"]):
                    judged[row["output"]] += 1
            if array:
                file.write("\n]\n" if count else "[]\n")
        size = temporary.stat().st_size
        ready()
    split_path(path.parent, next(s for s, stem in FILE_STEMS.items() if stem == path.stem),
               "jsonl" if array else "json").unlink(missing_ok=True)  # fmt: skip
    stats: dict[str, Any] = {"file": path.name, "rows": count, "bytes": size, "task_types": dict(task_types)}
    if judged:
        stats["judged"] = dict(judged)
    if count:
        stats["prompt_characters"] = {"mean": round(prompt_sum / count, 1), "max": prompt_max}
        stats["output_characters"] = {"mean": round(output_sum / count, 1), "max": output_max}
    return stats


def parse_line(line: str, path: Path, number: int) -> Row | None:
    """The row in one line of a file of ``write_rows``; None for its brackets. InputError for anything else."""
    text = line.strip().rstrip(",")
    if text in ("", "[", "]", "[]"):
        return None
    try:
        row = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path}:{number}: not one JSON row per line ({error})") from error
    if not isinstance(row, dict) or not {"instruction", "output", "id", "task_type"} <= row.keys():
        raise InputError(f"{path}:{number}: a row needs instruction, output, id and task_type")
    wrong = next((key for key, value in row.items() if key in _FIELDS and not _FIELDS[key](value)), None)
    if wrong is None:
        size = len(row.get("candidates") or ())
        parts = ("candidate_names", "candidate_codes")
        wrong = next((key for key in parts if row.get(key) is not None and len(row[key]) != size), None)
    if wrong is not None:
        raise InputError(f"{path}:{number}: {wrong} is {json.dumps(row[wrong])[:60]}, which no row has; write it anew")
    return row


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


_FIELDS: dict[str, Callable[[Any], bool]] = {  # what a field may hold
    "instruction": _is_text, "output": _is_text, "id": lambda value: type(value) in (str, int), "task_type": _is_text,
    "input": lambda value: value is None or isinstance(value, str), "split": lambda value: value in list(FILE_STEMS),
    "direction": lambda value: value in (None, "head", "tail"), "candidates": _is_names, "truth": _is_names,
    "triple": lambda value: _is_names(value) and len(value or ()) % 3 == 0,
    "candidate_rank": lambda value: value is None or (type(value) in (int, float) and value >= 1),
    "candidate_names": _is_names, "candidate_codes": _is_names,
    **dict.fromkeys(("head", "relation", "tail", "head_codes"), lambda value: value is None or isinstance(value, str)),
}  # fmt: skip


def read_lines(path: str | Path) -> Iterator[tuple[int, Row]]:
    """(offset in bytes, row) of a file of ``write_rows``, streamed. InputError names the line that is no row, and an
    array that does not end: the file was cut off."""
    path = Path(path)
    at, array, last = 0, False, b""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                row = parse_line(line.decode("utf-8-sig" if number == 1 else "utf-8"), path, number)
                if row is not None:
                    yield at, row
                at += len(line)
                last = line.strip() or last
                array = array or (number == 1 and last.endswith(b"["))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"instruction data {path} cannot be read: {error}") from error
    if not at:
        raise InputError(f"{path} is empty; write it anew")
    if array and last != b"]":
        raise InputError(f"{path}: its array does not end, so the file was cut off; write it anew")


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of ``read_lines``."""
    return (row for _, row in read_lines(path))


def write_task(
    folder: Path,
    task: str,
    args: argparse.Namespace,
    source: Source,
    splits: Mapping[str, Iterable[Row]],
    notes: Callable[[], Mapping[str, Any]] = dict,
) -> dict[str, Any]:
    """Write the splits' files and dataset_stats.json of one task; returns what the latter holds.

    ``notes`` is called after the rows were written and adds to the stats: counts made on the way, and
    ``candidate_order`` ({split: "shuffled" or "ranked"}) where rows have candidates.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out_dir: cannot write {folder}: {error.strerror}; choose another folder") from error
    written = {}
    with exclusive_lock(folder / LOCK, "--out_dir"):
        for split, rows in splits.items():
            path = split_path(folder, split, args.format)
            # a folder with statistics is complete, so they go with the first file that changes
            written[split] = write_rows(path, rows, args.limit, lambda: (folder / STATS).unlink(missing_ok=True))
            if not written[split]["rows"]:
                raise InputError(f"task {task} has no {split} rows from {source.kg.name}; check flags and data set")
            print(f"  {split:10} {written[split]['rows']:>9,} rows  {path}")
        stats = make_record(
            vars(args), source.kg.input_hashes, time.monotonic() - source.started, task=task, dataset=source.kg.name,
            codes=source.codes_info, names=source.names_info, splits=written, **notes(),
        )  # fmt: skip
        write_json(stats, folder / STATS)
    return stats


def fill_top(task_folder: Path, out_dir: Path) -> bool:
    """Give the LoRA stage's files and dataset_stats.json the content of one task, by hard link where the disk can.

    A mix that build_mix.py wrote is left alone: then nothing is done and False is returned.
    """
    stats_path = out_dir / STATS
    with exclusive_lock(out_dir / LOCK, "--out_dir"):
        before = read_json(stats_path, "statistics") if stats_path.is_file() else {}
        if isinstance(before, dict) and "mix" in before:
            return False
        stats_path.unlink(missing_ok=True)
        for split in FILE_STEMS:
            file = existing_split(task_folder, split)
            if file is None:
                continue
            for file_format in FORMATS:
                split_path(out_dir, split, file_format).unlink(missing_ok=True)
            try:
                os.link(file, out_dir / file.name)
            except OSError:
                with atomic_path(out_dir / file.name) as temporary:
                    shutil.copyfile(file, temporary)
        write_json(read_json(task_folder / STATS, "statistics"), stats_path)
    return True


def train_command(out_dir: Path, file_format: str) -> str:
    """What tunes on the files of ``out_dir``; they are named where train_lora.py would not find them by itself."""
    if out_dir.resolve() == OUT_FOLDER and file_format == "json":
        return "cd lora_training && python train_lora.py"
    train, validation = (split_path(out_dir, split, file_format) for split in ("train", "validation"))
    return f"python lora_training/train_lora.py --train_data {train} --val_data {validation}"


def answer_command(model: str, train_data: Path) -> str:
    """What answers the test rows beside ``train_data`` by ``model`` (inference.py's flag and its value).

    They are named where inference.py would not find them by itself.
    """
    folder = train_data.parent
    if folder.name == PREDICTED:  # its queries are ranked over the lists beside it
        folder, model = folder.parent / "link_prediction", f"{model} --decode predict"
    rows = existing_split(folder, "test")
    named = rows is not None and rows.resolve() != split_path(OUT_FOLDER, "test")
    return f"python inference.py {model}" + (f" --test_data {rows}" if named else "")
