"""One run record -> its checked rows: what stage 1 measured from codes, what an LLM answered.

Three kinds of records are read: of stage 1 (run_rq.py), of answers (inference.py), and of adapters (train_lora.py:
seed, time and flags behind the answers). A record with an impossible metric is an InputError with file and field
(common/metrics.py). A data set is identified by the hashes of its triples, not by the name of its folder.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import InputError, content_of
from common.files import ROOT, read_json, sha256_file
from common.metrics import (
    CLASSIFICATION,
    RANKING,
    SLACK,
    check_all_rankings,
    check_classification,
    check_count,
    impossible,
    number,
    share,
)
from data.knowledge_graph import KnowledgeGraph
from tables.system import CONTROLS, control_name, flag_words, other_flags, system_of

CODES, LINKS, TRIPLES = "codes", "link_prediction", "triple_classification"  # the tasks of Tables 2, 3 and 5, and 4
RECORD_FIELDS: dict[str, tuple[type, ...]] = {  # of every run record, with their types
    "args": (dict,), "seed": (int, NoneType), "git_commit": (str, NoneType), "device": (str,), "finished": (str,),
    "wall_seconds": (int, float),
}  # fmt: skip
METRIC_FIELDS = ("mrr", "test", "valid", "metrics")
SPLIT_FILES = ("train.txt", "valid.txt", "test.txt")
TRAINING_IN_WORDS = {
    "model_name", "train_data", "val_data", "output_dir", "overwrite", "resume_from_checkpoint", "micro_batch_size",
    "eval_batch_size", "logging_steps", "seed", "report_to", "lora_r", "gradient_checkpointing", "epochs", "max_steps",
    "eval_steps", "max_length", "code_init", "plain_text",
}  # fmt: skip
ANSWER_BASELINES = {
    "candidate_model": "candidate ranker", "as_listed": "first candidate of the list", "random": "random choice",
}  # fmt: skip
EXPECTED = ROOT / "tables" / "expected"

Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """The metrics of one run on one task and data set."""

    task: str  # CODES, LINKS or TRIPLES
    dataset: str
    label: str  # the facts that every table states (tables/system.py)
    flags: tuple[str, ...]  # all other flags that may change a result
    variant: str  # "" for the result itself, else a baseline or a control, as "control: codes shuffled"
    codes: str  # "with", "without" or "shuffled": what the LLM was given; stage 1 is always "with"
    seed: int | None
    commit: str | None
    device: str
    minutes: float  # training and answering
    finished: str
    metrics: dict[str, float]  # of the test split; {} with --no_test
    valid: dict[str, float]
    path: Path  # of the record, relative to the repository if it lies inside
    record: Record = field(repr=False)
    partial: bool = False  # only a part of the test split was answered

    @property
    def setting(self) -> str:
        """Equal for runs that differ only in seed, machine and folders."""
        return ", ".join([self.label, *self.flags])


def lacks_record(content: Any) -> str:
    """Why a file with metrics has no provenance; "" for a record and for a file without metrics."""
    if not isinstance(content, dict) or not any(name in content for name in METRIC_FIELDS):
        return ""
    missing = [name for name in RECORD_FIELDS if name not in content]
    return f"holds metrics and no run record (no {', '.join(missing)})" if missing else ""


def rows_of(path: Path, content: Any, data: Path) -> list[Row]:
    """The rows of one file; none for files that are no record of a result (adapters, merged models, statistics)."""
    if not isinstance(content, dict) or any(name not in content for name in RECORD_FIELDS):
        return []
    with content_of(path, "run record"):
        if "metrics" in content and "model" in content:
            return answer_rows(path, content, data)
        if "valid" in content and "dataset" in content:
            return stage1_rows(path, content, data)
    return []


def shown(path: Path) -> Path:
    """The path relative to the repository if it lies inside."""
    full = path.resolve()
    return full.relative_to(ROOT) if full.is_relative_to(ROOT) else path


def commit_words(commit: str | None) -> str:
    """A commit's first characters, and whether tracked files differed from it; "none" outside git."""
    head, plus, changes = (commit or "none").partition("+")
    return head[:9] + plus + changes


