"""tune.py: the default settings come first, test is never read, a search is shared and continued, weak trials end."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

import tune
from common.config import Config, parse_config
from common.files import ROOT
from tests.conftest import Command, assert_refused, flags_of, write_graph

# a run of half a second
FIXED = {"epoch": 4, "init_dim": 12, "seq_len": 3, "num_code": 8, "num_quantizers": 2, "device": "cpu"}


def words_of(data: Path, folder: Path, **more: Any) -> list[str]:
    return flags_of({"dataset": data, "checkpoint_dir": folder, "out": folder / "out.txt", **FIXED, **more})


@pytest.fixture
def tuned(shell: Command) -> Command:
    """tune.py."""
    return partial(shell, tune)


@pytest.fixture(scope="module")
def untested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny graph with a test split that cannot be read."""
    folder = write_graph(tmp_path_factory.mktemp("data") / "ring")
    (folder / "test.txt").write_bytes(b"\xff\0 no triples\n")
    return folder


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{folder}/ring_tune.db"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


def test_a_search_is_no_worse_than_its_first_trial_and_goes_on(tuned: Command, untested: Path, tmp_path: Path) -> None:
    words, out = words_of(untested, tmp_path), tmp_path / "out.txt"
    first = tuned(*words, "--trials", "3")
    assert first.code == 0, first.err
    trials, record = trials_of(tmp_path), json.loads(out.with_suffix(".json").read_text())
    assert len(trials) == 3 and [trial.user_attrs.get("default", False) for trial in trials] == [True, False, False]
    values = [trial.value for trial in trials if trial.value is not None]
    assert record["valid_mrr"] == {"default": trials[0].value, "best": max(values)}
    assert "train.txt" in record["inputs"] and not any("test" in name for name in record["inputs"])

    plain = parse_config(flags_of({"dataset": untested, **FIXED}))
    config = parse_config(["--config", str(out), "--dataset", str(untested)])
    best = trials[values.index(max(values))] if len(values) == 3 else trials[record["best_trial"]]
    assert all(getattr(config, name) == value for name, value in best.user_attrs["settings"].items())
    changed = {name for name, value in config.compared().items() if value != plain.compared()[name]}
    assert changed <= best.user_attrs["settings"].keys()

    before = out.read_bytes()
    assert tuned(*words, "--trials", "3").code == 0  # nothing is left to do
    assert len(trials_of(tmp_path)) == 3 and out.read_bytes() == before
    assert tuned(*words, "--trials", "4").code == 0
    again = trials_of(tmp_path)
    assert len(again) == 4 and [trial.params for trial in again[:3]] == [trial.params for trial in trials]


def test_the_first_trial_scores_what_a_run_without_the_search_does(
    tuned: Command, untested: Path, tmp_path: Path, rq: Command
) -> None:
    """With valid as test split, which adds no answer to the filter."""
    assert tuned(*words_of(untested, tmp_path), "--trials", "1").code == 0
    data = write_graph(tmp_path / "copy" / "ring")
    (data / "test.txt").write_bytes((data / "valid.txt").read_bytes())
    found = {}
    for name, more in {"plain": flags_of(FIXED), "tuned": ["--config", str(tmp_path / "out.txt")]}.items():
        folders = flags_of({"dataset": data, "out_dir": tmp_path / name, "checkpoint_dir": tmp_path / name})
        assert rq(*folders, *more).code == 0
        (record,) = (tmp_path / name).glob("ring_*_rq.json")
        found[name] = json.loads(record.read_text())["valid"]["mrr"]
    assert found["plain"] == found["tuned"] == pytest.approx(trials_of(tmp_path)[0].value)


def test_a_result_of_another_search_is_kept(tuned: Command, untested: Path, tmp_path: Path) -> None:
    words, out = words_of(untested, tmp_path), tmp_path / "out.txt"
    out.write_text("--lr 1\n")  # a person's
    assert_refused(tuned(*words, "--trials", "1"), str(out), "--overwrite")
    assert out.read_text() == "--lr 1\n"
    assert tuned(*words, "--trials", "1", "--overwrite").code == 0
    assert tuned(*words, "--trials", "1").code == 0
    assert_refused(tuned(*words, "--trials", "1", "--lbl_smooth", "0.2"), str(out), "--out")


