"""Read run records and check them: the rows behind all tables and figures.

    python tables/results.py                                                list the rows of the default folders
    python tables/results.py --keep lora_training/inference_results.json    check a record, copy it to tables/records

A row is one run on one data set: setting, seed, commit, device, minutes, metrics and the record (tables/rows.py). A
file with metrics and without a record is left out with a line; a record with impossible metrics is an error.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, run_command
from common.files import ROOT, command, read_json, write_json
from common.metrics import CLASSIFICATION, RANKING
from tables.rows import CODES, LINKS, TRIPLES, Row, answered_data, lacks_record, rows_of, shown, training_record

__all__ = ["CODES", "LINKS", "TRIPLES", "Group", "Row", "Stat", "collect", "groups", "keep"]

KEPT = ROOT / "tables" / "records"
FOLDERS = (KEPT, ROOT / "codes_new", ROOT / "lora_training" / "lora_outputs",
           ROOT / "lora_training" / "inference_results.json")  # fmt: skip


class Stat(NamedTuple):
    """A metric over seeds."""

    mean: float
    std: float | None  # sample standard deviation; None for a single run


@dataclass(frozen=True)
class Group:
    """Rows that differ only in their seed."""

    rows: list[Row]

    @property
    def first(self) -> Row:
        """The row of the lowest seed; task, data set, setting and variant are the same in all rows."""
        return self.rows[0]

    @property
    def seeds(self) -> list[int | None]:
        return [row.seed for row in self.rows]

    def stat(self, metric: str, split: str = "test") -> Stat | None:
        """Mean and sample standard deviation of a metric; None if no row has it."""
        chosen = [row.metrics if split == "test" else row.valid for row in self.rows]
        values = [metrics[metric] for metrics in chosen if metric in metrics]
        if not values:
            return None
        return Stat(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def groups(rows: Iterable[Row]) -> list[Group]:
    """Rows by (task, data set, setting, variant), in order of first appearance, each sorted by seed.

    A seed counts once: of several runs with one seed, the one that finished last is used.
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


def collect(places: Iterable[str | Path] = FOLDERS, data: str | Path = ROOT / "data") -> list[Row]:
    """All rows of the records in ``places`` (folders with everything below them, or files).

    ``data``: folder of the graphs, used to check counts and hashes. Default places that do not exist are skipped. A
    file with metrics and without a record is left out with one line on stderr. Raises InputError for another place that
    does not exist, a named file that is no record, and a record that is damaged or impossible.
    """
    rows: list[Row] = []
    for place in map(Path, places):
        if not place.exists():
            if place in FOLDERS:
                continue
            raise InputError(f"--records {place} does not exist; run records are written by run_rq.py and inference.py")
        files = [place] if place.is_file() else filter(holds_object, sorted(place.rglob("*.json")))
        for path in files:
            content = read_json(path, "record")
            reason, found = lacks_record(content), list[Row]()
            if reason and path != place:
                print(f"left out: {shown(path)} {reason}", file=sys.stderr)
            elif not reason:
                found = rows_of(path, content, Path(data))
            if path == place and not found:
                raise InputError(f"--records {path} {reason or 'is no record of run_rq.py or inference.py'}")
            rows += found
    return rows


def holds_object(path: Path) -> bool:
    """Whether a JSON file starts as an object: instruction data are arrays of up to gigabytes, records never are."""
    with open(path, "rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] not in (b"[", b'"')


# ---------------------------------------------------------------- keeping


def keep(path: Path, folder: Path = KEPT, data: Path = ROOT / "data", name: str | None = None) -> Path:
    """Check a record and copy it to ``folder``: without answers, with the adapter's own record and the data sets, paths
    relative to the repository. Returns the file. InputError if another record has this name."""
    content = read_json(path, "record")
    reason = lacks_record(content)
    if reason or not rows_of(path, content, data):
        raise InputError(f"{path} {reason or 'is no record of run_rq.py or inference.py'}; it was not copied")
    if "model" in content:
        more = {"training": training_record(path, content), "data": answered_data(path, content)}
        content = {key: value for key, value in content.items() if key != "answers"} | more
    content = relative(content)
    stem = str(name or content.get("name") or f"{path.parent.name}_{path.stem}")
    if Path(stem).name != stem or "\0" in stem:
        raise InputError(f"{path}: its name {stem[:60]!r} is no plain file name; give --name")
    target = folder / f"{stem}.json"
    if target.exists() and read_json(target, "record") != content:
        raise InputError(f"{target} is the record of another run; give --name")
    write_json(content, target)
    return target


def relative(value: Any) -> Any:
    """A copy with the repository's folder removed from all texts: ``ROOT/data/family`` becomes ``data/family``."""
    if isinstance(value, dict):
        return {key: relative(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [relative(inner) for inner in value]
    return value.replace(f"{ROOT}/", "") if isinstance(value, str) else value


# ---------------------------------------------------------------- the command


def _folder(word: str) -> Path:
    if not Path(word).is_dir():
        raise argparse.ArgumentTypeError(f"{word} is no folder")
    return Path(word)


def add_record_flags(parser: argparse.ArgumentParser) -> None:
    """--records and --data, for every command that reads records."""
    parser.add_argument("--records", nargs="+", type=Path, metavar="DIR", default=list(FOLDERS),
                        help="folders (with all below them) or files of run records (default: tables/records, "
                        "codes_new, lora_training/lora_outputs and lora_training/inference_results.json)")  # fmt: skip
    parser.add_argument("--data", type=_folder, metavar="DIR", default=ROOT / "data", help="folder of the graphs")


def print_groups(found: Iterable[Group]) -> None:
    """One line per group: task, data set, metrics, seeds, setting, record."""
    for group in found:
        row = group.first
        means = {name: group.stat(name) for name in (*RANKING, *CLASSIFICATION)}
        metrics = "  ".join(f"{name} {value.mean:.3f}" for name, value in means.items() if value)
        name = "mrr" if "mrr" in row.valid else "accuracy"
        valid = group.stat(name, "valid")
        metrics = metrics or ("no test" + (f", valid {name} {valid.mean:.3f}" if valid else ""))
        seeds = ",".join("-" if seed is None else str(seed) for seed in group.seeds)
        print(f"{row.task:21} {row.dataset:11} {metrics:53} seeds {seeds}: {row.setting} {row.variant} [{row.path}]")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="tables/results.py", description=__doc__.split("\n")[0])
    add_record_flags(parser)
    parser.add_argument("--keep", type=Path, metavar="FILE", help="check this record and copy it to tables/records")
    parser.add_argument("--name", help="with --keep: name of the copy (default: the run's, or its folder's and file's)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.keep:
        target = keep(args.keep, data=args.data, name=args.name)
        print(f"wrote {target}")
        print(f"next: {command('tables/make_tables.py', '--reproduce', ROOT / 'docs/REPRODUCE.md')}")
        return
    rows = collect(args.records, args.data)
    print_groups(groups(rows))
    if not rows:
        print("no run record found; make one: python run_rq.py --dataset data/family")


if __name__ == "__main__":
    run_command(main)
