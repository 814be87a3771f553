"""Steps: run once, in order, stopped together with the process that runs them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import InputError
from common.files import ROOT, read_json
from common.steps import Step, run_steps


def step(folder: Path, name: str, code: int = 0) -> Step:
    """A step that counts its runs in ``name``.runs and, unless it fails, writes ``name``."""
    made = folder / name
    text = (
        f"open({str(made) + '.runs'!r}, 'a').write('.'); {code} or open({str(made)!r}, 'w'); raise SystemExit({code})"
    )
    return Step(name, ["-c", text], [made])


def runs(folder: Path, *names: str) -> list[int]:
    return [len((folder / f"{name}.runs").read_text()) for name in names]


def test_a_repeated_command_does_only_what_is_missing(tmp_path: Path) -> None:
    marks = tmp_path / "done"
    with pytest.raises(InputError):
        run_steps([step(tmp_path, "a"), step(tmp_path, "b", 3), step(tmp_path, "c")], marks)
    assert not (tmp_path / "c").exists()
    again = [step(tmp_path, name) for name in "abc"]
    for _ in range(2):
        seconds = run_steps(again, marks)
        assert runs(tmp_path, *"abc") == [1, 2, 1]
    (tmp_path / "c").unlink()
    assert run_steps(again, marks)["a"] == seconds["a"]
    assert runs(tmp_path, *"abc") == [1, 2, 2], "what is gone is made again"
    assert list(run_steps(again)) == list("abc")
    assert runs(tmp_path, *"abc") == [2, 3, 3], "without marks every step runs"


def test_a_step_that_another_command_finished_is_an_error(tmp_path: Path) -> None:
    """Before anything is run: results of two commands would be mixed."""
    marks = tmp_path / "done"
    run_steps([step(tmp_path, "a")], marks)
    changed = step(tmp_path, "a")
    changed = changed._replace(words=[*changed.words, "--lr", "0.5"])
    with pytest.raises(InputError):
        run_steps([step(tmp_path, "b"), changed], marks)
    assert not (tmp_path / "b").exists()
    assert run_steps([step(tmp_path, "a")._replace(more=lambda: ["--restore"])], marks), "not part of the command"


def test_a_step_that_writes_nothing_is_not_done(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        run_steps([Step("x", ["-c", ""], [tmp_path / "x"])], tmp_path / "done")
    assert not (tmp_path / "done").exists()


def test_further_flags_are_decided_when_the_step_starts(tmp_path: Path) -> None:
    """As --restore is: it depends on what an interrupted run left."""
    first = step(tmp_path, "first")
    text = f"import sys; open({str(tmp_path / 'second')!r}, 'w').write(' '.join(sys.argv[1:]))"
    more = lambda: ["--restore"] if (tmp_path / "first").exists() else []  # noqa: E731
    run_steps([first, Step("second", ["-c", text], [tmp_path / "second"], more)], tmp_path / "done")
    assert (tmp_path / "second").read_text() == "--restore"
    assert read_json(tmp_path / "done" / "second.json", "mark")["command"] == ["-c", text]


def wait_for(path: Path) -> None:
    until = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < until, f"{path} was not written"
        time.sleep(0.02)


@pytest.mark.parametrize(("signals", "wanted"), [(1, "cleaned up"), (2, "")])
def test_sigterm_stops_the_steps_too(tmp_path: Path, signals: int, wanted: str) -> None:
    """One signal is passed on to the steps, which may clean up; a second one kills them."""
    log, started, received = (tmp_path / name for name in ("log", "started", "received"))
    child = (
        "import pathlib, signal, sys, time\n"
        f"def end(*_):\n    pathlib.Path({str(received)!r}).touch()\n    time.sleep(1)\n"
        f"    pathlib.Path({str(log)!r}).write_text('cleaned up')\n    sys.exit(143)\n"
        f"signal.signal(signal.SIGTERM, end)\npathlib.Path({str(started)!r}).touch()\ntime.sleep(60)\n"
    )
    parent = (
        "from common.errors import run_command\nfrom common.steps import Step, run_steps\n"
        f"run_command(lambda: run_steps([Step('s', ['-c', {child!r}], [])]) and None)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    wait_for(started)
    for _ in range(signals):
        process.terminate()
        wait_for(received)
    assert process.wait(20) == 143
    assert (log.read_text() if log.exists() else "") == wanted


def test_a_signal_while_a_step_starts_stops_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal is held until the process can be stopped."""
    begun: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def interrupted(*words: Any, **how: Any) -> subprocess.Popen[bytes]:
        begun.append(start(*words, **how))
        signal.raise_signal(signal.SIGTERM)
        return begun[-1]

    class Stopped(BaseException):
        pass

    def stop(number: int, frame: object) -> None:
        raise Stopped

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    sleeping = Step("sleeps", ["-c", "import time; time.sleep(60)"], [tmp_path / "never"])
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stopped):
            run_steps([sleeping], tmp_path / "done")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert [process.returncode for process in begun] == [-signal.SIGTERM]
