"""Likelihoods of candidates: every way equals full passes, wide searches equal scoring, narrow ones the textbook."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_training.candidate_scoring import (
    Branch,
    Prefix,
    TokenTrie,
    best_way,
    common_prefix,
    constrained_beams,
    generate_freely,
    left_padded,
    log_probs,
    score_candidates,
    score_choices,
    score_lists,
)

V = 97


@cache
def tiny_llama(seed: int = 0, vocabulary: int = V, attention: str = "sdpa") -> LlamaForCausalLM:
    """A random LLaMA with grouped heads whose predictions are far from flat."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.4,
    )  # fmt: skip
    config._attn_implementation = attention
    return LlamaForCausalLM(config).eval()


def draw(rng: np.random.Generator, lengths: Sequence[int]) -> list[list[int]]:
    return [rng.integers(3, V, n).tolist() for n in lengths]


def by_hand(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> float:
    """The chain rule, one forward per token and no cache."""
    total, ids = 0.0, list(prompt)
    for token in answer:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        total += float(logits.log_softmax(0)[token])
        ids.append(token)
    return total


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("way", ["packed", "full"])
def test_every_way_is_the_chain_rule(way: str, attention: str) -> None:
    model, rng = tiny_llama(attention=attention), np.random.default_rng(1)
    prompt = rng.integers(3, V, 40).tolist()
    candidates = draw(rng, [1, 7, 3, 7, 12, 1, 5])
    expected = torch.tensor([by_hand(model, prompt, candidate) for candidate in candidates], dtype=torch.float64)
    found = score_candidates(model, prompt, candidates, way)
    assert torch.allclose(found, expected, atol=1e-4, rtol=0)
    assert expected.diff().abs().min() > 1e-3, "the candidates must differ for this test to say anything"


def test_twenty_candidates_behind_a_long_prompt() -> None:
    """The paper's sizes: 1,024 tokens of prompt, 20 candidates of 16 x 4 codes; two of them equal."""
    model, rng = tiny_llama(), np.random.default_rng(11)
    prompt, candidates = rng.integers(3, V, 1024).tolist(), draw(rng, [66] * 19)
    candidates.append(candidates[4])
    expected = score_candidates(model, prompt, candidates, "full")
    found = score_candidates(model, prompt, candidates, "packed")
    assert float((found - expected).abs().max()) < 1e-4
    assert found.argsort(stable=True).equal(expected.argsort(stable=True))


def test_a_shared_beginning_counts_and_rows_may_be_cut_anywhere() -> None:
    model, rng = tiny_llama(), np.random.default_rng(2)
    prompt = rng.integers(3, V, 30).tolist()
    candidates = [[5, 9, *own] for own in draw(rng, [6] * 9)] + [[5, 9, 4]]
    expected = score_candidates(model, prompt, candidates, "full")
    for row_tokens in (1, 6, 13, 1000):
        assert torch.allclose(score_candidates(model, prompt, candidates, "packed", row_tokens), expected, atol=1e-4)
    assert (
        common_prefix(candidates) == [5, 9] and common_prefix([[1, 2, 3]]) == [1, 2] and common_prefix([[1], [1]]) == []
    )


def test_candidates_do_not_see_each_other() -> None:
    """The control of the mask: what stands beside a candidate changes nothing, its order neither."""
    model, rng = tiny_llama(), np.random.default_rng(3)
    prompt, candidates = rng.integers(3, V, 20).tolist(), draw(rng, [8] * 6)
    alone = [float(score_candidates(model, prompt, [one], "packed")) for one in candidates]
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 101):
        together = score_candidates(model, prompt, [candidates[i] for i in order], "packed")
        assert np.allclose(together, [alone[i] for i in order], atol=1e-4)


def test_equal_candidates_tie_to_the_bit() -> None:
    model, rng = tiny_llama(), np.random.default_rng(4)
    candidates = draw(rng, [9] * 4)
    for way in ("packed", "full"):
        found = score_candidates(model, [3, 4, 5], [candidates[i] for i in (0, 1, 0, 2, 3, 1, 0)], way)
        assert found[0] == found[2] == found[6] and found[1] == found[5] and len(set(found.tolist())) == 4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_batch_of_prompts_is_each_prompt_alone(attention: str) -> None:
    """Prompts, lists and shared beginnings of several lengths, in rows that are cut anywhere."""
    model, rng = tiny_llama(attention=attention), np.random.default_rng(13)
    prompts = draw(rng, [21, 3, 40, 1])
    lists = [
        draw(rng, [1, 5, 3]),
        [[7, 9, *own] for own in draw(rng, [4] * 7)],
        [[5]],
        [[8, *own] for own in [[1], [2, 3]]],
    ]
    expected = [score_candidates(model, *pair, "full") for pair in zip(prompts, lists, strict=True)]
    for row_tokens in (1, 24, 1000):
        found = score_lists(model, prompts, lists, "packed", row_tokens)
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))
    sequences = sorted({(5, *rng.integers(3, 7, n).tolist(), 1) for n in rng.integers(1, 6, 80).tolist()})
    trie = TokenTrie.from_sequences(sequences)
    for beams in (1, 4, len(sequences)):
        alone = [constrained_beams(model, [prompt], trie, beams)[0] for prompt in prompts]
        for one, other in zip(constrained_beams(model, prompts, trie, beams), alone, strict=True):
            assert one.owners.tolist() == other.owners.tolist() and np.allclose(one.scores, other.scores, atol=1e-5)


