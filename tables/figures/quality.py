"""Figure 6 (Jaccard distance over k, with baselines) and the usage of the codes of each level."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tables.code_quality import KS, CodeSet, jaccard_of
from tables.figures.inputs import Inputs, Missing
from tables.figures.style import heat_map, line, new_figure, save, short

if TYPE_CHECKING:
    import torch

COLUMNS = 256  # of the usage map at most: more codes are averaged by neighbours in rank


def baselines(found: CodeSet, seed: int) -> dict[str, torch.Tensor]:
    """Codes to compare with, made here and never saved.

    Random: uniform over K, the shape of ``found``. K-means: each position's decoded vector to the nearest of K centers,
    one level [M, L, 1], so its sets have L items in place of L*Q.
    """
    import torch

    from model.RQCodebook import RQCodebook

    generator = torch.Generator().manual_seed(seed)
    assert found.vectors is not None
    book = RQCodebook(found.num_code, found.vectors.shape[2], 1)
    book.init_from_data(found.vectors, generator=generator)
    return {
        "baseline: random codes": torch.randint(found.num_code, found.codes.shape, generator=generator),
        "baseline: k-means VQ of the same vectors": book.cal_codes(found.vectors),
    }


def draw_jaccard(inputs: Inputs, out: Path) -> list[Path]:
    """Figure 6: one panel per codes file, nearest entities by its own decoded vectors."""
    sets = [(name, found) for name, found in zip(inputs.code_names, inputs.code_sets, strict=True)
            if found.vectors is not None and len(found.codes) > KS[0] + 1]  # fmt: skip
    if not sets:
        raise Missing(f"needs codes of more than {KS[0]} entities with their decoded vectors: python demo_complete.py")
    figure, axes = new_figure(1, len(sets), 4.4, 3.4)
    for panel, (name, found) in zip(axes[0], sets, strict=True):
        others = baselines(found, inputs.seed)
        curves = jaccard_of([found.codes, *others.values()], found.flat_vectors())
        for number, (label, curve) in enumerate(zip(["these codes", *others], curves, strict=True)):
            panel.plot(list(curve), list(curve.values()), label=label, **line(number))
        panel.set(xlabel="k nearest entities", ylabel="mean Jaccard distance", title=short(name, 48))
        panel.legend(loc="best")
    return save(figure, out, "figure_6", inputs.kinds)


def draw_usage(inputs: Inputs, out: Path) -> list[Path]:
    """How often each level's codes occur, most frequent first: even is bright to the right end, unused is white."""
    sets = inputs.code_sets
    figure, axes = new_figure(len(sets), 1, 7.0, 1.9)
    for panel, name, found in zip([row[0] for row in axes], inputs.code_names, sets, strict=True):
        counts = usage_counts(found)
        with np.errstate(divide="ignore"):
            values = np.where(counts > 0, np.log10(counts), np.nan)
        levels = [f"level {level}: {(row > 0).mean():.1%} used" for level, row in enumerate(counts)]
        image = heat_map(panel, binned(values), levels)
        panel.set(title=short(name, 60), xlabel=f"the {found.num_code:,} codes of a level, most frequent first")
        panel.set_xticks([])
        figure.colorbar(image, ax=panel, label="log10 of uses")
    return save(figure, out, "usage", inputs.kinds)


def usage_counts(found: CodeSet) -> np.ndarray:
    """Occurrences of each code by level [Q, K], each level sorted from its most frequent code."""
    columns = found.codes.flatten(0, 1).numpy().T
    counts = np.array([np.bincount(column, minlength=found.num_code) for column in columns])
    return -np.sort(-counts, axis=1)


def binned(values: np.ndarray) -> np.ndarray:
    """values [Q, K] with at most COLUMNS columns: means of neighbours, NaN (unused) kept apart where a bin has none."""
    parts = np.array_split(values, min(COLUMNS, values.shape[1]), axis=1)
    with np.errstate(invalid="ignore"):
        return np.stack([np.where(np.isfinite(part).any(1), np.nansum(part, 1), np.nan)
                         / np.isfinite(part).sum(1).clip(1) for part in parts], axis=1)  # fmt: skip