def common(path: Path, record: Record) -> dict[str, Any]:
    """The fields that every row takes from its record; InputError where one is of the wrong type."""
    for name, types in RECORD_FIELDS.items():
        if not isinstance(record[name], types):
            expected = " or ".join(kind.__name__ for kind in types)
            raise impossible(path, name, f"is {record[name]!r}", expected)
    seconds = number(path, "wall_seconds", record["wall_seconds"])
    if seconds <= 0:
        raise impossible(path, "wall_seconds", f"is {seconds}", "more than 0")
    return {
        "seed": record["seed"], "commit": record["git_commit"], "device": record["device"],
        "minutes": seconds / 60, "finished": record["finished"], "path": shown(path), "record": record,
    }  # fmt: skip


def numbers(metrics: Any, names: Sequence[str] = RANKING) -> dict[str, float]:
    """The metrics of these names that are there."""
    return {name: float(metrics[name]) for name in names if metrics and metrics.get(name) is not None}


# ---------------------------------------------------------------- data sets


@functools.lru_cache(maxsize=8)
def graph(folder: Path) -> KnowledgeGraph | None:
    """The graph of a folder; None if there is no such folder."""
    return KnowledgeGraph.load(folder, keep_names=True) if folder.is_dir() else None


def counts(kg: KnowledgeGraph) -> dict[str, int]:
    """The columns of Table 6, counted; negatives if the folder has them."""
    found = {"entities": kg.num_entities, "relations": kg.num_relations}
    found |= {split: len(kg.split(split)) for split in ("train", "valid", "test")}
    negatives = {split: kg.negatives(split) for split in ("valid", "test")}
    return found | {f"{split} negatives": len(rows) for split, rows in negatives.items() if rows is not None}


def known_counts(dataset: str, data: Path) -> dict[str, int]:
    """The counts of the paper's Table 6, else of the data set in ``data``; {} for one that is in neither."""
    methods = read_json(EXPECTED / "table6.json", "expected numbers")["methods"]
    paper = next((dict(method["values"][""]) for method in methods if method["method"] == dataset), None)
    if paper is None:
        kg = graph(data / dataset)
        paper = counts(kg) if kg else {}
    return paper


@functools.lru_cache(maxsize=1)
def public_hashes() -> dict[str, dict[str, str]]:
    """Name -> hashes of the public data sets: of the files by name, of the training triples as "triples"."""
    return dict(read_json(EXPECTED / "datasets.json", "hashes of data sets"))


def dataset_name(name: str, hashes: Mapping[str, str], triples: str | None, data: Path) -> str:
    """The data set that a run used. A name that belongs to other triples gets their hash behind it.

    ``hashes``: of the input files by name; ``triples``: digest of the training triples if the record has one.
    """
    files = {file: hashes[file] for file in SPLIT_FILES if file in hashes}
    for public, known in public_hashes().items():
        if all(known[file] == digest for file, digest in files.items()) and (
            "train.txt" in files or triples == known["triples"]
        ):
            return public
    kg = None if name in public_hashes() else graph(data / name)
    there = kg.input_hashes if kg else {}
    same = all(there.get(file, digest) == digest for file, digest in files.items())
    if name not in public_hashes() and same:
        return name
    changed = next((digest for file, digest in files.items() if there.get(file) != digest), triples or "unknown")
    return f"{name} (other triples, {changed[:6]})"


# ---------------------------------------------------------------- stage 1


def stage1_rows(path: Path, record: Record, data: Path) -> list[Row]:
    """A run of run_rq.py: the result from its codes and the control with shuffled codes; or a baseline run."""
    base = common(path, record)
    dataset = dataset_name(record["dataset"], record.get("inputs") or {}, record.get("trained_on"), data)
    check_stage1(path, record, known_counts(dataset, data))
    what = {
        "task": CODES, "dataset": dataset, "label": system_of(record).label, "flags": tuple(other_flags(record)),
        "codes": "with", **base,
    }  # fmt: skip
    control = control_name(record["args"])
    if record.get("control") != control:
        raise impossible(path, "control", f"is {record.get('control')!r}", f"{control!r}, which the flags give")
    variant = f"control: {CONTROLS.get(control, control)}" if control else ""
    rows = [Row(variant=variant, metrics=numbers(record.get("test")), valid=numbers(record["valid"]), **what)]
    if record.get("test_shuffled_codes"):
        shuffled = numbers(record["test_shuffled_codes"])
        rows.append(Row(variant="control: codes shuffled", metrics=shuffled, valid={}, **what))
    return rows


