"""Run records in, checked rows out: what tables and figures are made of. Nothing here is ever typed.

    python tables/results.py                                                list the rows of the default folders
    python tables/results.py --keep lora_training/inference_results.json    check a record, copy it to tables/records

A row is one number-bearing run: its data set, setting, seed, commit, device, minutes, metrics and the record they come
from. Three kinds of records are read: stage 1's (run_rq.py), answers' (inference.py), adapters' (train_lora.py, for
seed, time and flags of the answers). A file with metrics and no record is refused, a record whose metrics cannot be is
an error (tables/sanity.py).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run_rq
from data.knowledge_graph import KnowledgeGraph
from run_record import ROOT, CommandParser, InputError, read_json, run_command, sha256_file, write_json
from tables.sanity import JUDGING, RANKING, check_all_rankings, check_count, check_judging, number, refuse, share

CODES, LINKS, TRIPLES = "codes", "link_prediction", "triple_classification"  # the tasks of Tables 2, 3 and 5, and 4
KEPT = ROOT / "tables" / "records"
FOLDERS = (KEPT, ROOT / "codes_new", ROOT / "lora_training" / "lora_outputs",
           ROOT / "lora_training" / "inference_results.json")  # fmt: skip
RECORD_FIELDS = ("args", "seed", "git_commit", "device", "finished", "wall_seconds")
METRIC_FIELDS = ("mrr", "test", "valid", "metrics")
DECODERS = {"conve": "ConvE", "distmult": "DistMult", "complex": "ComplEx", "tucker": "TuckER", "mlp": "MLP"}
# flags that do not change what is learned, or that the label says in words
UNLABELLED = run_rq.NOT_COMPARED | {
    "name", "seed", "quantizer", "seq_len", "num_code", "num_quantizers", "decoder", "gcn_layers", "text_init",
    "unquantized", "eval_codes", "checkpoint", "split", "metrics_out", "shuffle_codes", "predict", "export_candidates",
    "top", "baseline", "eval_every",
}  # fmt: skip

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


class Collection(NamedTuple):
    """What folders of records hold."""

    rows: list[Row]
    refused: list[str]  # one line per file that holds metrics and no record


class Stat(NamedTuple):
    """A metric over seeds."""

    mean: float
    std: float | None  # sample standard deviation; None for a single run
    n: int


@dataclass(frozen=True)
class Group:
    """Rows that differ in seed alone."""

    rows: list[Row]

    @property
    def first(self) -> Row:
        """The row of the lowest seed: for task, dataset, setting, variant, which are the same in all."""
        return self.rows[0]

    @property
    def seeds(self) -> list[int | None]:
        return [row.seed for row in self.rows]

    def stat(self, metric: str, split: str = "test") -> Stat | None:
        """Mean and spread of a metric; None where no row has it."""
        chosen = [row.metrics if split == "test" else row.valid for row in self.rows]
        values = [metrics[metric] for metrics in chosen if metric in metrics]
        return stat(values) if values else None


def stat(values: Sequence[float]) -> Stat:
    """Mean and sample standard deviation of one or more values."""
    return Stat(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def groups(rows: Iterable[Row]) -> list[Group]:
    """Rows by (task, dataset, setting, variant), in order of first appearance, each sorted by seed.

    Of several runs with one seed the one that finished last stands for it: a seed counts once.
    """
    found: dict[tuple[str, str, str, str], dict[int | None, Row]] = {}
    for row in rows:
        seeds = found.setdefault((row.task, row.dataset, row.setting, row.variant), {})
        if row.seed not in seeds or row.finished > seeds[row.seed].finished:
            seeds[row.seed] = row
    return [
        Group(sorted(by_seed.values(), key=lambda row: (row.seed is None, row.seed or 0))) for by_seed in found.values()
    ]


# ---------------------------------------------------------------- reading


def collect(places: Iterable[str | Path] = FOLDERS, data: str | Path = ROOT / "data") -> Collection:
    """All rows of the records in ``places`` (folders with everything below them, or files), each run once.

    ``data``: folder of the graphs, by which counts and hashes are checked where the data set is there. A place that
    does not exist is passed over when it is a default one. Raises InputError for a place that is not there, a file
    given by name that is no record, and a record that is damaged or impossible.
    """
    rows: list[Row] = []
    refused: list[str] = []
    seen: set[tuple[Any, ...]] = set()
    for place in map(Path, places):
        if not place.exists():
            if place in FOLDERS:
                continue
            raise InputError(f"--records {place} does not exist; run records are written by run_rq.py and inference.py")
        files = [place] if place.is_file() else sorted(place.rglob("*.json"))
        for path in files:
            content = read_json(path, "record")
            reason = lacks_record(content)
            if reason:
                line = f"{shown(path)} {reason}; only what a run recorded itself becomes a row"
                if path == place:
                    raise InputError(line)
                refused.append(line)
                continue
            for row in rows_of(path, content, Path(data)):
                if run_key(row) not in seen:
                    seen.add(run_key(row))
                    rows.append(row)
    return Collection(rows, refused)


def run_key(row: Row) -> tuple[Any, ...]:
    """Equal for copies of one run's record."""
    return (
        row.task,
        row.dataset,
        row.variant,
        row.seed,
        row.finished,
        row.record["wall_seconds"],
        *row.metrics.values(),
    )


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
    if "metrics" in content and "model" in content:
        return answer_rows(path, content, data)
    if "valid" in content and "dataset" in content:
        return stage1_rows(path, content, data)
    return []


