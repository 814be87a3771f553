"""Residual quantization (Eq. 3-5 of SSQR, one codebook per residual level): vectors -> codes -> vectors.

Level q matches its residual r_q to the nearest of its K codes c_q (Eq. 3) and hands the rest on:

    r_0 = z,   r_{q+1} = r_q - sg[c_q],   z_q = c_0 + c_1 + ... + c_{Q-1}
    loss = sum over q of  mean (sg[r_q] - c_q)^2  +  beta * mean (r_q - sg[c_q])^2             (Eq. 5)

mean is over elements, sg stops the gradient. What each gradient reaches follows from the sg in r_{q+1}:

    d loss / d z   = beta * 2/n * sum over q of r_{q+1}     the commitment terms alone, each level's own error once
    d loss / d c_q = 2/n * (c_q - r_q), summed per code     the codebook term alone; nothing from deeper levels
    d z_q / d z    = identity (straight-through);  d z_q / d c = 0

Both loss gradients are sums of residuals, so one pass over the data yields values, gradients and the statistics
that EMA needs; no autograd graph of size Q * n is kept.

With one level (Q = 1) this is SSQR's VQ. The letters M L D K Q B are those of docs/ARCHITECTURE.md; D here is the
codes' own width (code_dim).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.data_parallel import World
from model.precision import FULL, matmul_precision

LANES = 32  # scores are reduced as [rows, K / LANES, LANES]: torch's amin over the middle axis is vectorized


class RQOutput(NamedTuple):
    """What ``RQCodebook.forward`` returns."""

    z_q: Tensor  # [B, L, D], the decoded codes bit for bit, in training too; its gradient goes straight to z
    all_indices: Tensor  # int64 [B, L, Q]
    total_loss: Tensor  # scalar, summed over levels


class RQCodebook(nn.Module):
    """Q codebooks of K codes each, shared by the L positions.

    num_codes: K; latent_dim: D; num_quantizers: Q; beta: weight of the commitment term.
    chunk_size: rows searched at a time, which bounds the search's memory to chunk_size * K floats (ties aside); None
      means 1024 rows on CPU (the scores stay in cache) and 32768 elsewhere. It never changes a result.
    ema_decay: None trains the codes by the codebook term; a value in [0, 1) drops that term, and every training
      forward moves each code towards the mean of its residuals instead (van den Oord et al. 2017, appendix A.1).
    revive_after: calls of ``revive_dead_codes`` in a row that must find a code unused before it is replaced.
    kmeans_init: start from ``init_from_data`` at the first training forward (or call it before).
    world (an attribute): the processes that share the work. ``cal_codes``, ``init_from_data`` and ``revive_dead_codes``
      take the same z in every process and share out the search; ``forward`` takes each process's own rows of z.

    Buffers: ``initialized`` bool [Q]; ``usage`` int64 [Q, K], the assignments seen by training forwards since it was
    last zeroed (``revive_dead_codes`` does); ``idle`` int64 [Q, K], refreshes since a code was used; ``ema_count``
    [Q, K]; ``level_losses`` [Q], each level's share of the last forward's loss (not saved).
    """

    initialized: Tensor
    usage: Tensor
    idle: Tensor
    ema_count: Tensor
    level_losses: Tensor

    def __init__(
        self,
        num_codes: int,
        latent_dim: int,
        num_quantizers: int = 4,
        beta: float = 0.25,
        *,
        chunk_size: int | None = None,
        ema_decay: float | None = None,
        revive_after: int = 1,
        kmeans_init: bool = True,
    ) -> None:
        super().__init__()
        for name, value in [
            ("num_codes", num_codes),
            ("latent_dim", latent_dim),
            ("num_quantizers", num_quantizers),
            ("chunk_size", 1 if chunk_size is None else chunk_size),
            ("revive_after", revive_after),
        ]:
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1) or None, not {ema_decay}")
        self.num_codes, self.latent_dim, self.num_quantizers = num_codes, latent_dim, num_quantizers
        self.beta, self.chunk_size = beta, chunk_size
        self.world = World()
        self.ema_decay, self.revive_after = ema_decay, revive_after
        self.codebooks = nn.ModuleList(nn.Embedding(num_codes, latent_dim) for _ in range(num_quantizers))
        for weight in self._weights():
            nn.init.normal_(weight, std=latent_dim**-0.5)
            weight.requires_grad_(ema_decay is None)
        shape = (num_quantizers, num_codes)
        self.register_buffer("initialized", torch.full((num_quantizers,), not kmeans_init))
        self.register_buffer("usage", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("idle", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("ema_count", torch.ones(shape))
        self.register_buffer("level_losses", torch.zeros(num_quantizers), persistent=False)

    # ------------------------------------------------------------ vectors -> codes -> vectors

    def forward(self, z: Tensor, codes: Tensor | None = None) -> RQOutput:
        """z [B, L, D] -> (z_q [B, L, D], all_indices int64 [B, L, Q], total_loss scalar).

        codes [B, L, Q]: use these assignments and skip the search (a trainer may refresh them every few steps).
        Raises ValueError for wrong shapes or codes out of range, and for given codes in training before the
        codebooks are initialized.
        """
        rows = self._rows(z)  # [N, D], N = B * L
        values = rows.detach()
        if self.training and not bool(self.initialized.all()):
            if codes is not None:
                raise ValueError("codes were given to codebooks that hold no data yet: call init_from_data(z) first")
            self.init_from_data(z)
        flat = self._search(values) if codes is None else self._flat_codes(codes, z)  # [N, Q]
        weights = self._weights()
        learns = self.ema_decay is None
        quantized, errors, left, code_sums = self._measure(values, flat)
        self.level_losses = (self.beta + learns) * errors
        z_q, total_loss = _WithGradients.apply(
            rows,
            quantized,
            self.level_losses.sum(),
            left,
            code_sums,
            (2 * self.beta / rows.numel(), -2 * learns / rows.numel()),
            *weights,
        )
        if self.training:
            self._observe(flat, code_sums)
        return RQOutput(z_q.view(z.shape), flat.view(*z.shape[:2], -1), total_loss)

    @torch.no_grad()
    def cal_codes(self, z: Tensor) -> Tensor:
        """z [B, L, D] -> int64 [B, L, Q]: the nearest code of every residual, the lower index on a tie."""
        rows, world = self._rows(z), self.world
        return world.gather(self._search(world.own(rows)), len(rows)).view(*z.shape[:2], -1)

    @torch.no_grad()
    def cal_code_emds(self, z: Tensor) -> Tensor:
        """z [B, L, D] -> [B, L, D]: the decoded codes of z, equal to ``decode_from_codes(cal_codes(z))``."""
        return self.decode_from_codes(self.cal_codes(z))

    def decode_from_codes(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """codes [B, L, Q] -> [B, L, D]: the sum of the first ``levels`` levels' codes (Q by default).

        Raises ValueError for another shape, a type that is no integer, an index outside [0, K), levels outside [1, Q].
        """
        levels = self.num_quantizers if levels is None else levels
        if not 1 <= levels <= self.num_quantizers:
            raise ValueError(f"levels must be in [1, {self.num_quantizers}], not {levels}")
        flat, weights = self._flat_codes(codes)[:, :levels], self._weights()[:levels]
        first = torch.arange(levels, device=flat.device) * self.num_codes  # rows of the books end to end
        books = torch.cat(weights).to(_sum_dtype(weights[0]))
        # one pass that sums level after level, where a sum of Q lookups would write [B * L, D] numbers Q times over
        total = nn.functional.embedding_bag(flat + first, books, mode="sum").to(weights[0].dtype)
        return total.view(*codes.shape[:2], self.latent_dim)

    # ------------------------------------------------------------ initialization and upkeep

    @torch.no_grad()
    def init_from_data(
        self, z: Tensor, iterations: int = 10, generator: torch.Generator | None = None, sample: int | None = None
    ) -> None:
        """Residual k-means, level after level, on z [B, L, D]; marks every level initialized.

        sample: rows of z to run on (64 * K by default), drawn once for all levels. generator: of the draws
        (torch's global one by default); equal generators give equal codebooks. Clusters that run empty are re-seeded.
        """
        rows = self._rows(z)
        residual = rows[_permutation(len(rows), generator)[: sample or 64 * self.num_codes].to(rows.device)]
        for level, weight in enumerate(self._weights()):
            chunk = self._chunk(residual)
            weight.copy_(_kmeans(residual, self.num_codes, iterations, chunk, generator, self.world))
            codes = _nearest_shared(residual, weight, chunk, self.world)
            residual = residual - weight[codes]
            counts = torch.bincount(codes, minlength=self.num_codes) * (len(rows) / len(residual))
            self.ema_count[level] = counts.clamp_min(1)
        self.initialized.fill_(True)
        self.usage.zero_()
        self.idle.zero_()
        self.world.copy_from_first([*self._weights(), self.ema_count])  # a GPU's sums differ in their last bits

    @torch.no_grad()
    def revive_dead_codes(self, z: Tensor, codes: Tensor, generator: torch.Generator | None = None) -> list[int]:
        """Replace codes that the full assignment ``codes`` [M, L, Q] of z [M, L, D] leaves unused; how many per level.

        A dead code becomes the residual of a row drawn with probability proportional to its squared error at that level
        (k-means++'s rule): the new code serves the row it was drawn from exactly, and lands where the level is worst,
        in proportion, which neither copies outliers only (largest error) nor ignores error (split the fullest code).
        Under ``codes`` the dead codes carry nothing, so no other level's residual moves. Equal rows revive one code.
        Its EMA count restarts at 1, so that its first own data dominate it. Starts a new count in ``usage``.
        """
        residual = self._rows(z)
        revived = []
        for level, (weight, column) in enumerate(zip(self._weights(), self._flat_codes(codes, z).t(), strict=True)):
            used = torch.bincount(column, minlength=self.num_codes) > 0
            self.idle[level] = (self.idle[level] + 1).masked_fill(used, 0)
            dead = (self.idle[level] >= self.revive_after).nonzero().squeeze(1)
            rest = residual - weight[column]
            fresh = residual[_draw(rest.square().sum(1), len(dead), generator)].unique(dim=0)
            dead = dead[: len(fresh)]
            weight[dead], self.ema_count[level, dead], self.idle[level, dead] = fresh, 1, 0
            revived.append(len(dead))
            residual = rest
        self.usage.zero_()
        self.world.copy_from_first([*self._weights(), self.ema_count, self.idle])
        return revived

    def random_codes(self, rows: int, seq_len: int, generator: torch.Generator | None = None) -> Tensor:
        """int64 [rows, L, Q] drawn uniformly: the baseline of codes that know nothing (RandomEQ, Li et al. 2023)."""
        shape = (rows, seq_len, self.num_quantizers)
        return torch.randint(self.num_codes, shape, generator=generator)

    def _observe(self, codes: Tensor, code_sums: Tensor) -> None:
        """Take in one training batch's statistics: codes [N, Q], code_sums [Q, K, D] of ``_measure``.

        The only place where they enter; of several processes, each brings its rows' and all take in the sums.
        EMA keeps N_k <- d N_k + (1-d) n_k and S_k likewise, with c_k = S_k / N_k. Writing S_k = N_k c_k gives
        c_k <- c_k + (1-d) (sum of r - c_k) / N_k: no second buffer that could fall out of step with the codes.
        """
        counts = torch.stack([torch.bincount(column, minlength=self.num_codes) for column in codes.t()])
        counts = self.world.sum(counts)
        self.usage += counts
        if self.ema_decay is None:
            return
        code_sums = self.world.sum(code_sums)
        fresh = 1 - self.ema_decay
        self.ema_count.mul_(self.ema_decay).add_(counts, alpha=fresh)
        # a code without rows in this batch has a sum of 0 and stays; its count may decay to 0
        steps = fresh * code_sums / self.ema_count.clamp_min(torch.finfo(code_sums.dtype).tiny).unsqueeze(2)
        for weight, step in zip(self._weights(), steps, strict=True):
            weight.data.add_(step)

    # ------------------------------------------------------------ parts

    def _weights(self) -> list[Tensor]:
        return [book.weight for book in self.codebooks]  # type: ignore[misc]

    def _rows(self, z: Tensor) -> Tensor:
        """[B, L, D] -> [B * L, D] in the codebooks' precision."""
        if z.ndim != 3 or z.shape[2] != self.latent_dim:
            raise ValueError(f"z must be [B, L, {self.latent_dim}], not {list(z.shape)}")
        if not z.numel():
            raise ValueError(f"z is empty: {list(z.shape)}")
        return z.reshape(-1, self.latent_dim).to(self._weights()[0].dtype)

    def _flat_codes(self, codes: Tensor, z: Tensor | None = None) -> Tensor:
        """[B, L, Q] -> checked int64 [B * L, Q]."""
        wanted = ["B", "L", self.num_quantizers] if z is None else [*z.shape[:2], self.num_quantizers]
        fits = (
            codes.ndim == 3 and codes.shape[2] == self.num_quantizers and (z is None or codes.shape[:2] == z.shape[:2])
        )
        if not fits:
            raise ValueError(f"codes must be {wanted}, not {list(codes.shape)}")
        if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers, not {codes.dtype}")
        flat = codes.reshape(-1, self.num_quantizers).long()
        if flat.numel():
            low, high = (int(end) for end in flat.aminmax())
            if low < 0 or high >= self.num_codes:
                raise ValueError(f"codes must be in [0, {self.num_codes}), found {low} to {high}")
        return flat

    def _chunk(self, rows: Tensor) -> int:
        return self.chunk_size or (1024 if rows.device.type == "cpu" else 32768)

    @torch.no_grad()
    def _search(self, rows: Tensor) -> Tensor:
        return _nearest(rows, self._weights(), self._chunk(rows))

    @torch.no_grad()
    def _measure(self, rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """rows [N, D], codes [N, Q] -> the decoded codes [N, D]; mean squared error [Q] after each level; the sum over
        levels of what is left, r_{q+1} [N, D]; and per code, the sum over its rows of r_q - c_q [Q, K, D].
        """
        residual, left = rows.clone(), torch.zeros_like(rows)
        quantized = torch.zeros_like(rows, dtype=_sum_dtype(rows))
        errors = rows.new_empty(self.num_quantizers)
        sums = rows.new_zeros(self.num_quantizers, self.num_codes, self.latent_dim)
        for level, (weight, column) in enumerate(zip(self._weights(), codes.t().contiguous(), strict=True)):
            chosen = weight.index_select(0, column)
            quantized += chosen
            residual -= chosen
            left += residual
            errors[level] = torch.linalg.vector_norm(residual).square() / rows.numel()
            sums[level].index_add_(0, column, residual)
        return quantized.to(rows.dtype), errors, left, sums


def _sum_dtype(like: Tensor) -> torch.dtype:
    """Of sums and distances: float32 at least, so that z_q is rounded once, the same by every path."""
    return torch.promote_types(like.dtype, torch.float32)


class _WithGradients(torch.autograd.Function):
    """(z_q, loss) as computed, with their gradients in closed form (this file's head)."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        quantized: Tensor,
        loss: Tensor,
        left: Tensor,
        code_sums: Tensor,
        scales: tuple[float, float],
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.scales = scales
        ctx.save_for_backward(left, code_sums)
        return quantized.view_as(quantized), loss.view_as(loss)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_quantized: Tensor, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        left, code_sums = ctx.saved_tensors
        z_scale, code_scale = (d_loss * scale for scale in ctx.scales)
        d_rows = torch.addcmul(d_quantized, left, z_scale) if ctx.needs_input_grad[0] else None
        wanted = ctx.needs_input_grad[-len(code_sums) :]
        d_weights = [code_scale * total if wants else None for total, wants in zip(code_sums, wanted, strict=True)]
        return d_rows, None, None, None, None, None, *d_weights


# ---------------------------------------------------------------- nearest codes


class _Table(NamedTuple):
    """One codebook laid out for the search, K padded to a multiple of LANES by codes at infinite distance."""

    codes: Tensor  # [K', D]
    transposed: Tensor  # [D, K'], contiguous
    norms: Tensor  # [K'], |c|^2, infinite at the padding
    reach: float  # the longest code's length

    @classmethod
    def of(cls, weight: Tensor) -> _Table:
        padding = -len(weight) % LANES
        squares = weight.double().square().sum(1)
        codes = nn.functional.pad(weight, (0, 0, 0, padding))
        norms = nn.functional.pad(squares, (0, padding), value=torch.inf).to(weight.dtype)
        return cls(codes, codes.t().contiguous(), norms, float(squares.max().sqrt()))


def _nearest(rows: Tensor, weights: list[Tensor], chunk: int) -> Tensor:
    """rows [N, D] -> int64 [N, Q]: per level the nearest code of the residual (Eq. 3), the lower index on a tie.

    Independent of chunk, threads and BLAS: see ``_nearest_in_chunk``. Distances are float32 at least, under autocast
    too, which leaves products with a given output alone.
    """
    wide = _sum_dtype(rows)
    weights = [weight.to(wide) for weight in weights]
    tables = [_Table.of(weight) for weight in weights]
    found = rows.new_empty(len(weights), len(rows), dtype=torch.int64)
    scratch = rows.new_empty(min(chunk, len(rows)), len(tables[0].codes), dtype=wide)
    with matmul_precision(FULL):  # the rounding bound below is float32's
        for start in range(0, len(rows), chunk):  # all levels of a chunk while it is in cache
            residual = rows[start : start + chunk].to(wide, copy=True)
            for level, table in enumerate(tables):
                codes = _nearest_in_chunk(residual, table, scratch[: len(residual)])
                found[level, start : start + chunk] = codes.clamp_max_(len(weights[level]) - 1)  # NaN rows only
                residual -= table.codes.index_select(0, codes)
    return found.t().contiguous()


def _nearest_in_chunk(rows: Tensor, table: _Table, scores: Tensor) -> Tensor:
    """rows [n, D] -> int64 [n]; ``scores`` [n, K'] is overwritten.

    |c|^2 - 2 r.c by one matrix product, whose last bits depend on its shape and library. Rows whose runner-up lies
    within the product's worst rounding error are therefore settled among the codes in question by float64 distances.
    """
    n, width = rows.shape
    torch.addmm(table.norms, rows, table.transposed, alpha=-2, out=scores)
    folded = scores.view(n, -1, LANES)
    # argmin over K is ten times slower than amin: find the winning lane, then the winner in it
    lanes = folded.amin(1)  # [n, LANES]
    best, lane = lanes.min(1)
    slots = folded.gather(2, lane.view(n, 1, 1).expand(-1, folded.shape[1], 1)).squeeze(2)  # [n, K' / LANES]
    slot = slots.argmin(1)
    codes = slot * LANES + lane

    lanes.scatter_(1, lane.unsqueeze(1), torch.inf)
    slots.scatter_(1, slot.unsqueeze(1), torch.inf)
    runner_up = torch.minimum(lanes.amin(1), slots.amin(1))
    slack = (width + 4) * torch.finfo(rows.dtype).eps
    limit = best + slack * table.reach * (table.reach + 2 * torch.linalg.vector_norm(rows, dim=1))
    unsure = (runner_up <= limit).nonzero().squeeze(1)
    if len(unsure):
        row, code = (scores[unsure] <= limit[unsure].unsqueeze(1)).nonzero(as_tuple=True)  # sorted by row, then code
        # pairs at a time, so that their differences fit the scratch's size
        budget = max(1, scores.numel() // (2 * width))
        exact = torch.cat(
            [
                (rows[unsure[r]].double() - table.codes[c].double()).square().sum(1)
                for r, c in zip(row.split(budget), code.split(budget), strict=True)
            ]
        )
        least = exact.new_full((len(unsure),), torch.inf).scatter_reduce_(0, row, exact, "amin")
        wins = exact == least[row]
        codes[unsure] = codes[unsure].fill_(len(table.codes)).scatter_reduce_(0, row[wins], code[wins], "amin")
    return codes


# ---------------------------------------------------------------- k-means


def _nearest_shared(rows: Tensor, weight: Tensor, chunk: int, world: World) -> Tensor:
    """rows [n, D], the same in every process -> int64 [n], the nearest codes; each process searches its part."""
    return world.gather(_nearest(world.own(rows), [weight], chunk)[:, 0], len(rows))


def _kmeans(
    rows: Tensor, k: int, iterations: int, chunk: int, generator: torch.Generator | None, world: World
) -> Tensor:
    """rows [n, D] -> centers [k, D]: k-means++ starts, then Lloyd's iterations; empty clusters restart by ``_draw``.

    The starts are drawn a quarter of their number at a time: one by one for few, in ~30 rounds for 1024.
    """
    fresh = centers = rows[_permutation(len(rows), generator)[:1].to(rows.device)]
    errors = rows.new_full((len(rows),), torch.inf)
    while len(centers) < k:
        rest = rows - fresh[_nearest_shared(rows, fresh, chunk, world)]
        errors = torch.minimum(errors, rest.square().sum(1))
        fresh = rows[_draw(errors, min(k - len(centers), max(1, len(centers) // 4)), generator)]
        if not len(fresh):  # fewer distinct rows than centers: the rest stay doubles, which no row chooses
            fresh = centers[:1].expand(k - len(centers), -1)
        centers = torch.cat([centers, fresh])
    for _ in range(iterations):
        codes = _nearest_shared(rows, centers, chunk, world)
        counts = torch.bincount(codes, minlength=k)
        rest = rows - centers[codes]
        # centers + mean(rest), not a mean of sums: adding small differences loses fewer bits
        centers = centers + torch.zeros_like(centers).index_add_(0, codes, rest) / counts.clamp_min(1).unsqueeze(1)
        empty = (counts == 0).nonzero().squeeze(1)
        picks = _draw(rest.square().sum(1), len(empty), generator)
        centers[empty[: len(picks)]] = rows[picks]
    return centers


def _permutation(n: int, generator: torch.Generator | None) -> Tensor:
    return torch.randperm(n, generator=generator, device=generator.device if generator else "cpu")


def _draw(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """int64 [<= count]: distinct rows, drawn in proportion to weights [n] >= 0; never one of weight 0.

    The largest w / Exp(1) are such a sample (Efraimidis and Spirakis 2006); any n, unlike torch.multinomial.
    """
    if not count:
        return weights.new_empty(0, dtype=torch.int64)
    noise = torch.empty(len(weights), dtype=torch.float64, device=generator.device if generator else "cpu")
    keys = weights.double() / noise.exponential_(generator=generator).to(weights.device)
    return keys.topk(min(count, int((weights > 0).sum()))).indices


# ---------------------------------------------------------------- what codes tell


def code_usage(codes: Tensor, num_codes: int) -> Tensor:
    """codes [..., Q] -> float64 [Q]: the fraction of the K codes that occur at each level."""
    return (_counts(codes, num_codes) > 0).double().mean(1)


def code_perplexity(codes: Tensor, num_codes: int) -> Tensor:
    """codes [..., Q] -> float64 [Q]: exp of the entropy of each level's codes; K when all occur equally often."""
    shares = _counts(codes, num_codes).double()
    shares /= shares.sum(1, keepdim=True)
    return torch.special.entr(shares).sum(1).exp()


def entropy_bits(codes: Tensor) -> float:
    """codes [M, L, Q] (or [M, L]) -> -sum p log2 p over whole-entity codes (Eq. 11), in bits; log2 M if all differ."""
    shares = _whole_code_counts(codes).double() / max(len(codes), 1)
    return float(torch.special.entr(shares).sum()) / math.log(2)


def collisions(codes: Tensor) -> int:
    """codes [M, L, Q] (or [M, L]) -> how many entities share their whole code with another."""
    counts = _whole_code_counts(codes)
    return int(counts[counts > 1].sum())


def _counts(codes: Tensor, num_codes: int) -> Tensor:
    columns = codes.reshape(-1, codes.shape[-1]).t()
    return torch.stack([torch.bincount(column, minlength=num_codes) for column in columns])


def _whole_code_counts(codes: Tensor) -> Tensor:
    return torch.unique(codes.reshape(len(codes), -1), dim=0, return_counts=True)[1]
