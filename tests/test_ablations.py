"""The grid of ablations: equal budgets, valid commands, finished runs are not repeated, results from records."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from common.errors import InputError
from tables import run_ablations
from tests.conftest import small_flags
from tests.pages import check_command

TEXT = Path("text.npy")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Setting -> its command, for seed 3."""
    text = tmp_path_factory.mktemp("a folder") / TEXT
    text.touch()
    args = run_ablations.parse_args(["--text_emb", str(text), "--out", str(text.parent)])
    return {name: run_ablations.step_of(args, name, 3).words for name in run_ablations.grid(text)}


@pytest.mark.parametrize("name", run_ablations.grid(TEXT))
def test_every_setting_is_a_command_of_run_rq(name: str, plan: dict[str, list[str]]) -> None:
    check_command(f"python {shlex.join(plan[name])}")
    assert {("--seed", "3"), ("--epoch", "10"), ("--split", "valid")} <= set(
        zip(plan[name], plan[name][1:], strict=False)
    )


def test_equal_budgets_are_equal(plan: dict[str, list[str]]) -> None:
    for name, setting in run_ablations.grid(None).items():
        if setting.group in ("full model", "equal tokens"):
            flags = dict(zip(plan[name], plan[name][1:], strict=False))  # the last of a repeated flag
            L, Q, width = (int(flags[flag]) for flag in ("--seq_len", "--num_quantizers", "--code_dim"))
            assert (L * Q, L * width) == (16, run_ablations.Z_WIDTH), name


def test_finished_runs_are_not_repeated_and_results_come_from_records(
    ring: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = iter(small_flags(ring, tmp_path))
    words = dict(zip(flags, flags, strict=False))
    for own in ("--config", "--dataset", "--out_dir", "--checkpoint_dir", "--epoch"):
        words.pop(own, None)
    config = tmp_path / "recipe.txt"
    config.write_text(shlex.join([word for pair in words.items() for word in pair]))
    out = tmp_path / "out"
    common = ["--config", str(config), "--dataset", str(ring), "--epochs", "4", "--out", str(out)]

    def rows(*more: str) -> list[dict[str, object]]:
        run_ablations.main([*common, *more])
        found: list[dict[str, object]] = json.loads((out / "ablations.json").read_text())["rows"]
        return found

    first = rows("--only", "4x2", "unquantized")
    assert [line["name"] for line in first] == ["4x2", "unquantized"]
    for line in first:
        record = json.loads((out / str(line["record"])).read_text())
        assert line["mrr"] == record["valid"]["mrr"] and "test" not in record and record["epochs"] == 4
    coded = json.loads((out / str(first[0]["record"])).read_text())
    assert first[0]["tokens"] == coded["shape"][1] * coded["shape"][2] and first[0]["bits"] == 3 * 2 * 3
    assert first[1]["tokens"] is None and first[1]["bits"] is None
    assert len(coded["valid_mrr_by_levels"]) == 2 and first[0]["mrr_by_levels"] == coded["valid_mrr_by_levels"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    capfd.readouterr()
    assert rows("--only", "4x2", "unquantized") == first and "$ python" not in capfd.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    (out / "ablations.json").unlink()
    assert rows("--only", "unquantized") == first, "the results of earlier calls stay"
    with pytest.raises(InputError) as error:
        rows("--epochs", "5", "--only", "4x2")
    assert "4x2_seed0" in str(error.value) and "\n" not in str(error.value)
    assert json.loads((out / "ablations.json").read_text())["rows"] == first


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--only", "text_loss"], "--text_emb"),
        (["--config", "none.txt"], "--config"), (["--text_emb", "none.npy"], "--text_emb"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_line(
    words: list[str], flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run_ablations.main([*words, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1 and flag in printed
    assert not list(tmp_path.iterdir())
