"""The paper's tables: its numbers, those of its peers and those of this toolkit's run records, side by side.

    python tables/make_tables.py                                   all tables as Markdown on the terminal
    python tables/make_tables.py --table 2 --format latex --out table2.tex
    python tables/make_tables.py --reproduce docs/REPRODUCE.md     rewrite the numbers in that page from tables/records

Paper and peers: tables/expected/*.json. Ours: tables/results.py. Table 6 is counted from the data folders. What was not
measured stays blank. Data sets that the paper does not have (the bundled family graph) get a table of their own with
the same columns.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, run_command
from common.files import ROOT, output_file, read_json, read_text, write_text
from data.knowledge_graph import KnowledgeGraph
from tables.results import CODES, KEPT, LINKS, TRIPLES, Group, Row, add_record_flags, collect, groups
from tables.rows import EXPECTED, commit_words, counts, dataset_name
from tables.system import system_of
from tables.table_formats import Cell, Column, Line, Table, to_latex, to_markdown

NUMBERS = (2, 3, 4, 5, 6)
OURS, BASELINE, CONTROL = "ours", "baseline", "control"  # a baseline answered the same queries without our model
BUNDLED = ("family",)
GRAPH_FILES = ("train.txt", "train2id.txt")


class Choice(NamedTuple):
    """Which rows a table shows."""

    task: str
    shows: Callable[[Row], bool]


CHOICES = {
    2: Choice(CODES, lambda row: True),
    3: Choice(LINKS, lambda row: row.codes == "with"),
    4: Choice(TRIPLES, lambda row: True),
    5: Choice(LINKS, lambda row: not row.variant),
}


# ---------------------------------------------------------------- the paper's side


def expected(number: int, folder: Path = EXPECTED) -> dict[str, Any]:
    """The numbers of the paper and its peers for a table, each with its source."""
    content = read_json(folder / f"table{number}.json", "expected numbers")
    for method in content["methods"]:
        if not method.get("source"):
            raise InputError(f"{folder}/table{number}.json: {method.get('method')} names no source of its numbers")
    return dict(content)


def expected_lines(content: dict[str, Any]) -> list[Line]:
    """Peers, paper and references as lines; references are never marked as the best."""
    lines = []
    for method in content["methods"]:
        decimals = method.get("decimals", 0 if content["table"] == 6 else 3)
        cells = {
            Column(dataset, metric): Cell(value, decimals=decimals)
            for dataset, metrics in method["values"].items()
            for metric, value in metrics.items()
        }
        lines.append(Line(method["block"], method["method"], cells, competes=method["block"] != "references"))
    return lines


# ---------------------------------------------------------------- our side


def our_lines(number: int, found: Iterable[Group], columns: Sequence[Column]) -> list[Line]:
    """One line per setting and variant, over the data sets of ``columns``: results, baselines, controls.

    Controls and runs that answered only a part of the test split are never marked as the best.
    """
    by_setting: dict[tuple[str, str], list[Group]] = {}
    for group in found:
        row = group.first
        if row.task == CHOICES[number].task and CHOICES[number].shows(row) and row_cells(group, columns):
            by_setting.setdefault((row.setting, row.variant), []).append(group)
    names = method_names([same[0].first for same in by_setting.values()])
    lines = []
    for (setting, variant), same in by_setting.items():
        cells = {column: cell for group in same for column, cell in row_cells(group, columns).items()}
        rows = [row for group in same for row in group.rows]
        control = variant.startswith(CONTROL) or rows[0].codes == "shuffled"
        block = CONTROL if control else BASELINE if variant else OURS
        method = ", ".join([names[setting], seed_words(same)]) + (f" ({variant})" if variant else "")
        competes = not control and not any(row.partial for row in rows)
        lines.append(Line(block, method, cells, "; ".join(map(provenance, same)), competes))
    return sorted(lines, key=lambda line: (OURS, BASELINE, CONTROL).index(line.block))


def row_cells(group: Group, columns: Sequence[Column]) -> dict[Column, Cell]:
    """The group's numbers in ``columns``; {} if it is of another data set or was not tested."""
    stats = {column: group.stat(column.metric) for column in columns if column.dataset == group.first.dataset}
    return {column: Cell(*stat) for column, stat in stats.items() if stat}


def method_names(rows: Sequence[Row]) -> dict[str, str]:
    """Setting -> label; settings with one label are distinguished by the flags in which they differ."""
    shared: dict[str, set[str]] = {}
    for row in rows:
        shared[row.label] = shared.get(row.label, set(row.flags)) & set(row.flags)
    return {
        row.setting: ", ".join([row.label, *(flag for flag in row.flags if flag not in shared[row.label])])
        for row in rows
    }


def seed_words(found: Sequence[Group]) -> str:
    """``1 seed``, ``3 seeds``, ``1 to 3 seeds`` where the data sets differ."""
    numbers = sorted({len(group.rows) for group in found})
    return " to ".join(map(str, numbers)) + (" seed" if numbers == [1] else " seeds")


