"""resolve_collisions: zero collisions, at the least cost, deterministically."""

import itertools

import numpy as np
import pytest
import torch

from model.collisions import TooFewCodes, _cheapest_first, resolve_collisions
from model.RQCodebook import RQCodebook, collisions

M, L, D, K, Q = 60, 2, 4, 8, 2  # K^L = 64 >= M, so one level suffices too


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def crowded(num_quantizers: int = Q) -> tuple[RQCodebook, torch.Tensor, torch.Tensor]:
    """Entities in 12 tight clusters: far fewer codes than entities."""
    source = generator()
    z = torch.randn(12, L, D, generator=source).repeat(M // 12, 1, 1)
    z += 0.02 * torch.randn(M, L, D, generator=source)
    book = RQCodebook(K, D, num_quantizers)
    book.init_from_data(z, generator=generator())
    return book, z, book.cal_codes(z)


@pytest.mark.parametrize("num_quantizers", [1, Q])
def test_no_collision_is_left_and_little_is_changed(num_quantizers: int) -> None:
    book, z, codes = crowded(num_quantizers)
    before, distinct = codes.clone(), len(codes.flatten(1).unique(dim=0))
    assert collisions(codes) > M // 2
    resolved = resolve_collisions(z, book, codes)
    assert torch.equal(codes, before)
    assert collisions(resolved.codes) == 0
    moved = (resolved.codes != codes).flatten(1).any(1)
    assert torch.equal(moved.nonzero().squeeze(1), resolved.changed) and len(resolved.changed) == M - distinct
    assert torch.equal(resolved.codes[:, :, :-1], codes[:, :, :-1])  # only the last level moves
    again = resolve_collisions(z, book, codes)
    assert all(torch.equal(a, b) for a, b in zip(resolved, again, strict=True))


def test_extra_distance_is_what_decoding_says() -> None:
    book, z, codes = crowded()
    resolved = resolve_collisions(z, book, codes)

    def distance(some: torch.Tensor) -> torch.Tensor:
        return (z - book.decode_from_codes(some)).double().square().sum((1, 2))[resolved.changed]

    assert (resolved.extra_distance > 0).all()
    torch.testing.assert_close(
        resolved.extra_distance, distance(resolved.codes) - distance(codes), rtol=1e-4, atol=1e-5
    )


def test_of_two_the_closer_stays_and_the_other_takes_the_cheapest_code_of_all() -> None:
    book, z, _ = crowded()
    z = z[:2]
    codes = book.cal_codes(z[:1]).expand(2, L, Q).clone()
    z[1] = z[0] + 0.001
    book_error = [(z[i] - book.decode_from_codes(codes)[i]).square().sum() for i in (0, 1)]
    leaver = int(book_error[1] > book_error[0])
    resolved = resolve_collisions(z, book, codes)
    assert resolved.changed.tolist() == [leaver]
    costs = {}
    for last in itertools.product(range(K), repeat=L):
        option = codes[:1].clone()
        option[0, :, -1] = torch.tensor(last)
        if not torch.equal(option, codes[:1]):
            costs[last] = float((z[leaver] - book.decode_from_codes(option)[0]).detach().double().square().sum())
    best = min(costs, key=costs.__getitem__)
    assert tuple(resolved.codes[leaver, :, -1].tolist()) == best
    assert (resolved.codes[leaver] != codes[leaver]).sum() == 1


def test_vectors_are_decoded_together_not_entity_by_entity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoding lays all codebooks end to end: one for each of many entities would take minutes."""
    book, z, codes = crowded()
    decode, sizes = book.decode_from_codes, []

    def counted(some: torch.Tensor, levels: int | None = None) -> torch.Tensor:
        sizes.append(len(some))
        return decode(some, levels)

    monkeypatch.setattr(book, "decode_from_codes", counted)
    assert len(resolve_collisions(z, book, codes).changed) > M // 2
    assert sizes == [M, M]


def test_distinct_codes_stay() -> None:
    book, z, codes = crowded()
    codes = resolve_collisions(z, book, codes).codes
    resolved = resolve_collisions(z, book, codes)
    assert torch.equal(resolved.codes, codes) and not len(resolved.changed) and not len(resolved.extra_distance)


def test_whose_move_is_cheapest_moves_first() -> None:
    """Codes 0, 1, 10 and entities 0.0, 0.2, 0.4: the last leaves for 1 (0.36 - 0.16), the second is left 10."""
    book = RQCodebook(3, 1, 1)
    with torch.no_grad():
        book.codes_of_level(0).copy_(torch.tensor([[0.0], [1.0], [10.0]]))
    z = torch.tensor([0.0, 0.2, 0.4]).view(3, 1, 1)
    resolved = resolve_collisions(z, book, book.cal_codes(z))
    assert resolved.codes.flatten().tolist() == [0, 2, 1] and resolved.changed.tolist() == [1, 2]
    torch.testing.assert_close(resolved.extra_distance, torch.tensor([9.8**2 - 0.04, 0.2]).double())


def test_codes_that_are_not_the_nearest_change_in_one_place_only() -> None:
    book, z, _ = crowded()
    far = torch.cdist(z[0], book.codes_of_level(1)).argmax(1)
    codes = torch.stack([torch.zeros_like(far), far], 1).expand(3, L, Q)
    resolved = resolve_collisions(z[:3] * 5, book, codes)
    assert (resolved.codes != codes).flatten(1).sum(1).tolist() in ([0, 1, 1], [1, 0, 1], [1, 1, 0])


def test_as_many_entities_as_codes_fit_and_one_more_does_not() -> None:
    book = RQCodebook(3, D, 1)
    z = torch.randn(1, L, D, generator=generator()).expand(10, L, D)
    full = resolve_collisions(z[:9], book, book.cal_codes(z[:9]))  # 3^2 codes
    assert collisions(full.codes) == 0 and len(full.changed) == 8
    with pytest.raises(TooFewCodes):
        resolve_collisions(z, book, book.cal_codes(z))
    with pytest.raises(ValueError):
        resolve_collisions(z[:9], book, book.cal_codes(z))


def test_picks_come_by_ascending_cost_each_once() -> None:
    extra = np.sort(np.random.default_rng(0).random((3, 4)), axis=1)
    extra[:, 0] = 0
    picks = list(_cheapest_first(extra))
    assert {ranks for _, ranks in picks} == set(itertools.product(range(4), repeat=3)) and len(picks) == 64
    assert all(cost == pytest.approx(extra[range(3), list(ranks)].sum()) for cost, ranks in picks)
    assert [cost for cost, _ in picks] == sorted(cost for cost, _ in picks)
