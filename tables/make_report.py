"""One HTML page about some runs: results, the paper's tables beside them, figures, code quality, the whole records.

    python tables/make_report.py tables/records --out report.html
    python tables/make_report.py codes_new/FB15k-237_4_1024_4_rq.json lora_training/inference_results.json

The page is self-contained: no network, no scripts, images inside. Codes beside a record (same name, .pt) are measured
and drawn too. All text from files is escaped.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, run_command
from common.files import ROOT, write_text
from common.metrics import CLASSIFICATION, RANKING
from tables.code_quality import CodeSet, quality
from tables.figures.inputs import Inputs
from tables.make_figures import FIGURES, OUT, draw_all
from tables.make_tables import BASELINE, CHOICES, CONTROL, OURS, make_tables
from tables.results import Row, collect
from tables.rows import commit_words
from tables.table_formats import NAMES, Table, cell_text, is_best, marks

NEEDS_CODES = ("2", "4", "6", "9", "12")  # without codes they would show the bundled graph
NEEDS_MODEL = ("8", "13")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ccc; }
h3 { font-size: 1.05em; margin-bottom: .3em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88em; }
th, td { padding: .25em .7em; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4; }
th { border-bottom: 2px solid #888; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.ours td { background: #eef4fa; }
figure { margin: 1.5em 0; } figure img { max-width: 100%; } figcaption, .note { color: #555; font-size: .88em; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: .8em; }
summary { cursor: pointer; }
"""
SCALE = 0.6  # size of a figure on the page, relative to its pixels
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the browser loads nothing else


# ---------------------------------------------------------------- pieces of HTML


def html_table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int, ours: Sequence[int] = ()) -> str:
    """Cells are HTML already; the first ``words`` columns hold text, the others numbers; rows ``ours`` are coloured."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(
            f"<{tag}>{text}</{tag}>" if i < words else f'<{tag} class="number">{text}</{tag}>'
            for i, text in enumerate(texts)
        )

    body = "".join(
        ('<tr class="ours">' if place in ours else "<tr>") + cells("td", row) + "</tr>\n"
        for place, row in enumerate(rows)
    )
    return (
        f'<div class="wide"><table><thead><tr>{cells("th", heads)}</tr></thead><tbody>\n{body}</tbody></table></div>\n'
    )


def runs_html(rows: Sequence[Row]) -> str:
    """One row per run and variant: where it comes from and its metrics on test (on valid without test)."""
    metrics = [name for name in (*RANKING, *CLASSIFICATION) if any(name in (row.metrics or row.valid) for row in rows)]
    heads = [
        "task",
        "data set",
        "setting",
        "seed",
        "commit",
        "device",
        "minutes",
        "split",
        *(NAMES[m] for m in metrics),
    ]
    cells = []
    for row in rows:
        found = row.metrics or row.valid
        setting = row.setting + (f" ({row.variant})" if row.variant else "")
        words = [
            row.task.replace("_", " "), row.dataset, setting, "-" if row.seed is None else str(row.seed),
            commit_words(row.commit), row.device, f"{row.minutes:.1f}", "test" if row.metrics else "valid",
        ]  # fmt: skip
        cells.append([*map(escape, words), *(f"{found[m]:.3f}" if m in found else "" for m in metrics)])
    return html_table(heads, cells, 8)


def table_html(table: Table) -> str:
    """A table of the paper: blocks, notes, the best of a column in bold, our lines coloured."""
    heads = ["", "method", *(escape(f"{c.dataset} {NAMES.get(c.metric, c.metric)}".strip()) for c in table.columns)]
    found = marks(table)
    rows = []
    for line in table.lines:
        cells = [escape(line.block), escape(line.method) + (f" [{found[line.note]}]" if line.note else "")]
        for column in table.columns:
            text = escape(cell_text(line.cells[column])) if column in line.cells else ""
            cells.append(f"<b>{text}</b>" if is_best(table, line, column) else text)
        rows.append(cells)
    ours = [place for place, line in enumerate(table.lines) if line.block in (OURS, BASELINE, CONTROL)]
    notes = [f"[{mark}] {escape(note)}" for note, mark in found.items()] + [escape(note) for note in table.notes]
    return f"<h3>Table {table.number}: {escape(table.title)}</h3>\n{html_table(heads, rows, 2, ours)}" + note_html(
        notes
    )


def note_html(notes: Iterable[str]) -> str:
    """A line each; they are HTML already."""
    return "".join(f'<div class="note">{note}</div>\n' for note in notes)


def quality_html(sets: Sequence[CodeSet]) -> str:
    """Size, perplexity, collisions and entropy of each codes file (Jaccard distances are figure 6)."""
    heads = ["codes", "entities", "size", "bits per entity", "parameters behind the codes", "perplexity by level",
             "collisions", "entropy, bits", "at most"]  # fmt: skip
    rows = []
    for row in (quality(found, ks=()) for found in sets):
        parameters = row["parameters_behind_codes"]
        rows.append([
            escape(row["codes"]), f"{row['entities']:,}",
            f"{row['seq_len']} x {row['num_quantizers']} of {row['num_code']:,}", f"{row['bits_per_entity']:,.0f}",
            "" if parameters is None else f"{parameters:,}", " ".join(f"{x:.0f}" for x in row["perplexity"]),
            f"{row['collisions']:,}", f"{row['entropy_bits']:.3f}", f"{row['entropy_bits_max']:.3f}",
        ])  # fmt: skip
    return html_table(heads, rows, 1)


def figures_html(drawn: dict[str, list[Path]]) -> str:
    """The PNG files of all figures, inside the page."""
    parts = []
    for name, paths in drawn.items():
        title = f"Figure {name}" if name.isdigit() else name.capitalize()
        shows = escape(FIGURES[name].shows)
        for path in paths:
            image = path.read_bytes()
            width = round(SCALE * int.from_bytes(image[16:20], "big"))  # from the PNG's first chunk
            data = base64.b64encode(image).decode()
            parts.append(
                f'<figure><img alt="{shows}" width="{width}" src="data:image/png;base64,{data}">'
                f"<figcaption>{title}: {shows}</figcaption></figure>\n"
            )
    return "".join(parts)


def records_html(rows: Sequence[Row]) -> str:
    """The whole record of each run, folded; answers of an LLM are only counted."""
    parts = []
    for path, record in {str(row.path): row.record for row in rows}.items():
        shown = {key: f"{len(value):,}, not shown" if key == "answers" else value for key, value in record.items()}
        text = json.dumps(shown, indent=1, ensure_ascii=False)
        parts.append(f"<details><summary>{escape(path)}</summary><pre>{escape(text)}</pre></details>\n")
    return "".join(parts)


# ---------------------------------------------------------------- the page


def codes_beside(rows: Sequence[Row]) -> list[Path]:
    """The codes files beside the rows' records."""
    return [path for path in dict.fromkeys((ROOT / row.path).with_suffix(".pt") for row in rows) if path.is_file()]


