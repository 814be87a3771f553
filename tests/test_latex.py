"""LaTeX tables, checked by a small parser, and typeset by pdflatex if it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from common.files import ROOT
from tables import make_tables
from tables.results import KEPT
from tables.table_formats import Cell, Column, Line, Table, escape_latex, to_latex

KNOWN = {
    "begin", "end", "centering", "caption", "toprule", "midrule", "bottomrule", "cmidrule", "multicolumn", "textbf",
    "textsuperscript", "par", "footnotesize", "linewidth", "textbackslash", "textasciitilde", "textasciicircum",
    "textless", "textgreater", "textbar", "pm",
    "setlength", "tabcolsep",
}  # fmt: skip
ODD = 'a|b {c} ~ #1 ^ \\ <d> $ 5% & _ "q" --flag --- x-y'


def odd_table() -> Table:
    columns = [Column("A_1&", "mrr"), Column("A_1&", "hits@10"), Column("B%", "mrr")]
    lines = [
        Line("peers", ODD, {columns[0]: Cell(0.25)}, ODD),
        Line("ours", "x" * 80 + " " + ODD, {columns[2]: Cell(0.5, 0.1)}),
    ]
    return Table(2, ODD, columns, lines, [ODD])


def all_tables() -> list[Table]:
    return [odd_table(), *make_tables.make_tables(make_tables.NUMBERS, [KEPT], ROOT / "data", ["family"])]


def declared_columns(specification: str) -> int:
    """Columns of ``lrr`` or ``p{0.5\\linewidth}rr``."""
    plain = re.sub(r"p\{0\.\d+\\linewidth\}", "p", specification)
    assert set(plain) <= set("plcr"), specification
    return len(plain)


def check_latex(text: str) -> None:
    """Environments nest, braces and dollars pair, commands are known, every row has the declared columns."""
    text.encode("ascii")
    bare = re.sub(r"\\[\\{}&%$#_]", "", text)
    depth = 0
    for letter in bare:
        depth += (letter == "{") - (letter == "}")
        assert depth >= 0
    assert depth == 0 and bare.count("$") % 2 == 0 and not re.search(r'[%#_^~<>|"]|--', bare)
    assert set(re.findall(r"\\([a-zA-Z]+)", bare)) <= KNOWN
    stack: list[str] = []
    for word, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if word == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack
    specification = re.search(r"\\begin\{tabular\}\{((?:[^{}]|\{[^{}]*\})*)\}\n", text)
    assert specification is not None
    count = declared_columns(specification[1])
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    rows = [line for line in body.splitlines() if line and not re.match(r"\\(midrule|cmidrule)", line)]
    for line in rows:
        assert line.endswith(r" \\"), line
        spans = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line))
        assert len(re.findall(r"(?<!\\)&", line)) + spans + 1 == count, line
    for first, last in re.findall(r"\\cmidrule\(lr\)\{(\d+)-(\d+)\}", body):
        assert 2 <= int(first) <= int(last) <= count
    outside = bare.replace(body, "")
    assert "&" not in re.sub(r"\\begin\{tabular\}.*?\\end\{tabular\}", "", outside, flags=re.DOTALL)


def test_every_table_is_well_formed() -> None:
    for table in all_tables():
        check_latex(to_latex(table))


@pytest.mark.parametrize(
    "old, new",
    [(r"\end{table}", ""), (r"\%", "%"), (r"\_", "_"), (r"\&", "&"), ("{p{0.45", "{lp{0.45"), (r" & \textbf", " "),
     (r"\textbar{}", "|"), ("-{}-", "--"), (r"\midrule", r"\midrul"), (r"\bottomrule", "}" + r"\bottomrule")],
)  # fmt: skip
def test_the_parser_sees_what_is_wrong(old: str, new: str) -> None:
    columns = odd_table().columns
    table = odd_table()
    table.lines[1].cells[columns[0]] = Cell(0.5)  # two compete: one is bold
    text = to_latex(table)
    check_latex(text)
    assert old in text
    with pytest.raises((AssertionError, IndexError)):
        check_latex(text.replace(old, new))


def test_flags_and_bars_are_set_as_they_are() -> None:
    assert escape_latex("--lr") == "-{}-lr" and escape_latex("a---b") == "a-{}-{}-b" and escape_latex("a-b") == "a-b"
    assert escape_latex('|"x"') == r"\textbar{}''x''"


def test_long_names_break_into_lines() -> None:
    assert r"\begin{tabular}{p{0.45\linewidth}rrr}" in to_latex(odd_table())
    short = odd_table()._replace(lines=[Line("ours", "short", {})])
    assert r"\begin{tabular}{lrrr}" in to_latex(short)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex")
def test_pdflatex_sets_them(tmp_path: Path) -> None:
    body = "\n".join(map(to_latex, all_tables()))
    document = "\n".join([r"\documentclass{article}", r"\usepackage{booktabs}", r"\begin{document}", body,
                          r"\end{document}"])  # fmt: skip
    (tmp_path / "all.tex").write_text(document)
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and (tmp_path / "all.pdf").is_file(), done.stdout[-2000:]
