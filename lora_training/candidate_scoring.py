"""Log-likelihoods of answers under a causal language model: exact, with one forward pass over the prompt.

    log P(answer | prompt) = sum over its tokens of log P(token | prompt, tokens before it)

``score_candidates`` computes it for 20 candidates; ``constrained_beams`` is a beam search over a trie of all entities.
Both compute the prompt once and then feed *branches*: parts of several answers in one row of tokens, each attending to
the prompt, its own ancestors and itself (4D mask). The prompt's cache is never copied: 20 copies would need 15 GiB for
a 7B model.

Equal token sequences are scored once, so their scores are bit-equal and ties can be ranked at their mean.
"""

from __future__ import annotations

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
    """The cache of a prompt of P tokens and of the branches fed so far: slot s is at position P + s of the cache."""

    def __init__(self, model: PreTrainedModel, prompt: Sequence[int], keep: int = 1) -> None:
        """Compute ``prompt`` [P]; ``self.logits`` [keep, V] are those of its last ``keep`` tokens.

        Raises ValueError for an empty prompt and for a model with a sliding window.
        """
        from transformers import DynamicCache

        if len(prompt) < max(keep, 1):
            raise ValueError("the prompt is empty")
        self.model, self.P, self.fed = model, len(prompt), 0
        self.cache = DynamicCache(config=model.config)
        if any(self.cache.is_sliding):
            raise ValueError("the cache of a model with a sliding window drops its prompt: use way='full'")
        ids = torch.tensor([prompt], device=model.device)
        self.logits = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=keep).logits[0]

    def feed(self, branches: Sequence[Branch]) -> Tensor:
        """Feed all branches as one row of S tokens -> logits [S, V]; they get the next S slots, in order."""
        S, start = sum(len(branch.tokens) for branch in branches), self.P + self.fed
        dtype, device = self.model.dtype, self.model.device
        seen = torch.zeros(S, start + S, dtype=torch.bool)
        seen[:, : self.P] = True
        position = torch.empty(S, dtype=torch.long)
        at = 0
        for branch in branches:
            n = len(branch.tokens)
            rows = slice(at, at + n)
            seen[rows, [self.P + slot for slot in branch.ancestors]] = True
            seen[rows, start + at : start + at + n] = torch.ones(n, n, dtype=torch.bool).tril()
            position[rows] = self.P + len(branch.ancestors) + torch.arange(n)
            at += n
        mask = torch.zeros(S, start + S, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        ids = torch.tensor([token for branch in branches for token in branch.tokens], device=device)
        output = self.model(
            input_ids=ids[None], attention_mask=mask[None, None].to(device), position_ids=position[None].to(device),
            past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        self.fed += S
        return output.logits[0]

    def forget(self) -> None:
        """Remove everything after the prompt from the cache."""
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


@torch.inference_mode()
def score_candidates(
    model: PreTrainedModel, prompt: Sequence[int], candidates: Sequence[Sequence[int]], way: str | None = None,
    row_tokens: int = ROW_TOKENS,
) -> Tensor:  # fmt: skip
    """log P(candidate | prompt), summed over all its tokens -> float64 [C] on the CPU.

    A candidate should include its end token: without it, a name beats every longer name that it begins. ``way``:
    ``packed`` computes the prompt once and feeds candidates in rows of at most ``row_tokens`` tokens with a
    block-diagonal mask, ``full`` computes the prompt for every candidate (the reference). Default: ``best_way``.
    Raises ValueError for an empty prompt or candidate.
    """
    way = way or best_way(model)
    if way not in WAYS:
        raise ValueError(f"way {way!r} is not one of {', '.join(WAYS)}")
    distinct = list(dict.fromkeys(map(tuple, candidates)))
    if not prompt or not all(distinct):
        raise ValueError("a candidate has no tokens" if prompt else "the prompt is empty")
    if way == "full":
        totals = [_full_pass(model, prompt, candidate) for candidate in distinct]
    else:
        totals = _after_prompt(model, prompt, distinct, row_tokens)
    score = dict(zip(distinct, totals, strict=True))
    return torch.tensor([score[tuple(candidate)] for candidate in candidates], dtype=torch.float64)


def _full_pass(model: PreTrainedModel, prompt: Sequence[int], candidate: Sequence[int]) -> float:
    n = len(candidate)
    ids = torch.tensor([[*prompt, *candidate]], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=n + 1).logits[0, :-1]
    return float(log_probs(logits, ids[0, -n:]).sum())


def _after_prompt(
    model: PreTrainedModel, prompt: Sequence[int], candidates: list[tuple[int, ...]], row_tokens: int
) -> list[float]:
    shared = common_prefix(candidates)
    prefix = Prefix(model, [*prompt, *shared], keep=len(shared) + 1)
    device = prefix.logits.device
    own = [candidate[len(shared) :] for candidate in candidates]
    base = float(log_probs(prefix.logits[:-1], torch.tensor(shared, device=device)).sum()) if shared else 0.0
    first = prefix.logits[-1:].expand(len(own), -1)
    totals = (base + log_probs(first, torch.tensor([tokens[0] for tokens in own], device=device))).tolist()
    longer = [i for i, tokens in enumerate(own) if len(tokens) > 1]  # the last token is never fed
    for group in _groups(longer, [len(own[i]) - 1 for i in longer], row_tokens):
        fed, wanted = [own[i][:-1] for i in group], [own[i][1:] for i in group]
        logits = prefix.feed([Branch((), tokens) for tokens in fed])
        found = log_probs(logits, torch.tensor([token for tokens in wanted for token in tokens], device=device))
        for i, part in zip(group, found.split([len(tokens) for tokens in wanted]), strict=True):
            totals[i] += float(part.sum())
        prefix.forget()
    return totals


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
def constrained_beams(model: PreTrainedModel, prompt: Sequence[int], trie: TokenTrie, beams: int) -> Ranked:
    """The most likely sequences of ``trie`` after ``prompt``, by beam search of width ``beams``.

    With ``beams`` >= number of sequences it is exact and equals ``score_candidates``; 1 is greedy decoding. All beams
    share the prompt's cache. When each beam has only one continuation left, the rest is one pass. An owner of several
    sequences gets the sum of their probabilities; owners that share a sequence are all returned. Raises ValueError for
    ``beams`` < 1 or an attention that accepts no mask.
    """
    if beams < 1:
        raise ValueError(f"beams must be 1 or more, got {beams}")
    if best_way(model) != "packed":
        raise ValueError(f"constrained search needs attention {' or '.join(MASKED_ATTENTION)}")
    shared = trie.common()
    prefix = Prefix(model, [*prompt, *shared], keep=len(shared) + 1)
    logits = prefix.logits
    base = float(log_probs(logits[:-1], torch.tensor(shared, device=logits.device)).sum()) if shared else 0.0
    live = [_Beam(0, len(trie.rows), len(shared), base, (), len(shared))]
    done: list[_Beam] = []
    while live and not all(trie.is_chain(beam.low, beam.high) for beam in live):
        live, done = _step(trie, live, done, logits, beams)
        if live:
            start = prefix.fed
            logits = prefix.feed([Branch(beam.slots, [int(trie.rows[beam.low, beam.depth - 1])]) for beam in live])
            live = [beam._replace(slots=(*beam.slots, start + i), source=i) for i, beam in enumerate(live)]
    done += _finish(trie, prefix, live, logits)
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
    for beam in live:
        tokens, bounds = trie.children(beam.low, beam.high, beam.depth)
        row = logits[beam.source].expand(1, -1).float()
        found = (row[0, torch.from_numpy(tokens).to(row.device)] - row.logsumexp(1)).double().cpu().numpy()
        for i in np.argsort(-found, kind="stable")[:beams].tolist():
            low, high = int(bounds[i]), int(bounds[i + 1])
            source = -1 if trie.ends(low, beam.depth + 1) else beam.source
            grown.append(_Beam(low, high, beam.depth + 1, beam.total + float(found[i]), beam.slots, source))
    kept = sorted(grown, key=lambda beam: (-beam.total, beam.low))[:beams]
    return [beam for beam in kept if beam.source >= 0], [beam for beam in kept if beam.source < 0]


def _finish(trie: TokenTrie, prefix: Prefix, live: list[_Beam], logits: Tensor) -> list[_Beam]:
    """Score the rest of beams that have only one continuation."""
    if not live:
        return []
    finished = []
    rests = [trie.sequence(beam.low)[beam.depth :] for beam in live]
    device = logits.device
    first = log_probs(
        logits[[beam.source for beam in live]], torch.tensor([rest[0] for rest in rests], device=device)
    ).tolist()
    longer = [i for i, rest in enumerate(rests) if len(rest) > 1]
    for group in _groups(longer, [len(rests[i]) - 1 for i in longer], ROW_TOKENS):
        found = log_probs(
            prefix.feed([Branch(live[i].slots, rests[i][:-1]) for i in group]),
            torch.tensor([token for i in group for token in rests[i][1:]], device=device),
        )
        for i, part in zip(group, found.split([len(rests[i]) - 1 for i in group]), strict=True):
            first[i] += float(part.sum())
    for beam, rest, more in zip(live, rests, first, strict=True):
        finished.append(beam._replace(depth=beam.depth + len(rest), total=beam.total + more, source=-1))
    return finished
