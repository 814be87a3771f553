"""The mean of the last steps' weights, which generalizes better than any one step's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Exponential average of ``tensors`` over steps: a <- decay a + (1 - decay) w, from the first ``update`` on.

    Polyak and Juditsky 1992 average all steps, which needs a constant rate; the exponential form forgets the
    first ones. ``decay`` in [0, 1), else ValueError; 0 is the last step's weights.
    """

    def __init__(self, tensors: Sequence[Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        self.tensors = list(tensors)
        self.values: list[Tensor] | None = None  # of the averages; None before the first update
        self._mix = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one more step."""
        if self.values is None:
            self.values = [tensor.detach().clone() for tensor in self.tensors]
        else:
            self._mix(self.values, [tensor.detach() for tensor in self.tensors], 0)

    def load(self, values: Sequence[Tensor]) -> None:
        """Go on from stored averages. Raises ValueError where they are of other tensors, or not finite."""
        wanted = [(tensor.shape, tensor.dtype) for tensor in self.tensors]
        if [(value.shape, value.dtype) for value in values] != wanted:
            raise ValueError("the averaged weights are of another model")
        if not all(bool(value.isfinite().all()) for value in values):
            raise ValueError("the averaged weights hold values that are not finite")
        self.values = [value.to(tensor.device) for value, tensor in zip(values, self.tensors, strict=True)]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages where the weights are, for a while; nothing changes where there are none yet."""
        if self.values is None:
            yield
            return
        own = [tensor.detach().clone() for tensor in self.tensors]
        self._put(self.values)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)

    def settle(self) -> None:
        """Put the averages where the weights are, for good, and start a new average."""
        if self.values is not None:
            self._put(self.values)
        self.forget()

    def forget(self) -> None:
        """Leave the steps so far out of the average."""
        self.values = None
