"""Figures 2 and 9: prompt tokens of an entity, described by its neighbourhood or by its codes.

2-hop neighbours: the entities, other than itself, within two training edges of either direction. Prompt tokens: of
the lines "head | relation | tail" of all training triples that contain the entity or one of its neighbours, as a prompt
with this neighbourhood in words. Code tokens: <CODE>...</CODE>, one token per code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.knowledge_graph import Ints, KnowledgeGraph
from tables.figures.inputs import Inputs, Missing
from tables.figures.style import COLOURS, line, new_figure, plain_log, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE = " |  | \n"  # a triple's line without its three names
CONTEXT = 4096  # context window of LLaMA2 in tokens
PROXY = "estimate: a token per 4 letters of a word or number, one per other character"
_WORDS = re.compile(r"\w+|[^\w\s]")


class Cost(NamedTuple):
    """Per sampled entity."""

    neighbours: Ints  # [n], within two edges
    tokens: Ints  # [n], of these triples


def proxy_tokens(text: str) -> int:
    """An estimate of a tokenizer's count: ceil(letters / 4) per word or number, 1 per other visible character."""
    return sum(-(-len(word) // 4) for word in _WORDS.findall(text))


def token_counter(tokenizer: str | None) -> tuple[Callable[[str], int], str]:
    """(text -> tokens, how they were counted): by a tokenizer (folder or hub name), else by ``proxy_tokens``."""
    if tokenizer is None:
        return proxy_tokens, PROXY
    from lora_training.base_model import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return lambda text: len(loaded(text, add_special_tokens=False)["input_ids"]), f"tokenizer: {Path(tokenizer).name}"


def triple_tokens(kg: KnowledgeGraph, count: Callable[[str], int]) -> Ints:
    """Tokens of the line of each training triple [n]: those of its names and of ``LINE``, counted separately."""
    entity = np.array([count(label) for label in kg.labels], dtype=np.int64)
    relation = np.array([count(label) for label in kg.relation_labels], dtype=np.int64)
    h, r, t = kg.train.T
    return entity[h] + relation[r] + entity[t] + count(LINE)


def neighbourhood_cost(kg: KnowledgeGraph, entities: Ints, tokens: Ints) -> Cost:
    """2-hop neighbours and prompt tokens of ``entities`` [n]; ``tokens`` are those of each training triple."""
    h, _, t = kg.train.T
    found = np.zeros((2, len(entities)), dtype=np.int64)
    for place, entity in enumerate(entities):
        near = np.zeros(kg.num_entities, dtype=bool)
        near[entity] = True
        touches = (h == entity) | (t == entity)
        near[h[touches]] = near[t[touches]] = True
        touches = near[h] | near[t]
        ball = near.copy()
        ball[h[touches]] = ball[t[touches]] = True
        found[:, place] = ball.sum() - 1, tokens[touches].sum()
    return Cost(*found)


def code_token_counts(seq_len: int, num_quantizers: int) -> dict[str, int]:
    """Tokens of <CODE>...</CODE> by code format: L*Q codes and 2 marks, in "spec" also L*Q - 1 separators."""
    codes = seq_len * num_quantizers
    return {"compact": codes + 2, "spec": 2 * codes + 1}


def draw(inputs: Inputs, out: Path, number: int) -> list[Path]:
    """Figure 2: the first data set; figure 9: the others."""
    graphs = inputs.graphs[:1] if number == 2 else inputs.graphs[1:]
    if not graphs:
        raise Missing("needs a second data set; fetch one and name both: python data/download.py WN18RR, --dataset A B")
    count, how = token_counter(inputs.tokenizer)
    figure, axes = new_figure(len(graphs), 2, 4.2, 3.0)
    for panels, kg in zip(axes, graphs, strict=True):
        draw_graph(panels, kg, inputs, count)
    figure.supxlabel(f"Tokens: {how}", fontsize=7)
    return save(figure, out, f"figure_{number}")


def draw_graph(panels: list[Axes], kg: KnowledgeGraph, inputs: Inputs, count: Callable[[str], int]) -> None:
    """Both panels of one data set."""
    seen = np.flatnonzero(~kg.unseen)
    chosen = np.random.default_rng(inputs.seed).permutation(seen)[: inputs.sample]
    cost = neighbourhood_cost(kg, chosen, triple_tokens(kg, count))
    share = np.arange(1, len(chosen) + 1) / len(chosen)
    title = f"{kg.name}: {len(chosen):,} of {len(seen):,} entities"
    for axes, values, label in zip(panels, cost, ("2-hop neighbours", "prompt tokens"), strict=True):
        axes.plot(np.sort(values).clip(1), share, color=COLOURS[0], linewidth=1.6,
                  label=f"neighbourhood, median {np.median(values):,.0f}")  # fmt: skip
        axes.set(xlabel=f"{label} of an entity", ylabel="fraction of entities with at most x",
                 ylim=(0, 1.02), title=title)  # fmt: skip
    for panel in panels:
        plain_log(panel)
    axes = panels[1]
    own = [codes for codes in sets_of(inputs) if codes[0] == kg.name]
    for place, (_, L, Q) in enumerate(sorted(set(own)), start=1):
        for code_format, tokens in code_token_counts(L, Q).items():
            style = line(place) | {"marker": "", "linestyle": "--" if code_format == "compact" else ":"}
            axes.axvline(tokens, label=f"codes {L} x {Q}, {code_format}: {tokens}", **style)
    axes.axvline(CONTEXT, color="black", linewidth=1, label=f"LLaMA2's context: {CONTEXT:,}")
    for panel in panels:
        panel.legend(loc="upper left" if panel is panels[0] else "best", fontsize=7)


def sets_of(inputs: Inputs) -> list[tuple[str, int, int]]:
    """(data set, L, Q) of each codes file; [] without any."""
    try:
        return [(found.record["dataset"], *found.codes.shape[1:]) for found in inputs.code_sets]
    except Missing:
        return []
