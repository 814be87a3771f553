"""How float32 products and large blocks of memory are handled: full precision where integers are decided and ranks
counted, fast products where gradients are; freed memory kept for the next step."""

from __future__ import annotations

import ctypes
import functools
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


@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """True where products of bfloat16 matrices have instructions of their own and are not emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.backends.mkldnn.is_available() and bool(torch.cpu._is_avx512_bf16_supported())


def return_freed_memory() -> bool:
    """Give the system what is free in the C library's heap now. True where that could be done (glibc).

    Kept memory splinters when blocks of changing sizes come and go: 80 epochs of WN18RR with sampled negatives, and
    their rankings, had grown a process of 1.5 GB to 12.
    """
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError, TypeError):
        return False


def keep_freed_memory() -> bool:
    """Let the C library hand freed blocks out again, whatever their size. True where it could be told so (glibc).

    By default it returns every block above 32 MB to the system and gets the next one page by page, zeroed: six times
    the time of the product that fills a [1024, 14541] score matrix. ``return_freed_memory`` now and then undoes what
    it costs.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
