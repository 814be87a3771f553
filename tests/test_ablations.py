"""The grid of ablations: equal budgets, commands that parse, runs that resume, rows read off records."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import run_rq
from tables import run_ablations
from tests.conftest import small_flags

TEXT = Path("text.npy")


@pytest.mark.parametrize("name", run_ablations.grid(TEXT))
def test_every_setting_is_a_command_of_run_rq(name: str, tmp_path: Path) -> None:
    args = run_ablations.build_parser().parse_args([])
    setting = run_ablations.grid(TEXT)[name]
    parsed = run_rq.parse_config(run_ablations.command(args, setting, 3, tmp_path)[1:])
    assert (parsed.seed, parsed.epoch, parsed.max_minutes, parsed.split) == (3, 10, 0, "valid")


def test_equal_budgets_are_equal() -> None:
    for name, setting in run_ablations.grid(None).items():
        if setting.group in ("recipe", "equal tokens"):
            parsed = run_rq.parse_config(shlex.split(setting.flags))
            assert parsed.seq_len * parsed.num_quantizers == 16, name
            assert parsed.seq_len * parsed.code_dim == run_ablations.Z_WIDTH, name


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["run_ablations.py", *words])
    run_ablations.main()


def test_runs_resume_and_rows_are_read_off_records(
    ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = iter(small_flags(ring, tmp_path))
    words = dict(zip(flags, flags, strict=False))
    for own in ("--dataset", "--out_dir", "--checkpoint_dir", "--epoch"):
        words.pop(own, None)
    config = tmp_path / "recipe.txt"
    config.write_text(shlex.join([word for pair in words.items() for word in pair]))
    out = tmp_path / "out"
    common = ["--config", str(config), "--dataset", str(ring), "--epochs", "4", "--out", str(out)]
    run_main(monkeypatch, *common, "--only", "4x2", "unquantized")
    rows = json.loads((out / "ablations.json").read_text())["rows"]
    assert [line["name"] for line in rows] == ["4x2", "unquantized"]
    for line in rows:
        record = json.loads((out / line["record"]).read_text())
        assert line["mrr"] == record["valid"]["mrr"] and "test" not in record and record["epochs"] == 4
    coded = json.loads((out / rows[0]["record"]).read_text())
    assert rows[0]["tokens"] == coded["shape"][1] * coded["shape"][2] and rows[1]["tokens"] is None
    assert len(rows[0]["mrr_by_levels"]) == 2
    capfd.readouterr()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    run_main(monkeypatch, *common, "--only", "4x2", "unquantized")
    assert capfd.readouterr().out.count("done before") == 2
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    assert json.loads((out / "ablations.json").read_text())["rows"] == rows
    (out / "ablations.json").unlink()
    run_main(monkeypatch, *common, "--only", "unquantized")  # one setting looked at: the other's row stays
    assert json.loads((out / "ablations.json").read_text())["rows"] == rows
    for more, word in (["--epochs", "5"], "epoch (there 4, here 5)"), (["--flags", "--lr 0.5"], "lr (there "):
        with pytest.raises(run_ablations.InputError) as error:
            run_main(monkeypatch, *common, *more, "--only", "4x2")
        assert word in str(error.value) and "--out" in str(error.value)
    assert json.loads((out / "ablations.json").read_text())["rows"] == rows


def test_flags_with_an_open_quote_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(run_ablations.InputError, match="--flags --name 'a cannot be read as flags: No closing"):
        run_main(monkeypatch, "--flags", "--name 'a", "--only", "4x4", "--out", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_an_unknown_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(run_ablations.InputError, match="text_loss: no such setting"):
        run_main(monkeypatch, "--only", "text_loss")
