"""Make whole-entity codes distinct at dump time, at the least cost in distance.

Two entities with one code are one entity to whatever reads the codes. The last level carries the least energy, so an
entity moves by changing last-level codes only: the change that adds least to |z - z_q|^2 among those nobody holds.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.quantizers import Quantizer


class TooFewCodes(ValueError):
    """Entities that no change of last-level codes can make distinct."""


class Resolved(NamedTuple):
    """What ``resolve_collisions`` returns."""

    codes: Tensor  # int64 [M, L, Q], no two entities alike
    changed: Tensor  # int64 [n], sorted: the entities whose code was changed
    extra_distance: Tensor  # float64 [n]: what each change added to |z - z_q|^2, summed over the L positions


@torch.no_grad()
def resolve_collisions(z: Tensor, codebook: Quantizer, codes: Tensor) -> Resolved:
    """z [M, L, D], its codes [M, L, Q] -> distinct codes; the input stays as it is.

    Of the entities that share a code the closest to it (the lowest id on a tie) keeps it. The others move one by one,
    ordered by the cost of their cheapest move, then id: each takes the free code of least extra distance. That is one
    position's next-nearest last-level code wherever one is free; several positions change only where that costs less
    than any free single change. Deterministic. The n entities of one code each walk past the codes that those before
    them took, so the time grows with n squared: 6 s of one core for 2,000 of one code (L = 4, K = 256), by that rule
    40 minutes for 40,000. Trained codes leave groups of a few; codebooks that collapsed do not.
    Raises TooFewCodes where more entities share the codes above the last level than there are last-level codes, K^L.
    """
    decoded = codebook.decode_from_codes(codes)  # checks codes
    if decoded.shape != z.shape:
        raise ValueError(f"z is {list(z.shape)} where its codes decode to {list(decoded.shape)}")
    inverse, counts = torch.unique(codes.reshape(len(codes), -1), dim=0, return_inverse=True, return_counts=True)[1:]
    shared = (counts[inverse] > 1).nonzero().squeeze(1)  # [S]
    distance = (z[shared].double() - decoded[shared].double()).square().sum((1, 2))
    keepers: dict[int, tuple[float, int]] = {}
    for group, key in zip(inverse[shared].tolist(), zip(distance.tolist(), shared.tolist(), strict=True), strict=True):
        keepers[group] = min(keepers.get(group, key), key)
    keeps = {entity for _, entity in keepers.values()}
    movers = [entity for entity in shared.tolist() if entity not in keeps]

    last = codebook.codes_of_level(codebook.num_quantizers - 1).double()
    residual = z - codebook.decode_from_codes(codes, codebook.num_quantizers - 1) if codebook.num_quantizers > 1 else z

    def moves(entity: int) -> tuple[np.ndarray, np.ndarray]:
        return _extra_distances(residual[entity].double(), last, codes[entity, :, -1:].long())

    def cheapest_move(entity: int) -> tuple[float, int]:
        return moves(entity)[1][:, 1:2].min(initial=np.inf), entity

    order = sorted(movers, key=cheapest_move)
    table = codes.cpu().numpy().astype(np.int64)  # a copy
    taken = {row.tobytes() for row in table}
    extras = []
    for entity in order:
        choices, extra = moves(entity)
        positions = np.arange(len(choices))
        for cost, ranks in _cheapest_first(extra):
            table[entity, :, -1] = choices[positions, ranks]
            if (key := table[entity].tobytes()) not in taken:
                taken.add(key)
                extras.append(cost)
                break
        else:
            raise TooFewCodes(
                f"entity {entity} cannot get its own code: all {extra.shape[1]}^{len(extra)} last-level codes of its "
                "prefix are taken; use more codes, positions or levels"
            )
    changed = torch.tensor(order, dtype=torch.int64)
    by_id = changed.argsort()
    return Resolved(
        torch.from_numpy(table).to(codes.device), changed[by_id], torch.tensor(extras, dtype=torch.float64)[by_id]
    )


def _extra_distances(residual: Tensor, last: Tensor, held: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Per position the last-level codes int64 [L, K], cheapest first, and what each adds to the distance [L, K].

    ``residual`` [L, D]: what the levels above leave of z; ``last`` [K, D]: the last codebook; ``held`` int64 [L, 1].
    Rank 0 is the code held now, at 0. A nearer one than it (where codes are not z's own) counts as 0 too.
    """
    distances = torch.cdist(residual, last).square()
    extra = (distances - distances.gather(1, held)).clamp_min_(0).scatter_(1, held, -1.0)
    extra, choices = extra.sort(dim=1, stable=True)
    return choices.cpu().numpy(), extra.clamp_min_(0).cpu().numpy()


def _cheapest_first(extra: np.ndarray) -> Iterator[tuple[float, tuple[int, ...]]]:
    """All ways to pick one rank per position of extra [L, K] (rows ascending), by ascending sum; lazily, each once.

    A pick's successors raise one rank, at its last raised position or after: so every pick has one predecessor.
    """
    length, width = extra.shape
    heap = [(0.0, (0,) * length, 0)]
    while heap:
        cost, ranks, first = heapq.heappop(heap)
        yield cost, ranks
        for position in range(first, length):
            rank = ranks[position] + 1
            if rank < width:
                step = extra[position, rank] - extra[position, rank - 1]
                heapq.heappush(heap, (cost + float(step), (*ranks[:position], rank, *ranks[position + 1 :]), position))
