"""Settings of torch and the C library: the precision of float32 products, and whether freed memory is kept.

Codes and ranks need full precision; gradients may use fast products.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

FULL = "highest"


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """torch.set_float32_matmul_precision within a block: ``highest`` is float32; ``medium`` lets CPUs use bfloat16 and
    GPUs TF32 where they have it, at about twice the speed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """True if the device has instructions for products of bfloat16 matrices (they are not emulated)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.backends.mkldnn.is_available() and bool(torch.cpu._is_avx512_bf16_supported())


def return_freed_memory() -> bool:
    """Return the free memory of the C library's heap to the system. True if that is possible (glibc).

    Kept memory becomes fragmented when block sizes change: 80 epochs of WN18RR with sampled negatives made a process
    of 1.5 GB grow to 12 GB.
    """
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError, TypeError):
        return False


def keep_freed_memory() -> bool:
    """Make the C library reuse freed blocks of any size. True if that is possible (glibc).

    By default it returns every block above 32 MB to the system, and gets the next one page by page, zeroed. That takes
    six times as long as the product that fills a [1024, 14541] score matrix. Call ``return_freed_memory`` from time to
    time to limit the memory in use.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
