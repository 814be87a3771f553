"""One run record -> its checked rows: what stage 1 measured from codes, what an LLM answered.

Three kinds of records are read: stage 1's (run_rq.py), answers' (inference.py), and adapters' (train_lora.py, for
seed, time and flags of the answers). A record whose metrics cannot be is an InputError with file and field
(common/metrics.py).
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.config import BASELINES, NOT_COMPARED, build_parser
from common.errors import InputError, content_of
from common.files import ROOT, read_json, sha256_file
from common.metrics import (
    JUDGING,
    RANKING,
    SLACK,
    check_all_rankings,
    check_count,
    check_judging,
    number,
    refuse,
    share,
)
from data.knowledge_graph import KnowledgeGraph
from lora_training.score_answers import Answer, report

CODES, LINKS, TRIPLES = "codes", "link_prediction", "triple_classification"  # the tasks of Tables 2, 3 and 5, and 4
RECORD_FIELDS = ("args", "seed", "git_commit", "device", "finished", "wall_seconds")
METRIC_FIELDS = ("mrr", "test", "valid", "metrics")
CONTROLS = {
    "unquantized": "unquantized", "frozen_vectors": "unquantized, vectors frozen as codes are",
    "random_codes": "random codes", "posthoc": "codes made after training",
}  # fmt: skip
DECODERS = {"conve": "ConvE", "distmult": "DistMult", "complex": "ComplEx", "tucker": "TuckER", "mlp": "MLP"}
# flags that do not change what is learned, or that the label says in words
UNLABELLED = NOT_COMPARED | {
    "name", "seed", "quantizer", "seq_len", "num_code", "num_quantizers", "decoder", "gcn_layers", "text_init",
    "control", "eval_codes", "checkpoint", "split", "metrics_out", "shuffle_codes", "predict", "export_candidates",
    "top", "eval_every",
}  # fmt: skip
UNLABELLED_TRAINING = {
    "model_name", "train_data", "val_data", "output_dir", "overwrite", "resume_from_checkpoint", "micro_batch_size",
    "eval_batch_size", "logging_steps", "seed", "report_to", "lora_r", "gradient_checkpointing", "epochs", "max_steps",
    "eval_steps", "max_length", "code_init", "plain_text",
}  # fmt: skip
EXPECTED = ROOT / "tables" / "expected"
KEEP_FIRST = "give --keep before data are replaced, or repeat inference.py"

Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One run's metrics on one task and data set."""

    task: str  # CODES, LINKS or TRIPLES
    dataset: str
    setting: str  # a label made of the run's flags: equal for runs that differ in seed, machine and folders alone
    variant: str  # "" for the result itself, else a control of the same run, as "codes shuffled"
    codes: str  # "with", "without" or "shuffled": what the LLM was given; stage 1 is always "with"
    seed: int | None
    commit: str | None
    device: str
    minutes: float  # all of it: training and answering
    finished: str
    metrics: dict[str, float]  # of the test split; {} where it was left alone
    valid: dict[str, float]
    path: Path  # of the record, relative to the repository where it lies inside
    record: Record = field(repr=False)  # its whole content
    limited: bool = False  # not all of the test split was asked


def lacks_record(content: Any) -> str:
    """Why a file with metrics has no provenance; "" for a record and for a file without metrics."""
    if not isinstance(content, dict) or not any(name in content for name in METRIC_FIELDS):
        return ""
    missing = [name for name in RECORD_FIELDS if name not in content]
    return f"holds metrics and no run record (no {', '.join(missing)})" if missing else ""


def rows_of(path: Path, content: Any, data: Path) -> list[Row]:
    """The rows of one file; none for files that are no record of a result (adapters, merges, statistics)."""
    if not isinstance(content, dict) or any(name not in content for name in RECORD_FIELDS):
        return []
    with content_of(path, "run record"):
        if "metrics" in content and "model" in content:
            return answer_rows(path, content, data)
        if "valid" in content and "dataset" in content:
            return stage1_rows(path, content, data)
    return []


def shown(path: Path) -> Path:
    """The path relative to the repository where it lies inside."""
    full = path.resolve()
    return full.relative_to(ROOT) if full.is_relative_to(ROOT) else path


def commit_words(commit: str | None) -> str:
    """A commit's first characters, and whether tracked files differed from it; "none" outside git."""
    head, plus, changes = (commit or "none").partition("+")
    return head[:9] + plus + changes


