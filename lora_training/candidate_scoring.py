"""Log-likelihoods of answers under a causal language model: exact, with one forward pass over the prompt.

    log P(answer | prompt) = sum over its tokens of log P(token | prompt, tokens before it)

``score_lists`` computes it for lists of candidates; ``constrained_beams`` is a beam search over a trie of all entities.
Both compute several prompts in one batch, each once, and then feed *branches*: parts of several answers in one row of
tokens, each attending to the prompt, its own ancestors and itself (4D mask). A prompt's cache is never copied: 20
copies would need 15 GiB for a 7B model.

Equal token sequences are scored once, so their scores are bit-equal and ties can be ranked at their mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ints = NDArray[np.int64]
WAYS = ("packed", "full")
MASKED_ATTENTION = ("sdpa", "eager")  # implementations that accept a 4D mask
ROW_TOKENS = 2048  # tokens of branches in one row; bounds the logits
SOFTMAX_ROWS = 256


# ---------------------------------------------------------------- log-probabilities


def log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log P of ``tokens`` [S] under ``logits`` [S, V] -> float64 [S] on the CPU; computed in float32, in chunks."""
    parts = []
    for some, ids in zip(logits.split(SOFTMAX_ROWS), tokens.split(SOFTMAX_ROWS), strict=True):
        some = some.float()
        parts.append(some.gather(1, ids[:, None]).squeeze(1) - some.logsumexp(1))
    return torch.cat(parts).double().cpu()


class Branch(NamedTuple):
    """Tokens to feed after the prompt."""

    ancestors: Sequence[int]  # slots, counted from the prompt's end, of the tokens before them
    tokens: Sequence[int]


