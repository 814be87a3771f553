"""docs/EXTENDING.md: each diff applies to a copy of the repository, is short, and its command runs."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import ROOT
from tests.pages import read_page

EDITS = re.findall(r"## (.+?)\n.*?```diff\n(.*?)```\n\n    python (.+?)\n", read_page("docs/EXTENDING.md"), re.DOTALL)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's Python files and the bundled graph."""
    folder = tmp_path_factory.mktemp("copy")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if name.endswith(".py") or name.startswith(("configs/", "data/family/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_there_are_three_short_edits() -> None:
    assert [title for title, _, _ in EDITS] == ["A quantizer", "A loss", "An LLM task"]
    assert all(len(diff.splitlines()) <= 40 for _, diff, _ in EDITS)


def test_the_edits_apply_and_their_commands_run(copy: Path) -> None:
    """In order: the task reads the codes that the run with the new loss has written."""
    for title, diff, command in EDITS:
        words = [sys.executable, *shlex.split(command)]
        if title != "An LLM task":  # its command runs without the edit too
            assert subprocess.run(words, cwd=copy, capture_output=True).returncode == 2, "the edit changes nothing"
        applied = subprocess.run(["git", "apply", "-"], cwd=copy, input=diff, capture_output=True, text=True)
        assert applied.returncode == 0, applied.stderr
        done = subprocess.run(words, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "codes_to_degree" in "".join(path.read_text() for path in copy.glob("demo_output/rows/**/train.json"))