@functools.lru_cache(maxsize=8)
def graph(folder: Path) -> KnowledgeGraph | None:
    """The graph of a folder; None where there is no such folder."""
    return KnowledgeGraph.load(folder) if folder.is_dir() else None


def counts(kg: KnowledgeGraph) -> dict[str, int]:
    """What Table 6 says of a graph, counted; negatives where the folder has them."""
    found = {"entities": kg.num_entities, "relations": kg.num_relations}
    found |= {split: len(kg.split(split)) for split in ("train", "valid", "test")}
    negatives = {split: kg.negatives(split) for split in ("valid", "test")}
    return found | {f"{split} negatives": len(rows) for split, rows in negatives.items() if rows is not None}


def known_counts(dataset: str, data: Path) -> dict[str, int]:
    """``counts`` of a data set that is here, else the paper's; {} for one that is neither here nor in the paper."""
    kg = graph(data / dataset)
    if kg is not None:
        return counts(kg)
    methods = read_json(EXPECTED / "table6.json", "expected numbers")["methods"]
    return next((dict(method["values"][""]) for method in methods if method["method"] == dataset), {})


def common(path: Path, record: Record) -> dict[str, Any]:
    """The fields that every row takes from its record; InputError where one is of the wrong type."""
    if not isinstance(record["args"], dict):
        raise refuse(path, "args", f"is {type(record['args']).__name__}", "the flags by name")
    for name in ("device", "finished"):
        if not isinstance(record[name], str) or not record[name]:
            raise refuse(path, name, f"is {record[name]!r}", "text")
    if not isinstance(record["git_commit"] or "", str):
        raise refuse(path, "git_commit", f"is {record['git_commit']!r}", "text, or null outside git")
    if not isinstance(record.get("codes") or {}, dict):
        raise refuse(path, "codes", f"is {type(record['codes']).__name__}", "what is said of the codes, by name")
    seconds = number(path, "wall_seconds", record["wall_seconds"])
    if seconds <= 0:
        raise refuse(path, "wall_seconds", f"is {seconds}", "more than 0")
    return {
        "seed": seed_of(path, record), "commit": record["git_commit"], "device": record["device"],
        "minutes": seconds / 60, "finished": record["finished"], "path": shown(path), "record": record,
    }  # fmt: skip


def seed_of(path: Path, record: Record) -> int | None:
    """The seed of a record; None where nothing was drawn."""
    seed: int | None = record["seed"]
    if seed is not None and type(seed) is not int:
        raise refuse(path, "seed", f"is {seed!r}", "a whole number or null")
    return seed


def numbers(metrics: Any, names: Sequence[str]) -> dict[str, float]:
    """The metrics of these names that are there."""
    if not isinstance(metrics, dict):
        return {}
    return {name: float(metrics[name]) for name in names if metrics.get(name) is not None}


# ---------------------------------------------------------------- stage 1


def stage1_rows(path: Path, record: Record, data: Path) -> list[Row]:
    """A run of run_rq.py: the result from its codes and, as a control, from shuffled ones; or a control of its own."""
    base = common(path, record)
    check_stage1(path, record, data)
    control = control_of(path, record)
    what = {"task": CODES, "dataset": record["dataset"], "setting": stage1_setting(record), "codes": "with", **base}
    valid = numbers(record["valid"], RANKING)
    variant = f"control: {CONTROLS[control]}" if control else ""
    rows = [Row(variant=variant, metrics=numbers(record.get("test"), RANKING), valid=valid, **what)]
    if record.get("test_shuffled_codes"):
        shuffled = numbers(record["test_shuffled_codes"], RANKING)
        rows.append(Row(variant="control: codes shuffled", metrics=shuffled, valid={}, **what))
    return rows


def control_of(path: Path, record: Record) -> str | None:
    """Which --control a run was, None for a run whose codes are its result; record and flags must agree."""
    control, flag = record.get("control"), control_name(record["args"])
    if control != flag:
        raise refuse(path, "control", f"is {control!r}", f"what its flags say, {flag!r}")
    if control is not None and control not in CONTROLS:
        raise refuse(path, "control", f"is {control!r}", f"one of {', '.join(CONTROLS)}")
    return control


