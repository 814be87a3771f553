"""The grid of LLM runs: its plan against the scripts' own flags, what a repeated command does, what figures see."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.faults.furnish import leave

from Class.instructions import split_path
from common.errors import InputError
from common.files import exclusive_lock
from lora_training.compare_llm import Recipe
from lora_training.steps import Step, is_done, resumed
from tables import run_llm_grid
from tables.case_studies import record_beside
from tables.rows import LINKS, TRIPLES, answer_setting
from tables.run_llm_grid import GRID, QUICK, TASKS, base_step, cell_folder, cell_steps
from tests.pages import check_command


def steps_of(ring: Path, out: Path, recipe: Recipe = GRID) -> dict[tuple[int, int], list[Step]]:
    return {(L, K): cell_steps(ring, out, L, K, TASKS, recipe, 5) for L in (2, 3) for K in (8, 16)}


def value(words: Sequence[str], flag: str) -> str:
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("recipe", [GRID, QUICK])
def test_every_step_has_flags_that_its_script_knows(ring: Path, tmp_path: Path, recipe: Recipe) -> None:
    for step in [base_step(ring, tmp_path, recipe, 5), *cell_steps(ring, tmp_path, 2, 8, TASKS, recipe, 5)]:
        check_command(f"python {shlex.join(resumed(step))}")
    with pytest.raises((AssertionError, SystemExit)):
        check_command(f"python {shlex.join([*base_step(ring, tmp_path, recipe, 5).words, '--no_such_flag', '1'])}")


def test_cells_differ_in_the_codes_alone(ring: Path, tmp_path: Path) -> None:
    """With sizes and folders put back, every cell has the words of every other one."""
    cells = steps_of(ring, tmp_path)
    made = [path for steps in cells.values() for step in steps for path in step.made]
    assert len(set(made)) == len(made), "no two steps write the same file"
    plain = set()
    for (L, K), steps in cells.items():
        words = steps[0].words
        assert (value(words, "--seq_len"), value(words, "--num_code")) == (str(L), str(K))
        text = "\n".join(shlex.join(step.words) for step in steps)
        text = text.replace(f"/{L}x{K}/", "/cell/").replace(f"_{L}_{K}_", "_")
        plain.add(text.replace(f"--seq_len {L} --num_code {K} ", ""))
        assert all(path.is_relative_to(cell_folder(tmp_path, L, K)) for step in steps for path in step.made)
    assert len(plain) == 1


def test_what_a_step_reads_an_earlier_one_wrote(ring: Path, tmp_path: Path) -> None:
    base = base_step(ring, tmp_path, GRID, 5)
    steps = cell_steps(ring, tmp_path, 2, 8, TASKS, GRID, 5)
    there = set(base.made) | {base.made[0].parent}
    for step in steps:
        for flag in ("--codes", "--eval_codes", "--checkpoint", "--code_init", "--model_name", "--train_data",
                     "--test_data"):  # fmt: skip
            assert flag not in step.words or Path(value(step.words, flag)) in there, f"{step.name} {flag}"
        there |= set(step.made)
    for task in TASKS:
        answers = cell_folder(tmp_path, 2, 8) / task / "answers.jsonl"
        assert record_beside(answers) in there, "case studies and figures find it"
        assert split_path(answers.parent / "data" / task, "test") in there


def test_a_task_alone_leaves_the_other_out(ring: Path, tmp_path: Path) -> None:
    both, links, triples = (
        {step.name for step in cell_steps(ring, tmp_path, 2, 8, tasks, GRID, 0)}
        for tasks in (TASKS, [LINKS], [TRIPLES])
    )
    assert links | triples == both and links & triples == {"stage1"}
    assert not any(name.startswith("candidates") for name in triples)


def test_a_repeated_command_runs_only_what_is_missing(
    ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps are run by a stand-in that leaves mark and files; a further K adds its own cells alone."""
    ran: list[str] = []

    def stand_in(steps: Sequence[Step], marks: Path, title: str) -> None:
        for step in steps:
            if not is_done(step, marks):
                ran.append(f"{marks.parent.name}/{step.name}")
                leave([step], marks)

    monkeypatch.setattr(run_llm_grid, "run_steps", stand_in)
    out = tmp_path / "grid"
    words = ["--dataset", str(ring), "--out", str(out), "--L", "2", "3"]
    run_llm_grid.main([*words, "--K", "8"])
    assert ran.count("grid/base") == 1 and {name.split("/")[0] for name in ran} == {"grid", "2x8", "3x8"}
    printed = capsys.readouterr().out
    assert f"--figure 7 11 --records {out}" in printed and f"{out}/3x8/link_prediction/answers.jsonl" in printed
    ran.clear()
    run_llm_grid.main([*words, "--K", "8"])
    assert ran == []
    (cell_folder(out, 3, 8) / LINKS / "inference_results.json").unlink()
    run_llm_grid.main([*words, "--K", "8"])
    assert ran == [f"3x8/{LINKS}_answers"], "what is gone is made again"
    ran.clear()
    run_llm_grid.main([*words, "--K", "8", "16", "--task", TRIPLES])
    assert {name.split("/")[0] for name in ran} == {"2x16", "3x16"} and not any(LINKS in name for name in ran)
    with pytest.raises(InputError, match="begun with another recipe"):
        run_llm_grid.main([*words, "--K", "8", "--quick"])
    with exclusive_lock(tmp_path / "grid.lock"), pytest.raises(InputError, match="another run is writing"):
        run_llm_grid.main([*words, "--K", "8"])


@pytest.mark.parametrize("words", [["--L", "0"], ["--K", "64", "64"], ["--K", "1"], ["--seed", "-1"], ["--task", "x"]])
def test_odd_sizes_are_one_line(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_llm_grid.parse_args(["--out", str(tmp_path), *words])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and words[0] in error


def test_cells_share_a_panel_though_their_rows_start_from_checkpoints_of_their_own() -> None:
    """figures/answers.py takes runs together by their label: no path may stand in it, but whether there was one."""

    def label(code_init: str | None) -> str:
        flags = {"lora_r": 32, "epochs": 1.0, "max_steps": 0, "code_init": code_init}
        training = {"args": flags, "base_model": "out/tiny_base", "rows": {"train": 1000}}
        codes = {"file": "x", "seq_len": 2, "num_quantizers": 3, "num_code": 64}
        return answer_setting({"codes": codes, "args": {}, "model": {}}, training, "with", "ring", 0)

    assert label("2x64/codes.pt") == label("4x64/codes.pt") != label(None)