class Prefix:
    """The caches of B prompts and of the branches fed so far, all in one batch.

    Shorter prompts are padded on the left to T tokens; slot s of each prompt is at position T + s of the cache.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], keep: int = 1) -> None:
        """Compute ``prompts``; ``self.logits`` [B, keep, V] are those of their last ``keep`` tokens.

        Raises ValueError for an empty prompt and for a model with a sliding window.
        """
        from transformers import DynamicCache

        if not all(prompts):
            raise ValueError("the prompt is empty")
        self.model, self.fed = model, 0
        self.lengths = [len(prompt) for prompt in prompts]
        self.T = max(self.lengths)
        self.cache = DynamicCache(config=model.config)
        if any(self.cache.is_sliding):
            raise ValueError("the cache of a model with a sliding window drops its prompt: use way='full'")
        batch = left_padded(prompts, 0, model.device)
        if min(self.lengths) == self.T:  # nothing to mask
            batch = {"input_ids": batch["input_ids"]}
        self.logits = model(**batch, past_key_values=self.cache, use_cache=True, logits_to_keep=keep).logits

    def feed(self, rows: Sequence[Sequence[Branch]]) -> Tensor:
        """Feed the branches of each prompt as one row of at most S tokens -> logits [B, S, V].

        They get the next S slots, in order. Logits behind the tokens of a shorter row are padding.
        """
        S, start = max(sum(len(branch.tokens) for branch in branches) for branches in rows), self.T + self.fed
        dtype, device = self.model.dtype, self.model.device
        seen = np.zeros((len(rows), S, start + S), dtype=bool)
        position, ids = np.zeros((2, len(rows), S), dtype=np.int64)
        for row, (branches, P) in enumerate(zip(rows, self.lengths, strict=True)):
            seen[row, :, self.T - P : self.T] = True  # padding too, since softmax over nothing is NaN
            at = 0
            for branch in branches:
                n = len(branch.tokens)
                seen[row, at : at + n, [self.T + slot for slot in branch.ancestors]] = True
                seen[row, at : at + n, start + at : start + at + n] = np.tri(n, dtype=bool)
                position[row, at : at + n] = P + len(branch.ancestors) + np.arange(n)
                ids[row, at : at + n] = branch.tokens
                at += n
        hidden = torch.from_numpy(~seen[:, None]).to(device)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, torch.finfo(dtype).min)
        output = self.model(
            input_ids=torch.from_numpy(ids).to(device), attention_mask=mask,
            position_ids=torch.from_numpy(position).to(device), past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        self.fed += S
        logits: Tensor = output.logits
        return logits

    def forget(self) -> None:
        """Remove everything after the prompts from the cache."""
        self.cache.crop(-self.fed)
        self.fed = 0


# ---------------------------------------------------------------- a few candidates


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """The longest common prefix that leaves at least one token of each sequence."""
    first, shortest = sequences[0], min(map(len, sequences))
    n = 0
    while n < shortest - 1 and all(other[n] == first[n] for other in sequences):
        n += 1
    return list(first[:n])


def best_way(model: PreTrainedModel) -> str:
    """``packed``, or ``full`` for models with a sliding window or an attention that accepts no mask."""
    from transformers import DynamicCache

    masked = getattr(model.config, "_attn_implementation", None) in MASKED_ATTENTION
    return "packed" if masked and not any(DynamicCache(config=model.config).is_sliding) else "full"


def score_candidates(
    model: PreTrainedModel, prompt: Sequence[int], candidates: Sequence[Sequence[int]], way: str | None = None,
    row_tokens: int = ROW_TOKENS,
) -> Tensor:  # fmt: skip
    """``score_lists`` of one prompt: log P(candidate | prompt) -> float64 [C] on the CPU."""
    return score_lists(model, [prompt], [candidates], way, row_tokens)[0]


@torch.inference_mode()
def score_lists(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], lists: Sequence[Sequence[Sequence[int]]],
    way: str | None = None, row_tokens: int = ROW_TOKENS,
) -> list[Tensor]:  # fmt: skip
    """log P(candidate | prompt) of each prompt's own list, summed over all tokens -> B of float64 [C] on the CPU.

    A candidate should include its end token: without it, a name beats every longer name that it begins. ``way``:
    ``packed`` computes the prompts once and feeds candidates in batches of at most ``row_tokens`` tokens with a
    block-diagonal mask, ``full`` computes the prompt for every candidate (the reference). Default: ``best_way``.
    Raises ValueError for an empty prompt or candidate.
    """
    way = way or best_way(model)
    if way not in WAYS:
        raise ValueError(f"way {way!r} is not one of {', '.join(WAYS)}")
    distinct = [list(dict.fromkeys(map(tuple, candidates))) for candidates in lists]
    if not all(prompts) or not all(all(some) for some in distinct):
        raise ValueError("a candidate has no tokens" if all(prompts) else "the prompt is empty")
    if way == "full":
        totals = [
            [_full_pass(model, prompt, candidate) for candidate in some]
            for prompt, some in zip(prompts, distinct, strict=True)
        ]
    else:
        totals = _after_prompts(model, prompts, distinct, row_tokens)
    scores = [dict(zip(some, found, strict=True)) for some, found in zip(distinct, totals, strict=True)]
    return [
        torch.tensor([score[tuple(candidate)] for candidate in candidates], dtype=torch.float64)
        for score, candidates in zip(scores, lists, strict=True)
    ]


def _full_pass(model: PreTrainedModel, prompt: Sequence[int], candidate: Sequence[int]) -> float:
    n = len(candidate)
    ids = torch.tensor([[*prompt, *candidate]], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=n + 1).logits[0, :-1]
    return float(log_probs(logits, ids[0, -n:]).sum())


def _after_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], lists: Sequence[list[tuple[int, ...]]], row_tokens: int
) -> list[list[float]]:
    shared = [common_prefix(candidates) for candidates in lists]
    given = [[*prompt, *first] for prompt, first in zip(prompts, shared, strict=True)]
    prefix = Prefix(model, given, keep=max(map(len, shared)) + 1)
    own = [[one[len(first) :] for one in some] for some, first in zip(lists, shared, strict=True)]
    totals, groups = [], []
    for logits, first, rests in zip(prefix.logits, shared, own, strict=True):
        base = _total(logits[-1 - len(first) : -1], first) if first else 0.0
        next_tokens = torch.tensor([tokens[0] for tokens in rests], device=logits.device)
        totals.append((base + log_probs(logits[-1:].expand(len(rests), -1), next_tokens)).tolist())
        longer = [i for i, tokens in enumerate(rests) if len(tokens) > 1]  # the last token is never fed
        groups.append(_groups(longer, [len(rests[i]) - 1 for i in longer], row_tokens // len(lists)))
    for parts in itertools.zip_longest(*groups, fillvalue=()):
        fed = [[Branch((), rests[i][:-1]) for i in part] for rests, part in zip(own, parts, strict=True)]
        _add_rests(totals, parts, prefix.feed(fed), own)
        prefix.forget()
    return totals


def _total(logits: Tensor, tokens: Sequence[int]) -> float:
    """The sum of ``log_probs``."""
    return float(log_probs(logits, torch.tensor(tokens, device=logits.device)).sum())


def _add_rests(
    totals: list[list[float]], parts: Sequence[Sequence[int]], logits: Tensor, rests: Sequence[Sequence[Sequence[int]]]
) -> None:
    """Add to ``totals`` the log P of ``rests`` after their first token, from ``logits`` [B, S, V] of one ``feed``; of
    each prompt only those in ``parts``."""
    for own, part, row, rest in zip(totals, parts, logits, rests, strict=True):
        wanted = [rest[i][1:] for i in part]
        if part:
            ids = torch.tensor([token for tokens in wanted for token in tokens], device=row.device)
            found = log_probs(row[: len(ids)], ids).split([len(tokens) for tokens in wanted])
            for i, some in zip(part, found, strict=True):
                own[i] += float(some.sum())


def _groups(items: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Groups of consecutive items with a total size of at most ``limit``; a larger item is a group of its own."""
    groups: list[list[int]] = []
    room = 0
    for item, size in zip(items, sizes, strict=True):
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(item)
        room -= size
    return groups


