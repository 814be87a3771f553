"""Decoders: the score of a triple (h, r, t) from the quantized vectors q_h, q_t and the relation's v_r (Eq. 6).

Every decoder turns (q_h, v_r) into a query vector, and the score of t is its product with q_t:

    s(h, r, t) = query(q_h, v_r)^T q_t

so one matrix product scores a batch of queries against all entities (1-N). No decoder has a parameter per entity (no
bias per entity either): all information about an entity is in its codes. ``DECODERS`` lists the decoders by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Decoder(nn.Module, ABC):
    """Base class; a decoder defines ``query``.

    dim: D, the width of q_h, v_r, q_t and the query. Raises ValueError for a width that does not fit the decoder.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"the width must be positive, found D = {dim}")
        self.dim = dim

    @abstractmethod
    def query(self, q_h: Tensor, v_r: Tensor) -> Tensor:
        """q_h [B, D], v_r [B, D] -> [B, D]."""

    def cubed_norm(self, x: Tensor) -> Tensor:
        """x [N, D] -> [N]: the sum of |x_i|^3 over the numbers of a vector, for the N3 norm."""
        return x.abs().pow(3).sum(-1)

    def forward(self, q_h: Tensor, v_r: Tensor, q_t: Tensor) -> Tensor:
        """Scores of every tail in q_t [N, D] -> [B, N]."""
        return self.query(q_h, v_r) @ q_t.T

    def score_triples(self, q_h: Tensor, v_r: Tensor, q_t: Tensor) -> Tensor:
        """Scores of the B triples (q_h[i], v_r[i], q_t[i]), q_t [B, D] -> [B]."""
        return (self.query(q_h, v_r) * q_t).sum(-1)


class DistMult(Decoder):
    """s = sum_i q_h[i] v_r[i] q_t[i] (Yang et al., ICLR 2015, arXiv 1412.6575); dropout on the query."""

    def __init__(self, dim: int, dropout: float = 0.2) -> None:
        super().__init__(dim)
        self.dropout = nn.Dropout(dropout)

    def query(self, q_h: Tensor, v_r: Tensor) -> Tensor:
        return self.dropout(q_h * v_r)


class ComplEx(Decoder):
    """s = Re sum_i h[i] r[i] conj(t[i]) (Trouillon et al., ICML 2016, arXiv 1606.06357); dropout on the query.

    The first D/2 numbers of a vector are its real part, the others its imaginary part; D must be even.
    """

    def __init__(self, dim: int, dropout: float = 0.2) -> None:
        super().__init__(dim)
        if dim % 2:
            raise ValueError(f"ComplEx splits D into a real and an imaginary half: D must be even, found {dim}")
        self.dropout = nn.Dropout(dropout)

    def query(self, q_h: Tensor, v_r: Tensor) -> Tensor:
        (h_re, h_im), (r_re, r_im) = q_h.chunk(2, dim=-1), v_r.chunk(2, dim=-1)
        return self.dropout(torch.cat([h_re * r_re - h_im * r_im, h_re * r_im + h_im * r_re], dim=-1))

    def cubed_norm(self, x: Tensor) -> Tensor:
        """x [N, D] -> [N]: the sum of |x_i|^3 over the D/2 complex numbers."""
        re, im = x.chunk(2, dim=-1)
        return (re.square() + im.square() + 1e-12).pow(1.5).sum(-1)  # the small term: a finite gradient at 0


