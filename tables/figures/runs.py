"""Figures from the records of stage 1: 5 (MRR over L and K), 10 (training curves), MRR by levels and by tokens,
perplexity by level, and test MRR over the parameters behind the codes ("pareto").

All but "pareto" show MRR on the validation split, on which settings are chosen, and leave controls out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import content_of
from common.files import read_json
from tables.figures.inputs import Inputs, Missing
from tables.figures.style import from_zero, line, new_figure, plain_log, save, short, whole_ticks
from tables.results import CODES, Group, Row, groups
from tables.rows import EXPECTED
from tables.system import System, short_count, size_of, system_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Key = tuple[object, ...]
MOST_TICKS = 10  # that fit on a panel
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


def legend_labels(settings: Sequence[str], names: Sequence[str]) -> list[str]:
    """The first word of each setting (between commas) and those that not all settings have; the runs' ``names`` if the
    cut labels would be equal."""
    words = [setting.split(", ") for setting in settings]
    common = set(words[0]).intersection(*words[1:]) if len(set(settings)) > 1 else set()
    found = [", ".join([first, *(word for word in rest if word not in common)]) for first, *rest in words]
    found = [short(label, LONGEST_LABEL) for label in found]
    return found if len(set(found)) == len(found) else [short(name, LONGEST_LABEL) for name in names]


def run_labels(rows: Sequence[Row]) -> list[str]:
    """A legend label per run of a panel: the settings that differ, parameters behind the codes, bits per entity."""
    systems = [system_of(row.record) for row in rows]
    settings = [f"{found.codes}, {others(row)}, seed {row.seed}" for found, row in zip(systems, rows, strict=True)]
    labels = legend_labels(settings, [row.path.stem for row in rows])
    return [f"{label} ({sizes(found)})" for label, found in zip(labels, systems, strict=True)]


def sizes(system: System) -> str:
    """``0.45M, 160 bits``."""
    parameters = short_count(system.parameters).removesuffix(" parameters")
    return f"{parameters}, {system.bits:,.0f} bits" if system.bits else parameters


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
    axes.set_xscale("log", base=2)
    set_ticks(axes, {x for points in found.values() for x in points})
    axes.minorticks_off()
    axes.set_ylabel(MRR)
    axes.legend(loc="best", fontsize=7)


def set_ticks(axes: Axes, ticks: Iterable[int]) -> None:
    """Labels at ``ticks``; only powers of two if they are too many."""
    found = sorted(set(ticks))
    if len(found) > MOST_TICKS:
        found = [tick for tick in found if tick & (tick - 1) == 0]
    axes.set_xticks(found, [f"{tick:,}" for tick in found])


# ---------------------------------------------------------------- 5


def draw_sizes(inputs: Inputs, out: Path) -> list[Path]:
    """Figure 5: MRR over L, one line per K, and over K, one line per L (and other settings)."""
    found = {dataset: rows for dataset, all_rows in stage1(inputs).items() if (rows := varied(all_rows))}
    if not found:
        raise Missing(
            "needs records of two sizes, all else equal; make another: python run_rq.py with another --seq_len or "
            "--num_code, then --records FOLDER of both"
        )
    figure, axes = new_figure(len(found), 2, 4.4, 3.3)
    for (over_l, over_k), (dataset, rows) in zip(axes, found.items(), strict=True):
        several = len({others(row) for row in rows}) > 1

        def label(key: Key, letter: str, several: bool = several) -> str:
            note = f" ({short(str(key[3]), 40)})" if several else ""
            return f"{key[1]}, Q = {key[2]}, {letter} = {key[0]:,}{note}"

        plot_curves(over_l, curves(rows, lambda row: (size(row)[1], kind(row), size(row)[2], others(row)),
                                   lambda row: size(row)[0]), lambda key: label(key, "K"))  # fmt: skip
        plot_curves(over_k, curves(rows, lambda row: (size(row)[0], kind(row), size(row)[2], others(row)),
                                   lambda row: size(row)[1]), lambda key: label(key, "L"))  # fmt: skip
        over_l.set(xlabel="L, positions per entity", title=dataset)
        over_k.set(xlabel="K, codes per codebook", title=dataset)
    return save(figure, out, "figure_5", inputs.kinds)


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
    return save(figure, out, "figure_10", inputs.kinds)


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


# ---------------------------------------------------------------- by levels and by tokens


def by_levels(row: Row) -> list[float]:
    """MRR when only the first 1..Q levels are decoded; [] if the record has none, or a single one."""
    with content_of(row.path, "run record", "repeat its run: run_rq.py"):
        values = row.record.get("valid_mrr_by_levels") or []
        return [float(value) for value in values] if len(values) > 1 else []


def draw_levels(inputs: Inputs, out: Path) -> list[Path]:
    """MRR when only the first levels of every position are decoded: the contribution of each residual level."""
    missing = "no record has several levels; make one: python run_rq.py --num_quantizers 4"
    return draw_by_level(inputs, out, "levels", by_levels, missing, MRR, "levels decoded")


def draw_perplexity(inputs: Inputs, out: Path) -> list[Path]:
    """Perplexity of each level's codes; K if all codes are equally frequent."""
    missing = "no record has the perplexity of its codes; make one: python demo_complete.py"
    return draw_by_level(inputs, out, "perplexity", lambda row: system_of(row.record).perplexity, missing,
                         "perplexity of the codes", "level")  # fmt: skip


