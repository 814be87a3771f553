"""The precision of products within a block; freed memory is kept, and returned on request."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from model.precision import matmul_precision
from tests.conftest import ROOT

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import torch
from model.precision import keep_freed_memory, return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

if not keep_freed_memory():
    sys.exit(77)
before = resident()
blocks = [torch.ones(2**21 + 2**14 * i) for i in range(60)]  # 8 to 12 MB each
pins = blocks[::10]
del blocks
kept = resident()
again = torch.ones(2**21)
assert return_freed_memory()
print(before, kept, resident(), sum(pin.numel() for pin in pins) * 4 / 2**20)
"""


def test_precision_is_restored_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError), matmul_precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_is_kept_and_returned() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(root=str(ROOT))], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("another C library than glibc")
    assert done.returncode == 0, done.stderr
    before, kept, after, pinned = (float(word) for word in done.stdout.split())
    assert kept - before > 500, "the process should keep freed blocks"
    assert after - before < 1.5 * pinned + 60, "unused memory should be returned"