class ConvE(Decoder):
    """s = Flat(Conv(q_h || v_r))^T W_c q_t (Eq. 6; Dettmers et al., AAAI 2018, arXiv 1707.01476).

    q_h and v_r are reshaped to height x width = D and stacked to an image of 2 * height rows. ``channels`` kernels of
    kernel x kernel are applied to it; W_c maps their flat output to D. Batch norms, ReLUs and the three dropouts are
    those of ConvE; its bias per entity is left out.
    height: rows of one reshaped vector; default: the factor of D nearest to a square (D = 200: 10 x 20).
    """

    def __init__(
        self,
        dim: int,
        channels: int = 32,
        kernel: int = 3,
        height: int | None = None,
        input_dropout: float = 0.2,
        feature_dropout: float = 0.2,
        hidden_dropout: float = 0.3,
    ) -> None:
        super().__init__(dim)
        self.height, self.width = conve_shape(dim, kernel, height)
        self.input_norm, self.conv = nn.BatchNorm2d(1), nn.Conv2d(1, channels, kernel)
        self.feature_norm = nn.BatchNorm2d(channels)
        self.project = nn.Linear(channels * (2 * self.height - kernel + 1) * (self.width - kernel + 1), dim)  # W_c
        self.hidden_norm = nn.BatchNorm1d(dim)
        self.input_dropout = nn.Dropout(input_dropout)
        self.feature_dropout = nn.Dropout2d(feature_dropout)
        self.hidden_dropout = nn.Dropout(hidden_dropout)

    def query(self, q_h: Tensor, v_r: Tensor) -> Tensor:
        x = torch.cat([q_h, v_r], dim=1).view(-1, 1, 2 * self.height, self.width)
        # [B, channels, 2 height - kernel + 1, width - kernel + 1]
        x = self.conv(self.input_dropout(self.input_norm(x)))
        x = self.feature_dropout(torch.relu(self.feature_norm(x)))
        x = self.hidden_dropout(self.project(x.flatten(1)))
        return torch.relu(self.hidden_norm(x))


class JointDecoder(Decoder):
    """Ensemble: q_h, v_r, q_t and the query are the members' vectors, concatenated; s(h, r, t) is the sum of scores.

    Under a softmax over the tails, the sum of scores is the (normalized) product of the members' probabilities.
    """

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        super().__init__(sum(decoder.dim for decoder in decoders))
        self.decoders: Iterable[Decoder] = nn.ModuleList(decoders)  # type: ignore[assignment]
        self.dims = [decoder.dim for decoder in decoders]

    def query(self, q_h: Tensor, v_r: Tensor) -> Tensor:
        parts = zip(self.decoders, q_h.split(self.dims, dim=-1), v_r.split(self.dims, dim=-1), strict=True)
        return torch.cat([decoder.query(h, r) for decoder, h, r in parts], dim=-1)

    def cubed_norm(self, x: Tensor) -> Tensor:
        """x [N, D] -> [N]: the mean over members, as their losses are averaged."""
        parts = zip(self.decoders, x.split(self.dims, dim=-1), strict=True)
        return torch.stack([decoder.cubed_norm(own) for decoder, own in parts]).mean(0)


def conve_shape(dim: int, kernel: int, height: int | None = None) -> tuple[int, int]:
    """(height, width) with height * width = dim, such that the kernel fits the stacked image of 2 * height x width.

    Without ``height``: the shape nearest to a square, the wider one of two. Raises ValueError with the heights that fit
    D, or the nearest D for which there is one.
    """

    def heights(d: int) -> list[int]:
        return [h for h in range(1, d + 1) if d % h == 0 and 2 * h >= kernel and d // h >= kernel]

    fitting = heights(dim)
    if not fitting:
        near = [
            next((d for d in span if heights(d)), None) for span in (range(dim, 0, -1), range(dim, dim + kernel**2 + 2))
        ]
        near_text = " or ".join(str(d) for d in near if d is not None)
        raise ValueError(
            f"ConvE cannot reshape D = {dim} for a {kernel} x {kernel} kernel; the nearest D that fits: {near_text}"
        )
    if height is None:
        return min(((h, dim // h) for h in fitting), key=lambda shape: abs(shape[0] - shape[1]))  # the wider of two
    if height not in fitting:
        raise ValueError(
            f"ConvE cannot reshape D = {dim} to height {height} for a {kernel} x {kernel} kernel; "
            f"heights that fit: {fitting}"
        )
    return height, dim // height


DECODERS: dict[str, type[Decoder]] = {
    "conve": ConvE,
    "distmult": DistMult,
    "complex": ComplEx,
}


def make_decoder(name: str, dim: int, dropout: float | None = None, **options: Any) -> Decoder:
    """The decoder ``name`` (a key of DECODERS) of width ``dim``.

    dropout: one rate for all dropouts of the decoder (None: the class's defaults); ``options`` go to the class.
    Raises ValueError for an unknown name or a width that does not fit.
    """
    if name not in DECODERS:
        raise ValueError(f"unknown decoder {name!r}; expected one of {', '.join(DECODERS)}")
    decoder = DECODERS[name](dim, **options)
    if dropout is not None:
        for module in decoder.modules():
            if isinstance(module, nn.Dropout | nn.Dropout2d):
                module.p = dropout
    return decoder