def check_stage1(path: Path, record: Record, sizes: Mapping[str, int]) -> None:
    """The metrics are possible and the queries twice the split's triples (``sizes``, where known)."""
    for name in ("valid", "test", "test_shuffled_codes"):
        check_all_rankings(path, name, record.get(name))
    if not numbers(record["valid"]):
        raise impossible(path, "valid", "holds no metrics", "those of the validation split")
    levels = record.get("valid_mrr_by_levels") or []
    for level, value in enumerate(levels):
        share(path, f"valid_mrr_by_levels[{level}]", value)
    before = record.get("mrr_before_collision_pass")
    if isinstance(before, int | float):
        share(path, "mrr_before_collision_pass", before)
    if levels and abs(levels[-1] - record["valid"]["mrr"]) > SLACK:
        raise impossible(path, "valid_mrr_by_levels", f"ends at {levels[-1]}", f"valid.mrr = {record['valid']['mrr']}")
    for split, name in (("valid", "valid"), ("test", "test"), ("test", "test_shuffled_codes")):
        if record.get(name) and split in sizes:
            check_count(path, f"{name}.count", record[name].get("count"), 2 * sizes[split], f"2 x {split}")


# ---------------------------------------------------------------- answers of an LLM


def answer_rows(path: Path, record: Record, data: Path) -> list[Row]:
    """A run of inference.py: per task the LLM's metrics and, for link prediction, those of the baselines."""
    base = common(path, record)
    training, data_set = training_record(path, record), answered_data(path, record)
    if training:
        seconds = number(path, "training", training["wall_seconds"])
        base |= {"seed": training["seed"], "minutes": base["minutes"] + seconds / 60}
    codes = record.get("codes") or {"file": None}
    given = "without" if codes.get("file") is None else "shuffled" if codes.get("shuffled") else "with"
    limit = min((n for n in (record["args"].get("limit"), data_set["limit"]) if n), default=0)
    rows = []
    for task, names in ((LINKS, RANKING), (TRIPLES, CLASSIFICATION)):
        splits = record["metrics"].get(task)
        if not splits:
            continue
        dataset, hashes = data_set["datasets"][task], data_set.get("inputs") or {}
        dataset = dataset_name(dataset, hashes, None, data) if hashes else dataset
        test = splits.get("test", {})
        check_answers(path, task, splits, limit, known_counts(dataset, data))
        label, flags = answer_words(record, training, given, dataset, limit)
        if task == LINKS and (record.get("candidate_order") or {}).get("test") == "ranked":
            label += ", ranked lists"
        what = {"task": task, "dataset": dataset, "label": label, "flags": flags, "codes": given,
                "partial": bool(limit), **base}  # fmt: skip
        valid = numbers(splits.get("validation"), names)
        rows.append(Row(variant="", metrics=numbers(test, names), valid=valid, **what))
        for part, variant in ANSWER_BASELINES.items():
            if numbers(test.get(part), names):
                rows.append(Row(variant=variant, metrics=numbers(test[part], names), valid={}, **what))
    return rows


def answer_words(
    record: Record, training: Record | None, given: str, dataset: str, limit: int
) -> tuple[str, tuple[str, ...]]:
    """Label of an LLM's answers (base model, adapter, codes in the prompt, decoding), and the other training flags."""
    codes = record.get("codes") or {}
    base = Path(str((training or {}).get("base_model") or record["model"].get("base_model"))).name
    words, flags = [base], list[str]()
    if training:
        args = training["args"]
        words.append(f"LoRA r {args.get('lora_r')}")
        words.append(f"{args['max_steps']} steps" if args.get("max_steps") else f"{args['epochs']:g} epochs")
        words.append(f"{training['rows']['train']:,} rows")
        words += ["code rows from stage 1"] if args.get("code_init") else []
        flags = flag_words(args, TRAINING_IN_WORDS)
    K, L, Q = (codes.get(name) or 0 for name in ("num_code", "seq_len", "num_quantizers"))
    size = f"codes {L} x {Q} of {K:,}"
    size += f" ({L * Q * math.log2(K):,.0f} bits)" if K else ""
    words.append({"without": "without codes", "shuffled": f"{size}, shuffled", "with": size}[given])
    if given != "without" and codes.get("dataset") not in (None, dataset, dataset.partition(" (other")[0]):
        words.append(f"of {codes['dataset']}")
    decode = record["args"].get("decode", "score")
    words += [f"decode {decode}"] if decode != "score" else []
    words += [f"at most {limit:,} test rows"] if limit else []
    return ", ".join(words), tuple(flags)