def test_what_cannot_be_scored_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="prompt is empty"):
        score_candidates(model, [], [[1, 2], [1, 3]])
    with pytest.raises(ValueError, match="no tokens"):
        score_candidates(model, [1], [[1], []])
    with pytest.raises(ValueError, match="'quickly' is not one of"):
        score_candidates(model, [1], [[1]], "quickly")


def test_a_sliding_window_is_scored_by_full_passes() -> None:
    """Its cache drops the prompt."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=1, sliding_window=8,
                           num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4)  # fmt: skip
    model: Any = MistralForCausalLM(config).eval()
    rng = np.random.default_rng(12)
    prompt, candidates = rng.integers(3, V, 20).tolist(), draw(rng, [3, 5])
    assert best_way(model) == "full" and best_way(tiny_llama()) == "packed"
    expected = [by_hand(model, prompt, candidate) for candidate in candidates]
    assert np.allclose(score_candidates(model, prompt, candidates), expected, atol=1e-4)


def test_the_cache_is_cut_back_to_the_prompt() -> None:
    model, prompt = tiny_llama(), [3, 9, 27, 81]
    prefix = Prefix(model, [prompt])
    layer: Any = prefix.cache.layers[0]
    before = layer.keys.clone()
    first = prefix.feed([[Branch((), [5, 6]), Branch((), [7])]])
    second = prefix.feed([[Branch((0, 1), [8])]])  # behind 5, 6 and not behind 7
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[*prompt, 5, 6, 8]])).logits[0, -1]
    assert torch.allclose(second[0, 0], expected, atol=1e-4)
    prefix.forget()
    assert prefix.fed == 0 and torch.equal(layer.keys, before)
    assert torch.allclose(prefix.feed([[Branch((), [5, 6])]]), first[:, :2], atol=1e-4)


def test_log_probs_of_long_rows_are_the_log_softmax() -> None:
    logits = torch.randn(700, 11, generator=torch.Generator().manual_seed(0)) * 5
    tokens = torch.arange(700) % 11
    expected = logits.double().log_softmax(1)[torch.arange(700), tokens]
    assert torch.allclose(log_probs(logits, tokens), expected, atol=1e-5)


# ---------------------------------------------------------------- choices and free text


def test_choices_of_a_padded_batch_are_those_of_each_prompt() -> None:
    model, rng = tiny_llama(), np.random.default_rng(5)
    prompts = draw(rng, [3, 17, 9, 1, 17])
    for choices in ([[11], [12]], [[11, 4], [12]]):
        found = score_choices(model, prompts, choices, pad_id=0)
        expected = torch.stack([score_candidates(model, prompt, choices, "full") for prompt in prompts])
        assert found.shape == (5, 2) and torch.allclose(found, expected, atol=1e-4)
    padded = left_padded([[5], [6, 7, 8]], 0, "cpu")
    assert padded["input_ids"].tolist() == [[0, 0, 5], [6, 7, 8]]
    assert padded["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert padded["position_ids"].tolist() == [[0, 0, 0], [0, 1, 2]]


def test_free_text_is_the_greedy_argmax_of_each_prompt() -> None:
    model, rng = tiny_llama(), np.random.default_rng(6)
    prompts = draw(rng, [4, 11, 7])

    def greedy(prompt: list[int], n: int) -> list[int]:
        ids = list(prompt)
        for _ in range(n):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    expected = [greedy(prompt, 8) for prompt in prompts]
    assert generate_freely(model, prompts, end_id=V + 1, pad_id=0, max_new_tokens=8) == expected
    end = expected[1][3]  # as an end token it cuts every answer where it first comes
    cut = [ids[: ids.index(end)] if end in ids else ids for ids in expected]
    assert generate_freely(model, prompts, end_id=end, pad_id=0, max_new_tokens=8) == cut


# ---------------------------------------------------------------- tries


def test_a_trie_gives_back_its_sequences() -> None:
    rng = np.random.default_rng(7)
    sequences = [[*ids, 1] for ids in draw(rng, rng.integers(1, 6, 60).tolist())]
    trie = TokenTrie.from_sequences(sequences)

    def leaves(low: int, high: int, path: list[int]) -> list[tuple[list[int], list[int]]]:
        if trie.ends(low, len(path)):
            return [(path, trie.owners[low:high].tolist())]
        tokens, bounds = trie.children(low, high, len(path))
        assert bounds[0] == low and bounds[-1] == high and (np.diff(tokens) > 0).all()
        return [
            leaf for i, token in enumerate(tokens.tolist())
            for leaf in leaves(int(bounds[i]), int(bounds[i + 1]), [*path, token])
        ]  # fmt: skip

    found = leaves(0, len(sequences), [])
    assert sorted(owner for _, owners in found for owner in owners) == list(range(60))
    assert all(sequences[owner] == path for path, owners in found for owner in owners)
    with pytest.raises(ValueError, match="prefix of another"):
        TokenTrie.from_sequences([[4, 5], [4, 5, 6], [7]])
    assert TokenTrie.from_sequences([[4, 5], [4, 5]]).is_chain(0, 2)


def test_a_wide_search_is_scoring_every_sequence() -> None:
    model, rng = tiny_llama(), np.random.default_rng(9)
    prompt = rng.integers(3, V, 25).tolist()
    # few tokens, so that paths part late and again; ends of different length
    sequences = list({(*rng.integers(3, 6, n).tolist(), 1) for n in rng.integers(2, 6, 40).tolist()})
    trie = TokenTrie.from_sequences([list(s) for s in sequences])
    scores = score_candidates(model, prompt, sequences, "full").numpy()
    found = constrained_beams(model, [prompt], trie, beams=len(sequences))[0]
    assert sorted(found.owners.tolist()) == list(range(len(sequences)))
    assert np.allclose(found.scores, scores[found.owners], atol=1e-4) and (np.diff(found.scores) <= 0).all()
    assert found.owners[0] == scores.argmax()


def test_a_narrow_search_is_the_textbook_one() -> None:
    """Beam search written down without a trie or a cache, over prefixes, for several widths."""
    model, rng = tiny_llama(seed=3), np.random.default_rng(10)
    prompt = rng.integers(3, V, 12).tolist()
    sequences = sorted({tuple(rng.integers(3, 8, 5).tolist()) for _ in range(120)})

    def textbook(width: int) -> dict[tuple[int, ...], float]:
        beams: dict[tuple[int, ...], float] = {(): 0.0}
        for depth in range(1, 6):
            grown = {
                prefix: by_hand(model, prompt, list(prefix))
                for prefix in {s[:depth] for s in sequences if s[: depth - 1] in beams}
            }
            beams = dict(sorted(grown.items(), key=lambda item: -item[1])[:width])
        return beams

    trie = TokenTrie.from_sequences(sequences)
    for width in (1, 2, 5):
        found, expected = constrained_beams(model, [prompt], trie, width)[0], textbook(width)
        assert [sequences[i] for i in found.owners.tolist()] == list(expected)
        assert np.allclose(found.scores, list(expected.values()), atol=1e-4)


def test_owners_of_several_sequences_get_their_sum_and_sharers_tie() -> None:
    model, prompt = tiny_llama(), [3, 14, 15, 92]
    sequences, owners = [[6, 1], [6, 2], [7, 1], [7, 2], [8, 1], [8, 1]], [0, 0, 1, 1, 2, 3]
    found = constrained_beams(model, [prompt], TokenTrie.from_sequences(sequences, owners), beams=6)[0]
    scores = score_candidates(model, prompt, sequences, "full").tolist()
    expected = {0: math.log(math.exp(scores[0]) + math.exp(scores[1])),
                1: math.log(math.exp(scores[2]) + math.exp(scores[3])), 2: scores[4], 3: scores[5]}  # fmt: skip
    by_owner = dict(zip(found.owners.tolist(), found.scores.tolist(), strict=True))
    assert by_owner.keys() == expected.keys() and by_owner[2] == by_owner[3]
    assert all(abs(by_owner[owner] - value) < 1e-4 for owner, value in expected.items())
    order = found.owners.tolist()
    assert order.index(2) + 1 == order.index(3), "equal scores stand in the order of their owners"
    with pytest.raises(ValueError, match="1 or more"):
        constrained_beams(model, [prompt], TokenTrie.from_sequences(sequences), 0)


def test_one_sequence_is_found_without_a_choice() -> None:
    model = tiny_llama()
    found = constrained_beams(model, [[3, 4]], TokenTrie.from_sequences([[5, 6, 7]]), beams=4)[0]
    assert found.owners.tolist() == [0] and abs(found.scores[0] - by_hand(model, [3, 4], [5, 6, 7])) < 1e-4
