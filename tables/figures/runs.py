"""Figures from stage 1's run records: 5 (MRR over L and K), 10 (training curves), MRR by levels and by tokens.

All by MRR on the validation split, where settings are chosen. Controls stay out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import content_of
from tables.figures.inputs import Inputs, Missing
from tables.figures.style import from_zero, line, new_figure, save, short, whole_ticks
from tables.results import CODES, Row, groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Key = tuple[object, ...]
MOST_TICKS = 10  # that a panel has room to label
MRR = "valid MRR"


def stage1(inputs: Inputs) -> dict[str, list[Row]]:
    """Data set -> stage 1's rows that have codes, a seed of a setting once; Missing where there is no record."""
    found: dict[str, list[Row]] = {}
    for row in (row for group in groups(inputs.rows) for row in group.rows):
        if row.task == CODES and not row.variant and "mrr" in row.valid:
            found.setdefault(row.dataset, []).append(row)
    if not found:
        raise Missing("there are no records of stage 1; make one: python demo_complete.py, then --records demo_output")
    return found


def size(row: Row) -> tuple[int, int, int]:
    """(L, K, Q) of a run; Q = 1 for VQ."""
    args = row.record["args"]
    return args["seq_len"], args["num_code"], 1 if args.get("quantizer") == "vq" else args["num_quantizers"]


def kind(row: Row) -> str:
    """VQ or RQ."""
    return str(row.record["args"].get("quantizer", "rq")).upper()


def others(row: Row) -> str:
    """The run's setting without the codes' size: runs are compared where it is equal."""
    return row.setting.partition(", ")[2]


def tell_apart(labels: Sequence[str]) -> list[str]:
    """The labels without the words (between commas) that all have, the first one kept; a single label stays whole."""
    words = [label.split(", ") for label in labels]
    common = set(words[0]).intersection(*words[1:]) if len(set(labels)) > 1 else set()
    return [", ".join([first, *(word for word in rest if word not in common)]) for first, *rest in words]


def curves(rows: Sequence[Row], key: Callable[[Row], Key], x: Callable[[Row], int]) -> dict[Key, dict[int, float]]:
    """key -> x -> mean MRR over the rows with them (seeds), both in order."""
    values: dict[Key, dict[int, list[float]]] = {}
    for row in rows:
        values.setdefault(key(row), {}).setdefault(x(row), []).append(row.valid["mrr"])
    return {
        name: {at: sum(found) / len(found) for at, found in sorted(points.items())}
        for name, points in sorted(values.items(), key=lambda item: str(item[0]))
    }


