"""What each residual level adds: valid MRR of one run by the levels decoded, from the kept records.

    python tables/levels.py                              print the table
    python tables/levels.py --page docs/MIGRATION.md     write it anew between the page's marks
    python tables/levels.py --records codes_new          of your own runs

A run decoded up to level q is not a run trained with q levels: see the page.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, content_of, run_command
from common.files import ROOT, read_json, read_text, write_text
from common.metrics import share
from tables.rows import shown

RECORDS = ROOT / "tables" / "records"
GRAPHS = ("family", "FB15k-237", "WN18RR")  # a graph without a record has a blank line
BLOCK = re.compile(r"(<!-- levels -->\n).*?(<!-- end -->)", re.DOTALL)


def level_lines(records: Path = RECORDS) -> list[str]:
    """The table's lines, one per record that has ``valid_mrr_by_levels`` (InputError where a list has another length).

    Graphs stand in the order of ``GRAPHS``, then any others; a level that the run does not have stays blank.
    """
    found: dict[str, list[tuple[Path, dict[str, Any]]]] = {name: [] for name in GRAPHS}
    for path in sorted(records.glob("*.json")):
        record = read_json(path, "record")
        if isinstance(record, dict) and record.get("valid_mrr_by_levels"):
            with content_of(path, "run record"):
                _line(path, record, 0)
                found.setdefault(record["dataset"], []).append((path, record))
    deepest = max((len(record["valid_mrr_by_levels"]) for runs in found.values() for _, record in runs), default=1)
    levels = [str(level) for level in range(1, deepest + 1)]
    lines = [
        f"| graph | entities | codes | {' | '.join(levels)} | record |",
        f"|---|---:|---|{'---:|' * deepest}---|",
    ]
    for graph, runs in found.items():
        lines += [_line(path, record, deepest) for path, record in runs]
        if not runs:
            lines.append(f"| {graph} |{' |' * (deepest + 3)}")
    return lines


def _line(path: Path, record: dict[str, Any], deepest: int) -> str:
    entities, positions, levels = record["shape"]
    scores = [share(path, "valid_mrr_by_levels", score) for score in record["valid_mrr_by_levels"]]
    if len(scores) != levels:
        raise InputError(
            f"{path} has {len(scores)} scores by level, its codes have {levels} levels; run run_rq.py again"
        )
    cells = [f"{score:.3f}".removeprefix("0") for score in scores] + [""] * (deepest - levels)
    size = f"{positions} x {levels} of {record['args']['num_code']:,}"
    return f"| {record['dataset']} | {entities:,} | {size} | {' | '.join(cells)} | `{shown(path)}` |"


def with_levels(page: str, records: Path = RECORDS, name: object = "the page") -> str:
    """The page with the table between ``<!-- levels -->`` and ``<!-- end -->`` written anew. Raises InputError."""
    if not BLOCK.search(page):
        raise InputError(f"{name} has no <!-- levels --> ... <!-- end -->; --page docs/MIGRATION.md has them")
    table = "\n".join(level_lines(records))
    return BLOCK.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", page)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="tables/levels.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--page", type=Path, metavar="PAGE.md", help="rewrite the table of this page instead of printing"
    )
    parser.add_argument("--records", type=Path, metavar="DIR", default=RECORDS, help="folder of run records")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if not args.records.is_dir():
        raise InputError(f"--records {args.records} is no folder; run records are written by run_rq.py")
    if args.page is None:
        print("\n".join(level_lines(args.records)))
        return
    if not args.page.is_file():
        raise InputError(f"--page {args.page} does not exist, expected a page such as docs/MIGRATION.md")
    write_text(with_levels(read_text(args.page, "page"), args.records, args.page), args.page)
    print(f"wrote {args.page}")


if __name__ == "__main__":
    run_command(main)
