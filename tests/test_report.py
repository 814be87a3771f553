"""The report is one file that needs nothing else, holds the runs, and shows hostile names as text."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from common.errors import InputError
from tables import make_figures, make_report
from tables.figures.inputs import Inputs
from tables.rows import commit_words
from tables.table_formats import Cell, Column, Line, Table
from tests.conftest import write_graph
from tests.test_code_quality import stage1

HOSTILE = '<script>alert("x")</script>&<img src=x onerror=alert(1)>'


class Page(HTMLParser):
    """Tags with attributes, and the text a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The page of a run on the ring whose entities have hostile labels and whose record a hostile device."""
    folder = tmp_path_factory.mktemp("report")
    ring = write_graph(folder / "data" / "ring")
    (ring / "entity2label.txt").write_text("".join(f"e{i}\t{HOSTILE} {i}\n" for i in range(43)))
    record = stage1(ring, folder).with_suffix(".json")
    content = json.loads(record.read_text())
    content["device"] = HOSTILE
    record.write_text(json.dumps(content))
    out = folder / "report.html"
    requested: list[str] = []

    def draw_two(inputs: Inputs, folder: Path, names: list[str]) -> dict[str, list[Path]]:
        requested.extend(names)
        return make_figures.draw_all(inputs, folder, ["10", "perplexity"])  # tests/test_figures.py draws the others

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_report, "draw_all", draw_two)
        make_report.main([str(record), "--data", str(ring.parent), "--out", str(out), "--title", f"T {HOSTILE}"])
    assert requested == [name for name in make_figures.FIGURES if name not in make_report.NEEDS_MODEL]
    return out.read_text(encoding="utf-8"), record


def test_hostile_names_stay_text(report: tuple[str, Path]) -> None:
    page = Page(report[0])
    names = {tag for tag, _ in page.tags}
    assert "script" not in names and not [1 for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert page.words.count(HOSTILE) >= 3, "in title, heading, runs, record: as the text it is"
    assert "<script" not in report[0] and "<img src=x" not in report[0]


def test_the_page_needs_no_other_file(report: tuple[str, Path]) -> None:
    page = Page(report[0])
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "iframe", "script", "object", "embed", "a"})
    sources = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 2
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.search(r"https?://|@import|url\(", re.sub(r"<pre>.*?</pre>", "", report[0], flags=re.DOTALL))
    assert any(attrs.get("content") == make_report.POLICY for tag, attrs in page.tags if tag == "meta")


def test_the_page_holds_numbers_and_the_whole_record(report: tuple[str, Path]) -> None:
    text, path = report
    page, record = Page(text), json.loads(path.read_text())
    assert f"{record['test']['mrr']:.3f}" in page.words and "control: codes shuffled" in page.words
    assert f"{record['codes']['entropy_bits']:.3f}" in page.words
    stored = page.words[page.words.index('{\n "command"') :].split("\n}")[0] + "\n}"
    assert json.loads(stored) == record


def test_tables_are_escaped_and_mark_the_best() -> None:
    column = Column("<d>", "mrr")
    lines = [
        Line("peers", HOSTILE, {column: Cell(0.25)}, note="<n>"),
        Line("ours", "x", {column: Cell(0.5)}),
        Line("", "y", {}),
    ]
    text = make_report.table_html(Table(2, "<t>", [column], lines, ["<z>"]))
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= {"h3", "div", "table", "thead", "tbody", "tr", "th", "td", "b"}
    assert "<b>.500</b>" in text and "<b>.250" not in text and text.count('class="ours"') == 1
    assert all(word in page.words for word in (HOSTILE, "<t>", "<d> MRR", "[a]", "[a] <n>", "<z>"))


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        make_report.main([str(tmp_path), "--out", str(tmp_path / "r.html")])
    assert commit_words("0123456789abcdef+changes") == "012345678+changes"
    assert commit_words(None) == "none"
