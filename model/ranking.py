"""Filtered ranks by counting, and their metrics.

The rank of a target among M entities, with the mean rank for ties (the "realistic" rank):

    rank = 1 + #{others that score higher} + #{others that score the same} / 2

The others are all entities except the target and the filtered ones (other known true tails of the same query).
Counting needs one pass over the scores. The filter then corrects the count by the few filtered scores, which are
gathered through CSR indices: there is no dense mask, and only those few scores are sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

HITS = (1, 3, 10)
# Scores compared at once. On a CPU: in the cache, and below the 2**15 at which torch splits an operation over threads,
# which gains little here and is a hundred times slower on a busy machine. Sums of 0, 1 and 2 are exact in float32.
CPU_BLOCK = 2**15 - 1
GPU_BLOCK = 2**23


class KnownTails(Protocol):
    """The part of the graph's index of true tails that ``filtered_ranks`` uses."""

    def of(self, h: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """CSR (indptr [B + 1], entities) of the known tails of each query (h [B], r [B]), without repeats."""


def rank_scores(
    scores: Tensor, targets: Tensor, known: tuple[Tensor, Tensor] | None = None, rows: Tensor | None = None
) -> Tensor:
    """Filtered ranks of ``targets``, the mean rank for ties -> float64 [N].

    scores: [B, M], higher is better. targets: int64 [N]; target i is ranked in row ``rows[i]`` of the scores (default:
    N = B, one target per row). known: CSR (indptr [B + 1], ids) of the entities that the filter removes from each row,
    without repeats; a target is never removed from its own ranking, so it may be among them.
    Raises ValueError for NaN scores, for targets outside 0..M-1 and for shapes that do not fit.
    """
    if rows is None:
        rows = torch.arange(len(scores), device=scores.device)
    if scores.dim() != 2 or rows.shape != targets.shape or (known is not None and len(known[0]) != len(scores) + 1):
        raise ValueError(
            f"shapes do not fit: scores {list(scores.shape)}, targets {list(targets.shape)}, rows {list(rows.shape)}"
            + ("" if known is None else f", known's indptr {list(known[0].shape)}")
        )
    _check_range("target", targets, scores.shape[1])
    return _ranks(lambda: [(0, scores)], rows, targets, known)


@torch.no_grad()
def filtered_ranks(
    score_fn: Callable[..., Tensor],
    triples: np.ndarray,
    answers: KnownTails,
    num_relations: int,
    *,
    batch: int = 1024,
    num_entities: int | None = None,
    chunk: int | None = None,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Rank of t for every triple (h, r, t), filtered by the known tails ``answers`` of (h, r) -> float64 [n].

    triples: int64 [n, 3] with inverse queries already appended (``with_inverse``): relations 0..2R-1, R =
    ``num_relations``. Every distinct query (h, r) is scored once, ``batch`` queries at a time, even if several triples
    share it. ``score_fn(heads [B], relations [B]) -> [B, M]`` receives int64 tensors on ``device``; its scores may be
    on any one device. The model must be in eval mode.

    With ``chunk`` and ``num_entities`` the scores [B, M] are never complete in memory: ``score_fn(heads, relations,
    start, stop) -> [B, stop - start]`` is called twice per chunk of entities, first for the targets' scores, then to
    count. All calls of a batch get the same two tensor objects, so the function may keep its query vectors. Equal
    scores give equal ranks for every ``batch`` and ``chunk``.
    Raises ValueError for NaN scores and for ids out of range.
    """
    triples = np.asarray(triples, dtype=np.int64).reshape(-1, 3)
    if len(triples) and (triples.min() < 0 or triples[:, 1].max() >= 2 * num_relations):
        raise ValueError(f"ids must not be negative and relation ids lie below 2R = {2 * num_relations}")
    if chunk is not None and num_entities is None:
        raise ValueError("chunk needs num_entities")
    queries, query_of = np.unique(triples[:, 0] * (2 * num_relations) + triples[:, 1], return_inverse=True)
    order = np.argsort(query_of, kind="stable")
    first = np.searchsorted(query_of[order], np.arange(len(queries) + 1))  # triples order[first[q]:first[q + 1]]
    ranks = np.empty(len(triples))
    for start in range(0, len(queries), batch):
        keys = queries[start : start + batch]
        h, r = np.divmod(keys, 2 * num_relations)
        heads, relations = (torch.from_numpy(x).to(device) for x in (h, r))
        if chunk is None:
            scores = score_fn(heads, relations)
            blocks, size = _whole(scores), scores.shape[1]
        else:
            assert num_entities is not None
            blocks, size = _chunked(score_fn, heads, relations, num_entities, chunk), num_entities
        members = order[first[start] : first[start + len(keys)]]
        targets, rows = torch.from_numpy(triples[members, 2]), torch.from_numpy(query_of[members] - start)
        _check_range("target", targets, size)
        indptr, known = map(torch.from_numpy, answers.of(h, r))
        ranks[members] = _ranks(blocks, rows, targets, (indptr, known)).cpu().numpy()
    return ranks


def summarize(ranks: np.ndarray, is_head_query: np.ndarray) -> dict[str, Any]:
    """Metrics of ``ranks`` [n] -> {"mrr", "mr", "hits@1", "hits@3", "hits@10", "count", "head": {...}, "tail": {...}}.

    is_head_query: bool [n], true for inverse queries (t, r + R, ?), which predict the head. "head" and "tail" hold the
    same metrics for each direction. hits@k is the share of ranks <= k. Without ranks, metrics are None and count is 0.
    """
    ranks, head = np.asarray(ranks, dtype=np.float64), np.asarray(is_head_query, dtype=bool)
    return _metrics(ranks) | {"head": _metrics(ranks[head]), "tail": _metrics(ranks[~head])}


def _metrics(ranks: np.ndarray) -> dict[str, Any]:
    values = {"mrr": 1 / ranks, "mr": ranks, **{f"hits@{k}": ranks <= k for k in HITS}}
    return {name: float(v.mean()) if len(ranks) else None for name, v in values.items()} | {"count": len(ranks)}


# ---------------------------------------------------------------- counting

Blocks = Callable[[], Iterable[tuple[int, Tensor]]]  # each call yields (first entity, scores [B, m]) over all entities


def _whole(scores: Tensor) -> Blocks:
    return lambda: [(0, scores)]


def _chunked(score_fn: Callable[..., Tensor], heads: Tensor, relations: Tensor, entities: int, chunk: int) -> Blocks:
    def blocks() -> Iterator[tuple[int, Tensor]]:
        for start in range(0, entities, chunk):
            yield start, score_fn(heads, relations, start, min(start + chunk, entities))

    return blocks


def _ranks(blocks: Blocks, rows: Tensor, targets: Tensor, known: tuple[Tensor, Tensor] | None) -> Tensor:
    """Ranks [N] of ``targets`` in ``rows`` of the scores from ``blocks``, on the scores' device."""
    own: Tensor | None = None
    for start, scores in blocks():
        if own is None:
            rows, targets = rows.to(scores.device), targets.to(scores.device)
            known = None if known is None else (known[0].to(scores.device), known[1].to(scores.device))
            own = scores.new_zeros(len(targets))
        # the sum is NaN if any score is; but infinities of both signs give NaN too, so the scores are checked as well
        if bool(scores.sum().isnan()) and bool(scores.isnan().any()):
            raise ValueError("some scores are NaN, which have no rank")
        here = ((targets >= start) & (targets < start + scores.shape[1])).nonzero().squeeze(1)
        own[here] = scores[rows[here], targets[here] - start]
    if own is None:
        raise ValueError("there are no entities to rank")
    # the target counts itself as one tie, therefore 1 + above - 1/2
    ranks = torch.full(own.shape, 0.5, dtype=torch.float64, device=own.device)
    for start, scores in blocks():
        ranks += _count_above(scores, rows, own)
        if known is not None:
            ranks -= _count_known_above(scores, start, rows, targets, own, *known)
    return ranks


def _count_above(scores: Tensor, rows: Tensor, own: Tensor) -> Tensor:
    """#{scores > own} + #{scores == own} / 2 over each target's row -> float64 [N]."""
    total = torch.zeros(len(own), dtype=torch.float64, device=own.device)
    size = GPU_BLOCK if scores.is_cuda else CPU_BLOCK
    for part in scores.split(size, dim=1):
        step = min(max(1, size // part.shape[1]), max(1, len(own)))
        higher, as_high = torch.empty((2, step, part.shape[1]), device=scores.device)
        for i in range(0, len(own), step):
            row, bar = part.index_select(0, rows[i : i + step]), own[i : i + step, None]
            # comparisons that write floats, then a float sum, are vectorized; a sum of bools is not.
            # index_select, because row[i] starts all threads even for the smallest block
            count = torch.gt(row, bar, out=higher[: len(row)]).add_(torch.ge(row, bar, out=as_high[: len(row)]))
            total[i : i + step] += count.sum(1)
    return total / 2


def _count_known_above(
    scores: Tensor, start: int, rows: Tensor, targets: Tensor, own: Tensor, indptr: Tensor, ids: Tensor
) -> Tensor:
    """The part of ``_count_above`` that comes from each target's filtered entities -> float64 [N].

    scores: [B, m], entities start..stop-1; (indptr, ids): CSR over the B rows. The filtered scores of each row are
    sorted once, then each target is located among them by binary search. The pairs (target, filtered entity) are never
    listed: one query can have thousands of targets and thousands of filtered entities.
    """
    stop = start + scores.shape[1]
    row = torch.arange(len(scores), device=ids.device).repeat_interleave(indptr.diff())
    here = (ids >= start) & (ids < stop)
    row, ids = row[here], ids[here]
    values, place = torch.cat([scores[row, ids - start], own]).unique(return_inverse=True)
    place = torch.cat([row, rows]) * len(values) + place  # integers sorted by row, then by score
    filtered, mine = place[: len(ids)].sort().values, place[len(ids) :]
    row_end = torch.searchsorted(filtered, (rows + 1) * len(values))
    higher = row_end - torch.searchsorted(filtered, mine, right=True)
    as_high = row_end - torch.searchsorted(filtered, mine)
    itself = torch.isin(rows * stop + targets, row * stop + ids) & (targets >= start) & (targets < stop)
    return (higher + as_high - itself.long()).double() / 2


def _check_range(what: str, ids: Tensor, size: int) -> None:
    if ids.numel() and (ids.min() < 0 or ids.max() >= size):
        raise ValueError(f"{what} ids must lie in 0..{size - 1}, found {int(ids.min())}..{int(ids.max())}")
