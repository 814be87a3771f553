"""Quantizers: vectors z [B, L, D] -> codes [B, L, Q] -> vectors z_q [B, L, D].

``QUANTIZERS`` lists them by name. A new one derives from ``Quantizer``, defines its four abstract methods and gets a
line in ``QUANTIZERS``. The letters M L D K Q B are those of docs/ARCHITECTURE.md; D here is the width of a code
(``code_dim``).
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.search import at_least_float32, draw, kmeans, nearest_codes, permutation

KMEANS_ROWS = 64  # rows per code that k-means runs on


class RQOutput(NamedTuple):
    """What ``Quantizer.forward`` returns."""

    z_q: Tensor  # [B, L, D], bit for bit the decoded codes; its gradient goes straight to z
    all_indices: Tensor  # int64 [B, L, Q]
    total_loss: Tensor  # scalar, the sum over levels


class Quantizer(nn.Module, ABC):
    """Base class: what the trainer, the collision pass and the dump call. A quantizer defines the abstract methods.

    num_codes: K; latent_dim: D; num_quantizers: Q. ``initialized`` (buffer): whether ``init_from_data`` has run; the
    first forward in training mode calls it if nobody has. ``level_losses`` [Q]: the terms of the last loss.
    ``codes_depend_on_z`` False: the codes are drawn, not computed; a trainer calls ``cal_codes`` once, with all
    entities, and keeps the result. Raises ValueError for sizes below 1.
    """

    initialized: Tensor
    level_losses: Tensor
    codes_depend_on_z = True

    def __init__(self, num_codes: int, latent_dim: int, num_quantizers: int = 4) -> None:
        super().__init__()
        for name, value in [
            ("num_codes", num_codes),
            ("latent_dim", latent_dim),
            ("num_quantizers", num_quantizers),
        ]:
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.num_codes, self.latent_dim, self.num_quantizers = num_codes, latent_dim, num_quantizers
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("level_losses", torch.zeros(num_quantizers), persistent=False)

    def forward(self, z: Tensor, codes: Tensor | None = None) -> RQOutput:
        """z [B, L, D] -> (z_q [B, L, D], all_indices int64 [B, L, Q], total_loss scalar), in the parameters' precision.

        codes [B, L, Q]: use these and skip the search (a trainer may compute codes only every few steps). The gradient
        of z_q goes to z unchanged (straight-through), and not to the codes. Raises ValueError for wrong shapes or codes
        out of range, and for given codes in training before the quantizer is initialized.
        """
        self.check_vectors(z)
        if self.training and not bool(self.initialized):
            if codes is not None:
                raise ValueError("codes were given to a quantizer without data: call init_from_data(z) first")
            self.init_from_data(z)
        codes = self.cal_codes(z) if codes is None else codes
        self.check_codes(codes, z)
        decoded = self.decode_from_codes(codes).detach()
        z = z.to(decoded.dtype)
        by_level = self.losses(z, codes.long())
        self.level_losses = by_level.detach()
        return RQOutput(decoded + (z - z.detach()), codes.long(), by_level.sum())  # the bracket is zero

    @abstractmethod
    def losses(self, z: Tensor, codes: Tensor) -> Tensor:
        """z [B, L, D], its codes [B, L, Q] -> [Q], each level's loss; ``forward`` adds them up."""

    @abstractmethod
    def cal_codes(self, z: Tensor) -> Tensor:
        """z [B, L, D] -> int64 [B, L, Q]."""

    @abstractmethod
    def decode_from_codes(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """codes [B, L, Q] -> [B, L, D], from the first ``levels`` levels alone (default: all). Differentiable."""

    @abstractmethod
    def codes_of_level(self, level: int) -> Tensor:
        """[K, D]: the vectors that level ``level`` adds for its codes 0..K-1."""

    @torch.no_grad()
    def cal_code_emds(self, z: Tensor) -> Tensor:
        """z [B, L, D] -> [B, L, D]: ``decode_from_codes(cal_codes(z))``."""
        return self.decode_from_codes(self.cal_codes(z))

    def init_from_data(
        self, z: Tensor, generator: torch.Generator | None = None, weights: Tensor | None = None
    ) -> None:
        """Prepare for z [M, L, D] of all entities; called once, before the first codes. Here: nothing to prepare.

        weights [M]: of the entities' errors (default: equal).
        """
        self.initialized.fill_(True)

    def revive_dead_codes(self, z: Tensor, codes: Tensor, generator: torch.Generator | None = None) -> list[int]:
        """Replace codes that ``codes`` [M, L, Q] of z [M, L, D] never uses; returns how many per level. Here: none."""
        return [0] * self.num_quantizers

    def random_codes(self, rows: int, seq_len: int, generator: torch.Generator | None = None) -> Tensor:
        """int64 [rows, L, Q], uniform over the K codes."""
        return torch.randint(self.num_codes, (rows, seq_len, self.num_quantizers), generator=generator)

    def check_vectors(self, z: Tensor) -> None:
        """ValueError unless z is [B, L, D] and not empty."""
        if z.ndim != 3 or z.shape[2] != self.latent_dim:
            raise ValueError(f"z must be [B, L, {self.latent_dim}], not {list(z.shape)}")
        if not z.numel():
            raise ValueError(f"z is empty: {list(z.shape)}")

    def check_codes(self, codes: Tensor, z: Tensor | None = None) -> None:
        """ValueError unless codes is [B, L, Q], of integers in [0, K), and (with z) of the B and L of z."""
        expected = ["B", "L", self.num_quantizers] if z is None else [*z.shape[:2], self.num_quantizers]
        if codes.ndim != 3 or (list(codes.shape) != expected if z is not None else codes.shape[2] != expected[2]):
            raise ValueError(f"codes must be {expected}, not {list(codes.shape)}")
        if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers, not {codes.dtype}")
        if codes.numel():
            low, high = (int(end) for end in codes.aminmax())
            if low < 0 or high >= self.num_codes:
                raise ValueError(f"codes must be in [0, {self.num_codes}), found {low} to {high}")


class RQCodebook(Quantizer):
    """Residual quantization (Eq. 3-5 of SSQR with one codebook per level); the L positions share the Q codebooks.

    Level q replaces its residual r_q by the nearest of its K codes, c_q (Eq. 3), and passes on the rest:

        r_0 = z,   r_{q+1} = r_q - sg[c_q],   z_q = c_0 + c_1 + ... + c_{Q-1}
        loss = sum over q of  mean (sg[r_q] - c_q)^2  +  beta * mean (r_q - sg[c_q])^2             (Eq. 5)

    mean is over elements, sg stops the gradient; beta: weight of the commitment term.
    """

    closed_form = True  # compute the same losses by ``_ResidualLosses``, in half the time

    def __init__(self, num_codes: int, latent_dim: int, num_quantizers: int = 4, beta: float = 0.25) -> None:
        super().__init__(num_codes, latent_dim, num_quantizers)
        self.beta = beta
        self.codebooks = nn.ModuleList(nn.Embedding(num_codes, latent_dim) for _ in range(num_quantizers))
        for weight in self._weights():
            nn.init.normal_(weight, std=latent_dim**-0.5)

    def losses(self, z: Tensor, codes: Tensor) -> Tensor:
        """Eq. 5: z [B, L, D], its codes int64 [B, L, Q] -> [Q]. Set ``closed_form = False`` if you change the loop."""
        if self.closed_form:
            by_level: Tensor = _ResidualLosses.apply(z, codes, self.beta, *self._weights())
            return by_level
        losses, residual = [], z  # r_0
        for book, index in zip(self.codebooks, codes.unbind(-1), strict=True):
            code = book(index)  # c_q (B, L, D)
            codebook_term = F.mse_loss(code, residual.detach())
            commitment_term = F.mse_loss(residual, code.detach())
            losses.append(codebook_term + self.beta * commitment_term)
            residual = residual - code.detach()  # r_{q+1}
        return torch.stack(losses)

    @torch.no_grad()
    def cal_codes(self, z: Tensor) -> Tensor:
        """z [B, L, D] -> int64 [B, L, Q]: the nearest code of every residual, the lower index on a tie."""
        return nearest_codes(self._rows(z), self._weights()).view(*z.shape[:2], -1)

    def decode_from_codes(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """codes [B, L, Q] -> [B, L, D]: the sum of the first ``levels`` levels' codes (default: all Q).

        Raises ValueError for another shape, a type that is no integer, an index outside [0, K), levels outside [1, Q].
        """
        levels = self.num_quantizers if levels is None else levels
        if not 1 <= levels <= self.num_quantizers:
            raise ValueError(f"levels must be in [1, {self.num_quantizers}], not {levels}")
        self.check_codes(codes)
        weights = self._weights()[:levels]
        first = torch.arange(levels, device=codes.device) * self.num_codes  # rows of the codebooks in one table
        rows = codes.reshape(-1, self.num_quantizers)[:, :levels].long() + first  # (B * L, levels)
        table = torch.cat(weights).to(at_least_float32(weights[0].dtype))
        # one pass over the output; a sum of Q lookups would write [B * L, D] numbers Q times
        total = F.embedding_bag(rows, table, mode="sum").to(weights[0].dtype)
        return total.view(*codes.shape[:2], self.latent_dim)

    def codes_of_level(self, level: int) -> Tensor:
        """[K, D]: the codebook of ``level``."""
        return self._weights()[level]

    @torch.no_grad()
    def init_from_data(
        self, z: Tensor, generator: torch.Generator | None = None, weights: Tensor | None = None
    ) -> None:
        """Residual k-means, level after level, on 64 K random rows of z [M, L, D].

        generator: of all draws (default: torch's global one); equal generators give equal codebooks. weights [M]: of
        the entities' errors (default: equal).
        """
        rows = self._rows(z)
        chosen = permutation(len(rows), generator)[: KMEANS_ROWS * self.num_codes].to(rows.device)
        residual, of_rows = rows[chosen], None
        if weights is not None:
            of_rows = weights.to(rows).repeat_interleave(z.shape[1])[chosen]
        for book in self._weights():
            book.copy_(kmeans(residual, self.num_codes, generator=generator, weights=of_rows))
            residual = residual - book[nearest_codes(residual, [book])[:, 0]]
        self.initialized.fill_(True)

    @torch.no_grad()
    def revive_dead_codes(self, z: Tensor, codes: Tensor, generator: torch.Generator | None = None) -> list[int]:
        """Replace codes that the assignment ``codes`` [M, L, Q] of z [M, L, D] never uses; how many per level.

        A new code is the residual of a row, drawn with probability proportional to its squared error at that level
        (the rule of k-means++). No other level's residual changes, since no row uses the old code. Equal rows give one
        new code only.
        """
        self.check_codes(codes, z)
        residual, revived = self._rows(z), []
        for weight, column in zip(self._weights(), codes.reshape(-1, self.num_quantizers).long().t(), strict=True):
            rest = residual - weight[column]
            dead = (torch.bincount(column, minlength=self.num_codes) == 0).nonzero().squeeze(1)
            fresh = residual[draw(rest.square().sum(1), len(dead), generator)].unique(dim=0)
            weight[dead[: len(fresh)]] = fresh
            revived.append(len(fresh))
            residual = rest
        return revived

    def _weights(self) -> list[Tensor]:
        return [book.weight for book in self.codebooks]  # type: ignore[misc]

    def _rows(self, z: Tensor) -> Tensor:
        """[B, L, D] -> [B * L, D] in the codebooks' precision."""
        self.check_vectors(z)
        return z.reshape(-1, self.latent_dim).to(self._weights()[0].dtype)


class _ResidualLosses(torch.autograd.Function):
    """The loop of ``RQCodebook.losses`` with its gradients in closed form; n = number of elements of z:

    d loss_q / d z = beta 2/n r_{q+1}          d loss_q / d c_q = 2/n (c_q - r_q), summed over the rows of a code
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, codes: Tensor, beta: float, *codebooks: Tensor) -> Tensor:
        ctx.save_for_backward(z, codes, *codebooks)
        ctx.beta = beta
        residual, losses = z.clone(), z.new_empty(len(codebooks))
        for level, (book, index) in enumerate(zip(codebooks, codes.unbind(-1), strict=True)):
            residual -= F.embedding(index, book)  # r_{q+1} = r_q - c_q
            losses[level] = (1 + beta) * torch.linalg.vector_norm(residual).square() / z.numel()
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, codes, *codebooks = ctx.saved_tensors
        scale = 2 / z.numel()
        residual, d_z, d_books = z.clone(), torch.zeros_like(z), []
        for book, index, weight in zip(codebooks, codes.unbind(-1), gradient, strict=True):
            residual -= F.embedding(index, book)
            d_z.addcmul_(residual, weight)
            sums = torch.zeros_like(book).index_add_(0, index.flatten(), residual.flatten(0, 1))
            d_books.append(sums * (-scale * weight))
        return d_z * (ctx.beta * scale), None, None, *d_books


class VQCodebook(RQCodebook):
    """The paper's VQ-VAE quantizer: residual quantization with one level."""

    def __init__(self, num_codes: int, latent_dim: int, num_quantizers: int = 1, beta: float = 0.25) -> None:
        if num_quantizers != 1:
            raise ValueError(f"num_quantizers must be 1 for vq, not {num_quantizers}")
        super().__init__(num_codes, latent_dim, 1, beta)


class RandomCodebook(RQCodebook):
    """Baseline (RandomEQ, Li et al. 2023): uniform random codes, drawn once; only the codebooks are trained.

    ``seed`` (buffer, drawn by ``init_from_data``) determines the codes of any number of entities.
    """

    codes_depend_on_z = False
    seed: Tensor

    def __init__(self, num_codes: int, latent_dim: int, num_quantizers: int = 4, beta: float = 0.25) -> None:
        super().__init__(num_codes, latent_dim, num_quantizers, beta)
        self.register_buffer("seed", torch.tensor(0))

    def init_from_data(
        self, z: Tensor, generator: torch.Generator | None = None, weights: Tensor | None = None
    ) -> None:
        """Draw the seed; the codebooks keep their random values."""
        self.seed.copy_(torch.randint(2**31, (), generator=generator))
        self.initialized.fill_(True)

    def cal_codes(self, z: Tensor) -> Tensor:
        """z [M, L, D] of all entities -> int64 [M, L, Q]; only the shape of z matters."""
        self.check_vectors(z)
        source = torch.Generator().manual_seed(int(self.seed))
        return self.random_codes(z.shape[0], z.shape[1], source).to(z.device)

    def revive_dead_codes(self, z: Tensor, codes: Tensor, generator: torch.Generator | None = None) -> list[int]:
        """The codes do not follow z, so there is nothing to replace."""
        return [0] * self.num_quantizers


QUANTIZERS: dict[str, type[Quantizer]] = {"rq": RQCodebook, "vq": VQCodebook, "random": RandomCodebook}


def codebooks_of(state: Mapping[str, Tensor]) -> Tensor:
    """The codebooks [Q, K, D] in the state dict of a quantizer or of a model that contains one.

    Raises ValueError where there are none, or where they do not have one shape.
    """
    found = {
        int(m[1]): value for name, value in state.items() if (m := re.search(r"\bcodebooks\.(\d+)\.weight$", name))
    }
    if not found:
        raise ValueError("there are no codebooks in the state")
    if sorted(found) != list(range(len(found))) or len({value.shape for value in found.values()}) > 1:
        raise ValueError(f"codebooks of levels {sorted(found)} are incomplete or of several shapes")
    return torch.stack([found[level] for level in sorted(found)])


# ---------------------------------------------------------------- statistics of codes


def code_perplexity(codes: Tensor, num_codes: int) -> Tensor:
    """codes [..., Q] -> float64 [Q]: exp of the entropy of each level's codes; K when all are equally frequent."""
    columns = codes.reshape(-1, codes.shape[-1]).t()
    shares = torch.stack([torch.bincount(column, minlength=num_codes) for column in columns]).double()
    shares /= shares.sum(1, keepdim=True)
    return torch.special.entr(shares).sum(1).exp()


def entropy_bits(codes: Tensor) -> float:
    """codes [M, L, Q] (or [M, L]) -> -sum p log2 p over whole-entity codes (Eq. 11), in bits; log2 M if all differ."""
    shares = _whole_code_counts(codes).double() / max(len(codes), 1)
    return float(torch.special.entr(shares).sum()) / math.log(2)


def collisions(codes: Tensor) -> int:
    """codes [M, L, Q] (or [M, L]) -> the number of entities that share their whole code with another."""
    counts = _whole_code_counts(codes)
    return int(counts[counts > 1].sum())


def _whole_code_counts(codes: Tensor) -> Tensor:
    return torch.unique(codes.reshape(len(codes), -1), dim=0, return_counts=True)[1]
