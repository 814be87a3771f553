"""Commands of other scripts as steps: in order or side by side, each done once, ended together.

A step that ended well leaves a mark, ``NAME.json``, so that the same plan goes on where it was stopped.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError, content_of
from common.files import ROOT, read_json, write_json
from lora_training.checkpoints import SECONDS

REPEATED = "remove it and repeat the command: its step runs again"


class Step(NamedTuple):
    """A command of another script."""

    name: str
    words: list[str]  # the script, then its flags
    made: list[Path]  # what it leaves
    checkpoints: Path | None = None  # of train_lora.py: where an interrupted run goes on


def resumed(step: Step) -> list[str]:
    """The words of a step, so that it goes on from the last checkpoint of an interrupted run where it left one."""
    if step.checkpoints is None:
        return step.words
    there = any(step.checkpoints.glob(f"checkpoint-*/{SECONDS}"))
    return [*step.words, *(["--resume_from_checkpoint", "last"] if there else ["--overwrite"])]


def is_done(step: Step, marks: Path) -> bool:
    """Whether a step ended well and what it made is still there."""
    return (marks / f"{step.name}.json").is_file() and all(path.exists() for path in step.made)


class Task(NamedTuple):
    """A step and where it belongs."""

    step: Step
    marks: Path  # folder of the marks of what is done
    title: str


def needs(step: Step, others: Iterable[Step]) -> bool:
    """Whether the step's words name what one of the others makes, or a folder that this lies in."""
    named = {Path(word) for word in step.words}
    return any(not named.isdisjoint((made, *made.parents)) for one in others for made in one.made)


def run_steps(steps: Sequence[Step], marks: Path, title: str) -> None:
    """Run the steps that are not done, one after another, each in a process of its own. InputError where one fails."""
    run_tasks(tasks_of(steps, marks, title), workers=1)


def tasks_of(steps: Sequence[Step], marks: Path, title: str) -> list[Task]:
    """Steps in order, each with its place among them."""
    return [Task(step, marks, f"{title}, step {place} of {len(steps)}") for place, step in enumerate(steps, 1)]


def run_tasks(tasks: Sequence[Task], workers: int) -> None:
    """Run what is not done, up to ``workers`` steps side by side, each once what it names of earlier ones is there.

    ``tasks`` come in an order that they could run in. Side by side, a step's output goes to a file beside its mark.
    InputError where a step fails; no other one is begun then, those that run are waited for. SIGTERM is passed on to
    them, Ctrl-C in a terminal has reached them; a second signal ends them at once. What ends well all the same is done.
    """
    waiting = [task for task in tasks if not is_done(task.step, task.marks)]
    running: list[Running] = []
    problems: list[str] = []
    changed = True  # since the last look at what may begin
    try:
        while running or (waiting and not problems):
            free = workers - len(running) if changed and not problems else 0
            for task in ready(waiting, running, free):
                waiting.remove(task)
                with signals_held() as came:  # between its start and its place here, a process has nobody to end it
                    if not came:
                        running.append(begin(task, to_file=workers > 1))
            ended = [one for one in running if one.process.poll() is not None]
            running, changed = [one for one in running if one not in ended], bool(ended)
            for problem in filter(None, map(finish, ended)):
                problems.append(problem)
                if running:
                    print(f"{problem}; {len(running)} steps still run", file=sys.stderr, flush=True)
            if not ended:
                time.sleep(0.05)
    except BaseException as stop:
        end_all(running, pass_on=not isinstance(stop, KeyboardInterrupt))
        for one in running:
            if one.process.returncode == 0:
                finish(one)
        raise
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise InputError(f"{problems[0]}{more}, then repeat the command to go on")


class Running(NamedTuple):
    """A task whose process has been started."""

    task: Task
    process: subprocess.Popen[bytes]
    words: list[str]
    started: float  # monotonic seconds
    log: Path | None  # that gets its output


def ready(waiting: Sequence[Task], running: Sequence[Running], most: int) -> list[Task]:
    """The first ``most`` tasks that need nothing of those that run or stand before them."""
    ahead, found = [one.task.step for one in running], list[Task]()
    for task in waiting:
        if len(found) == most:
            break
        if not needs(task.step, ahead):
            found.append(task)
        ahead.append(task.step)
    return found


@contextmanager
def signals_held() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C that come inside act at its end; yields those that have come. Ignored ones stay ignored, in
    processes begun inside too."""
    came: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, lambda given, frame: came.append(given))
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for given in came:
            signal.raise_signal(given)


def begin(task: Task, to_file: bool) -> Running:
    """Start a step's process."""
    words, log = resumed(task.step), task.marks / f"{task.step.name}.log" if to_file else None
    print(f"\n[{task.title}] {task.step.name}\n$ python {shlex.join(words)}", flush=True)
    started = time.monotonic()
    if log is None:
        return Running(task, subprocess.Popen([sys.executable, *words], cwd=ROOT), words, started, log)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as sink:
        sink.write(f"$ python {shlex.join(words)}\n".encode())
        sink.flush()
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT)
    return Running(task, process, words, started, log)


def finish(ended: Running) -> str | None:
    """Leave the mark of a step that ended well; else what went wrong."""
    step, code = ended.task.step, ended.process.returncode
    missing = [str(path) for path in step.made if not path.exists()]
    if code or missing:
        problem = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        problem = problem if code else f"did not write {missing[0]}"
        return f"{ended.task.title}, step {step.name} {problem}; see {ended.log or 'above'}"
    record = {"command": ended.words, "seconds": round(time.monotonic() - ended.started, 1)}
    write_json(record, ended.task.marks / f"{step.name}.json")
    return None


def end_all(running: Iterable[Running], pass_on: bool) -> None:
    """Wait for processes that were asked to end, ``pass_on``: by us; a signal while they are waited for kills them."""
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


def seconds_of(marks: Path) -> dict[str, float]:
    """Seconds per step of one seed, as its marks have it: of the call that ended it."""
    found = {}
    for path in sorted(marks.glob("*.json")):
        with content_of(path, "mark of a step", REPEATED):
            found[path.stem] = float(read_json(path, "mark")["seconds"])
    return found
