"""docs/REPRODUCE.md: its numbers are those of tables/records, its commands (and tables/README.md's) the scripts'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.errors import InputError
from common.files import ROOT
from tables import make_tables
from tests.pages import check_command, indented, page_commands, read_page

PAGE = ROOT / "docs" / "REPRODUCE.md"
TEXT = PAGE.read_text(encoding="utf-8")


PAGES = [TEXT, read_page("tables/README.md")]
LINES = [line for text in PAGES for line in indented(text)]
VARIABLES = dict(re.findall(r'^(\w+)="(.*)"$', "\n".join(LINES), re.MULTILINE))
COMMANDS = sorted({line for text in PAGES for line in page_commands(text)})


def test_the_numbers_are_those_of_the_records() -> None:
    now = make_tables.reproduced(TEXT)
    assert now == TEXT, "out of date: python tables/make_tables.py --reproduce docs/REPRODUCE.md"
    assert {int(number) for number in re.findall(r"<!-- table (\d) -->", TEXT)} == set(make_tables.NUMBERS)


def test_a_number_edited_by_hand_is_replaced(tmp_path: Path) -> None:
    """The control of the test above."""
    changed = re.sub(r"(\| ours \|.*?\| \*{0,2}\.)\d\d\d", r"\g<1>999", TEXT, count=1)
    assert changed != TEXT and make_tables.reproduced(changed) == TEXT
    page = tmp_path / "page.md"
    page.write_text(changed, encoding="utf-8")
    make_tables.main(["--reproduce", str(page)])
    assert page.read_text(encoding="utf-8") == TEXT
    with pytest.raises(InputError):
        make_tables.reproduced("# no block\n")


def test_the_page_has_commands_for_every_stage() -> None:
    named = {line.split()[1] for line in COMMANDS}
    assert {"run_rq.py", "Class/gen_lp_data_rq.py", "Class/gen_fb_data_rq.py", "lora_training/train_lora.py",
            "lora_training/inference.py", "tables/results.py", "tables/make_tables.py"} <= named  # fmt: skip
    assert all(line.startswith(("python ", *(f"{name}=" for name in VARIABLES))) for line in LINES if line)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str) -> None:
    assert "$" not in command, "a variable of the page is not set"
    check_command(command)
