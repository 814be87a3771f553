"""Figures 7 and 11: metrics of the LLM's answers over (L, K), from the records of inference.py.

Figure 7 shows link prediction, figure 11 triple classification; a cell is the mean over seeds. Settings that
differ in more than L, K and the number of training rows have panels of their own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.files import command
from common.metrics import CLASSIFICATION, RANKING
from tables.figures.inputs import Inputs, Missing
from tables.figures.style import heat_map, new_figure, save, short
from tables.results import LINKS, TRIPLES, Row, groups

TASKS = {7: (LINKS, RANKING), 11: (TRIPLES, CLASSIFICATION)}
SHOWN = {"mrr": "MRR", "hits@1": "Hits@1", "hits@3": "Hits@3", "hits@10": "Hits@10", "f1": "F1"}


def grid(rows: list[Row], metric: str) -> tuple[list[int], list[int], np.ndarray]:
    """(values of L, values of K, mean of the metric [L, K], NaN where no run has that size)."""
    cells: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if metric in row.metrics:
            codes = row.record["codes"]
            cells.setdefault((int(codes["seq_len"]), int(codes["num_code"])), []).append(row.metrics[metric])
    lengths, sizes = (sorted({key[place] for key in cells}) for place in (0, 1))
    values = [[np.mean(cells[L, K]) if (L, K) in cells else np.nan for K in sizes] for L in lengths]
    return lengths, sizes, np.array(values, dtype=float).reshape(len(lengths), len(sizes))


def others(row: Row) -> str:
    """The run's setting without the size of the codes and the number of training rows: only equal ones are compared."""
    return ", ".join(
        word for word in row.setting.split(", ") if not word.startswith("codes ") and not word.endswith(" rows")
    )


def draw(inputs: Inputs, out: Path, number: int) -> list[Path]:
    """One row of panels per data set, Q and setting, one panel per metric."""
    task, metrics = TASKS[number]
    found: dict[tuple[str, int, str], list[Row]] = {}
    for row in (row for group in groups(inputs.rows) for row in group.rows):
        if row.task == task and not row.variant and row.codes == "with" and row.metrics:
            key = row.dataset, int(row.record["codes"]["num_quantizers"]), others(row)
            found.setdefault(key, []).append(row)
    if not found:
        raise Missing(
            f"no record of answers to {task.replace('_', ' ')} with codes; make one: "
            f"{command('lora_training/inference.py')}; or name yours: --records FOLDER"
        )
    figure, axes = new_figure(len(found), len(metrics), 2.7, 2.4)
    for panels, ((dataset, Q, setting), rows) in zip(axes, found.items(), strict=True):
        for panel, metric in zip(panels, metrics, strict=True):
            lengths, sizes, values = grid(rows, metric)
            if values.size:
                heat_map(panel, values, [str(L) for L in lengths], [f"{K:,}" for K in sizes], text=".3f")
            title = f"{dataset}, Q = {Q}: {SHOWN.get(metric, metric)}"
            panel.set(title=title, xlabel="K, codes per codebook", ylabel="L")
        if len(found) > 1:
            panels[0].set_ylabel(f"{short(setting, 40)}\nL", fontsize=7)
    return save(figure, out, f"figure_{number}")