# ---------------------------------------------------------------- batches of prompts


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: Any) -> dict[str, Tensor]:
    """input_ids, attention_mask and position_ids [B, T] of left-padded prompts."""
    T = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (T - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@torch.inference_mode()
def score_choices(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]], pad_id: int
) -> Tensor:
    """log P(choice | prompt) of the same C choices for each of B prompts -> float64 [B, C] on the CPU.

    One forward pass of the padded batch if every choice is one token; otherwise ``score_candidates`` per prompt.
    """
    if any(len(choice) != 1 for choice in choices):
        return torch.stack([score_candidates(model, prompt, choices) for prompt in prompts])
    batch = left_padded(prompts, pad_id, model.device)
    logits = model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1]
    ids = torch.tensor([choice[0] for choice in choices], device=logits.device)
    return torch.stack([log_probs(logits, one.expand(len(prompts))) for one in ids], dim=1)


@torch.inference_mode()
def generate_freely(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], end_id: int, pad_id: int, max_new_tokens: int
) -> list[list[int]]:
    """The greedy continuation of each prompt, without its end token, of at most ``max_new_tokens``."""
    from transformers import GenerationConfig

    # not the model's own configuration: LLaMA-2's sets a temperature
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end_id, pad_token_id=pad_id, use_cache=True
    )
    batch = left_padded(prompts, pad_id, model.device)
    del batch["position_ids"]  # generate derives them from the mask
    generate: Any = model.generate
    found = generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :].tolist()
    return [ids[: ids.index(end_id)] if end_id in ids else ids for ids in found]


# ---------------------------------------------------------------- all entities


