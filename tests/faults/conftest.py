"""Shared by the tests of faults: the world, put back after each test that may change it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.world import pristine, restore


@pytest.fixture
def world() -> Iterator[Path]:
    yield pristine()
    restore(pristine())
