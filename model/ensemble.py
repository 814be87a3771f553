"""Scorers that were trained apart on the same integers, as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from model.decoders import JointDecoder
from model.RQCodebook import RQCodebook
from model.RQGCN import CodeScorer


class JointScorer(nn.Module):
    """``CodeScorer``s that were trained apart on the same integers, as one; its D is the sum of theirs.

    Relations [2R, D] are theirs side by side. Nothing of it is indexed by an entity, as nothing of theirs is.
    """

    def __init__(self, scorers: Sequence[CodeScorer]) -> None:
        super().__init__()
        self.scorers: Iterable[CodeScorer] = nn.ModuleList(scorers)  # type: ignore[assignment]
        self.decoder = JointDecoder([scorer.decoder for scorer in scorers])

    @property
    def rq_codebook(self) -> RQCodebook:
        """The first scorer's: the sizes are those of all."""
        return next(iter(self.scorers)).rq_codebook

    def entity_vectors_from_codes(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """Integers [N, L, Q] -> [N, D]; ``levels`` decodes only the first levels."""
        return torch.cat([scorer.entity_vectors_from_codes(codes, levels) for scorer in self.scorers], dim=-1)

    def scores(self, q_head: Tensor, relation: Tensor, q_all: Tensor) -> Tensor:
        """s(h, r, t) of every tail: q_head [B, D], relation [B, D], q_all [M, D] -> [B, M]."""
        return self.decoder.query(q_head, relation) @ q_all.T