def page(runs: Sequence[Path], data: Path, models: Sequence[Path] | None, title: str) -> str:
    """The HTML. InputError if the runs hold no result."""
    rows, omitted = collect(runs, data)
    if not rows:
        raise InputError(
            f"RUN {' '.join(map(str, runs))} holds no run record; name what run_rq.py or inference.py wrote"
        )
    inputs = Inputs(codes=codes_beside(rows), records=runs, data=data, models=models, kinds=("png",))
    sets = inputs.code_sets if inputs.codes else []
    left_out = (() if sets else NEEDS_CODES) + (() if models else NEEDS_MODEL)
    with tempfile.TemporaryDirectory() as folder:
        drawn = draw_all(inputs, Path(folder), [name for name in FIGURES if name not in left_out])
        figures = figures_html(drawn)
    tasks = {row.task for row in rows}
    numbers = [number for number, choice in CHOICES.items() if choice.task in tasks]
    sections = [
        ("Runs", runs_html(rows) + note_html(f"left out: {escape(line)}" for line in omitted)),
        ("The paper's tables", "".join(table_html(table) for table in make_tables(numbers, runs, data))),
        ("Figures", figures),
        ("Code quality", quality_html(sets) if sets else ""),
        ("Run records", records_html(rows)),
    ]
    body = "".join(f"<h2>{heading}</h2>\n{text}" for heading, text in sections if text)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="tables/make_report.py", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run records, or folders of them")
    parser.add_argument("--out", type=Path, default=OUT / "report.html", metavar="FILE", help="the page")
    parser.add_argument("--title", default="Codes of knowledge graphs: runs", help="heading of the page")
    parser.add_argument("--model", type=Path, nargs="+", metavar="DIR", help="models to draw the embeddings of")
    parser.add_argument("--data", type=Path, metavar="DIR", default=ROOT / "data", help="folder of the graphs")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    write_text(page(args.runs, args.data, args.model, args.title), args.out)
    print(f"wrote {args.out} ({args.out.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    run_command(main)