def draw_by_level(
    inputs: Inputs, out: Path, name: str, values: Callable[[Row], list[float]], missing: str, y: str, x: str
) -> list[Path]:
    """A panel per data set, a line per run: a value per level 1..Q."""
    found = stage1(inputs, values, missing)
    figure, axes = new_figure(1, len(found), 4.4, 3.3)
    for panel, (dataset, rows) in zip(axes[0], found.items(), strict=True):
        for number, (row, label) in enumerate(zip(rows, run_labels(rows), strict=True)):
            panel.plot(range(1, len(values(row)) + 1), values(row), label=label, **line(number))
        panel.set(xlabel=x, ylabel=y, title=dataset)
        from_zero(panel)
        panel.set_xticks(range(1, 1 + max(len(values(row)) for row in rows)))
        panel.legend(loc="best", fontsize=6)
    return save(figure, out, name, inputs.kinds)


def draw_tokens(inputs: Inputs, out: Path) -> list[Path]:
    """MRR over code tokens per entity (L * Q): VQ and RQ runs, and each RQ run cut to its first levels."""
    found = stage1(inputs)
    figure, axes = new_figure(1, len(found), 4.4, 3.3)
    for panel, (dataset, rows) in zip(axes[0], found.items(), strict=True):
        runs = curves(rows, described, lambda row: size(row)[0] * size(row)[2])
        names = {described(row): row.path.stem for row in reversed(rows)}
        labels = dict(
            zip(runs, legend_labels([str(key[0]) for key in runs], [names[key] for key in runs]), strict=True)
        )
        plot_curves(panel, runs, labels.__getitem__)
        ticks = {x for points in runs.values() for x in points}
        for number, row in enumerate(row for row in rows if by_levels(row)):
            xs = [size(row)[0] * level for level in range(1, len(by_levels(row)) + 1)]
            ticks.update(xs)
            label = "one RQ run, cut to its first levels" if not number else None
            panel.plot(xs, by_levels(row), color="0.45", linewidth=1, marker=".", linestyle=":", label=label)
        set_ticks(panel, ticks)
        panel.set(xlabel="code tokens per entity, L x Q", title=dataset)
        from_zero(panel)
        panel.legend(loc="lower right", fontsize=7)
    return save(figure, out, "tokens", inputs.kinds)


def described(row: Row) -> Key:
    """Kind, K and all other settings of a run."""
    return (f"{kind(row)}, K = {size(row)[1]:,}, {others(row)}",)


# ---------------------------------------------------------------- pareto


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
    return save(figure, out, "pareto", inputs.kinds)
