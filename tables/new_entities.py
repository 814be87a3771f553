"""Table and figure of docs/NEW_ENTITIES.md, from the records of benchmarks/new_entities.py.

python tables/new_entities.py                       prints the table, writes docs/figures/new_entities.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, run_command
from common.files import ROOT, output_file, read_json
from tables.figures.style import line, new_figure, save

KEPT = ROOT / "tables" / "new_entities"
METHODS = {
    "fold_in_text": "fold-in with text", "fold_in": "fold-in", "encoder": "graph encoder",
    "center": "ERAvg at the mean length of known entities", "eravg": "ERAvg",
}  # fmt: skip
WITHOUT_TRIPLES = {
    "retrained": "retrained with all triples (upper bound)", "text_alone": "text alone",
    "nearest_by_text": "codes of the nearest by text", "random": "random codes",
}  # fmt: skip
SIZES = ("all", "10", "3", "1")

Results = dict[str, dict[str, float]]


def read_records(paths: list[Path]) -> dict[str, Results]:
    """Title -> results of each record. InputError for another file."""
    found = {}
    for path in paths:
        record = read_json(path, "record")
        if not isinstance(record, dict) or "results" not in record or "new_entities" not in record:
            raise InputError(f"{path} is no record of benchmarks/new_entities.py; write one with its --out")
        found[f"{path.stem} ({record['new_entities']} new, {record['queries']:,} queries)"] = record["results"]
    return found


def table(records: dict[str, Results]) -> str:
    """Markdown: a row per method and support, a column per record: MRR over queries / over entities; blank where it was
    not measured."""
    rows = {"retrained": WITHOUT_TRIPLES["retrained"]}
    for size in SIZES:
        of_size = {"all": "all triples", "1": "1 triple"}.get(size, f"{size} triples")
        rows |= {f"{method}_{size}": f"{title}, {of_size}" for method, title in METHODS.items()}
    rows |= WITHOUT_TRIPLES
    lines = [f"| codes of the new entities | {' | '.join(records)} |", "|---" * (1 + len(records)) + "|"]
    for key, title in rows.items():
        cells = [
            " / ".join(f"{results[key][name]:.3f}".lstrip("0") for name in ("mrr", "mrr_over_entities"))
            if key in results else "" for results in records.values()
        ]  # fmt: skip
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(records: dict[str, Results], out: Path) -> list[Path]:
    """MRR over the number of support triples, a panel per record."""
    figure, axes = new_figure(1, len(records), 2.6, 2.8)
    sizes = SIZES[::-1]
    for panel, (title, results) in zip(axes[0], records.items(), strict=True):
        mrr = {method: found["mrr_over_entities"] for method, found in results.items() if "mrr_over_entities" in found}
        for number, (method, label) in enumerate(METHODS.items()):
            points = [(place, mrr[f"{method}_{size}"]) for place, size in enumerate(sizes) if f"{method}_{size}" in mrr]
            if points:
                panel.plot(*zip(*points, strict=True), label=label, **line(number))
        for number, (method, label) in enumerate(WITHOUT_TRIPLES.items()):
            if method in mrr and method != "random":
                panel.axhline(mrr[method], label=label, color="0.4", linestyle=("-", "--", ":")[number])
        panel.set_xticks(range(len(sizes)), sizes)
        panel.set(xlabel="support triples", title=title.replace(" (", "\n("))
        panel.set_ylim(bottom=0)
    axes[0][0].set_ylabel("MRR, mean over new entities")
    handles = {
        label: handle for panel in axes[0] for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=6)
    return save(figure, out.parent, out.name)


def main() -> None:
    parser = CommandParser(prog="tables/new_entities.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=Path, nargs="+", help=f"default: those of {KEPT.relative_to(ROOT)}")
    parser.add_argument("--out", type=output_file, default=ROOT / "docs" / "figures" / "new_entities",
                        help="figure to write, without .png and .pdf")  # fmt: skip
    args = parser.parse_args()
    records: dict[str, Any] = read_records(args.records or sorted(KEPT.glob("*.json")))
    if not records:
        raise InputError(f"{KEPT} has no records; write one: python benchmarks/new_entities.py ... --out FILE.json")
    print(table(records))
    print("wrote", ", ".join(str(path) for path in draw(records, args.out)))


if __name__ == "__main__":
    run_command(main)