def provenance(group: Group) -> str:
    """Data set, seeds, minutes, perplexity by level, device, commits and records of the runs behind a line."""
    records = [row.record for row in group.rows]
    seeds = ", ".join("none" if seed is None else str(seed) for seed in group.seeds)
    minutes = [row.minutes for row in group.rows]
    time = f"{min(minutes):.1f}" + (f" to {max(minutes):.1f}" if len(minutes) > 1 else "") + " min"
    parts = [f"{group.first.dataset}: seed{'s' * (len(minutes) > 1)} {seeds}", time]
    if group.first.task == CODES and (perplexity := system_of(records[0]).perplexity):
        parts.append("perplexity by level " + ", ".join(f"{value:,.0f}" for value in perplexity))
    before = [value for record in records if isinstance(value := record.get("mrr_before_collision_pass"), float)]
    if before:
        parts.append("MRR before the collision pass " + ", ".join(f"{value:.3f}" for value in before))
    given = [str(codes["sha256"])[:6] for record in records if (codes := record.get("codes") or {}).get("sha256")]
    if given:  # the codes file that an LLM was given
        parts.append(f"codes {unique(given)}")
    devices = unique(row.device for row in group.rows)
    commits = unique(commit_words(row.commit) for row in group.rows)
    return ", ".join([*parts, f"on {devices}", f"commit {commits}", unique(str(row.path) for row in group.rows)])


def unique(words: Iterable[str]) -> str:
    """The distinct words in order, joined by "and"."""
    return " and ".join(dict.fromkeys(words))


def result_tables(number: int, found: list[Group]) -> list[Table]:
    """The paper's table with our lines, then one with the same columns for every other data set with results."""
    content = expected(number)
    title, metrics = content["title"], content["metrics"]
    columns = [Column(dataset, metric) for dataset in content["datasets"] for metric in metrics]
    lines = [*expected_lines(content), *our_lines(number, found, columns)]
    tables = [Table(number, title, columns, lines, content["notes"])]
    others = dict.fromkeys(group.first.dataset for group in found if group.first.task == CHOICES[number].task)
    for dataset in sorted(others.keys() - set(content["datasets"])):
        columns = [Column(dataset, metric) for metric in metrics]
        lines = our_lines(number, found, columns)
        if lines:
            tables.append(Table(number, f"{title}, on {dataset}", columns, lines, []))
    return tables


# ---------------------------------------------------------------- Table 6


def data_table(data: Path, only: Iterable[str] | None = None) -> list[Table]:
    """Table 6: the paper's counts, and those of the graphs in ``data`` (or only of these folders).

    A folder that is named like a public data set and holds other triples is shown under another name.
    """
    content = expected(6)
    columns = [Column("", metric) for metric in content["metrics"]]
    lines = expected_lines(content)
    for folder in sorted(path for path in data.iterdir() if any((path / name).is_file() for name in GRAPH_FILES)):
        if only is None or folder.name in only:
            kg = KnowledgeGraph.load(folder, keep_names=True)
            name = dataset_name(folder.name, kg.input_hashes, kg.train_digest(), data)
            cells = {Column("", metric): Cell(value, decimals=0) for metric, value in counts(kg).items()}
            lines.append(Line("counted here", name, cells))
    return [Table(6, content["title"], columns, lines, content["notes"])]


# ---------------------------------------------------------------- all of them


def make_tables(
    numbers: Iterable[int], records: Iterable[Path], data: Path, only: Iterable[str] | None = None
) -> list[Table]:
    """The tables of these numbers in order. ``only``: the data sets that Table 6 counts (default: all there are)."""
    numbers = list(numbers)
    found: list[Group] = []
    if any(number in CHOICES for number in numbers):
        found = groups(collect(records, data))
        report_untested(found)
    return [
        table
        for number in numbers
        for table in (data_table(data, only) if number == 6 else result_tables(number, found))
    ]


def report_untested(found: Iterable[Group]) -> None:
    """One line on stderr about settings that no table shows because their runs did not use the test split."""
    untested = sum(not any(row.metrics for row in group.rows) for group in found)
    if untested:
        words = "1 setting" if untested == 1 else f"{untested} settings"
        print(f"{words} without test metrics, not shown; list them: python tables/results.py", file=sys.stderr)


def render(tables: list[Table], form: str) -> str:
    """All tables in one text."""
    return "\n".join((to_markdown if form == "md" else to_latex)(table) for table in tables)


def reproduced(text: str, data: Path = ROOT / "data", name: object = "the page") -> str:
    """A page with the blocks between ``<!-- table N -->`` and ``<!-- end -->`` rewritten from tables/records.

    Only the repository's own records and graph are used, so that every machine writes the same.
    """
    pattern = re.compile(r"(<!-- table (\d) -->\n).*?(<!-- end -->)", re.DOTALL)
    found = {int(number) for _, number, _ in pattern.findall(text)}
    if not found or not found <= set(NUMBERS):
        raise InputError(f"{name} has blocks of tables {sorted(found)}, expected <!-- table N --> ... <!-- end -->")
    blocks = {number: render(make_tables([number], [KEPT], data, BUNDLED), "md") for number in found}
    return pattern.sub(lambda match: match[1] + "\n" + blocks[int(match[2])] + "\n" + match[3], text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="tables/make_tables.py", description=__doc__.split("\n")[0])
    choices = [*map(str, NUMBERS), "all"]
    parser.add_argument("--table", choices=choices, default="all", help="the paper's number of the table")
    parser.add_argument("--format", choices=("md", "latex"), default="md", help="Markdown or LaTeX (booktabs)")
    add_record_flags(parser)
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write there (default: the terminal)")
    parser.add_argument("--reproduce", type=Path, metavar="PAGE.md", help="rewrite this page's numbers instead")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.reproduce:
        if not args.reproduce.is_file():
            raise InputError(f"--reproduce {args.reproduce} does not exist, expected a page such as docs/REPRODUCE.md")
        write_text(reproduced(read_text(args.reproduce, "page"), args.data, args.reproduce), args.reproduce)
        print(f"wrote {args.reproduce}")
        return
    numbers = NUMBERS if args.table == "all" else [int(args.table)]
    text = render(make_tables(numbers, args.records, args.data), args.format)
    if args.out is None:
        print(text, end="")
    else:
        write_text(text, args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    run_command(main)
