"""One table of numbers as Markdown or LaTeX (booktabs): cells in, text out.

Numbers are printed as in papers (no leading zero, then the standard deviation), the best of a column in bold.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

NAMES = {
    "mrr": "MRR", "hits@1": "Hits@1", "hits@3": "Hits@3", "hits@10": "Hits@10", "accuracy": "Acc", "precision": "P",
    "recall": "R", "f1": "F1",
}  # fmt: skip
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$", "|": r"\textbar{}", '"': "''",
}  # fmt: skip
MANY = 4  # more columns than this are printed smaller
WIDE = 40  # longer method names (characters) are broken into lines


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


# ---------------------------------------------------------------- Markdown


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


# ---------------------------------------------------------------- LaTeX


def escape_latex(text: str) -> str:
    """Text that LaTeX prints unchanged: ``--`` of a flag does not become a dash."""
    return re.sub(r"-(?=-)", "-{}", "".join(LATEX.get(letter, letter) for letter in text))


def latex_cell(table: Table, line: Line, column: Column) -> str:
    """A number, bold if it is the best; blank if there is none."""
    if column not in line.cells:
        return ""
    text = escape_latex(cell_text(line.cells[column]))
    return rf"\textbf{{{text}}}" if is_best(table, line, column) else text


def latex_heads(columns: Sequence[Column]) -> list[str]:
    """Data sets (if any) over their columns, then the metrics."""
    heads, rules = [], []
    start = 0
    while start < len(columns):
        stop = start
        while stop < len(columns) and columns[stop].dataset == columns[start].dataset:
            stop += 1
        heads.append(rf"\multicolumn{{{stop - start}}}{{c}}{{{escape_latex(columns[start].dataset)}}}")
        rules.append(rf"\cmidrule(lr){{{start + 2}-{stop + 1}}}")
        start = stop
    above = [" & ".join(["", *heads]) + r" \\", " ".join(rules)] if any(column.dataset for column in columns) else []
    names = [escape_latex(NAMES.get(column.metric, column.metric)) for column in columns]
    return [*above, " & ".join(["method", *names]) + r" \\"]


def to_latex(table: Table) -> str:
    r"""A ``table`` environment for ``\usepackage{booktabs}``; blocks are separated by rules."""
    rows: list[str] = []
    block = None
    found = marks(table)
    for line in table.lines:
        if line.block != block:
            rows.append(r"\midrule")
            block = line.block
        name = escape_latex(line.method) + (rf"\textsuperscript{{{found[line.note]}}}" if line.note else "")
        rows.append(" & ".join([name, *(latex_cell(table, line, column) for column in table.columns)]) + r" \\")
    long = max((len(line.method) for line in table.lines), default=0) > WIDE
    first = r"p{0.45\linewidth}" if long else "l"
    small = r"\footnotesize\setlength{\tabcolsep}{3pt}" if len(table.columns) > MANY else ""
    notes = [rf"\textsuperscript{{{mark}}} {escape_latex(note)}" for note, mark in found.items()]
    notes += [escape_latex(note) for note in table.notes]
    return "\n".join([
        r"\begin{table}", r"\centering" + small,
        rf"\caption{{{escape_latex(table.title)}. Compare the paper's Table {table.number}.}}",
        rf"\begin{{tabular}}{{{first}{'r' * len(table.columns)}}}", r"\toprule", *latex_heads(table.columns), *rows,
        r"\bottomrule", r"\end{tabular}", *(rf"\par\footnotesize {note}" for note in notes), r"\end{table}", "",
    ])  # fmt: skip
