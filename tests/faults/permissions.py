"""File modes that count even for root, whom the kernel else lets read and write everything."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

OVERRIDE = (1 << 1) | (1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
VERSION_3 = 0x20080522  # of the kernel's capability calls


@contextmanager
def modes_count() -> Iterator[bool]:
    """Take the right to pass over file modes from this thread, and give it back. False where that cannot be done."""
    if os.geteuid() != 0:
        yield True
        return
    library = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(VERSION_3, 0), (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable
    if not hasattr(library, "capset") or library.capget(header, sets) != 0:
        yield False
        return
    before = sets[0]
    sets[0] = before & ~OVERRIDE
    if library.capset(header, sets) != 0:
        yield False
        return
    try:
        yield True
    finally:
        sets[0] = before
        if library.capset(header, sets) != 0:
            raise OSError(ctypes.get_errno(), "the right to pass over file modes did not come back")