def check_answers(path: Path, task: str, splits: Record, limit: int, sizes: Mapping[str, int]) -> None:
    """The metrics are possible; without --limit the test queries are as many as the data set has (``sizes``)."""
    for split, metrics in splits.items():
        name = f"metrics.{task}.{split}"
        if task == LINKS:
            check_all_rankings(path, name, metrics)
        else:
            check_classification(path, name, metrics)
    test, name = splits.get("test"), f"metrics.{task}.test"
    if not test or not sizes:
        return
    if limit:
        if number(path, f"{name}.count", test.get("count")) > limit:
            raise impossible(path, f"{name}.count", f"is {test['count']}", f"at most --limit {limit}")
    elif task == LINKS:
        check_count(path, f"{name}.count", test.get("count"), 2 * sizes["test"], "2 x test")
    else:
        check_count(path, f"{name}.positives", test.get("positives"), sizes["test"], "test triples")


# ---------------------------------------------------------------- files that a record of answers refers to


def training_record(path: Path, record: Record) -> Record | None:
    """The record of the adapter that answered, identified by its hash; None for a base model alone.

    Raises InputError if the adapter is gone or was trained again since: keep records before that (--keep).
    """
    if "training" in record:  # a kept record has it inside
        return dict(record["training"]) if record["training"] else None
    digest = record["model"].get("run_record.json")
    if digest is None:
        return None
    folder = find_file(path, record["args"].get("lora_adapter") or record["model"].get("base_model"))
    found = dict(read_json(unchanged(path, folder / "run_record.json", digest), "adapter's record"))
    if "lora_r" in found["args"]:
        return found
    merged = find_file(path, found["args"]["lora_adapter"]) / "run_record.json"  # a merged model names its adapter
    return dict(read_json(merged, "adapter's record"))


def answered_data(path: Path, record: Record) -> dict[str, Any]:
    """{"datasets": task -> data set, "limit": rows per file, 0 for all, "inputs": file hashes} of the answered rows.

    A kept record has it inside; else it comes from the statistics beside the rows, if the rows are unchanged.
    """
    if "data" in record:
        return dict(record["data"])
    stats = read_json(answered_rows(path, record).parent / "dataset_stats.json", "statistics")
    datasets = stats["datasets"] if "datasets" in stats else {stats["task"]: stats["dataset"]}
    hashes = {name: digest for name, digest in stats.get("inputs", {}).items() if name in SPLIT_FILES}
    return {"datasets": datasets, "limit": stats["args"].get("limit") or 0, "inputs": hashes}


def answered_rows(path: Path, record: Record, given: Path | None = None) -> Path:
    """The file of test rows that were answered: ``given``, else the one that the record names."""
    named = record["args"].get("test_data")
    return unchanged(path, given or find_file(path, named), record["inputs"].get(Path(str(named)).name))


def unchanged(path: Path, file: Path, digest: Any) -> Path:
    """A file that the record ``path`` names; InputError if it is missing or, by its hash, another one."""
    if not file.is_file() or sha256_file(file) != digest:
        problem = "has changed since" if file.is_file() else "does not exist"
        raise InputError(f"{path}: {file} {problem}; give --keep before files are replaced, or repeat inference.py")
    return file


def find_file(path: Path, name: Any) -> Path:
    """A path of a record's flags: as it is, or relative to the record's folder, lora_training/ or the repository."""
    for folder in (Path(), path.parent, ROOT / "lora_training", ROOT):
        if (folder / str(name)).exists():
            return folder / str(name)
    return Path(str(name))
