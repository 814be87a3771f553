"""Figure 6: Jaccard distance of codes over k, with two baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tables.code_quality import KS, CodeSet, jaccard_of
from tables.figures.inputs import Inputs, Missing
from tables.figures.style import line, new_figure, save, short

if TYPE_CHECKING:
    import torch


def baselines(found: CodeSet, seed: int) -> dict[str, torch.Tensor]:
    """Codes to compare with, made here and never saved.

    Random: uniform over K, of the same shape. K-means: the nearest of K centers of each position's decoded vector, one
    level [M, L, 1], so its sets have L items instead of L*Q.
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
    """One panel per codes file; the nearest entities are those of its own decoded vectors."""
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
    return save(figure, out, "figure_6")