def control_name(args: Record) -> str | None:
    """The baseline that a run's flags name: by --control in older records, by --quantizer in newer ones."""
    return args.get("control") or BASELINES.get(args.get("quantizer", "rq"))


def check_stage1(path: Path, record: Record, data: Path) -> None:
    """Metrics possible, queries twice the split's triples, made from the data that are here."""
    for name in ("valid", "test", "test_shuffled_codes"):
        check_all_rankings(path, name, record.get(name))
    if not numbers(record["valid"], RANKING):
        raise refuse(path, "valid", "holds no metrics", "those of the validation split")
    levels = record.get("valid_mrr_by_levels") or []
    for level, value in enumerate(levels):
        share(path, f"valid_mrr_by_levels[{level}]", value)
    before = record.get("mrr_before_collision_pass")
    if isinstance(before, int | float):
        share(path, "mrr_before_collision_pass", before)
    if levels and abs(levels[-1] - record["valid"]["mrr"]) > 1e-9:
        raise refuse(path, "valid_mrr_by_levels", f"ends at {levels[-1]}", f"valid.mrr = {record['valid']['mrr']}")
    kg = graph(data / record["dataset"])
    for name, digest in record.get("inputs", {}).items():
        here = kg.input_hashes.get(name) if kg and name in ("train.txt", "valid.txt", "test.txt") else None
        if here not in (None, digest):
            raise refuse(path, f"inputs.{name}", f"is {digest[:12]}...", f"the hash in {data / record['dataset']}")
    sizes = known_counts(record["dataset"], data)
    for split, name in (("valid", "valid"), ("test", "test"), ("test", "test_shuffled_codes")):
        if record.get(name) and split in sizes:
            check_count(path, f"{name}.count", record[name].get("count"), 2 * sizes[split], f"2 x {split}")


def stage1_setting(record: Record) -> str:
    """The label of a run of run_rq.py: its codes, decoder and encoder in words, then all flags off their defaults."""
    args = record["args"]
    size = f"{args.get('seq_len')} x {args.get('num_quantizers')} of {args.get('num_code', 0):,}"
    name = {"rq": f"RQ {size}", "vq": f"VQ {args.get('seq_len')} of {args.get('num_code', 0):,}"}.get(
        args.get("quantizer", "rq"), size
    )
    layers = args.get("gcn_layers")
    words = [
        f"{args.get('seq_len')} vectors" if control_name(args) in ("unquantized", "frozen_vectors") else name,
        DECODERS.get(args.get("decoder"), str(args.get("decoder"))),
        "no GCN" if layers == 0 else f"GCN {layers}",
    ]
    if args.get("text_emb"):  # two files of one name are two inputs: an encoder is known by its vectors
        file = Path(str(args["text_emb"]))
        words.append(f"text {file.stem} {str(record.get('inputs', {}).get(file.name, ''))[:6]}".rstrip())
    words += ["text init"] if args.get("text_init") else []
    words += ["given codes"] if args.get("codes_from") else []
    teachers = sum(name.startswith("teacher ") for name in record.get("inputs", {}))
    words += [f"taught by {teachers}"] if teachers else []
    words += [f"stopped after {record['epochs']}"] if stopped_early(record) else []
    return ", ".join([*words, *other_flags(args, stage1_defaults(), UNLABELLED)])


def stopped_early(record: Record) -> bool:
    """Whether a run was dumped (--dump_only) before its epochs were over, and neither clock nor patience ended it."""
    args = record["args"]
    return bool(
        args.get("epoch")
        and record.get("epochs", args["epoch"]) < args["epoch"]
        and not (args.get("max_minutes") or args.get("patience"))
    )


@functools.lru_cache(maxsize=1)
def stage1_defaults() -> Record:
    """run_rq.py's flags at their defaults."""
    return {action.dest: action.default for action in build_parser()._actions}


@functools.lru_cache(maxsize=1)
def training_defaults() -> Record:
    """train_lora.py's flags at their defaults, and those that are gone at the defaults that they had."""
    from lora_training.train_lora import parse_args

    gone = {"share_prompts": False, "rank_loss": False, "token_weight": 1.0, "place_weight": 0.0, "draw": 0,
            "easy_until": 0.5, "matmul_precision": "highest"}  # fmt: skip
    return gone | vars(parse_args([]))


