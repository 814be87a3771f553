"""Steps: run once, in order or side by side, each after those it depends on, stopped together."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import steps as module
from common.errors import InputError
from common.files import ROOT, read_json
from common.steps import Running, Step, run_steps


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


def meeting(folder: Path, name: str, other: str) -> Step:
    """A step that writes ``name`` and succeeds only if ``other`` appears while it runs."""
    made = folder / name
    text = f"""
import pathlib, time
pathlib.Path({str(made)!r}).touch()
until = time.monotonic() + 20
while not pathlib.Path({str(folder / other)!r}).exists():
    assert time.monotonic() < until
    time.sleep(0.02)
print("met")
"""
    return Step(name, ["-c", text], [made])


def test_steps_run_side_by_side_once_what_they_name_exists(tmp_path: Path) -> None:
    marks, early = tmp_path / "done", tmp_path / "model" / "weights"
    first = Step("first", ["-c", f"import pathlib, time; time.sleep(.5); p = pathlib.Path({str(early)!r}); "
                           "p.parent.mkdir(); p.touch()"], [early])  # fmt: skip
    reads = Step("reads", ["-c", f"open({str(early)!r}); open({str(tmp_path / 'read')!r}, 'w')", str(early.parent)],
                 [tmp_path / "read"])  # fmt: skip
    steps = [first, reads, meeting(tmp_path, "a", "b"), meeting(tmp_path, "b", "a")]
    assert run_steps(steps, marks, workers=4).keys() == {"first", "reads", "a", "b"}
    assert (marks / "a.log").read_text().endswith("met\n")


def test_a_folder_that_all_steps_name_delays_none(tmp_path: Path) -> None:
    """An output folder inside the data folder: every step names a folder above what all of them make."""
    steps = [step(tmp_path, name) for name in "abc"]
    run_steps([one._replace(words=[*one.words, str(tmp_path)]) for one in steps], tmp_path / "done", workers=2)
    assert runs(tmp_path, *"abc") == [1, 1, 1]


def test_after_a_failure_no_step_is_started(tmp_path: Path) -> None:
    later = Step("later", [*step(tmp_path, "later").words, str(tmp_path / "b")], [tmp_path / "later"])
    steps = [step(tmp_path, "a"), step(tmp_path, "b", 3), later]
    with pytest.raises(InputError, match=r"b\.log"):
        run_steps(steps, tmp_path / "done", workers=2)
    assert not (tmp_path / "later").exists()


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
    """The signal is held until the process is in the list of those to stop."""
    begun: list[Running] = []
    start = module.start

    def interrupted(step: Step, place: str, logs: Path | None) -> Running:
        begun.append(start(step, place, logs))
        signal.raise_signal(signal.SIGTERM)
        return begun[-1]

    class Stopped(BaseException):
        pass

    def stop(number: int, frame: object) -> None:
        raise Stopped

    monkeypatch.setattr(module, "start", interrupted)
    sleeping = Step("sleeps", ["-c", "import time; time.sleep(60)"], [tmp_path / "never"])
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stopped):
            run_steps([sleeping], tmp_path / "done")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert [one.process.returncode for one in begun] == [-signal.SIGTERM]