def test_a_killed_trial_is_done_again(
    tuned: Command, untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, str(ROOT / "tune.py"), *words_of(untested, tmp_path, epoch=60, trials=3)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as killed:
        until = time.monotonic() + 120
        while not running(tmp_path / "ring_tune.db") and time.monotonic() < until:
            assert killed.poll() is None
            time.sleep(0.02)
        killed.kill()
    monkeypatch.setattr(tune, "GRACE", 1)
    time.sleep(2.5)
    assert tuned(*words_of(untested, tmp_path, epoch=60, trials=3)).code == 0
    trials = trials_of(tmp_path)
    states = [trial.state.name for trial in trials]
    assert states.count("FAIL") == 1 and states.count("COMPLETE") + states.count("PRUNED") == 3
    assert [trial.state.name for trial in trials if trial.user_attrs.get("default")] == ["FAIL", "COMPLETE"]


def test_two_processes_share_a_search(untested: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tune.py"), *words_of(untested, tmp_path, trials=4)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert sorted(process.returncode for process in both)[0] == 0, said
    trials = trials_of(tmp_path)
    assert 4 <= len(trials) <= 5, "the last trials of both may end together"
    assert [trial.user_attrs.get("default") for trial in trials].count(True) == 1
    assert (tmp_path / "out.txt").exists()


def running(storage: Path) -> bool:
    """Whether a trial runs and has given a sign of life."""
    try:
        with sqlite3.connect(storage, timeout=10) as base:
            return bool(base.execute("SELECT count(*) FROM trial_heartbeats").fetchone()[0])
    except sqlite3.OperationalError:  # no table yet
        return False


def test_no_trial_starts_after_the_time(tuned: Command, untested: Path, tmp_path: Path) -> None:
    assert tuned(*words_of(untested, tmp_path), "--max_minutes", "0.0001").code == 0
    (trial,) = trials_of(tmp_path)
    assert trial.user_attrs["default"] and (tmp_path / "out.txt").exists()


def test_settings_that_do_not_work_are_one_line(tuned: Command, untested: Path, tmp_path: Path) -> None:
    outcome = tuned(*words_of(untested, tmp_path, ensemble=5))  # does not divide the width
    assert_refused(outcome, "default settings")


def test_a_file_that_is_no_search_is_named(tuned: Command, untested: Path, tmp_path: Path) -> None:
    (tmp_path / "ring_tune.db").write_text("no database")
    assert_refused(tuned(*words_of(untested, tmp_path)), "ring_tune.db")
    assert (tmp_path / "ring_tune.db").read_text() == "no database"


def test_flags_of_the_command_line_are_not_searched() -> None:
    space = tune.space_of(parse_config([]), {})
    assert space == tune.SPACE
    assert "batch" not in tune.space_of(parse_config(["--batch", "64"]), {"batch": 64})
    given = parse_config(["--lr", "0.1", "--loss", "bce", "--code_dim", "8"])
    left = tune.space_of(given, {"lr": 0.1})
    assert not {"optimizer", "lr", "tails_at_once", "init_dim"} & left.keys() and "freeze_at" in left


@pytest.mark.parametrize("words", [["--eval_codes", "c.pt"], ["--restore"], ["--name", "x"], ["--split", "test"]])
def test_flags_without_a_meaning_here_are_refused(tuned: Command, words: list[str]) -> None:
    assert_refused(tuned("--dataset", "none", *words), words[0])


def watched(study: optuna.Study, scores: list[float], default: bool) -> None:
    """A run of ten epochs whose valid MRR from codes is ``scores``."""
    trial = study.ask()
    trial.set_user_attr("default", default)
    trainer: Any = SimpleNamespace(
        watchers=[], best={}, config=Config(epoch=10), schedule=SimpleNamespace(progress=lambda epoch: epoch / 10)
    )
    tune.watch_trial(trainer, trial)
    for epoch, score in enumerate(scores, 1):
        if epoch % 3 == 1:  # an epoch that is not ranked reports nothing
            trainer.watchers[0]({"epoch": epoch, "valid": {"mrr": score}})
        else:
            trainer.watchers[0]({"epoch": epoch})
    study.tell(trial, scores[-1])


def test_a_trial_far_behind_is_pruned_but_never_the_default() -> None:
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=5))
    for _ in range(5):
        watched(study, [0.5] * 10, default=False)
    assert sorted(study.trials[0].intermediate_values) == list(range(1, 11))
    watched(study, [0.1] * 10, default=True)
    watched(study, [0.6] * 10, default=False)
    with pytest.raises(optuna.TrialPruned):
        watched(study, [0.1] * 10, default=False)


def test_the_range_includes_the_default() -> None:
    trial = optuna.trial.FixedTrial({"a": 0.9, "b": 7})
    assert tune.draw(trial, "a", tune.Between(0.0, 0.5), 0.9) == 0.9  # type: ignore[arg-type]
    assert tune.draw(trial, "b", (1, 2), 7) == 7  # type: ignore[arg-type]
