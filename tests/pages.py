"""Commands in the repository's pages: found, and compared with the scripts' ``--help``."""

from __future__ import annotations

import importlib
import io
import re
import shlex
import sys
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path

import pytest

from common.files import ROOT

FOLDER = "cd lora_training && "
SCRIPT = re.compile(r"[\w./-]+\.py")
STARTERS = ("python", "torchrun", "accelerate")
PAGES = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("*/*.md"))
         if not path.relative_to(ROOT).parts[0].startswith((".", "demo_output"))]  # fmt: skip
# their commands are those of the day on which they were written
HISTORY = ("CHANGELOG.md", "docs/LOG.md")


def read_page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def indented(text: str) -> list[str]:
    """The lines of a page's code blocks (indented or fenced), joined where they continue, without comments."""
    found, fenced = [], False
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            found.append(line.split("  #")[0].strip())
    return found


def page_commands(text: str) -> list[str]:
    """Commands of our scripts, in the page's blocks and sentences, with the page's variables filled in."""
    lines = indented(text)
    variables = dict(re.findall(r'^(\w+)="(.*)"$', "\n".join(lines), re.MULTILINE))
    found = []
    for line in dict.fromkeys([*lines, *re.findall(r"`(python [^`\n]+\.py\b[^`\n]*)`", text)]):
        command = line.removeprefix(FOLDER).split(" && ")[0]
        starts = command.split(" ")[0] in STARTERS and not command.startswith("python -m")
        if starts and SCRIPT.search(command):
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            found.append(line)
    return found


@lru_cache
def help_of(script: str) -> str:
    """What ``python SCRIPT --help`` prints."""
    module, out = importlib.import_module(script.removesuffix(".py").replace("/", ".")), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [script, "--help"])
        patch.setenv("COLUMNS", "120")
        module.main()
    assert not end.value.code, script
    return out.getvalue()


def entries_of(script: str) -> list[str]:
    """One string per flag or argument of ``--help``: its names and what is said of it."""
    text = help_of(script).partition("\n\n")[2]
    return [" ".join(entry.split()) for entry in re.findall(r"(?m)^  (?=\S).*(?:\n {4,}\S.*)*", text)]


def flags_of_script(script: str) -> set[str]:
    return {flag for entry in entries_of(script) for flag in re.findall(r"(?<!\S)--?[A-Za-z][\w-]*", entry)}


def script_of(command: str) -> tuple[str, list[str]]:
    """The script that a command calls, from the root, and its arguments."""
    folder = "lora_training" if command.startswith(FOLDER) else ""
    words = shlex.split(command.removeprefix(FOLDER))
    at = next(i for i, word in enumerate(words) if SCRIPT.fullmatch(word))
    return str(Path(folder) / words[at]), words[at + 1 :]


def check_command(command: str) -> None:
    """AssertionError unless the script exists and its ``--help`` knows the flags."""
    script, given = script_of(command)
    assert (ROOT / script).is_file(), f"{script} does not exist"
    flags = {word.split("=")[0] for word in given if word.startswith("--")}
    unknown = flags - flags_of_script(script) if flags else set()
    assert not unknown, f"{script} has no {', '.join(sorted(unknown))}"
