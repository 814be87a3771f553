"""Figures from the records of stage 1: 5 (MRR over L and K), 10 (training curves), MRR by decoded levels ("levels"),
and test MRR over the parameters behind the codes ("pareto").

All but "pareto" show MRR on the validation split, on which settings are chosen, and leave controls out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import content_of
from common.files import read_json
from tables.figures.inputs import Inputs, Missing, distinct_names
from tables.figures.style import line, new_figure, plain_log, save, short, whole_ticks
from tables.results import CODES, Group, Row, groups
from tables.rows import EXPECTED
from tables.system import short_count, size_of, system_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Key = tuple[object, ...]
SIZE_NAMES = ("L, positions per entity", "K, codes per codebook")
MRR = "valid MRR"
LONGEST_LABEL = 48


def stage1(inputs: Inputs, needs: Callable[[Row], object] = bool, what: str = "") -> dict[str, list[Row]]:
    """Data set -> the rows of stage 1 without controls, one per setting and seed, for which ``needs`` is true.

    Raises Missing if there is none; ``what``: the reason and the remedy.
    """
    found: dict[str, list[Row]] = {}
    for row in (row for group in groups(inputs.rows) for row in group.rows):
        if row.task == CODES and not row.variant and "mrr" in row.valid and needs(row):
            found.setdefault(row.dataset, []).append(row)
    if not found:
        raise Missing(what or "there are no records of stage 1; make one: python demo_complete.py")
    return found


def size(row: Row) -> tuple[int, int, int]:
    """(L, K, Q) of a run; Q = 1 for VQ."""
    return size_of(row.record["args"])


def kind(row: Row) -> str:
    """VQ or RQ."""
    return str(row.record["args"].get("quantizer", "rq")).upper()


def others(row: Row) -> str:
    """The run's setting without the size of its codes: only runs that agree in it are compared."""
    system = system_of(row.record)
    facts = [system.decoder, system.graph_encoder, system.quantizer, system.text, f"{system.members} members"]
    return ", ".join([*filter(None, facts), *row.flags])


def run_labels(rows: Sequence[Row]) -> list[str]:
    """A legend label per run of a panel: its record (with its folder where two have one name), parameters, bits."""
    labels = []
    for name, row in zip(distinct_names([row.path for row in rows]), rows, strict=True):
        system = system_of(row.record)
        parameters = short_count(system.parameters).removesuffix(" parameters")
        labels.append(f"{short(name, LONGEST_LABEL)} ({parameters}, {system.bits or 0:,.0f} bits)")
    return labels


# ---------------------------------------------------------------- 5


def draw_sizes(inputs: Inputs, out: Path) -> list[Path]:
    """Figure 5: MRR over L, one line per K, and over K, one line per L; a line per setting that differs otherwise."""
    found = {dataset: rows for dataset, all_rows in stage1(inputs).items() if (rows := varied(all_rows))}
    if not found:
        raise Missing(
            "needs records of two sizes, all else equal; make another: python run_rq.py with another --seq_len or "
            "--num_code, then --records FOLDER of both"
        )
    figure, axes = new_figure(len(found), 2, 4.4, 3.3)
    for panels, (dataset, rows) in zip(axes, found.items(), strict=True):
        several = len({others(row) for row in rows}) > 1
        for place, (panel, name) in enumerate(zip(panels, SIZE_NAMES, strict=True)):
            for number, ((fixed, *setting), points) in enumerate(curves(rows, place).items()):
                quantizer, Q, rest = setting
                label = f"{quantizer}, Q = {Q}, {'KL'[place]} = {fixed:,}"
                label += f" ({short(str(rest), 40)})" if several else ""
                panel.plot(list(points), list(points.values()), label=label, **line(number))
            ticks = sorted({size(row)[place] for row in rows})
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            panel.minorticks_off()
            panel.set(xlabel=name, ylabel=MRR, title=dataset)
            panel.legend(loc="best", fontsize=7)
    return save(figure, out, "figure_5")


def curves(rows: Sequence[Row], place: int) -> dict[Key, dict[int, float]]:
    """Mean MRR over seeds, by the rest of the setting and then by L (``place`` 0) or K (1), both sorted."""
    values: dict[Key, dict[int, list[float]]] = {}
    for row in rows:
        key = (size(row)[1 - place], kind(row), size(row)[2], others(row))
        values.setdefault(key, {}).setdefault(size(row)[place], []).append(row.valid["mrr"])
    return {
        key: {x: statistics.fmean(found) for x, found in sorted(points.items())}
        for key, points in sorted(values.items(), key=str)
    }


def varied(rows: Sequence[Row]) -> list[Row]:
    """The rows for which there is another row with another (L, K), everything else equal."""
    sizes: dict[Key, set[tuple[int, int]]] = {}
    for row in rows:
        sizes.setdefault((kind(row), size(row)[2], others(row)), set()).add(size(row)[:2])
    return [row for row in rows if len(sizes[kind(row), size(row)[2], others(row)]) > 1]


# ---------------------------------------------------------------- 10


