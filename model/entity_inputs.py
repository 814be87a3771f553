"""What the encoder starts from: vectors learned per entity, projected texts, the mean vector of the nearest by text.

Ensemble members may start from different sources: members that differ make different errors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

LEARNED, TEXT, NEIGHBOURS = SOURCES = ("learned", "text", "neighbours")
NUM_NEIGHBOURS = 10
TEMPERATURE = 0.1  # of cosines: a neighbour at .5 has a seventh of the weight of one at .7
ROWS_AT_ONCE = 2**24  # of cosines: 64 MB


class Neighbours(NamedTuple):
    """The nearest entities of each by text: ids, int64 [M, N], and their weights [M, N], 1 in sum."""

    entities: Tensor
    weights: Tensor

    def mean(self, vectors: Tensor) -> Tensor:
        """Weighted means of the neighbours' rows: vectors [M, W] -> [M, W], without an entity's own row."""
        found: Tensor = F.embedding_bag(self.entities, vectors, per_sample_weights=self.weights, mode="sum")
        return found


@torch.no_grad()
def nearest_by_text(text: Tensor, count: int = NUM_NEIGHBOURS, new: Tensor | None = None) -> Neighbours:
    """The ``count`` others (all, where there are fewer) with the highest cosine to each of text [M, T], weighted by a
    softmax of cosine / TEMPERATURE. Exact: M^2 T products. ``new`` [N, T]: to each of these instead, from all M.

    As in the retrieval of kNN-KGE (Zhang et al. 2022, arXiv 2201.05575), but of inputs instead of answers.
    """
    if new is None and len(text) < 2:
        raise ValueError(f"{len(text)} entity has no neighbours")
    unit = F.normalize(text if text.dtype == torch.float64 else text.float(), dim=1)
    asked = unit if new is None else F.normalize(new.to(unit), dim=1)
    count, rows = min(count, len(unit) - (new is None)), max(1, ROWS_AT_ONCE // len(unit))
    entities, cosines = [], []
    for start in tqdm(range(0, len(asked), rows), desc="neighbours by text", leave=False, unit="part", disable=None):
        part = asked[start : start + rows] @ unit.T
        if new is None:
            own = torch.arange(start, start + len(part), device=part.device)
            part.scatter_(1, own.unsqueeze(1), -torch.inf)
        found = part.topk(count, dim=1)
        entities.append(found.indices)
        cosines.append(found.values)
    return Neighbours(torch.cat(entities), torch.softmax(torch.cat(cosines) / TEMPERATURE, dim=1))


def sources_of(inputs: str, members: int) -> list[frozenset[str]]:
    """``"learned+text,learned"`` -> each member's sources; one entry serves all members. Raises ValueError."""
    found = [frozenset(entry.split("+")) for entry in inputs.split(",")]
    unknown = sorted(set().union(*found) - set(SOURCES))
    if unknown:
        raise ValueError(f"inputs {inputs} name {unknown[0]!r}, expected {', '.join(SOURCES)} joined by +")
    if len(found) not in (1, members):
        raise ValueError(f"inputs {inputs} are for {len(found)} members, but there are {members}: give 1 or {members}")
    return found * members if len(found) == 1 else found


class EntityInputs(nn.Module):
    """The encoder's inputs [M, width], each member's slice the sum of its own sources.

    ``sources``: one set per member.
    """

    def __init__(self, sources: list[frozenset[str]], width: int) -> None:
        super().__init__()
        if len(set(sources)) == 1:
            sources = sources[:1]  # one slice for all
        self.sources, self.size = sources, width // len(sources)
        self._near: tuple[Tensor, Neighbours] | None = None  # of the text that they were found by

    def forward(self, learned: Tensor, text: Tensor | None = None, projection: Tensor | None = None) -> Tensor:
        """``learned`` [M, width], ``text`` [M, T], ``projection`` [width, T] -> [M, width].

        Raises ValueError where a member needs a text and none is given.
        """
        slices = []
        for member, sources in enumerate(self.sources):
            part = slice(member * self.size, (member + 1) * self.size)
            own = learned if len(self.sources) == 1 else learned[:, part]
            terms = [own] if LEARNED in sources else []
            if sources != {LEARNED} and text is None:
                raise ValueError("the model's inputs are text embeddings: encode(g, text) needs them")
            if TEXT in sources:
                assert text is not None and projection is not None
                terms.append(F.linear(text, projection[part]))
            if NEIGHBOURS in sources:
                assert text is not None
                terms.append(self._neighbours(text).mean(own.contiguous()))
            slices.append(sum(terms[1:], start=terms[0]))
        return slices[0] if len(slices) == 1 else torch.cat(slices, dim=1)

    def _neighbours(self, text: Tensor) -> Neighbours:
        if self._near is None or self._near[0] is not text:
            self._near = text, nearest_by_text(text)
        return self._near[1]
