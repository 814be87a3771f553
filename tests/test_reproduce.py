"""docs/REPRODUCE.md: its numbers are those of tables/records, its commands (and tables/README.md's) the scripts'."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from run_record import ROOT, InputError
from tables import make_tables

PAGE = ROOT / "docs" / "REPRODUCE.md"
TEXT = PAGE.read_text(encoding="utf-8")


def indented(text: str) -> list[str]:
    """The commands of a page: its indented lines, joined where they go on, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith("    ")]


LINES = indented(TEXT) + indented((ROOT / "tables" / "README.md").read_text(encoding="utf-8"))
VARIABLES = dict(re.findall(r'^(\w+)="(.*)"$', "\n".join(LINES), re.MULTILINE))
INLINE = re.findall(r"`(python [^`]+)`", TEXT)
COMMANDS = sorted({line for line in [*LINES, *INLINE] if line.startswith("python ")})


def test_the_numbers_are_those_of_the_records() -> None:
    now = make_tables.reproduced(TEXT)
    assert now == TEXT, "out of date: python tables/make_tables.py --reproduce docs/REPRODUCE.md"
    assert {int(number) for number in re.findall(r"<!-- table (\d) -->", TEXT)} == set(make_tables.NUMBERS)


def test_a_number_changed_by_hand_is_seen(tmp_path: Path) -> None:
    """The control of the test above."""
    changed = re.sub(r"(\| ours \|.*?\| \*{0,2}\.)\d\d\d", r"\g<1>999", TEXT, count=1)
    assert changed != TEXT and make_tables.reproduced(changed) == TEXT
    page = tmp_path / "page.md"
    page.write_text(changed, encoding="utf-8")
    make_tables.main(["--reproduce", str(page)])
    assert page.read_text(encoding="utf-8") == TEXT
    with pytest.raises(InputError, match=r"has blocks of tables \[\]"):
        make_tables.reproduced("# no block\n")


def test_the_page_has_commands_for_every_stage() -> None:
    named = {line.split()[1] for line in COMMANDS}
    assert {"run_rq.py", "Class/gen_lp_data_rq.py", "Class/gen_fb_data_rq.py", "lora_training/train_lora.py",
            "lora_training/inference.py", "tables/results.py", "tables/make_tables.py"} <= named  # fmt: skip
    assert all(line.startswith(("python ", *(f"{name}=" for name in VARIABLES))) for line in LINES if line)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str) -> None:
    for name, value in VARIABLES.items():
        command = command.replace(f"${name}", value)
    assert "$" not in command, "a variable of the page is not set"
    _, script, *words = shlex.split(command)
    assert (ROOT / script).is_file(), f"{script} is named and not there"
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if hasattr(module, "parse_args"):
        module.parse_args(words)
        return
    # the parser is made inside main: ask the script itself
    shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(re.search(rf"{word}\b", shown.stdout) for word in words if word.startswith("--"))
