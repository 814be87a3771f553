"""Contribution of each residual level: valid MRR of a run by the number of decoded levels, from kept records.

    python tables/levels.py                              print the table
    python tables/levels.py --page docs/MIGRATION.md     rewrite it between the marks of the page
    python tables/levels.py --records codes_new          for your own runs

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
from common.files import read_json, read_text, write_text
from common.metrics import share
from tables.results import KEPT
from tables.rows import shown
from tables.system import short_count, system_of

GRAPHS = ("family", "FB15k-237", "WN18RR")  # printed first, in this order
BLOCK = re.compile(r"(<!-- levels -->\n).*?(<!-- end -->)", re.DOTALL)


def level_lines(records: Path = KEPT) -> list[str]:
    """The table's lines, one per record that has ``valid_mrr_by_levels`` (InputError if a list has a wrong length)."""
    found = []
    for path in sorted(records.glob("*.json")):
        record = read_json(path, "record")
        if isinstance(record, dict) and record.get("valid_mrr_by_levels"):
            found.append((path, record))
    deepest = max((len(record["valid_mrr_by_levels"]) for _, record in found), default=1)
    with_order = []
    for path, record in found:
        with content_of(path, "run record"):
            graph = record["dataset"]
            with_order.append((GRAPHS.index(graph) if graph in GRAPHS else len(GRAPHS), _line(path, record, deepest)))
    levels = " | ".join(str(level) for level in range(1, deepest + 1))
    heads = [
        f"| graph | entities | codes | bits per entity | parameters behind the codes | {levels} | record |",
        f"|---|---:|---|---:|---:|{'---:|' * deepest}---|",
    ]
    return heads + [line for _, line in sorted(with_order, key=lambda item: item[0])]


def _line(path: Path, record: dict[str, Any], deepest: int) -> str:
    entities, _, levels = record["shape"]
    scores = [share(path, "valid_mrr_by_levels", score) for score in record["valid_mrr_by_levels"]]
    if len(scores) != levels:
        raise InputError(f"{path} has {len(scores)} scores by level for {levels} levels; run run_rq.py again")
    cells = [f"{score:.3f}".removeprefix("0") for score in scores] + [""] * (deepest - levels)
    system = system_of(record)
    facts = [record["dataset"], f"{entities:,}", system.codes, f"{system.bits or 0:,.0f}"]
    facts.append(short_count(system.parameters).removesuffix(" parameters"))
    return f"| {' | '.join([*facts, *cells])} | `{shown(path)}` |"


def with_levels(page: str, records: Path = KEPT, name: object = "the page") -> str:
    """The page with the table between ``<!-- levels -->`` and ``<!-- end -->`` rewritten. Raises InputError."""
    if not BLOCK.search(page):
        raise InputError(f"{name} has no <!-- levels --> ... <!-- end -->; --page docs/MIGRATION.md has them")
    table = "\n".join(level_lines(records))
    return BLOCK.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", page)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="tables/levels.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--page", type=Path, metavar="PAGE.md", help="rewrite the table of this page instead of printing"
    )
    parser.add_argument("--records", type=Path, metavar="DIR", default=KEPT, help="folder of run records")
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
