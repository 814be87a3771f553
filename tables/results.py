"""Run records in, checked rows out: what tables and figures are made of. Nothing here is ever typed.

    python tables/results.py                                                list the rows of the default folders
    python tables/results.py --keep lora_training/inference_results.json    check a record, copy it to tables/records

A row is one run on one data set: its setting, seed, commit, device, minutes, metrics and the record they come from
(tables/rows.py). A file with metrics and no record is refused, a record whose metrics cannot be is an error.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, run_command
from common.files import ROOT, read_json, write_json
from common.metrics import JUDGING, RANKING
from tables.rows import CODES, LINKS, TRIPLES, Row, answered_data, lacks_record, rows_of, shown, training_record

__all__ = ["CODES", "LINKS", "TRIPLES", "Collection", "Group", "Row", "Stat", "collect", "groups", "keep", "stat"]

KEPT = ROOT / "tables" / "records"
FOLDERS = (KEPT, ROOT / "codes_new", ROOT / "lora_training" / "lora_outputs",
           ROOT / "lora_training" / "inference_results.json")  # fmt: skip


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
            if path != place and not holds_object(path):
                continue
            content = read_json(path, "record")
            reason = lacks_record(content)
            if reason:
                line = f"{shown(path)} {reason}; only what a run recorded itself becomes a row"
                if path == place:
                    raise InputError(line)
                refused.append(line)
                continue
            found = rows_of(path, content, Path(data))
            if path == place and not found:
                raise InputError(f"--records {path} is no record of run_rq.py or inference.py")
            for row in found:
                if run_key(row) not in seen:
                    seen.add(run_key(row))
                    rows.append(row)
    return Collection(rows, refused)


def holds_object(path: Path) -> bool:
    """Whether a JSON file starts as an object: instruction data are arrays of up to gigabytes, records never are."""
    with open(path, "rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] not in (b"[", b'"')


def run_key(row: Row) -> tuple[Any, ...]:
    """Equal for copies of one run's record."""
    seconds, metrics = row.record["wall_seconds"], tuple(row.metrics.values())
    return row.task, row.dataset, row.setting, row.variant, row.seed, row.finished, seconds, metrics


# ---------------------------------------------------------------- keeping


def keep(path: Path, folder: Path = KEPT, data: Path = ROOT / "data", name: str | None = None) -> Path:
    """Check a record and copy it to ``folder`` as it will be needed: without answers, with the adapter's own record
    and the data sets, paths relative to the repository. Returns the file; InputError where one of the name differs."""
    content = read_json(path, "record")
    reason = lacks_record(content)
    if reason or not rows_of(path, content, data):
        raise InputError(f"{path} {reason or 'is no record of run_rq.py or inference.py'}; nothing was kept")
    if "model" in content:
        more = {"training": training_record(path, content), "data": answered_data(path, content)}
        content = {key: value for key, value in content.items() if key != "answers"} | more
    content = relative(content)
    stem = str(name or content.get("name") or f"{path.parent.name}_{path.stem}")
    if Path(stem).name != stem or "\0" in stem:
        raise InputError(f"{path}: its name {stem[:60]!r} is no plain file name; give --name")
    target = folder / f"{stem}.json"
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
        print(
            "next: python tables/make_tables.py --reproduce docs/REPRODUCE.md\n"
            "      python tables/levels.py --page docs/MIGRATION.md"
        )
        return
    collection = collect(args.records, args.data)
    report_refused(collection)
    for group in groups(collection.rows):
        row = group.first
        found = {name: group.stat(name) for name in (*RANKING, *JUDGING)}
        metrics = "  ".join(f"{name} {value.mean:.3f}" for name, value in found.items() if value)
        valid = group.stat("mrr", "valid") or group.stat("accuracy", "valid")
        metrics = metrics or "test left alone" + (
            f", valid {'mrr' if 'mrr' in row.valid else 'accuracy'} {valid.mean:.3f}" if valid else ""
        )
        seeds = ",".join("-" if seed is None else str(seed) for seed in group.seeds)
        print(f"{row.task:21} {row.dataset:11} {metrics:53} seeds {seeds}: {row.setting} {row.variant} [{row.path}]")
    if not collection.rows:
        print("no run record found; the first comes by: python run_rq.py --help")


if __name__ == "__main__":
    run_command(main)
