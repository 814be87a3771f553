"""The quantizers: search, losses and gradients, k-means, statistics; equality with vector-quantize-pytorch."""

import math

import pytest
import torch

from model import search
from model.quantizers import (
    QUANTIZERS,
    Quantizer,
    RQCodebook,
    code_perplexity,
    codebooks_of,
    collisions,
    entropy_bits,
)

B, L, D, K, Q = 40, 5, 12, 24, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(batch: int = B, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, L, D, generator=generator(100 + seed), dtype=dtype)  # no codebook's seed


def codebook(num_quantizers: int = Q, num_codes: int = K, beta: float = 0.25) -> RQCodebook:
    """Initialized random codebooks whose scale falls by level, as residuals do."""
    book, source = RQCodebook(num_codes, D, num_quantizers, beta), generator()
    with torch.no_grad():
        for level, weight in enumerate(book.parameters()):
            weight.copy_(torch.randn(num_codes, D, generator=source) * 0.7**level)
    book.initialized.fill_(True)
    return book


def weights(book: Quantizer) -> list[torch.Tensor]:
    return [book.codes_of_level(level) for level in range(book.num_quantizers)]


def brute_force(book: RQCodebook, z: torch.Tensor) -> torch.Tensor:
    """Nearest codes from float64 differences, the residual subtracted in the codebooks' own precision."""
    residual, columns = z.reshape(-1, z.shape[-1]), []
    for weight in weights(book):
        distance = (residual.double().unsqueeze(1) - weight.detach().double()).square().sum(2)
        columns.append(distance.argmin(1))
        residual = residual - weight.detach()[columns[-1]]
    return torch.stack(columns, 1).view(*z.shape[:2], -1)


# ---------------------------------------------------------------- surface and search


def test_surface() -> None:
    book = RQCodebook(K, D)
    assert (book.num_quantizers, book.beta, len(book.codebooks)) == (4, 0.25, 4)
    assert all(type(level) is torch.nn.Embedding and level.weight.shape == (K, D) for level in book.codebooks)
    z_q, codes, loss = book(vectors())
    assert z_q.shape == (B, L, D) and codes.shape == (B, L, 4) and loss.shape == ()
    assert codes.dtype == torch.int64 and codes.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_codes", [1, 5, 32, 33, 100])
def test_search_is_the_nearest_by_brute_force(num_codes: int, dtype: torch.dtype) -> None:
    book = codebook(num_codes=num_codes).to(dtype)
    z = vectors(200, dtype=dtype)
    torch.testing.assert_close(book.cal_codes(z), brute_force(book, z), rtol=0, atol=0)


def test_search_is_exact_where_float32_scores_are_not() -> None:
    """Codes 1e-3 apart at distance 1000 from 0: |c|^2 - 2 r.c in float32 cannot order them, the search must."""
    book = codebook(1)
    with torch.no_grad():
        weights(book)[0].copy_(1000 + 1e-3 * torch.randn(K, D, generator=generator(3)))
    z = 1000 + 1e-3 * vectors(50)
    expected = brute_force(book, z)
    weight, rows = weights(book)[0].detach(), z.reshape(-1, D)
    by_scores = (weight.square().sum(1) - 2 * rows @ weight.t()).argmin(1)
    assert (by_scores != expected.flatten()).float().mean() > 0.5  # the plain formula fails here
    torch.testing.assert_close(book.cal_codes(z), expected, rtol=0, atol=0)