def shown(path: Path) -> Path:
    """The path relative to the repository where it lies inside."""
    full = path.resolve()
    return full.relative_to(ROOT) if full.is_relative_to(ROOT) else path


@functools.lru_cache(maxsize=8)
def graph(folder: Path) -> KnowledgeGraph | None:
    """The graph of a folder; None where there is no such folder."""
    return KnowledgeGraph.load(folder) if folder.is_dir() else None


def common(path: Path, record: Record) -> dict[str, Any]:
    """The fields that every row takes from its record; InputError where one is of the wrong type."""
    if not isinstance(record["args"], dict):
        raise refuse(path, "args", f"is {type(record['args']).__name__}", "the flags by name")
    for name in ("device", "finished"):
        if not isinstance(record[name], str) or not record[name]:
            raise refuse(path, name, f"is {record[name]!r}", "text")
    seconds = number(path, "wall_seconds", record["wall_seconds"])
    if seconds <= 0:
        raise refuse(path, "wall_seconds", f"is {seconds}", "more than 0")
    return {
        "seed": record["seed"], "commit": record["git_commit"], "device": record["device"], "minutes": seconds / 60,
        "finished": record["finished"], "path": shown(path), "record": record,
    }  # fmt: skip


def numbers(metrics: Any, names: Sequence[str]) -> dict[str, float]:
    """The metrics of these names that are there."""
    if not isinstance(metrics, dict):
        return {}
    return {name: float(metrics[name]) for name in names if metrics.get(name) is not None}


# ---------------------------------------------------------------- stage 1


def stage1_rows(path: Path, record: Record, data: Path) -> list[Row]:
    """A run of run_rq.py: the result from its codes and, as a control, from shuffled ones."""
    base = common(path, record)
    check_stage1(path, record, graph(data / str(record["dataset"])))
    what = {"task": CODES, "dataset": record["dataset"], "setting": stage1_setting(record), "codes": "with", **base}
    valid = numbers(record["valid"], RANKING)
    rows = [Row(variant="", metrics=numbers(record.get("test"), RANKING), valid=valid, **what)]
    if record.get("test_shuffled_codes"):
        control = numbers(record["test_shuffled_codes"], RANKING)
        rows.append(Row(variant="control: codes shuffled", metrics=control, valid={}, **what))
    return rows


def check_stage1(path: Path, record: Record, kg: KnowledgeGraph | None) -> None:
    """Metrics possible, queries twice the split's triples, made from the data that are here."""
    for name in ("valid", "test", "test_shuffled_codes"):
        check_all_rankings(path, name, record.get(name))
    if not numbers(record["valid"], RANKING):
        raise refuse(path, "valid", "holds no metrics", "those of the validation split")
    levels = record.get("valid_mrr_by_levels") or []
    for level, value in enumerate(levels):
        share(path, f"valid_mrr_by_levels[{level}]", value)
    if levels and abs(levels[-1] - record["valid"]["mrr"]) > 1e-9:
        raise refuse(path, "valid_mrr_by_levels", f"ends at {levels[-1]}", f"valid.mrr = {record['valid']['mrr']}")
    if kg is None:
        return
    for name, digest in record.get("inputs", {}).items():
        if name in ("train.txt", "valid.txt", "test.txt") and kg.input_hashes.get(name) not in (None, digest):
            raise refuse(
                path, f"inputs.{name}", f"is {digest[:12]}...", f"the hash of {kg.name}'s file in the data folder"
            )
    for split, name in (("valid", "valid"), ("test", "test"), ("test", "test_shuffled_codes")):
        if record.get(name):
            check_count(path, f"{name}.count", record[name].get("count"), 2 * len(kg.split(split)), f"2 x {split}")