class TokenTrie:
    """Token sequences as one sorted matrix int32 [N, T]; a node is a range of rows that agree up to a depth.

    21 MB for 41,000 entities of 130 tokens; nodes as objects would need gigabytes.
    """

    def __init__(self, rows: NDArray[np.int32], owners: ArrayLike | None = None) -> None:
        """``rows`` int32 [N, T], padded with -1; ``owners`` [N]: what each sequence stands for (default: its row).

        Raises ValueError if one sequence is a proper prefix of another.
        """
        if rows.ndim != 2 or not rows.size or (rows[:, 0] < 0).any():
            raise ValueError(f"a trie needs sequences of one token or more, got {list(rows.shape)}")
        order = np.lexsort(rows.T[::-1])
        self.rows: NDArray[np.int32] = rows[order]
        self.owners: Ints = (np.arange(len(rows)) if owners is None else np.asarray(owners, dtype=np.int64))[order]
        before, after = self.rows[:-1], self.rows[1:]
        same = before == after
        differs = same.argmin(axis=1)  # the first column that differs
        prefix = ~same.all(axis=1) & (before[np.arange(len(before)), differs] < 0)
        if prefix.any():
            raise ValueError(f"sequence {before[int(prefix.argmax())].tolist()} is a prefix of another one")

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]], owners: ArrayLike | None = None) -> TokenTrie:
        """A trie of sequences of any length."""
        rows = np.full((len(sequences), max(map(len, sequences))), -1, dtype=np.int32)
        for row, sequence in zip(rows, sequences, strict=True):
            row[: len(sequence)] = sequence
        return cls(rows, owners)

    def common(self) -> list[int]:
        """``common_prefix`` of all sequences."""
        return common_prefix([self.sequence(0), self.sequence(len(self.rows) - 1)])

    def sequence(self, row: int) -> list[int]:
        """The tokens of a row, without padding."""
        found = self.rows[row]
        return found[found >= 0].tolist()

    def children(self, low: int, high: int, depth: int) -> tuple[Ints, Ints]:
        """Next tokens [n] and their bounds [n + 1] of rows ``low``..``high`` - 1, which agree on ``depth`` tokens."""
        column = self.rows[low:high, depth]
        changes = np.flatnonzero(column[1:] != column[:-1]) + 1
        bounds = np.concatenate([[0], changes, [high - low]]) + low
        return column[bounds[:-1] - low].astype(np.int64), bounds

    def ends(self, low: int, depth: int) -> bool:
        """Whether the sequence in row ``low`` has ``depth`` tokens."""
        return depth == self.rows.shape[1] or bool(self.rows[low, depth] < 0)

    def is_chain(self, low: int, high: int) -> bool:
        """Whether all these rows are equal."""
        return bool((self.rows[low] == self.rows[high - 1]).all())


class _Beam(NamedTuple):
    low: int
    high: int
    depth: int
    total: float
    slots: tuple[int, ...]  # of its tokens after the shared prompt
    source: int  # row of the last logits that continues it; -1 if it has ended


class Ranked(NamedTuple):
    """Owners by descending score, ties by ascending owner."""

    owners: Ints  # [n]
    scores: NDArray[np.float64]  # [n] log-likelihoods


@torch.inference_mode()
def constrained_beams(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], trie: TokenTrie, beams: int
) -> list[Ranked]:
    """The most likely sequences of ``trie`` after each of B prompts, by beam search of width ``beams``.

    With ``beams`` >= number of sequences it is exact and equals ``score_candidates``; 1 is greedy decoding. All beams
    share their prompt's cache. When each beam has only one continuation left, the rest is one pass. An owner of several
    sequences gets the sum of their probabilities; owners that share a sequence are all returned. Raises ValueError for
    ``beams`` < 1 or an attention that accepts no mask.
    """
    if beams < 1:
        raise ValueError(f"beams must be 1 or more, got {beams}")
    if best_way(model) != "packed":
        raise ValueError(f"constrained search needs attention {' or '.join(MASKED_ATTENTION)}")
    shared = trie.common()
    prefix = Prefix(model, [[*prompt, *shared] for prompt in prompts], keep=len(shared) + 1)
    logits = list(prefix.logits)
    bases = [_total(some[:-1], shared) if shared else 0.0 for some in logits]
    live = [[_Beam(0, len(trie.rows), len(shared), base, (), len(shared))] for base in bases]
    done: list[list[_Beam]] = [[] for _ in prompts]
    while growing := [b for b, some in enumerate(live) if not all(trie.is_chain(x.low, x.high) for x in some)]:
        for b in growing:
            live[b], done[b] = _step(trie, live[b], done[b], logits[b], beams)
        fed: list[list[Branch]] = [[] for _ in prompts]
        for b in growing:
            fed[b] = [Branch(beam.slots, [int(trie.rows[beam.low, beam.depth - 1])]) for beam in live[b]]
        if any(fed):
            start, found = prefix.fed, prefix.feed(fed)
            for b in growing:
                logits[b] = found[b]
                live[b] = [x._replace(slots=(*x.slots, start + i), source=i) for i, x in enumerate(live[b])]
    finished = _finish(trie, prefix, live, logits)
    return [_ranked(trie, [*some, *more], beams) for some, more in zip(done, finished, strict=True)]