def draw_training(inputs: Inputs, out: Path) -> list[Path]:
    """Figure 10: structure loss (Eq. 7) and MRR by epoch, one line per run.

    The warm-up has no codes: its MRR, of the unquantized vectors, has hollow markers and a line of its own.
    """
    found = stage1(
        inputs, lambda row: row.record.get("history"), "the records hold no history: python demo_complete.py"
    )
    figure, axes = new_figure(len(found), 2, 4.6, 3.2)
    for (losses, scores), (dataset, rows) in zip(axes, found.items(), strict=True):
        for number, (row, label) in enumerate(zip(rows, run_labels(rows), strict=True)):
            with content_of(row.path, "run record", "repeat its run: run_rq.py"):
                draw_run(losses, scores, row.record["history"], label, number)
        losses.set(xlabel="epoch", ylabel="structure loss", title=dataset)
        scores.set(xlabel="epoch (hollow: no codes yet; dotted: codes frozen from here)", ylabel=MRR, title=dataset)
        losses.legend(loc="upper right", fontsize=6)
        whole_ticks(losses)
        whole_ticks(scores)
    return save(figure, out, "figure_10")


def draw_run(losses: Axes, scores: Axes, history: Sequence[dict[str, Any]], label: str, number: int) -> None:
    """Loss and MRR of one run."""
    style = line(number) | {"markersize": 2.5}
    losses.plot([epoch["epoch"] for epoch in history], [epoch["structure"] for epoch in history], label=label, **style)
    for warm, fill in ((True, "white"), (False, style["color"])):
        phase = [epoch for epoch in history if (epoch["phase"] == "warm-up") == warm]
        points = [(epoch["epoch"], epoch["valid"]["mrr"]) for epoch in phase if "valid" in epoch]
        scores.plot([x for x, _ in points], [y for _, y in points], **style, markerfacecolor=fill)
    frozen = next((epoch["epoch"] for epoch in history if epoch["phase"] == "frozen"), None)
    if frozen is not None:
        scores.axvline(frozen, color=style["color"], linewidth=0.8, linestyle=":")


# ---------------------------------------------------------------- levels


def by_levels(row: Row) -> list[float]:
    """MRR when only the first 1..Q levels are decoded; [] if the record has none, or a single one."""
    with content_of(row.path, "run record", "repeat its run: run_rq.py"):
        values = row.record.get("valid_mrr_by_levels") or []
        return [float(value) for value in values] if len(values) > 1 else []


def draw_levels(inputs: Inputs, out: Path) -> list[Path]:
    """MRR when only the first levels of every position are decoded: one panel per data set, one line per run."""
    found = stage1(inputs, by_levels, "no record has several levels; make one: python run_rq.py --num_quantizers 4")
    figure, axes = new_figure(1, len(found), 4.4, 3.3)
    for panel, (dataset, rows) in zip(axes[0], found.items(), strict=True):
        for number, (row, label) in enumerate(zip(rows, run_labels(rows), strict=True)):
            panel.plot(range(1, len(by_levels(row)) + 1), by_levels(row), label=label, **line(number))
        panel.set(xlabel="levels decoded", ylabel=MRR, title=dataset)
        panel.set_ylim(bottom=0)
        panel.set_xticks(range(1, 1 + max(len(by_levels(row)) for row in rows)))
        panel.legend(loc="best", fontsize=6)
    return save(figure, out, "levels")


# ---------------------------------------------------------------- pareto

FEWEST_POINTS = 3  # of a panel, where any data set has so many


def series_of(group: Group) -> str:
    """The name of the series that a group belongs to in "pareto"."""
    row = group.first
    if row.variant:
        return row.variant.removeprefix("control: ")
    system = system_of(row.record)
    return f"{kind(row)}, {system.quantizer}, {system.text or 'no text'}"


def draw_pareto(inputs: Inputs, out: Path) -> list[Path]:
    """Test MRR (mean over seeds) over the parameters behind the codes, with published results beside ours."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for group in groups(inputs.rows):
        row, mrr = group.first, group.stat("mrr")
        if row.task == CODES and mrr and row.variant != "control: codes shuffled":
            parameters = system_of(row.record).parameters
            if parameters:
                points = found.setdefault(row.dataset, {}).setdefault(series_of(group), [])
                points.append((parameters / 1e6, mrr.mean))
    if not found:
        raise Missing("needs records of stage 1 with test metrics; make one: python demo_complete.py")
    compared = {dataset: series for dataset, series in found.items() if sum(map(len, series.values())) >= FEWEST_POINTS}
    found = compared or found
    published = read_json(EXPECTED / "pareto.json", "published results")["points"]
    figure, axes = new_figure(1, len(found), 5.0, 3.6)
    for panel, (dataset, series) in zip(axes[0], found.items(), strict=True):
        for number, (name, points) in enumerate(sorted(series.items())):
            panel.plot(*zip(*sorted(points), strict=True), label=name, **line(number) | {"linestyle": ""})
        for number, point in enumerate(point for point in published if point["dataset"] == dataset):
            x, label = point["parameters"] / 1e6, "published (not measured here)" if not number else None
            panel.plot([x], [point["mrr"]], color="0.4", marker="*", linestyle="", markersize=8, label=label)
            panel.annotate(point["method"], (x, point["mrr"]), (3, 3), textcoords="offset points", fontsize=7)
        panel.set(xlabel="parameters behind the codes (millions)", ylabel="test MRR", title=dataset)
        plain_log(panel, (1, 2, 5))
        panel.legend(loc="best", fontsize=6)
    return save(figure, out, "pareto")