def other_flags(args: Record, defaults: Record, unlabelled: set[str]) -> list[str]:
    """Flags off today's defaults by name, as "lr 0.005"; a flag that is new since the record says nothing."""
    found = []
    for name, value in sorted(args.items()):
        default = defaults.get(name)
        if name in unlabelled or value is None or value == default or (value is False and default is None):
            continue
        if isinstance(value, bool):
            found.append(name if value else f"no {name}")
        else:
            found.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return found


# ---------------------------------------------------------------- answers of an LLM


def answer_rows(path: Path, record: Record, data: Path) -> list[Row]:
    """A run of inference.py: per task the LLM's metrics and, for link prediction, those of its rivals."""
    base = common(path, record)
    training, data_set = training_record(path, record), answered_data(path, record)
    if training:
        base |= {
            "seed": seed_of(path, training),
            "minutes": base["minutes"] + number(path, "training", training["wall_seconds"]) / 60,
        }
    codes = record.get("codes") or {"file": None}
    given = "without" if codes.get("file") is None else "shuffled" if codes.get("shuffled") else "with"
    limit = min((n for n in (record["args"].get("limit"), data_set["limit"]) if n), default=0)
    rows = []
    for task, names in ((LINKS, RANKING), (TRIPLES, JUDGING)):
        splits = record["metrics"].get(task)
        if not splits:
            continue
        dataset = data_set["datasets"].get(task)
        if not dataset:
            raise refuse(path, "data.datasets", f"names no data set of {task}", "the one of its rows")
        test, sizes = splits.get("test", {}), known_counts(dataset, data)
        check_answers(path, task, splits, limit, sizes)
        check_scored(path, task, splits, record.get("answers"))
        cut = 0 if asked_all(task, test, sizes) else limit
        setting = answer_setting(record, training, given, dataset, cut)
        what = {"task": task, "dataset": dataset, "setting": setting, "codes": given, "limited": bool(cut), **base}
        rows.append(
            Row(variant="", metrics=numbers(test, names), valid=numbers(splits.get("validation"), names), **what)
        )
        for part, variant in (
            ("candidate_model", "the candidates' model"),
            ("as_listed", "copies the first candidate"),
        ):
            if numbers(test.get(part), names):
                rows.append(Row(variant=variant, metrics=numbers(test[part], names), valid={}, **what))
    return rows


def answer_setting(record: Record, training: Record | None, given: str, dataset: str, limit: int) -> str:
    """The label of an LLM's answers: base model, adapter, the codes it saw, how it answered."""
    codes = record.get("codes") or {}
    base = Path(str((training or {}).get("base_model") or record["model"].get("base_model"))).name
    words = [base]
    if training:
        flags = training["args"]
        words.append(f"LoRA r {flags.get('lora_r')}")
        words.append(f"{flags['max_steps']} steps" if flags.get("max_steps") else f"{flags['epochs']:g} epochs")
        words.append(f"{training['rows']['train']:,} rows")
        words += ["code rows from stage 1"] if flags.get("code_init") else []
        words += other_flags(flags, training_defaults(), UNLABELLED_TRAINING)
    size = f"codes {codes.get('seq_len')} x {codes.get('num_quantizers')} of {codes.get('num_code') or 0:,}"
    words.append({"without": "without codes", "shuffled": f"{size}, shuffled", "with": size}[given])
    if given != "without" and codes.get("dataset") not in (None, dataset):
        words.append(f"of {codes['dataset']}")
    decode = record["args"].get("decode", "score")
    words += [f"decode {decode}"] if decode != "score" else []
    words += [f"{limit:,} test rows at most"] if limit else []
    return ", ".join(words)


def asked_all(task: str, test: Record, sizes: dict[str, int]) -> bool:
    """Whether the test split was answered as a whole, whatever --limit would have cut."""
    if task == LINKS:
        return "test" in sizes and test.get("count") == 2 * sizes["test"]
    if "test negatives" in sizes:
        return bool(test.get("count") == sizes["test"] + sizes["test negatives"])
    return "test" in sizes and test.get("positives") == sizes["test"]  # sampled negatives, one or more for each


