"""Steps: done once, in order or side by side, each after what it names, ended together."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import InputError
from common.files import ROOT
from lora_training.steps import Running, Step, Task, begin, resumed, run_steps, run_tasks, seconds_of, tasks_of


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
    done = tmp_path / "done"
    with pytest.raises(InputError, match="step b ended with exit code 3"):
        run_steps([step(tmp_path, "a"), step(tmp_path, "b", 3), step(tmp_path, "c")], done, "seed 0")
    assert not (tmp_path / "c").exists()
    again = [step(tmp_path, name) for name in "abc"]
    for _ in range(2):
        run_steps(again, done, "seed 0")
        assert runs(tmp_path, *"abc") == [1, 2, 1]
    (tmp_path / "c").unlink()
    run_steps(again, done, "seed 0")
    assert runs(tmp_path, *"abc") == [1, 2, 2], "what is gone is made again"
    assert seconds_of(done).keys() == set("abc")


def meeting(folder: Path, name: str, other: str, *named: Path) -> Step:
    """A step that leaves ``name`` and ends well only when ``other`` comes while it runs."""
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
    return Step(name, ["-c", text, *map(str, named)], [made])


def test_steps_run_side_by_side_once_what_they_name_is_there(tmp_path: Path) -> None:
    done, early = tmp_path / "done", tmp_path / "model" / "weights"
    first = Step("first", ["-c", f"import pathlib, time; time.sleep(.5); p = pathlib.Path({str(early)!r}); "
                           "p.parent.mkdir(); p.touch()"], [early])  # fmt: skip
    reads = Step("reads", ["-c", f"open({str(early)!r}); open({str(tmp_path / 'read')!r}, 'w')", str(early.parent)],
                 [tmp_path / "read"])  # fmt: skip
    steps = [first, reads, meeting(tmp_path, "a", "b"), meeting(tmp_path, "b", "a")]
    run_tasks(tasks_of(steps, done, "seed 0"), workers=4)
    assert seconds_of(done).keys() == {"first", "reads", "a", "b"}
    assert (done / "a.log").read_text().endswith("met\n")


def test_a_folder_that_all_steps_name_holds_nobody_up(tmp_path: Path) -> None:
    """OUT below the data set's folder: every step names a folder above what all of them make."""
    steps = [step(tmp_path, name) for name in "abc"]
    steps = [one._replace(words=[*one.words, str(tmp_path)]) for one in steps]
    run_tasks(tasks_of(steps, tmp_path / "done", "seed 0"), workers=2)
    assert runs(tmp_path, *"abc") == [1, 1, 1]


def test_sigterm_ends_the_steps_too(tmp_path: Path) -> None:
    """Asked alone, the command asks its steps, which end in their own way; a second signal kills them."""
    for name, asked, wanted in (("once", 1, "ended in its own way"), ("twice", 2, "")):
        said = tmp_path / name
        child = (
            "import pathlib, signal, sys, time\n"
            f"said = pathlib.Path({str(said)!r})\n"
            "def end(*_):\n    said.with_suffix('.asked').touch()\n    time.sleep(2)\n"
            "    said.write_text('ended in its own way')\n    sys.exit(143)\n"
            "signal.signal(signal.SIGTERM, end)\nsaid.with_suffix('.begun').touch()\ntime.sleep(60)\n"
        )
        parent = (
            "import sys; from pathlib import Path; from common.errors import run_command\n"
            "from lora_training.steps import Step, run_steps\n"
            f"run_command(lambda: run_steps([Step('s', ['-c', {child!r}], [])], Path({str(tmp_path / 'done')!r}), 't'))"
        )
        process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
        wait_for(said.with_suffix(".begun"))
        for _ in range(asked):
            process.terminate()
            wait_for(said.with_suffix(".asked"))
        assert process.wait(20) == 143
        assert (said.read_text() if said.exists() else "") == wanted


def wait_for(path: Path) -> None:
    until = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.02)


def test_a_signal_at_the_start_of_a_step_ends_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held until the process has its place in the list: by it who ends is known."""
    begun: list[Running] = []

    def interrupted(task: Task, to_file: bool) -> Running:
        begun.append(begin(task, to_file))
        signal.raise_signal(signal.SIGTERM)
        return begun[-1]

    class Stopped(BaseException):
        pass

    def stop(number: int, frame: object) -> None:
        raise Stopped

    monkeypatch.setattr("lora_training.steps.begin", interrupted)
    sleeping = Step("sleeps", ["-c", "import time; time.sleep(60)"], [tmp_path / "never"])
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stopped):
            run_tasks(tasks_of([sleeping], tmp_path / "done", ""), workers=1)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert [one.process.returncode for one in begun] == [-signal.SIGTERM]


def test_after_a_failure_nothing_more_is_begun(tmp_path: Path) -> None:
    later = Step("later", [*step(tmp_path, "later").words, str(tmp_path / "b")], [tmp_path / "later"])
    steps = [step(tmp_path, "a"), step(tmp_path, "b", 3), later]
    with pytest.raises(InputError, match=r"step b ended with exit code 3; see .*b\.log"):
        run_tasks(tasks_of(steps, tmp_path / "done", "seed 0"), workers=2)
    assert not (tmp_path / "later").exists() and seconds_of(tmp_path / "done").keys() <= {"a"}


def test_a_step_that_writes_nothing_is_not_done(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did not write"):
        run_steps([Step("x", ["-c", ""], [tmp_path / "x"])], tmp_path / "done", "seed 0")


def test_interrupted_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    tuning = Step("t", ["t.py"], [], tmp_path)
    assert resumed(tuning) == ["t.py", "--overwrite"]
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "trainer_state.json").write_text("{}")
    assert resumed(tuning)[1:] == ["--overwrite"], "killed before the checkpoint was whole"
    (tmp_path / "checkpoint-7" / "seconds.json").write_text("{}")
    assert resumed(tuning) == ["t.py", "--resume_from_checkpoint", "last"]
    assert resumed(Step("s", ["s.py"], [])) == ["s.py"]
