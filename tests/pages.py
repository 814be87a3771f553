"""Commands in the repository's pages: found, and held against the scripts' own parsers."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from common.files import ROOT

FOLDER = "cd lora_training && "
SCRIPT = re.compile(r"[\w./-]+\.py")
STARTERS = ("python", "torchrun", "accelerate")


def read_page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def indented(text: str) -> list[str]:
    """The commands of a page: its indented lines, joined where they go on, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith("    ")]


def page_commands(text: str) -> list[str]:
    """What the page says to run of ours, in its blocks and in its sentences, the page's variables filled in."""
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


class _Seen(Exception):
    """A parser on its way to parse."""


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that ``script``'s main makes: main is called and stopped where it would parse."""
    seen: list[argparse.ArgumentParser] = []

    def stop(self: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        seen.append(self)
        raise _Seen

    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(_Seen):
            module.main()
    return seen[0]


def check_command(command: str) -> None:
    """AssertionError or SystemExit unless the script is there and takes these words.

    The words go through the script's own ``parse_args`` where it has one, with the checks beyond the parser's.
    """
    folder = "lora_training" if command.startswith(FOLDER) else ""
    words = shlex.split(command.removeprefix(FOLDER))
    at = next(i for i, word in enumerate(words) if SCRIPT.fullmatch(word))
    script, given = str(Path(folder) / words[at]), words[at + 1 :]
    assert (ROOT / script).is_file(), f"{script} is named and not there"
    flags = [word.split("=")[0] for word in given if word.startswith("--")]
    if not flags:
        return
    parser = parser_of(script)
    unknown = set(flags) - parser._option_string_actions.keys()
    assert not unknown, f"{script} has no {', '.join(sorted(unknown))}"
    if "--help" not in flags:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *given])
            getattr(module, "parse_args", parser.parse_args)()