def _ranked(trie: TokenTrie, done: list[_Beam], beams: int) -> Ranked:
    """Owners of the best ``beams`` sequences, with the sum of their probabilities."""
    best = sorted(done, key=lambda beam: (-beam.total, beam.low))[:beams]
    totals: dict[int, float] = {}
    for beam in best:
        for owner in np.unique(trie.owners[beam.low : beam.high]).tolist():
            totals[owner] = float(np.logaddexp(totals[owner], beam.total)) if owner in totals else beam.total
    owners = sorted(totals, key=lambda owner: (-totals[owner], owner))
    return Ranked(np.array(owners, dtype=np.int64), np.array([totals[owner] for owner in owners]))


def _step(
    trie: TokenTrie, live: list[_Beam], done: list[_Beam], logits: Tensor, beams: int
) -> tuple[list[_Beam], list[_Beam]]:
    """Extend every live beam by one token; keep the best ``beams`` among them and those that have ended."""
    grown = list(done)
    rows = logits[[beam.source for beam in live]].float()
    log_p = (rows - rows.logsumexp(1, keepdim=True)).cpu().numpy()
    for beam, row in zip(live, log_p, strict=True):
        tokens, bounds = trie.children(beam.low, beam.high, beam.depth)
        found = row[tokens].astype(np.float64)
        for i in np.argsort(-found, kind="stable")[:beams].tolist():
            low, high = int(bounds[i]), int(bounds[i + 1])
            source = -1 if trie.ends(low, beam.depth + 1) else beam.source
            grown.append(_Beam(low, high, beam.depth + 1, beam.total + float(found[i]), beam.slots, source))
    kept = sorted(grown, key=lambda beam: (-beam.total, beam.low))[:beams]
    return [beam for beam in kept if beam.source >= 0], [beam for beam in kept if beam.source < 0]


def _finish(trie: TokenTrie, prefix: Prefix, live: list[list[_Beam]], logits: Sequence[Tensor]) -> list[list[_Beam]]:
    """Score the rest of each prompt's beams that have only one continuation."""
    rests = [[trie.sequence(beam.low)[beam.depth :] for beam in some] for some in live]
    totals, groups = [], []
    for some, own, rows in zip(live, rests, logits, strict=True):
        first = torch.tensor([rest[0] for rest in own], dtype=torch.long, device=rows.device)
        totals.append(log_probs(rows[[beam.source for beam in some]], first).tolist() if some else [])
        longer = [i for i, rest in enumerate(own) if len(rest) > 1]
        groups.append(_groups(longer, [len(own[i]) - 1 for i in longer], ROW_TOKENS // len(live)))
    for parts in itertools.zip_longest(*groups, fillvalue=()):
        fed = [
            [Branch(some[i].slots, own[i][:-1]) for i in part]
            for some, own, part in zip(live, rests, parts, strict=True)
        ]
        _add_rests(totals, parts, prefix.feed(fed), rests)
    return [
        [
            beam._replace(depth=beam.depth + len(rest), total=beam.total + more, source=-1)
            for beam, rest, more in zip(some, own, found, strict=True)
        ]
        for some, own, found in zip(live, rests, totals, strict=True)
    ]