def test_lower_index_wins_exact_ties() -> None:
    book = codebook(1)
    with torch.no_grad():
        weights(book)[0][K // 2 :] = weights(book)[0][: K // 2]
    codes = book.cal_codes(vectors(200))
    assert codes.max() < K // 2 and len(codes.unique()) > K // 4


def test_codes_depend_neither_on_chunks_nor_other_rows_nor_threads_nor_autocast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    book, z = codebook().eval(), vectors(300, seed=6)
    expected = book.cal_codes(z)
    order = torch.randperm(300, generator=generator())
    assert torch.equal(book.cal_codes(z[order]), expected[order])
    assert torch.equal(torch.cat([book.cal_codes(z[i : i + 1]) for i in range(60)]), expected[:60])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(book(z).all_indices, expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(book.cal_codes(z), expected)
    finally:
        torch.set_num_threads(threads)
    for size in (1, 7, 64, 299):
        monkeypatch.setitem(search.ROWS_AT_ONCE, "cpu", size)
        assert torch.equal(book.cal_codes(z), expected)


def test_search_is_exact_under_reduced_matmul_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a processor that rounds the inputs of products to bfloat16 if the precision in force allows it."""
    book, z = codebook(), vectors(200)
    expected, addmm = book.cal_codes(z), torch.addmm
    rounding = "always"

    def coarse(norms: torch.Tensor, rows: torch.Tensor, codes: torch.Tensor, **options: object) -> torch.Tensor:
        if rounding == "always" or torch.get_float32_matmul_precision() != "highest":
            rows, codes = rows.bfloat16().float(), codes.bfloat16().float()
        return addmm(norms, rows, codes, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "addmm", coarse)
    assert not torch.equal(book.cal_codes(z), expected)  # such rounding changes codes
    rounding = "where allowed"
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(book.cal_codes(z), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_indices_equal_vector_quantize_pytorch() -> None:
    library = pytest.importorskip("vector_quantize_pytorch")
    book, z = codebook().eval(), vectors(300)
    theirs = library.ResidualVQ(dim=D, num_quantizers=Q, codebook_size=K, shared_codebook=False).eval()
    with torch.no_grad():
        for layer, weight in zip(theirs.layers, weights(book), strict=True):
            layer._codebook.embed.copy_(weight.unsqueeze(0))
            layer._codebook.initted.fill_(True)
        z_q, indices, _ = theirs(z)
        ours = book(z)
    assert torch.equal(ours.all_indices, indices)
    torch.testing.assert_close(ours.z_q, z_q)
    assert len(indices.unique()) == K


# ---------------------------------------------------------------- the one value of z_q


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_quantizers", [1, Q])
def test_every_path_to_z_q_agrees_bitwise(num_quantizers: int, dtype: torch.dtype) -> None:
    book, z = codebook(num_quantizers).to(dtype), vectors(dtype=dtype)
    for mode in (True, False):
        book.train(mode)
        output = book(z.clone().requires_grad_())
        assert torch.equal(output.all_indices, book.cal_codes(z))
        assert torch.equal(output.z_q, book.decode_from_codes(book.cal_codes(z)))
        assert torch.equal(output.z_q, book.cal_code_emds(z))
    assert not torch.equal(output.z_q, z)


def test_given_codes_are_used_as_they_are() -> None:
    book, z = codebook(), vectors()
    found = book(z)
    again = book(z, found.all_indices)
    assert torch.equal(found.z_q, again.z_q) and torch.equal(found.total_loss, again.total_loss)
    other = torch.randint(K, (B, L, Q), generator=generator())
    output = book(z, other)
    assert torch.equal(output.all_indices, other) and torch.equal(output.z_q, book.decode_from_codes(other))
    assert output.total_loss > found.total_loss


def test_decode_by_levels() -> None:
    book = codebook()
    codes = torch.randint(K, (B, L, Q), generator=generator())
    w = weights(book)
    for levels in range(1, Q + 1):
        expected = w[0][codes[:, :, 0]]
        for level in range(1, levels):
            expected = expected + w[level][codes[:, :, level]]
        assert torch.equal(book.decode_from_codes(codes, levels=levels), expected)
    assert torch.equal(book.decode_from_codes(codes.to(torch.int16)), book.decode_from_codes(codes))
    assert book.decode_from_codes(codes[:0]).shape == (0, L, D)


# ---------------------------------------------------------------- loss and gradients


def test_loss_and_gradients_on_a_case_computed_by_hand() -> None:
    """z = 1.0; level 0 has codes 0 and 0.8, level 1 has codes 0 and 0.15. So r_0 = 1, c_0 = 0.8, r_1 = 0.2, c_1 = 0.15.

    Level 0: (1 - 0.8)^2 = 0.04; level 1: (0.2 - 0.15)^2 = 0.0025. Loss 1.25 * 0.0425.
    d/dz = 0.25 * 2 * (0.2 + 0.05); d/dc_0 = 2 * (0.8 - 1) = -0.4 and d/dc_1 = 2 * (0.15 - 0.2) = -0.1.
    """
    book = RQCodebook(2, 1, 2, beta=0.25).double().eval()
    first, second = weights(book)
    with torch.no_grad():
        first.copy_(torch.tensor([[0.0], [0.8]]).double())
        second.copy_(torch.tensor([[0.0], [0.15]]).double())
    z = torch.ones(1, 1, 1, dtype=torch.float64, requires_grad=True)
    output = book(z)
    assert output.all_indices.tolist() == [[[1, 1]]]
    output.total_loss.backward()
    for got, expected in [
        (output.z_q, [[[0.95]]]),
        (output.total_loss, 1.25 * 0.0425),
        (book.level_losses, [1.25 * 0.04, 1.25 * 0.0025]),
        (z.grad, [[[0.125]]]),
        (first.grad, [[0.0], [-0.4]]),
        (second.grad, [[0.0], [-0.1]]),
    ]:
        assert got is not None
        torch.testing.assert_close(got.detach(), torch.tensor(expected).double(), rtol=0, atol=1e-7)


def test_closed_form_losses_are_those_of_the_loop() -> None:
    """Values and gradients, under an own weight per level."""
    book, z = codebook().double(), vectors(dtype=torch.float64).requires_grad_()
    codes, found = book.cal_codes(z), []
    weight_of_level = torch.tensor([1.0, 3.0, 0.2]).double()
    for book.closed_form in (True, False):
        losses = book.losses(z, codes)
        found.append([losses, *torch.autograd.grad(losses @ weight_of_level, [z, *weights(book)])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
def test_gradients_equal_their_closed_forms(beta: float) -> None:
    """d loss / d z = beta 2/n sum over q of r_{q+1}; d loss / d c_q = 2/n sum over its rows of (c_q - r_q).

    n is the number of elements. The gradient of z_q goes to z unchanged, and not to the codes.
    """
    book = codebook(beta=beta).double()
    z = vectors(dtype=torch.float64).requires_grad_()
    direction = torch.randn(B, L, D, generator=generator(9), dtype=torch.float64)
    output = book(z)
    (3 * output.total_loss + (output.z_q * direction).sum()).backward()
    scale, residual, left = 3 * 2 / z.numel(), z.detach(), torch.zeros_like(z)
    for level, weight in enumerate(weights(book)):
        index = output.all_indices[:, :, level]
        residual = residual - weight.detach()[index]
        left = left + residual
        sums = torch.zeros(K, D).double().index_add_(0, index.flatten(), residual.view(-1, D))
        torch.testing.assert_close(weight.grad, -scale * sums)
    torch.testing.assert_close(z.grad, direction + beta * scale * left)


def test_z_without_gradient_and_in_bfloat16() -> None:
    book = codebook()
    book(vectors()).total_loss.backward()
    assert all(w.grad is not None and w.grad.any() for w in weights(book))
    z = vectors().bfloat16().requires_grad_()
    output = book(z)
    (output.total_loss + output.z_q.sum()).backward()
    assert output.z_q.dtype == torch.float32 and z.grad is not None and z.grad.dtype == torch.bfloat16


# ---------------------------------------------------------------- initialization


def structured(batch: int = 400, seed: int = 0) -> torch.Tensor:
    """Clusters within clusters, so that later levels have something to find."""
    source = generator(seed)
    coarse, fine = torch.randn(16, D, generator=source) * 4, torch.randn(16, D, generator=source)
    pick = torch.randint(16, (2, batch, L), generator=source)
    return coarse[pick[0]] + fine[pick[1]] + 0.05 * torch.randn(batch, L, D, generator=source)


def used_codes(codes: torch.Tensor) -> list[int]:
    """Number of different codes per level of codes [M, L, Q]."""
    return [len(level.unique()) for level in codes.flatten(0, 1).t()]


def test_kmeans_error_falls_with_levels_and_beats_random_rows() -> None:
    book, z = RQCodebook(K, D, Q), structured()
    book.init_from_data(z, generator=generator())
    codes = book.cal_codes(z)
    errors = [float((z - book.decode_from_codes(codes, n)).detach().square().mean()) for n in range(1, Q + 1)]
    assert float(z.var()) > 2 * errors[0] and errors[0] > 2 * errors[1] > 2 * errors[2]
    rows = z.view(-1, D)
    starts = search.kmeans(rows, K, 0, generator())
    assert errors[0] < 0.9 * float((rows - starts[search.nearest_codes(rows, [starts])[:, 0]]).square().mean())
    assert used_codes(codes) == [K] * Q


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_separated_clusters_exactly(seed: int) -> None:
    """8 far clusters and K = 8: the codes are the clusters' means, from any seed."""
    source = generator(1)
    label = torch.arange(8).repeat_interleave(50)
    rows = (torch.randn(8, D, generator=source) * 100)[label] + torch.randn(400, D, generator=source)
    means = torch.stack([rows[label == k].mean(0) for k in range(8)])
    book = RQCodebook(8, D, 1)
    book.init_from_data(rows.view(1, 400, D), generator=generator(seed))
    found = weights(book)[0].detach()
    torch.testing.assert_close(found[found[:, 0].argsort()], means[means[:, 0].argsort()])


def test_a_weight_counts_like_equal_rows() -> None:
    """Every cluster's center is the mean of its rows, each repeated as often as its weight says."""
    source = generator(3)
    rows, often = torch.randn(200, D, generator=source), torch.randint(1, 6, (200,), generator=source)
    centers = search.kmeans(rows, 8, 30, generator(0), weights=often.float())
    codes = search.nearest_codes(rows, [centers])[:, 0]
    means = [rows[codes == k].repeat_interleave(often[codes == k], 0).mean(0) for k in range(8)]
    torch.testing.assert_close(centers, torch.stack(means), rtol=1e-4, atol=1e-4)

    def error(found: torch.Tensor) -> float:
        rest = rows - found[search.nearest_codes(rows, [found])[:, 0]]
        return float((often * rest.square().sum(1)).sum())

    plain = [error(search.kmeans(rows, 8, 30, generator(seed))) for seed in range(8)]
    weighted = [error(search.kmeans(rows, 8, 30, generator(seed), often.float())) for seed in range(8)]
    assert sum(weighted) < sum(plain)


def test_heavy_entities_are_quantized_better() -> None:
    z, heavy = torch.randn(400, 1, D, generator=generator(4)), torch.arange(400) < 40

    def error(weights: torch.Tensor | None) -> float:
        book = RQCodebook(32, D, 1)
        book.init_from_data(z, generator=generator(), weights=weights)
        return float((book.cal_code_emds(z) - z)[heavy].square().mean())

    assert error(torch.where(heavy, 50.0, 1.0)) < 0.7 * error(None)


def test_rows_without_structure_use_all_codes() -> None:
    """In many dimensions plain k-means ends in one large cluster and many of one row each."""
    rows = torch.randn(1000, 64, generator=generator(5))
    codes = search.nearest_codes(rows, [search.kmeans(rows, 50, generator=generator())])[:, 0]
    shares = torch.bincount(codes, minlength=50) / 1000
    assert float((-(shares * (shares + 1e-9).log()).sum()).exp()) > 40  # perplexity


def test_kmeans_restarts_empty_clusters() -> None:
    """64 points, 20 times each: drawing several starts at once selects some point twice, so a cluster stays empty."""
    points = torch.randn(64, D, generator=generator(2))
    rows = points.repeat(20, 1)
    starts, centers = (search.kmeans(rows, 64, iterations, generator(0)) for iterations in (0, 10))
    assert len(search.nearest_codes(rows, [starts]).unique()) < 64
    found = search.nearest_codes(rows, [centers])[:, 0]
    assert len(found.unique()) == 64
    torch.testing.assert_close(centers[found], rows)


def test_equal_seeds_give_equal_codebooks() -> None:
    def trained(seed: int) -> RQCodebook:
        torch.manual_seed(0)
        book, z = RQCodebook(K, D, Q), structured().requires_grad_()
        book.init_from_data(z, generator=generator(seed))
        optimizer = torch.optim.Adam(book.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            book(z).total_loss.backward()
            optimizer.step()
        book.revive_dead_codes(z, book.cal_codes(z), generator(seed))
        return book

    first, second, other = (trained(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_initialized_once_in_training_and_never_after_a_reload() -> None:
    book, z = RQCodebook(K, D, Q), structured()
    book.eval()(z)
    assert not book.initialized  # evaluation does not change the codebooks
    book.train()(z)
    assert book.initialized
    loaded = RQCodebook(K, D, Q)
    loaded.load_state_dict(book.state_dict())
    loaded(structured(seed=8))
    assert all(torch.equal(a, b) for a, b in zip(weights(book), weights(loaded), strict=True))


@pytest.mark.parametrize("rows", [1, 3])
def test_init_from_fewer_rows_than_codes(rows: int) -> None:
    book, z = RQCodebook(K, D, 2), vectors(1)[:, :rows]
    book.init_from_data(z)
    assert all(weight.isfinite().all() for weight in weights(book))
    torch.testing.assert_close(book.cal_code_emds(z), z)


# ---------------------------------------------------------------- unused codes


def test_revival_uses_more_codes_and_lowers_the_error() -> None:
    book, z = codebook(), structured()
    with torch.no_grad():
        for weight in weights(book):
            weight[3:] += 1000  # beyond all data: dead
    codes = book.cal_codes(z)
    before = [w.clone() for w in weights(book)]
    assert max(used_codes(codes)) <= 3
    revived = book.revive_dead_codes(z, codes, generator())
    assert revived == [int(K - len(codes[:, :, q].unique())) for q in range(Q)]
    for q, (old, new) in enumerate(zip(before, weights(book), strict=True)):
        used = codes[:, :, q].unique()
        assert torch.equal(old[used], new[used])
    after = book.cal_codes(z)
    assert used_codes(after)[0] == K and all(
        new > 2 * old for new, old in zip(used_codes(after), used_codes(codes), strict=True)
    )
    assert (z - book.decode_from_codes(after)).square().mean() < 0.5 * (
        z - book.decode_from_codes(codes)
    ).square().mean()


def test_new_codes_are_residuals_of_their_level() -> None:
    book, z = codebook(), vectors()
    codes = book.cal_codes(z).clamp_max(K - 4)  # the last 3 of every level are unused
    old = [w.clone() for w in weights(book)]
    book.revive_dead_codes(z, codes, generator())
    residual = z.view(-1, D)
    for q in range(Q):
        fresh = weights(book)[q][K - 3 :]
        assert torch.cdist(fresh, residual, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max() == 0
        residual = residual - old[q][codes[:, :, q].flatten()]


def test_equal_rows_give_one_new_code_and_exact_codes_none() -> None:
    codes = torch.zeros(B, L, 1, dtype=torch.int64)
    same = vectors(1)[:, :1].expand(B, L, D)
    assert codebook(1).revive_dead_codes(same, codes) == [1]
    exact = codebook(1)
    assert exact.revive_dead_codes(exact.decode_from_codes(codes), codes) == [0]


# ---------------------------------------------------------------- all quantizers


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_trains_by_the_same_calls(name: str) -> None:
    """The calls of the trainer, in its order; the loss falls, the codes decode to z_q, and a reload gives the same."""
    torch.manual_seed(0)
    z, levels = structured(), 1 if name == "vq" else Q
    made = [QUANTIZERS[name](K, D, levels) for _ in range(2)]
    book = made[0]
    book.init_from_data(z, generator=generator())
    codes = book.cal_codes(z)
    assert codes.shape == (400, L, levels) and codes.dtype == torch.int64
    optimizer, losses = torch.optim.Adam(book.parameters(), 0.05), []
    for _ in range(20):
        optimizer.zero_grad()
        output = book(z.requires_grad_(), codes)
        output.total_loss.backward()
        optimizer.step()
        losses.append(float(output.total_loss.detach()))
    assert losses[-1] < losses[0] and float(book.level_losses.sum()) == pytest.approx(losses[-1])
    assert torch.equal(book(z, codes).z_q, book.decode_from_codes(codes))
    revived = book.revive_dead_codes(z.detach(), codes, generator())
    assert len(revived) == levels and (name != "random" or torch.equal(book.cal_codes(z), codes))
    made[1].load_state_dict(book.state_dict())
    assert torch.equal(made[1].cal_codes(z), book.cal_codes(z))
    assert torch.equal(codebooks_of({f"a.b.{k}": v for k, v in book.state_dict().items()}), torch.stack(weights(book)))


def test_random_codes_do_not_depend_on_z() -> None:
    book, z = QUANTIZERS["random"](K, D, Q), vectors()
    book.init_from_data(z, generator=generator(1))
    codes = book.cal_codes(z)
    assert torch.equal(book.cal_codes(vectors(seed=1)), codes) and codes.unique().tolist() == list(range(K))
    other = QUANTIZERS["random"](K, D, Q)
    other.init_from_data(z, generator=generator(2))
    assert not torch.equal(other.cal_codes(z), codes)


def test_states_without_whole_codebooks_are_rejected() -> None:
    state = codebook().state_dict()
    del state["codebooks.1.weight"]
    for bad in ({}, state, state | {"codebooks.1.weight": torch.zeros(K, D + 1)}):
        with pytest.raises(ValueError):
            codebooks_of(bad)


# ---------------------------------------------------------------- statistics


def test_statistics_by_hand() -> None:
    codes = torch.tensor([[[0, 1]], [[0, 1]], [[1, 1]], [[2, 1]]])  # M = 4, L = 1, Q = 2
    torch.testing.assert_close(code_perplexity(codes, 4), torch.tensor([2**1.5, 1.0]).double())
    assert entropy_bits(codes) == pytest.approx(1.5) and collisions(codes) == 2
    every = torch.arange(8).view(8, 1, 1)
    assert entropy_bits(every) == pytest.approx(math.log2(8)) and collisions(every) == 0
    assert code_perplexity(every, 8).item() == pytest.approx(8)
    assert collisions(codes[:, :, 1]) == 4  # VQ's [M, L]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "options"),
    [("rq", {"num_codes": 0}), ("rq", {"num_quantizers": 0}), ("rq", {"latent_dim": 0}), ("vq", {"num_quantizers": 2})],
)
def test_bad_sizes_are_rejected(name: str, options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        QUANTIZERS[name](**{"num_codes": K, "latent_dim": D, **options})


def test_bad_tensors_are_rejected() -> None:
    book, z = codebook(), vectors()
    good = torch.zeros(B, L, Q, dtype=torch.int64)
    for bad in (good - 1, good + K, good.float(), good.bool(), good[:, :, 1:], good[0]):
        with pytest.raises(ValueError):
            book.decode_from_codes(bad)
        with pytest.raises(ValueError):
            book(z, bad)
    with pytest.raises(ValueError):
        book(z, good[:1])
    for bad in (z[0], z[:, :, 1:], z[:0]):
        with pytest.raises(ValueError):
            book(bad)
    for levels in (0, Q + 1):
        with pytest.raises(ValueError):
            book.decode_from_codes(good, levels)
    with pytest.raises(ValueError):  # not initialized
        RQCodebook(K, D)(z, torch.zeros(B, L, 4, dtype=torch.int64))


def test_a_nan_in_z_reaches_the_loss_and_nothing_else() -> None:
    book, z = codebook(), vectors()
    expected = book.cal_codes(z)
    for value in (torch.nan, torch.inf):
        z[0, 0, 0] = value
        output = book(z)
        assert not output.total_loss.isfinite()
        assert torch.equal(output.all_indices.flatten(0, 1)[1:], expected.flatten(0, 1)[1:])
