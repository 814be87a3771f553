"""Run commands of other scripts as steps: in order, each once, resumable, stopped together with this process."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError, content_of
from common.files import ROOT, read_json, write_json


class Step(NamedTuple):
    """A command of another script, run from the repository root."""

    name: str  # unique; may contain "/": its mark is MARKS/name.json
    words: list[str]  # the script, then its flags
    outputs: list[Path]  # files or folders that exist after it
    more: Callable[[], list[str]] = list  # further flags, decided when the step starts (as in --restore)


def run_steps(steps: Sequence[Step], marks: Path | None = None) -> dict[str, float]:
    """Run the steps that are not done, in order; returns the seconds of every step by its name.

    A step that succeeded leaves a mark in the folder ``marks`` and is not run again while its outputs exist; without
    ``marks`` every step runs. Raises InputError where a step fails, or was finished by another command. SIGTERM is
    passed on to the running step (Ctrl-C in a terminal reaches it anyway); a second signal kills it.
    """
    seconds = {step.name: done for step in steps if (done := seconds_of(step, marks)) is not None}
    for number, step in enumerate(steps, 1):
        if step.name not in seconds:
            seconds[step.name] = run(step, f"{number}/{len(steps)}", marks)
    return {step.name: seconds[step.name] for step in steps}


def seconds_of(step: Step, marks: Path | None) -> float | None:
    """Seconds that a finished step took; None if it is not done. InputError if another command finished it."""
    mark = marks / f"{step.name}.json" if marks else None
    if mark is None or not mark.is_file() or not all(path.exists() for path in step.outputs):
        return None
    with content_of(mark, "mark of a step", "remove it and repeat the command: its step runs again"):
        record = read_json(mark, "mark")
        if record["command"] != step.words:
            changed = [word for word in step.words if word not in record["command"]]
            raise InputError(
                f"{mark}: this step was run with another command (now {shlex.join(changed or step.words)}); "
                "choose another output folder, or remove this file to run the step again"
            )
        return float(record["seconds"])


def run(step: Step, place: str, marks: Path | None) -> float:
    """Run a step, mark it and return its seconds; InputError if it fails."""
    words, started = [*step.words, *step.more()], time.monotonic()
    print(f"\n[{place}] {step.name}\n$ python {shlex.join(words)}", flush=True)
    process: subprocess.Popen[bytes] | None = None
    try:
        with signals_held():  # a process that has no name yet could not be stopped
            process = subprocess.Popen([sys.executable, *words], cwd=ROOT)
        process.wait()
    except BaseException as error:
        if process is not None:
            stop(process, pass_on=not isinstance(error, KeyboardInterrupt))
            if process.returncode == 0:
                finish(step, 0, started, marks)
        raise
    return finish(step, process.returncode, started, marks)


def finish(step: Step, code: int, started: float, marks: Path | None) -> float:
    """Mark a step that succeeded and return its seconds; InputError if it failed."""
    missing = [path for path in step.outputs if not path.exists()]
    if code or missing:
        problem = f"did not write {missing[0]}" if not code else f"ended with exit code {code}"
        problem = f"was killed by signal {-code}" if code < 0 else problem
        repeat = ", then repeat the command: finished steps are not run again" if marks else ""
        raise InputError(f"step {step.name} {problem}; see its output above{repeat}")
    seconds = round(time.monotonic() - started, 1)
    if marks:
        write_json({"command": step.words, "seconds": seconds}, marks / f"{step.name}.json")
    wrote = f": wrote {', '.join(map(str, step.outputs))}" if step.outputs else ""
    print(f"{step.name}: done in {seconds:.0f} s{wrote}", flush=True)
    return seconds


def stop(process: subprocess.Popen[bytes], pass_on: bool) -> None:
    """Wait for the process to end, after SIGTERM if ``pass_on``; a signal during the wait kills it."""
    try:
        if pass_on:
            process.terminate()
        process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise


@contextmanager
def signals_held() -> Iterator[None]:
    """Delay SIGTERM and Ctrl-C until the end of the block. Signals that are ignored stay so, also in processes that are
    started in the block."""
    received: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, lambda given, frame: received.append(given))
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    for given in received:
        signal.raise_signal(given)
