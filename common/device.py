"""Devices: the one that a flag names, its name for the record, memory used and wanted."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.errors import InputError

if TYPE_CHECKING:
    import torch


class Memory(NamedTuple):
    """Bytes when an allocation failed."""

    wanted: float
    used: float
    total: float


def memory_wanted(error: BaseException) -> Memory | None:
    """What a failed allocation wanted, on a GPU or the CPU; None where the error is another."""
    import torch

    text = str(error)
    found = re.search(r"[Tt]ried to allocate ([0-9.]+) ?(bytes|KiB|MiB|GiB|TiB)", text)
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in text:
        return None
    units = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    wanted = float(found[1]) * units[found[2]] if found else 0.0
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():  # the type is the GPU's alone
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return Memory(wanted, torch.cuda.memory_allocated(), total)
    return Memory(wanted, peak_memory_mb() * 2**20, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def find_device(name: str | None, flag: str = "--device") -> torch.device:
    """The device of that name; for None or ``auto`` the GPU where there is one. InputError where there is none such."""
    import torch

    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        if found.type != "cuda":  # one number on a GPU takes hundreds of megabytes of it
            torch.zeros(1, device=found).cpu()  # and back: "meta" takes every number and keeps none
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:  # torch has its own for each
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"{flag} {name} is not there: {reason}; use --device cpu") from error
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"{flag} {name} is not there: torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    return found


def device_name(device: str | torch.device) -> str:
    """``cpu (N threads, AVX512)``, by what a recipe's time depends on most, or the GPU's own name."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'s' * (threads > 1)}, {torch.backends.cpu.get_cpu_capability()})"


def peak_memory_mb(device: str | torch.device = "cpu") -> float:
    """Peak resident memory of this process in MiB, or peak allocated memory of a CUDA device."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would be the starting process's where that was larger (Linux keeps it over exec)
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
