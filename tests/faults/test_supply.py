"""What is installed and imported: pins, licences, silent imports, and a help text for every flag of every script."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import os
import re
import resource
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from common.errors import run_command
from common.files import ROOT
from tests.pages import entries_of, help_of

REQUIREMENTS = [
    line for name in ("requirements.txt", "requirements-dev.txt")
    for line in (text.split("#")[0].strip() for text in (ROOT / name).read_text().splitlines())
    if line and not line.startswith("-r ")
]  # fmt: skip
DOCUMENT = (ROOT / "docs" / "ROBUSTNESS.md").read_text(encoding="utf-8")
ABSENT = {"fused_gpu.py"} if importlib.util.find_spec("triton") is None else set()  # it comes with torch for GPUs
# every file of the toolkit, wherever it is: a new one is tested without being named here
FILES = sorted(
    path.relative_to(ROOT) for path in ROOT.rglob("*.py")
    if path.name not in {"__init__.py"} | ABSENT
    and not any(part.startswith(".") or part == "tests" for part in path.relative_to(ROOT).parts)
)  # fmt: skip
SCRIPTS = [path for path in FILES if re.search(r"^def main\(", (ROOT / path).read_text(), re.MULTILINE)]
NAMES = sorted({re.split(r"[=;\[ ]", line)[0] for line in REQUIREMENTS})


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


# ---------------------------------------------------------------- pins and licences


def test_every_requirement_is_pinned_and_comes_from_the_index() -> None:
    assert len(REQUIREMENTS) > 10
    for line in REQUIREMENTS:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+(\[[a-z,]+\])?==[0-9][0-9A-Za-z.]*( ?;.*)?", line), line
    assert not re.search(r"://|^-", "\n".join(REQUIREMENTS), re.MULTILINE)


def licence_of(name: str) -> str:
    """What the installed package says of itself: its SPDX expression, else its classifier, else its field."""
    found: Any = importlib.metadata.metadata(name)
    kinds = [line for line in found.get_all("Classifier") or [] if line.startswith("License ::")]
    named = "; ".join(line.split("::")[-1].strip() for line in kinds)
    return str(found.get("License-Expression") or named or (found.get("License") or "none stated").splitlines()[0])


@pytest.mark.parametrize("name", NAMES)
def test_licences_are_listed(name: str) -> None:
    row = re.search(rf"^\| {re.escape(name)} \| (.*) \|$", DOCUMENT, re.MULTILINE)
    try:
        expected = licence_of(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed here")
    assert row is not None and row[1] == expected, f"docs/ROBUSTNESS.md: | {name} | {expected} |"


def test_no_licence_is_listed_for_what_is_not_required() -> None:
    table = DOCUMENT.split("| package | licence |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"^\| ([A-Za-z0-9_.-]+) \| ", table, re.MULTILINE)) == NAMES


# ---------------------------------------------------------------- imports


def used_seconds() -> float:
    """Processor time of the children so far: other programs may keep them waiting."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def python(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def test_every_module_is_imported_without_a_warning() -> None:
    """One process for all of them; a warning anywhere is an error."""
    names = [module_of(path) for path in FILES]
    text = f"import importlib\nfor name in {names}:\n    importlib.import_module(name)"
    ended = python("-W", "error", "-c", text)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_module_is_imported_alone_without_a_warning(path: Path) -> None:
    ended = python("-W", "error", "-c", f"import {module_of(path)}")
    assert ended.returncode == 0 and not ended.stderr, ended.stderr[-2000:]


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_every_flag_is_explained_in_help_with_its_default_once(path: Path) -> None:
    script = str(path)
    entries = entries_of(script)
    assert "usage:" in help_of(script) and any("--help" in entry for entry in entries)
    for entry in entries:
        explained = re.sub(r"(?<!\S)-[\w-]+(?: [A-Z{\[][^ ]*)*,? ?|\(default: .*?\)", "", entry)
        assert len(explained) > 3, f"{script}: {entry} is not explained"
        defaults = re.findall(r"\(default: (.*?)\)", entry)
        assert len(set(defaults)) == len(defaults) and "None" not in defaults, f"{script}: {entry}"


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_a_flag_that_does_not_exist_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    monkeypatch.setattr(sys, "argv", [path.name, "--no-such-flag"])
    with redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        run_command(importlib.import_module(module_of(path)).main)
    error = capsys.readouterr().err  # type: ignore[attr-defined]
    assert end.value.code == 2 and error.count("\n") == 1 and "--help" in error, error


@pytest.fixture(scope="module")
def torch_seconds() -> float:
    """Processor time of importing torch, which measures the machine: 1 to 3 seconds were seen."""
    before = used_seconds()
    python("-c", "import torch", cwd=ROOT)
    return used_seconds() - before


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_help_takes_three_seconds_or_little_more_than_torch(path: Path, torch_seconds: float) -> None:
    """Processor time, from the script's own folder; half of a pytest run would be hidden by what it has imported."""
    before = used_seconds()
    ended = python(path.name, "--help", cwd=(ROOT / path).parent)
    assert ended.returncode == 0 and ended.stdout.startswith("usage:") and not ended.stderr, ended.stderr
    assert used_seconds() - before < max(3.0, 1.5 * torch_seconds)
