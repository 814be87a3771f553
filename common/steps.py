"""Run commands of other scripts as steps: each once, in order or side by side, resumable, stopped together."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError, content_of
from common.files import ROOT, read_json, write_json


class Step(NamedTuple):
    """A command of another script, run from the repository root."""

    name: str  # unique; may contain "/": its mark is MARKS/name.json, its log MARKS/name.log
    words: list[str]  # the script, then its flags
    outputs: list[Path]  # files or folders that exist after it
    more: Callable[[], list[str]] = list  # further flags, decided when the step starts (as in --restore)


class Running(NamedTuple):
    """A step whose process has been started."""

    step: Step
    process: subprocess.Popen[bytes]
    started: float  # monotonic seconds
    log: Path | None  # file that receives its output


def run_steps(steps: Sequence[Step], marks: Path | None = None, workers: int = 1) -> dict[str, float]:
    """Run the steps that are not done; returns the seconds of every step by its name.

    ``steps`` must be in an order in which they could run one after another. A step that succeeded leaves a mark in the
    folder ``marks`` and is not run again while its outputs exist; without ``marks`` every step runs. With several
    ``workers``, a step starts as soon as no unfinished earlier step makes a file that its command names (or a file
    below a folder that it names), and its output goes to a log beside its mark.

    Raises InputError where a step fails, or was finished by another command. After a failure no step is started; those
    that are running are waited for. SIGTERM is passed on to them (Ctrl-C in a terminal reaches them anyway); a second
    signal kills them.
    """
    if marks is None and workers > 1:
        raise ValueError("several workers need a folder for marks and logs")
    seconds = {step.name: done for step in steps if (done := seconds_of(step, marks)) is not None}
    place = {step.name: f"{number}/{len(steps)}" for number, step in enumerate(steps, 1)}
    waiting = [step for step in steps if step.name not in seconds]
    running: list[Running] = []
    problems: list[str] = []
    try:
        while running or (waiting and not problems):
            for step in [] if problems else ready(waiting, [one.step for one in running], workers):
                waiting.remove(step)
                with signals_held() as received:  # a process that is not in the list yet could not be stopped
                    if not received:
                        running.append(start(step, place[step.name], marks if workers > 1 else None))
            ended = [one for one in running if one.process.poll() is not None]
            running = [one for one in running if one not in ended]
            if not ended:
                time.sleep(0.05)
            for one in ended:
                problem = finish(one, marks, seconds)
                if problem:
                    problems.append(problem)
                    print(f"{problem}; {len(running)} steps are still running", file=sys.stderr, flush=True)
    except BaseException as error:
        stop_all(running, pass_on=not isinstance(error, KeyboardInterrupt))
        for one in running:
            if one.process.returncode == 0:
                finish(one, marks, seconds)
        raise
    if problems:
        repeat = ", then repeat the command: finished steps are not run again" if marks else ""
        raise InputError(f"{problems[0]}{repeat}")
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


def ready(waiting: Sequence[Step], running: Sequence[Step], workers: int) -> list[Step]:
    """The waiting steps that can start now: free workers, and nothing that they need is still to be made."""
    earlier, found = list(running), list[Step]()
    for step in waiting:
        if len(running) + len(found) == workers:
            break
        if not needs(step, earlier):
            found.append(step)
        earlier.append(step)
    return found


def needs(step: Step, others: Iterable[Step]) -> bool:
    """Whether the step's command names an output of another step, or a folder that contains it."""
    named = {Path(word) for word in step.words}
    return any(not named.isdisjoint((path, *path.parents)) for other in others for path in other.outputs)


def start(step: Step, place: str, logs: Path | None) -> Running:
    """Start the step's process; its output goes to ``logs``/name.log if given."""
    words = [*step.words, *step.more()]
    print(f"\n[{place}] {step.name}\n$ python {shlex.join(words)}", flush=True)
    started = time.monotonic()
    command = [sys.executable, *words]
    if logs is None:
        return Running(step, subprocess.Popen(command, cwd=ROOT), started, None)
    log = logs / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as sink:
        sink.write(f"$ python {shlex.join(words)}\n".encode())
        sink.flush()
        process = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT)
    return Running(step, process, started, log)


def finish(ended: Running, marks: Path | None, seconds: dict[str, float]) -> str | None:
    """Mark a step that succeeded and note its seconds; otherwise return what went wrong."""
    step, code = ended.step, ended.process.returncode
    missing = [path for path in step.outputs if not path.exists()]
    if code or missing:
        problem = f"did not write {missing[0]}" if not code else f"ended with exit code {code}"
        problem = f"was killed by signal {-code}" if code < 0 else problem
        return f"step {step.name} {problem}; see {ended.log or 'its output above'}"
    seconds[step.name] = round(time.monotonic() - ended.started, 1)
    if marks:
        write_json({"command": step.words, "seconds": seconds[step.name]}, marks / f"{step.name}.json")
    wrote = f": wrote {', '.join(map(str, step.outputs))}" if step.outputs else ""
    print(f"{step.name}: done in {seconds[step.name]:.0f} s{wrote}", flush=True)
    return None


@contextmanager
def signals_held() -> Iterator[list[int]]:
    """Delay SIGTERM and Ctrl-C until the end of the block; yields the list of those received so far.

    Ignored signals stay ignored, also in processes that are started in the block.
    """
    received: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, lambda given, frame: received.append(given))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for given in received:
            signal.raise_signal(given)


def stop_all(running: Iterable[Running], pass_on: bool) -> None:
    """Wait for the processes to end, after SIGTERM if ``pass_on``; a signal during the wait kills them."""
    processes = [one.process for one in running]
    try:
        for process in processes:
            if pass_on:
                process.terminate()
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            process.kill()
            process.wait()
        raise