def stage1_setting(record: Record) -> str:
    """The label of a run of run_rq.py: its codes, decoder and encoder in words, then all flags off their defaults."""
    args = record["args"]
    size = f"{args.get('seq_len')} x {args.get('num_quantizers')} of {args.get('num_code', 0):,}"
    name = {"rq": f"RQ {size}", "vq": f"VQ {args.get('seq_len')} of {args.get('num_code', 0):,}"}.get(
        args.get("quantizer", "rq"), size
    )
    layers = args.get("gcn_layers")
    words = [
        f"unquantized ({args.get('seq_len')} vectors)" if args.get("unquantized") else name,
        DECODERS.get(args.get("decoder"), str(args.get("decoder"))),
        "no GCN" if layers == 0 else f"GCN {layers}",
    ]
    baseline = record.get("baseline") or args.get("baseline")
    words += [f"baseline: {str(baseline).replace('_', ' ')}"] if baseline else []
    words += ["text"] if args.get("text_emb") else []
    words += ["text init"] if args.get("text_init") else []
    return ", ".join([*words, *other_flags(args)])


@functools.lru_cache(maxsize=1)
def defaults() -> dict[str, Any]:
    return {action.dest: action.default for action in run_rq.build_parser()._actions}


def other_flags(args: Record) -> list[str]:
    """Flags that differ from today's defaults, as "lr 0.005"; a flag that is new since the record says nothing."""
    found = []
    for name, value in args.items():
        if name in UNLABELLED or value in (None, False) or value == defaults().get(name):
            continue
        if name in ("max_minutes", "patience", "text_weight") and (
            not value or (not args.get("text_emb") and name[0] == "t")
        ):
            continue
        found.append(name if value is True else f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return found


# ---------------------------------------------------------------- answers of an LLM


def answer_rows(path: Path, record: Record, data: Path) -> list[Row]:
    """A run of inference.py: per task the LLM's metrics and, for link prediction, those of its rivals."""
    base = common(path, record)
    training = record["training"] if "training" in record else training_record(path, record)
    datasets = record["datasets"] if "datasets" in record else task_datasets(path, record)
    if training:
        base |= {
            "seed": training["seed"],
            "minutes": base["minutes"] + number(path, "training", training["wall_seconds"]) / 60,
        }
    codes = record.get("codes") or {"file": None}
    given = "without" if codes.get("file") is None else "shuffled" if codes.get("shuffled") else "with"
    rows = []
    for task, names in ((LINKS, RANKING), (TRIPLES, JUDGING)):
        splits = record["metrics"].get(task)
        if not splits:
            continue
        dataset = datasets.get(task)
        if not dataset:
            raise refuse(path, "datasets", f"names no data set of {task}", "the one of its rows")
        check_answers(path, task, splits, record["args"], graph(data / dataset))
        test = splits.get("test", {})
        setting = answer_setting(record, training, given)
        what = {"task": task, "dataset": dataset, "setting": setting, "codes": given, **base}
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


def answer_setting(record: Record, training: Record | None, given: str) -> str:
    """The label of an LLM's answers: base model, adapter, the codes it saw, how it answered."""
    codes = record.get("codes") or {}
    base = Path(str((training or {}).get("base_model") or record["model"].get("base_model"))).name
    words = [base]
    if training:
        flags = training["args"]
        words.append(f"LoRA r {flags.get('lora_r')}")
        words.append(f"{flags['max_steps']} steps" if flags.get("max_steps") else f"{flags.get('epochs'):g} epochs")
    size = f"codes {codes.get('seq_len')} x {codes.get('num_quantizers')} of {codes.get('num_code') or 0:,}"
    words.append({"without": "without codes", "shuffled": f"{size}, shuffled", "with": size}[given])
    if given != "without" and codes.get("dataset"):
        words.append(f"of {codes['dataset']}")
    decode, limit = record["args"].get("decode", "score"), record["args"].get("limit")
    words += [f"decode {decode}"] if decode != "score" else []
    words += [f"first {limit:,} rows alone"] if limit else []
    return ", ".join(words)


def check_answers(path: Path, task: str, splits: Record, args: Record, kg: KnowledgeGraph | None) -> None:
    """Metrics possible; where no --limit cut them, the test queries are the data set's."""
    for split, metrics in splits.items():
        name = f"metrics.{task}.{split}"
        if task == LINKS:
            check_all_rankings(path, name, metrics)
        else:
            check_judging(path, name, metrics)
            check_judging(path, f"{name}.at_zero", metrics.get("at_zero", metrics))
    test = splits.get("test")
    if kg is None or not test:
        return
    triples = len(kg.test)
    name = f"metrics.{task}.test"
    if args.get("limit"):
        if number(path, f"{name}.count", test.get("count")) > args["limit"]:
            raise refuse(path, f"{name}.count", f"is {test['count']}", f"at most --limit {args['limit']}")
    elif task == LINKS:
        check_count(path, f"{name}.count", test.get("count"), 2 * triples, "2 x test")
    else:
        check_count(path, f"{name}.positives", test.get("positives"), triples, "test triples")
        negatives = kg.negatives("test")
        if negatives is not None:
            check_count(
                path, f"{name}.count", test.get("count"), triples + len(negatives), "test triples and negatives"
            )


def training_record(path: Path, record: Record) -> Record | None:
    """The record of the adapter that answered, known by its hash; None for a base model alone.

    Raises InputError where the adapter is gone or was trained anew since: keep records before that (--keep).
    """
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


def task_datasets(path: Path, record: Record) -> dict[str, str]:
    """Task -> data set, from the statistics beside the rows that were answered, if they still are those rows."""
    rows = beside(path, record["args"].get("test_data"))
    stats = rows.parent / "dataset_stats.json"
    if not rows.is_file() or not stats.is_file() or sha256_file(rows) != record["inputs"].get(rows.name):
        raise InputError(
            f"{path}: its rows {rows} are {'others now' if rows.is_file() else 'not there'}, so their data set is "
            "unknown; give --keep before data are replaced, or repeat inference.py"
        )
    found = read_json(stats, "statistics")
    return found["datasets"] if "datasets" in found else {found["task"]: found["dataset"]}


def beside(path: Path, name: Any) -> Path:
    """A path of a record's flags: as it is, or relative to the record's folder or to lora_training/."""
    for folder in (Path(), path.parent, ROOT / "lora_training", ROOT):
        if (folder / str(name)).exists():
            return folder / str(name)
    return Path(str(name))


# ---------------------------------------------------------------- keeping


def keep(path: Path, folder: Path = KEPT, data: Path = ROOT / "data", name: str | None = None) -> Path:
    """Check a record and copy it to ``folder`` as it will be needed: without answers, with the adapter's own record
    and the data sets, paths relative to the repository. Returns the file; InputError where one of the name differs."""
    content = read_json(path, "record")
    reason = lacks_record(content)
    if reason or not rows_of(path, content, data):
        raise InputError(f"{path} {reason or 'is no record of run_rq.py or inference.py'}; nothing was kept")
    if "model" in content:
        training = content.get("training") or training_record(path, content)
        datasets = content.get("datasets") or task_datasets(path, content)
        content = {key: value for key, value in content.items() if key != "answers"}
        content |= {"training": training, "datasets": datasets}
    content = relative(content)
    target = folder / f"{name or content.get('name') or path.parent.name + '_' + path.stem}.json"
    if target.exists() and read_json(target, "record") != content:
        raise InputError(f"{target} is another run's record; give --name")
    write_json(content, target)
    return target


def relative(value: Any) -> Any:
    """A copy whose texts name the repository's folder by nothing: ``ROOT/data/family`` becomes ``data/family``."""
    if isinstance(value, dict):
        return {key: relative(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [relative(inner) for inner in value]
    return value.replace(f"{ROOT}/", "") if isinstance(value, str) else value


# ---------------------------------------------------------------- the command


def add_record_flags(parser: argparse.ArgumentParser) -> None:
    """--records and --data, for every command that reads records."""
    parser.add_argument("--records", nargs="+", type=Path, metavar="DIR", default=list(FOLDERS),
                        help="folders (all below them) or files of run records")  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="DIR", default=ROOT / "data", help="folder of the graphs")


def report_refused(collection: Collection) -> None:
    """One line on stderr per file that was left out."""
    for line in collection.refused:
        print(f"refused: {line}", file=sys.stderr)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="tables/results.py", description=__doc__.split("\n")[0])
    add_record_flags(parser)
    parser.add_argument("--keep", type=Path, metavar="FILE", help="check this record and copy it to tables/records")
    parser.add_argument("--name", help="name of the kept record (default: the run's, or its folder's and file's)")
    args = parser.parse_args(argv)
    if args.name and not args.keep:
        parser.error("--name goes with --keep FILE")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.keep:
        target = keep(args.keep, data=args.data, name=args.name)
        print(f"wrote {target}")
        print("next: python tables/make_tables.py --reproduce docs/REPRODUCE.md")
        return
    collection = collect(args.records, args.data)
    report_refused(collection)
    for group in groups(collection.rows):
        row = group.first
        found = {name: group.stat(name) for name in (*RANKING, *JUDGING)}
        metrics = "  ".join(f"{name} {value.mean:.3f}" for name, value in found.items() if value)
        seeds = ",".join("-" if seed is None else str(seed) for seed in group.seeds)
        print(
            f"{row.task:21} {row.dataset:11} {metrics or 'test left alone':53} seeds {seeds}: {row.setting} "
            f"{row.variant} [{row.path}]"
        )
    if not collection.rows:
        print("no run record found; the first comes by: python run_rq.py --help")


if __name__ == "__main__":
    run_command(main)
