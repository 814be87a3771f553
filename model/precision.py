"""Precision of float32 matrix products: full where integers are decided and ranks counted, fast where gradients are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FULL = "highest"


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set torch.set_float32_matmul_precision inside: ``medium`` lets CPUs with bfloat16 instructions and GPUs with TF32
    use them, at about twice the speed; ``highest`` is float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