def check_answers(path: Path, task: str, splits: Record, limit: int, sizes: dict[str, int]) -> None:
    """Metrics possible; where no --limit cut the rows, the test queries are the data set's (``known_counts``)."""
    for split, metrics in splits.items():
        name = f"metrics.{task}.{split}"
        if task == LINKS:
            check_all_rankings(path, name, metrics)
        else:
            check_judging(path, name, metrics)
            check_judging(path, f"{name}.at_zero", metrics.get("at_zero", metrics))
    test, name = splits.get("test"), f"metrics.{task}.test"
    if not test or not sizes:
        return
    if limit:
        if number(path, f"{name}.count", test.get("count")) > limit:
            raise refuse(path, f"{name}.count", f"is {test['count']}", f"at most --limit {limit}")
    elif task == LINKS:
        check_count(path, f"{name}.count", test.get("count"), 2 * sizes["test"], "2 x test")
    else:
        check_count(path, f"{name}.positives", test.get("positives"), sizes["test"], "test triples")
        if "test negatives" in sizes:
            both = sizes["test"] + sizes["test negatives"]
            check_count(path, f"{name}.count", test.get("count"), both, "test triples and negatives")


def check_scored(path: Path, task: str, splits: Record, answers: Sequence[Answer] | None) -> None:
    """The metrics are those of the record's own answers, scored again; a kept record has left its answers out."""
    if not answers:
        return
    again = report(answer for answer in answers if answer["task_type"] == task).get(task, {})
    for split in splits.keys() | again.keys():
        for name in (*RANKING, *JUDGING):
            old, new = (numbers(part.get(split), (name,)).get(name, math.nan) for part in (splits, again))
            if not (math.isnan(old) and math.isnan(new)) and not abs(old - new) <= SLACK:
                found = "is not there" if math.isnan(old) else f"is {old}"
                raise refuse(path, f"metrics.{task}.{split}.{name}", found, f"{new}, which its answers give")


def training_record(path: Path, record: Record) -> Record | None:
    """The record of the adapter that answered, known by its hash; None for a base model alone.

    Raises InputError where the adapter is gone or was trained anew since: keep records before that (--keep).
    """
    if "training" in record:  # a kept record has it inside
        return dict(record["training"]) if record["training"] else None
    digest = record["model"].get("run_record.json")
    if digest is None:
        return None
    folder = record["args"].get("lora_adapter") or record["model"].get("base_model")
    for _ in range(2):  # a merged model's record names the adapter
        file = beside(path, folder) / "run_record.json"
        if not file.is_file() or (digest is not None and sha256_file(file) != digest):
            raise InputError(
                f"{path}: its adapter's record {file} is {'another run' if file.is_file() else 'not there'}; "
                "give --keep before an adapter is replaced, or repeat inference.py"
            )
        found: Record = read_json(file, "adapter's record")
        if "lora_r" in found["args"]:
            return found
        digest, folder = None, found["args"].get("lora_adapter")
    raise InputError(f"{path}: {file} is no record of train_lora.py")


def answered_rows(path: Path, record: Record, given: Path | None = None) -> Path:
    """The test rows that were answered: ``given``, else the file that the record names.

    Raises InputError where they are not there, or no longer the same rows (by their hash).
    """
    named = record["args"].get("test_data")
    rows = given or beside(path, named)
    if not rows.is_file() or sha256_file(rows) != record["inputs"].get(Path(str(named)).name):
        raise InputError(f"{path}: its rows {rows} are {'others' if rows.is_file() else 'not there'} now; {KEEP_FIRST}")
    return rows


def answered_data(path: Path, record: Record) -> dict[str, Any]:
    """{"datasets": task -> data set, "limit": rows per file, 0 for all} of the rows that were answered.

    A kept record has it inside; else it comes from the statistics beside those rows, if they are still the same rows.
    """
    if "data" in record:
        return dict(record["data"])
    rows = answered_rows(path, record)
    stats_file = rows.parent / "dataset_stats.json"
    if not stats_file.is_file():
        raise InputError(f"{path}: {stats_file} is not there, so the rows' data set is unknown; {KEEP_FIRST}")
    stats = read_json(stats_file, "statistics")
    datasets = stats["datasets"] if "datasets" in stats else {stats["task"]: stats["dataset"]}
    return {"datasets": datasets, "limit": stats["args"].get("limit") or 0}


def beside(path: Path, name: Any) -> Path:
    """A path of a record's flags: as it is, or relative to the record's folder or to lora_training/."""
    for folder in (Path(), path.parent, ROOT / "lora_training", ROOT):
        if (folder / str(name)).exists():
            return folder / str(name)
    return Path(str(name))