def plot_curves(axes: Axes, found: dict[Key, dict[int, float]], label: Callable[[Key], str]) -> None:
    """One line per key, powers of two on the axis."""
    for number, (key, points) in enumerate(found.items()):
        axes.plot(list(points), list(points.values()), label=label(key), **line(number))
    ticks = sorted({x for points in found.values() for x in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylabel(MRR)
    axes.legend(loc="best")


def draw_sizes(inputs: Inputs, out: Path) -> list[Path]:
    """Figure 5: MRR over L, one line per K, and over K, one line per L; settings apart from size are kept apart."""
    found = {dataset: rows for dataset, rows in stage1(inputs).items() if varied(rows)}
    if not found:
        raise Missing(
            "needs records of two sizes, all else equal; make another: python run_rq.py with another --seq_len or "
            "--num_code, then --records FOLDER of both"
        )
    figure, axes = new_figure(len(found), 2, 4.4, 3.3)
    for (over_l, over_k), (dataset, rows) in zip(axes, found.items(), strict=True):
        rows = varied(rows)
        settings = sorted({others(row) for row in rows})

        def label(key: Key, letter: str, settings: list[str] = settings) -> str:
            note = f" ({short(str(key[3]), 40)})" if len(settings) > 1 else ""
            return f"{key[1]}, Q = {key[2]}, {letter} = {key[0]:,}{note}"

        plot_curves(over_l, curves(rows, lambda row: (size(row)[1], kind(row), size(row)[2], others(row)),
                                   lambda row: size(row)[0]), lambda key: label(key, "K"))  # fmt: skip
        plot_curves(over_k, curves(rows, lambda row: (size(row)[0], kind(row), size(row)[2], others(row)),
                                   lambda row: size(row)[1]), lambda key: label(key, "L"))  # fmt: skip
        over_l.set(xlabel="L, positions per entity", title=dataset)
        over_k.set(xlabel="K, codes per codebook", title=dataset)
    return save(figure, out, "figure_5", inputs.kinds)


def varied(rows: Sequence[Row]) -> list[Row]:
    """The rows that have a companion with another (L, K), everything else equal."""
    sizes: dict[Key, set[tuple[int, int]]] = {}
    for row in rows:
        sizes.setdefault((kind(row), size(row)[2], others(row)), set()).add(size(row)[:2])
    return [row for row in rows if len(sizes[kind(row), size(row)[2], others(row)]) > 1]


def draw_training(inputs: Inputs, out: Path) -> list[Path]:
    """Figure 10: loss of the structure (Eq. 7) and MRR by epoch, one line per run.

    The warm-up has no codes: its MRR, that of the unquantized vectors, is drawn hollow and not joined to the codes'.
    """
    found = {dataset: [row for row in rows if row.record.get("history")] for dataset, rows in stage1(inputs).items()}
    found = {dataset: rows for dataset, rows in found.items() if rows}
    if not found:
        raise Missing("the records hold no history; run_rq.py writes it: python demo_complete.py")
    figure, axes = new_figure(len(found), 2, 4.6, 3.2)
    for (losses, scores), (dataset, rows) in zip(axes, found.items(), strict=True):
        labels = run_labels(rows)
        for number, row in enumerate(rows):
            with content_of(row.path, "run record", "make it anew: run_rq.py"):
                history = row.record["history"]
                style = line(number) | {"markersize": 2.5}
                losses.plot([epoch["epoch"] for epoch in history], [epoch["structure"] for epoch in history],
                            label=labels[number], **style)  # fmt: skip
                for warm, fill in ((True, "white"), (False, style["color"])):
                    scored = [epoch for epoch in history if "valid" in epoch and (epoch["phase"] == "warm-up") == warm]
                    scores.plot([epoch["epoch"] for epoch in scored], [epoch["valid"]["mrr"] for epoch in scored],
                                **style, markerfacecolor=fill)  # fmt: skip
                frozen = next((epoch["epoch"] for epoch in history if epoch["phase"] == "frozen"), None)
                if frozen is not None:
                    scores.axvline(frozen, color=style["color"], linewidth=0.8, linestyle=":")
        losses.set(xlabel="epoch", ylabel="structure loss", title=dataset)
        scores.set(xlabel="epoch (hollow: no codes yet; dotted: codes frozen from here)", ylabel=MRR, title=dataset)
        losses.legend(loc="upper right", fontsize=6)
        whole_ticks(losses)
        whole_ticks(scores)
    return save(figure, out, "figure_10", inputs.kinds)


def run_labels(rows: Sequence[Row]) -> list[str]:
    """What tells each run from the others of its panel, its seed with them."""
    return fitting([f"{row.setting}, seed {row.seed}" for row in rows], [row.path.stem for row in rows])


def fitting(labels: Sequence[str], names: Sequence[str]) -> list[str]:
    """The labels as a legend has room for them; where cut ones would be the same, the runs' ``names`` instead."""
    found = [short(label, 56) for label in tell_apart(labels)]
    return found if len(set(found)) == len(found) else [short(name, 56) for name in names]


def by_levels(row: Row) -> list[float]:
    """MRR when the first 1..Q levels are decoded; [] where the record has none, or a single one."""
    with content_of(row.path, "run record", "make it anew: run_rq.py"):
        values = row.record.get("valid_mrr_by_levels") or []
        return [float(value) for value in values] if len(values) > 1 else []


def draw_levels(inputs: Inputs, out: Path) -> list[Path]:
    """MRR when only the first levels of every position are decoded: what each residual level adds."""
    found = {dataset: [row for row in rows if by_levels(row)] for dataset, rows in stage1(inputs).items()}
    found = {dataset: rows for dataset, rows in found.items() if rows}
    if not found:
        raise Missing("no record has several levels; make one: python run_rq.py --num_quantizers 4")
    figure, axes = new_figure(1, len(found), 4.2, 3.2)
    for panel, (dataset, rows) in zip(axes[0], found.items(), strict=True):
        labels = run_labels(rows)
        for number, row in enumerate(rows):
            values = by_levels(row)
            panel.plot(range(1, len(values) + 1), values, label=labels[number], **line(number))
        panel.set(xlabel="levels decoded", ylabel=MRR, title=dataset)
        from_zero(panel)
        panel.set_xticks(range(1, 1 + max(len(by_levels(row)) for row in rows)))
        panel.legend(loc="lower right", fontsize=7)
    return save(figure, out, "levels", inputs.kinds)


def described(row: Row) -> Key:
    """Kind, K and all other settings of a run."""
    return (f"{kind(row)}, K = {size(row)[1]:,}, {others(row)}",)


def draw_tokens(inputs: Inputs, out: Path) -> list[Path]:
    """MRR against code tokens per entity (L * Q): VQ and RQ runs, and each RQ run cut to its first levels."""
    found = stage1(inputs)
    figure, axes = new_figure(1, len(found), 4.4, 3.3)
    for panel, (dataset, rows) in zip(axes[0], found.items(), strict=True):
        runs = curves(rows, described, lambda row: size(row)[0] * size(row)[2])
        names = {described(row): row.path.stem for row in reversed(rows)}
        found_labels = fitting([str(key[0]) for key in runs], [names[key] for key in runs])
        labels = dict(zip(runs, found_labels, strict=True))
        plot_curves(panel, runs, labels.__getitem__)
        ticks = {x for points in runs.values() for x in points}
        for number, row in enumerate(row for row in rows if by_levels(row)):
            values, L = by_levels(row), size(row)[0]
            xs = [L * level for level in range(1, len(values) + 1)]
            ticks.update(xs)
            label = "one RQ run, cut to its first levels" if not number else None
            panel.plot(xs, values, color="0.45", linewidth=1, marker=".", linestyle=":", label=label)
        if len(ticks) > MOST_TICKS:
            ticks = {tick for tick in ticks if tick & (tick - 1) == 0}  # powers of two
        panel.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)])
        panel.set(xlabel="code tokens per entity, L x Q", title=dataset)
        from_zero(panel)
        panel.legend(loc="lower right", fontsize=7)
    return save(figure, out, "tokens", inputs.kinds)
