"""Shared by the tests of faults: the world that the scripts read, and copies of it that may be changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.world import make_world


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world. No test may change it."""
    folder = tmp_path_factory.mktemp("faults") / "world"
    make_world(folder)
    return folder


@pytest.fixture
def world(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the world for one test."""
    return Path(shutil.copytree(pristine, tmp_path / "world"))
