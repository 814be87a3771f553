"""demo_complete.py --quick, as CI runs it: every step, the table from the records, and the faults that it reports."""

from __future__ import annotations

import importlib
import io
import json
import re
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

import demo_complete as demo
from common import steps
from common.errors import InputError, run_command
from common.files import read_json
from lora_training.score_answers import read_answers, report
from tests.pages import check_command

LLMS = [f"{name}/{demo.RESULTS}" for name in demo.VARIANTS]
RECORDS = (f"{demo.STEM}.json", demo.RANKED, demo.SHUFFLED, *LLMS)
SIZES = {"full": demo.FULL, "quick": demo.QUICK}


class Done(NamedTuple):
    out: Path
    printed: str


class InProcess:
    """In place of subprocess.Popen: runs the script in this process, since eighteen imports of torch take long."""

    def __init__(self, command: list[str], cwd: Path) -> None:
        script, *words = command[1:]
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        self.returncode = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *words])
            patch.chdir(cwd)
            try:
                run_command(module.main)
            except SystemExit as end:
                self.returncode = int(end.code or 0)

    def wait(self) -> int:
        return self.returncode


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    out, printed = tmp_path_factory.mktemp("demo") / "a folder", io.StringIO()  # with a blank: commands must quote it
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", ["demo_complete.py", "--quick", "--out_dir", str(out)])
        patch.setattr(steps, "subprocess", SimpleNamespace(Popen=InProcess))
        assert demo.main() == 0, printed.getvalue()[-3000:]
    return Done(out, printed.getvalue())


@pytest.mark.parametrize("name", SIZES)
def test_every_command_is_one_that_its_script_takes(name: str, tmp_path: Path) -> None:
    plan = demo.steps(tmp_path, SIZES[name])
    assert [Path(step.words[0]).name for step in plan] == [
        *["run_rq.py"] * 8, *["gen_lp_data_rq.py"] * 2, "check_leaks.py", "make_tiny_base.py",
        *["train_lora.py", "inference.py"] * 2, "score_answers.py", "make_figures.py",
    ]  # fmt: skip
    for step in plan:
        check_command(f"python {shlex.join(step.words)}")
        assert all(path.is_relative_to(tmp_path) for path in step.outputs)


def test_each_step_prints_its_command_and_what_it_wrote(done: Done) -> None:
    plan = demo.steps(done.out, demo.QUICK)
    for number, step in enumerate(plan, 1):
        assert f"[{number}/{len(plan)}] {step.name}\n$ python {shlex.join(step.words)}\n" in done.printed
        for path in step.outputs:
            assert path.exists() and str(path) in done.printed
    assert "--out_dir '" in done.printed, "the blank in the folder's name is quoted"


def test_the_printed_table_is_that_of_the_records(done: Done) -> None:
    lines = {line.label: line.metrics for line in demo.table(done.out)}
    record = read_json(done.out / f"{demo.STEM}.json", "record")
    rows = [re.split(r"\s{2,}", line) for line in done.printed.splitlines() if line.startswith(tuple(lines))]
    assert [row[0] for row in rows] == list(lines) and len(rows) == 6
    answered, shuffled = (
        report(read_answers(done.out / name / "answers.jsonl").answers)[demo.TASK]["test"] for name in demo.VARIANTS
    )
    assert answered["count"] == shuffled["count"] == demo.QUICK.test_rows
    found = (record["test"], record["test"], None, answered, shuffled, answered["as_listed"])
    for row, metrics in zip(rows, found, strict=True):
        if metrics:
            assert row[1:] == [f"{metrics[name]:.3f}" for name in ("mrr", "hits@1", "hits@3", "hits@10")]


def test_the_printed_gain_is_the_difference_of_the_two_lines(done: Done) -> None:
    lines = {line.label: line.metrics for line in demo.table(done.out)}
    ours, theirs = (metrics["mrr"] for label, metrics in lines.items() if label.startswith("LLM with"))
    assert f"shuffled codes: {ours - theirs:+.3f} (standard error" in done.printed


def test_the_integers_give_the_score_and_shuffled_ones_do_not(done: Done) -> None:
    recorded, again, shuffled = (line.metrics for line in demo.table(done.out)[:3])
    assert again == recorded and again["count"] == 952
    assert recorded["mrr"] > 0.3 and shuffled["mrr"] < 0.02


def test_the_order_of_the_lists_is_random(done: Done) -> None:
    """The place of the truth is drawn: the order alone scores like a random guess, within four standard errors."""
    listed = demo.table(done.out)[5].metrics
    ranks = np.array([1 / rank for rank in range(1, demo.CANDIDATES + 1)])
    assert abs(listed["mrr"] - ranks.mean()) < 4 * ranks.std() / demo.QUICK.test_rows**0.5


def test_the_record_has_the_seconds_of_every_step(done: Done) -> None:
    record = json.loads((done.out / demo.RECORD).read_text())
    assert len(record["seconds"]) == 18 and sum(record["seconds"].values()) <= record["wall_seconds"] + 1
    assert {path.suffix for path in (done.out / "figures").iterdir()} == {".png", ".pdf"}


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (demo.RANKED, lambda metrics: metrics | {"hits@3": metrics["hits@3"] - 0.001}, "was recorded"),
        (demo.SHUFFLED, lambda metrics: metrics | {"mrr": 0.9}, "shuffled codes still give MRR 0.9000"),
    ],
    ids=["another score from the integers", "a score without the codes"],
)
def test_a_score_that_is_not_the_codes_is_a_fault(
    done: Done, tmp_path: Path, file: str, change: Any, words: str
) -> None:
    for name in RECORDS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(done.out / name, tmp_path / name)
    assert demo.fault(demo.table(tmp_path)) is None
    (tmp_path / file).write_text(json.dumps(change(read_json(tmp_path / file, "metrics"))))
    assert words in str(demo.fault(demo.table(tmp_path)))


def test_a_step_that_fails_stops_the_demo(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        demo.run_steps([demo.Step("nothing", ["run_rq.py", "--dataset", str(tmp_path / "none")], [])])
