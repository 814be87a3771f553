"""Figures 4 and 12: cosine similarity of the decoded codes of some entities, one panel per codes file.

The entities come in groups that share a training fact (relation, tail), chosen without the codes: if codes represent
the graph, the blocks on the diagonal are brighter. Figure 12 draws another sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.files import ROOT, command
from data.knowledge_graph import Ints, KnowledgeGraph
from tables.code_quality import CodeSet
from tables.figures.inputs import Inputs, Missing, display_names
from tables.figures.style import heat_map, new_figure, save, short

GROUPS, SIZE, LARGEST = 3, 4, 60  # groups, entities of each, and how many entities a fact may hold for


class Sample(NamedTuple):
    """Entities in groups."""

    entities: Ints  # [GROUPS * SIZE] ids, group after group
    facts: list[tuple[int, int]]  # the (relation, tail) that each group shares


def sample_groups(kg: KnowledgeGraph, seed: int) -> Sample:
    """GROUPS random facts with SIZE to LARGEST heads, SIZE random ones of each, no entity twice.

    Missing if the graph has too few such facts.
    """
    rng = np.random.default_rng(seed)
    h, r, t = np.unique(kg.train, axis=0).T
    keys, counts = np.unique(r * kg.num_entities + t, return_counts=True)
    chosen: list[int] = []
    facts: list[tuple[int, int]] = []
    used: set[int] = set()  # relations: groups of one relation would look alike
    for key in rng.permutation(keys[(counts >= SIZE) & (counts <= LARGEST)]).tolist():
        relation, tail = divmod(key, kg.num_entities)
        heads = np.setdiff1d(h[(r == relation) & (t == tail)], [*chosen, tail])
        if relation not in used and len(heads) >= SIZE:
            chosen += rng.choice(heads, SIZE, replace=False).tolist()
            facts.append((relation, tail))
            used.add(relation)
        if len(facts) == GROUPS:
            return Sample(np.array(chosen), facts)
    raise Missing(
        f"{kg.name} has too few facts that {SIZE} to {LARGEST} entities share; "
        "name another graph: python tables/make_figures.py --dataset DIR"
    )


def cosines(codes: CodeSet, rows: list[int]) -> NDArray[np.float64]:
    """Cosine similarity [n, n] of the decoded vectors of these rows."""
    vectors = codes.flat_vectors()[rows].double().numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-30)
    return vectors @ vectors.T


def draw(inputs: Inputs, out: Path, number: int) -> list[Path]:
    """Figure 4, or 12 with the next seed, for the first data set."""
    kg = inputs.graphs[0]
    sample = sample_groups(kg, inputs.seed + (number == 12))
    wanted = [kg.entities[e] for e in sample.entities]
    variants = []
    for name, codes in zip(inputs.code_names, inputs.code_sets, strict=True):
        row = {entity: i for i, entity in enumerate(codes.entities)}
        if codes.vectors is not None and all(entity in row for entity in wanted):
            variants.append((name, codes, [row[entity] for entity in wanted]))
    if not variants:
        raise Missing(f"no codes with decoded vectors belong to {kg.name}; make them: "
                      + command("run_rq.py", "--dataset", ROOT / "data" / kg.name))  # fmt: skip
    names = display_names(kg)
    shown = [names[e] for e in sample.entities]
    figure, axes = new_figure(1, len(variants), 4.6, 4.3)
    for panel, (name, codes, rows) in zip(axes[0], variants, strict=True):
        first = panel is axes[0][0]
        image = heat_map(panel, cosines(codes, rows), shown if first else [""] * len(shown), shown, limits=(-1, 1))
        panel.set_title(short(name, 48))
        panel.tick_params(axis="x", rotation=90)
        panel.tick_params(length=0)
        for edge in range(SIZE, len(rows), SIZE):
            panel.axhline(edge - 0.5, color="white", linewidth=2)
            panel.axvline(edge - 0.5, color="white", linewidth=2)
    figure.colorbar(image, ax=axes[0], label="cosine similarity of decoded codes", shrink=0.8)
    facts = "\n".join(f"({short(kg.relation_labels[r], 40)}, {short(names[t])})" for r, t in sample.facts)
    figure.supxlabel(f"{kg.name}: the groups share\n{facts}", fontsize=6)  # a line each: one panel is narrow
    return save(figure, out, f"figure_{number}")
