"""One table of numbers as Markdown: cells in, text out.

Numbers are printed as in papers (no leading zero, then the standard deviation), the best of a column in bold.
"""

from __future__ import annotations

from typing import NamedTuple

NAMES = {
    "mrr": "MRR", "hits@1": "Hits@1", "hits@3": "Hits@3", "hits@10": "Hits@10", "accuracy": "Acc", "precision": "P",
    "recall": "R", "f1": "F1",
}  # fmt: skip


class Column(NamedTuple):
    """A metric of a data set; ``dataset`` is "" if the table has no data sets above its columns."""

    dataset: str
    metric: str


class Cell(NamedTuple):
    """A number of one method: the mean of its runs and, with two or more, their sample standard deviation."""

    value: float
    std: float | None = None
    decimals: int = 3


class Line(NamedTuple):
    """A method and its numbers; a column without a cell stays blank."""

    block: str  # methods of one block are printed together
    method: str
    cells: dict[Column, Cell]
    note: str = ""
    competes: bool = True  # may be marked as the best of a column


class Table(NamedTuple):
    """``number`` is the paper's."""

    number: int
    title: str
    columns: list[Column]
    lines: list[Line]
    notes: list[str]


def cell_text(cell: Cell) -> str:
    """``.50``, ``.50 ± .01``, ``40,943``: the leading zero of a share is left out."""

    def text(value: float) -> str:
        shown = f"{value:,.{cell.decimals}f}"
        return shown[1:] if shown.startswith("0.") else shown

    return text(cell.value) + (f" ± {text(cell.std)}" if cell.std is not None else "")


def best_of(table: Table, column: Column) -> float | None:
    """The highest number of a column as printed; None if fewer than two methods compete."""
    values = [shown_value(line.cells[column]) for line in table.lines if line.competes and column in line.cells]
    return max(values) if len(values) > 1 and column.metric in NAMES else None


def is_best(table: Table, line: Line, column: Column) -> bool:
    """Whether a cell is the best of its column; cells that are printed equal share it."""
    return line.competes and column in line.cells and shown_value(line.cells[column]) == best_of(table, column)


def shown_value(cell: Cell) -> float:
    """The number as it is printed."""
    return round(cell.value, cell.decimals)


def marks(table: Table) -> dict[str, str]:
    """Note of a line -> its mark, in order: a, b, ... z, aa, ab ...; equal notes share one."""
    notes = dict.fromkeys(line.note for line in table.lines if line.note)
    return {
        note: (chr(96 + place // 26) if place >= 26 else "") + chr(97 + place % 26) for place, note in enumerate(notes)
    }


def to_markdown(table: Table) -> str:
    """A heading, a pipe table, its notes."""

    def plain(text: str) -> str:
        return text.replace("|", "\\|")

    heads = [f"{column.dataset} {NAMES.get(column.metric, column.metric)}".strip() for column in table.columns]
    rows = [["", "method", *heads], ["---", "---", *("---:" for _ in heads)]]
    found = marks(table)
    for line in table.lines:
        cells = []
        for column in table.columns:
            text = cell_text(line.cells[column]) if column in line.cells else ""
            cells.append(f"**{text}**" if is_best(table, line, column) else text)
        rows.append([line.block, plain(line.method) + (f" [{found[line.note]}]" if line.note else ""), *cells])
    notes = [f"- [{mark}] {plain(note)}" for note, mark in found.items()] + [f"- {plain(note)}" for note in table.notes]
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"### Table {table.number}: {table.title}\n\n{body}\n" + ("\n" + "\n".join(notes) + "\n" if notes else "")
