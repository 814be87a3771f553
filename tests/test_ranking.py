"""Filtered ranks against brute force, PyKEEN's evaluator and closed forms."""

import numpy as np
import pytest
import torch

from data.knowledge_graph import TrueTails
from model import ranking
from model.ranking import filtered_ranks, rank_scores, summarize

M, R, N = 37, 3, 200


def make_answers(triples: np.ndarray) -> TrueTails:
    """The CSR index, built from a dict."""
    tails: dict[int, set[int]] = {}
    for h, r, t in triples.tolist():
        tails.setdefault(h * 2 * R + r, set()).add(t)
    keys = sorted(tails)
    return TrueTails(
        np.array(keys, dtype=np.int64),
        np.cumsum([0, *(len(tails[k]) for k in keys)]),
        np.array([t for k in keys for t in sorted(tails[k])], dtype=np.int64),
        R,
    )


def brute_force(scores: list[float], target: int, known: set[int]) -> float:
    """The definition of the rank: the mean of the first and the last place among equal scores."""
    others = [s for e, s in enumerate(scores) if e != target and e not in known]
    first = 1 + sum(s > scores[target] for s in others)
    last = first + sum(s == scores[target] for s in others)
    return (first + last) / 2


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def problem(rng: np.random.Generator) -> tuple[np.ndarray, TrueTails, torch.Tensor]:
    """Triples that share queries, answers for most of the queries, integer scores [M, 2R, M] with many ties."""
    triples, more = rng.integers(0, [8, 2 * R, M], (2, N, 3))
    known = np.concatenate([triples[: N // 2], more])
    answers = make_answers(known[known[:, 0] % 4 > 0])  # heads 0 and 4 have no known answers at all
    return triples, answers, torch.from_numpy(rng.integers(0, 6, (M, 2 * R, M))).float()


def expected(triples: np.ndarray, answers: TrueTails, table: torch.Tensor) -> list[float]:
    known = {
        int(k): set(answers.targets[answers.indptr[i] : answers.indptr[i + 1]].tolist())
        for i, k in enumerate(answers.keys)
    }
    return [
        brute_force(table[h, r].tolist(), t, known.get(h * 2 * R + r, set()))
        for h, r, t in triples.astype(int).tolist()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_rank_scores_equals_brute_force(rng: np.random.Generator, dtype: torch.dtype) -> None:
    scores = rng.integers(0, 5, (N, M))
    targets = rng.integers(0, M, N)
    known = [rng.choice(M, rng.integers(0, M), replace=False) for _ in range(N)]  # target among them or not, any order
    assert 0 < sum(t in k for t, k in zip(targets, known, strict=True)) < N
    indptr = torch.tensor([0, *np.cumsum([len(k) for k in known])])
    got = rank_scores(
        torch.from_numpy(scores).to(dtype), torch.from_numpy(targets), (indptr, torch.from_numpy(np.concatenate(known)))
    )
    want = [brute_force(scores[i].tolist(), targets[i], set(known[i].tolist())) for i in range(N)]
    assert got.tolist() == want
    plain = rank_scores(torch.from_numpy(scores).to(dtype), torch.from_numpy(targets))
    assert plain.tolist() == [brute_force(scores[i].tolist(), targets[i], set()) for i in range(N)]


def test_equal_scores_and_infinities() -> None:
    """All equal: the middle place. Infinities are compared like any other score."""
    assert rank_scores(torch.zeros(1, 9), torch.tensor([4])).tolist() == [5.0]
    inf = float("inf")
    masked = torch.tensor([[-inf, 0.5, -inf, -inf]])
    assert rank_scores(masked, torch.tensor([1])).tolist() == [1.0]
    assert rank_scores(masked, torch.tensor([2])).tolist() == [3.0]
    assert rank_scores(torch.tensor([[inf, -inf, 1.0]]), torch.tensor([2])).tolist() == [2.0]


def test_small_blocks_change_nothing(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.from_numpy(rng.integers(0, 5, (9, M))).float()
    rows, targets = torch.from_numpy(rng.integers(0, 9, N)), torch.from_numpy(rng.integers(0, M, N))
    known = torch.arange(10) * 11, torch.from_numpy(np.concatenate([rng.permutation(M)[:11] for _ in range(9)]))
    whole = rank_scores(scores, targets, known, rows)
    for size in (50, 10):  # a row and a bit, a part of a row
        monkeypatch.setattr(ranking, "CPU_BLOCK", size)
        assert torch.equal(rank_scores(scores, targets, known, rows), whole)
    assert whole.tolist() == [
        brute_force(scores[r].tolist(), int(t), set(known[1][11 * r : 11 * r + 11].tolist()))
        for r, t in zip(rows.tolist(), targets.tolist(), strict=True)
    ]


def test_bad_scores_are_rejected() -> None:
    scores = torch.zeros(2, 3)
    with pytest.raises(ValueError):
        rank_scores(scores, torch.tensor([1, 3]))
    with pytest.raises(ValueError):
        rank_scores(scores, torch.tensor([1]))
    with pytest.raises(ValueError):
        rank_scores(scores, torch.tensor([1, 2]), (torch.tensor([0, 0]), torch.tensor([], dtype=torch.long)))
    scores[1, 2] = float("nan")
    with pytest.raises(ValueError):
        rank_scores(scores, torch.tensor([0, 1]))


@pytest.mark.parametrize("batch", [1, 7, 1000])
@pytest.mark.parametrize("chunk", [None, 1, 10, M, 5 * M])
def test_filtered_ranks_for_every_batch_and_chunk(
    problem: tuple[np.ndarray, TrueTails, torch.Tensor], batch: int, chunk: int | None
) -> None:
    triples, answers, table = problem
    calls: list[tuple[int, int, tuple[int, ...]]] = []

    def score(heads: torch.Tensor, relations: torch.Tensor, *span: int) -> torch.Tensor:
        assert len(heads) <= batch
        calls.extend((h, r, span) for h, r in zip(heads.tolist(), relations.tolist(), strict=True))
        return table[heads, relations][:, slice(*span) if span else slice(None)]

    got = filtered_ranks(score, triples, answers, num_relations=R, batch=batch, num_entities=M, chunk=chunk)
    assert got.tolist() == expected(triples, answers, table)
    distinct = len(np.unique(triples[:, :2], axis=0))
    assert distinct < N / 2, "triples must share queries, or the test checks nothing"
    assert len(calls) == distinct * (1 if chunk is None else 2 * -(-M // chunk))


def test_the_filter_removes_known_tails_but_not_the_target() -> None:
    table = torch.arange(float(M)).repeat(M, 2 * R, 1)  # entity M - 1 is the best answer to every query
    triples = np.array([[0, 0, M - 4], [1, 0, M - 4]])
    answers = make_answers(np.array([[0, 0, M - 4], [0, 0, M - 1], [0, 0, M - 2], [0, 1, M - 3]]))
    got = filtered_ranks(lambda h, r: table[h, r], triples, answers, num_relations=R)
    assert got.tolist() == [2.0, 4.0]  # M - 3 alone is above in the first; the second query has no known answers


def test_filtered_ranks_rejects_bad_input(problem: tuple[np.ndarray, TrueTails, torch.Tensor]) -> None:
    triples, answers, table = problem
    bad = triples.copy()
    bad[3, 1] = 2 * R
    with pytest.raises(ValueError):
        filtered_ranks(lambda h, r: table[h, r], bad, answers, num_relations=R)
    bad = triples.copy()
    bad[3, 2] = M
    with pytest.raises(ValueError):
        filtered_ranks(lambda h, r: table[h, r], bad, answers, num_relations=R)
    with pytest.raises(ValueError):
        filtered_ranks(lambda h, r: table[h, r], triples, answers, num_relations=R, chunk=5)
    with pytest.raises(ValueError):
        filtered_ranks(lambda h, r: table[h, r] / 0 * 0, triples, answers, num_relations=R)


def test_no_triples(problem: tuple[np.ndarray, TrueTails, torch.Tensor]) -> None:
    _, answers, table = problem
    got = filtered_ranks(lambda h, r: table[h, r], np.zeros((0, 3), np.int64), answers, num_relations=R)
    assert got.shape == (0,)


def test_metrics_in_closed_form() -> None:
    """Ranks 1..n: MRR is the harmonic number over n, MR (n + 1) / 2, hits@k is k / n."""
    n = 20
    ranks = np.arange(1, n + 1, dtype=np.float64)
    found = summarize(ranks, ranks > 10)
    assert found["mrr"] == pytest.approx(sum(1 / k for k in range(1, n + 1)) / n, abs=1e-15)
    assert (found["mr"], found["count"]) == ((n + 1) / 2, n)
    assert [found[f"hits@{k}"] for k in (1, 3, 10)] == [1 / n, 3 / n, 10 / n]
    assert (found["head"]["count"], found["head"]["hits@10"], found["head"]["mr"]) == (10, 0.0, 15.5)
    assert (found["tail"]["count"], found["tail"]["hits@10"], found["tail"]["mr"]) == (10, 1.0, 5.5)
    assert found["mrr"] == pytest.approx((found["head"]["mrr"] + found["tail"]["mrr"]) / 2)
    assert {type(v) for v in found["head"].values()} == {float, int}


def test_a_tie_for_the_first_place_is_no_hit_at_1() -> None:
    found = summarize(np.array([1.5, 1.0]), np.array([False, False]))
    assert (found["hits@1"], found["hits@3"]) == (0.5, 1.0)


def test_directions_separately_and_none_without_ranks() -> None:
    found = summarize(np.array([2.0, 4.0]), np.array([False, True]))
    assert (found["mr"], found["head"]["mr"], found["tail"]["mr"]) == (3.0, 4.0, 2.0)
    assert found["head"]["count"] == found["tail"]["count"] == 1
    empty = summarize(np.zeros(0), np.zeros(0, dtype=bool))
    assert (empty["mrr"], empty["hits@1"], empty["count"], empty["head"]["count"]) == (None, None, 0, 0)


@pytest.mark.slow
def test_equals_pykeen(problem: tuple[np.ndarray, TrueTails, torch.Tensor]) -> None:
    """PyKEEN's evaluator, fed the same scores with the filtered ones as NaN (its own convention)."""
    from pykeen.evaluation import RankBasedEvaluator

    triples, answers, table = problem
    ours = filtered_ranks(lambda h, r: table[h, r], triples, answers, num_relations=R)
    known = {k: answers.targets[answers.indptr[i] : answers.indptr[i + 1]] for i, k in enumerate(answers.keys)}
    evaluator = RankBasedEvaluator(filtered=True)
    scores = table[triples[:, 0], triples[:, 1]]
    true = scores[torch.arange(N), triples[:, 2]]
    for row, (h, r, _) in zip(scores, triples, strict=True):
        row[known.get(h * 2 * R + r, [])] = float("nan")
    scores[torch.arange(N), triples[:, 2]] = true
    evaluator.process_scores_(torch.from_numpy(triples), "tail", scores, true_scores=true[:, None])
    theirs = np.concatenate(list(evaluator.ranks["tail", "realistic"]))
    np.testing.assert_array_equal(ours, theirs)
    found, result = summarize(ours, np.zeros(N, dtype=bool)), evaluator.finalize()
    for name, key in (("mrr", "inverse_harmonic_mean_rank"), ("mr", "arithmetic_mean_rank"), ("hits@10", "hits_at_10")):
        assert found[name] == pytest.approx(result.get_metric(f"tail.realistic.{key}"), abs=1e-6)
