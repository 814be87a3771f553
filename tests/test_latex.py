"""LaTeX tables, checked by their text, and typeset by pdflatex if it is installed."""

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


def check_latex(text: str) -> None:
    """Braces and environments pair, nothing is left unescaped, every row has the declared columns."""
    text.encode("ascii")
    bare = re.sub(r"\\[\\{}&%$#_]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0 and not re.search(r'[%#_^~<>|"]|--', bare)
    assert text.count(r"\begin") == text.count(r"\end") == 2
    columns = re.sub(r"p\{.*?linewidth\}", "p", text.split(r"\begin{tabular}{")[1].split("}\n")[0])
    rows = text.split(r"\toprule")[1].split(r"\bottomrule")[0].splitlines()
    for line in (row for row in rows if row and not re.match(r"\\(midrule|cmidrule)", row)):
        spans = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line))
        assert line.endswith(r" \\") and len(re.findall(r"(?<!\\)&", line)) + spans + 1 == len(columns), line


def test_every_table_is_well_formed() -> None:
    for table in all_tables():
        check_latex(to_latex(table))


@pytest.mark.parametrize(("old", "new"), [(r"\%", "%"), (r"\_", "_"), (r"\&", "&"), ("{p{0.45", "{lp{0.45")])
def test_the_check_sees_what_is_wrong(old: str, new: str) -> None:
    text = to_latex(odd_table())
    check_latex(text)
    with pytest.raises(AssertionError):
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
