"""Damaged files: every script that reads one says so in one line, in seconds, and leaves everything else as it was.

All cases run with ``-m slow``; a seeded part of them, and some in processes of their own, run by default.
"""

from __future__ import annotations

import io
import os
import random
import re
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from common import errors
from common.files import ROOT
from tables.rows import graph
from tests.faults.cases import Case, Target, cases_of, main_of
from tests.faults.damage import MUST, NO_PERMISSION, SAME, WITNESS, put
from tests.faults.later import LATER
from tests.faults.permissions import modes_count
from tests.faults.targets import TARGETS
from tests.faults.test_supply import SCRIPTS
from tests.faults.world import pristine, restore, snapshot

SECONDS = 10.0
MEMORY = 2 * 2**30
FAST, FAST_HEAVY = 130, 24  # cases of the default suite
ALL = [*TARGETS, *LATER]
CASES = cases_of(ALL)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float


@contextmanager
def more_memory(limit: int) -> Iterator[None]:
    """No more than ``limit`` bytes of address space beyond what the process has now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def call(target: Target, world: Path) -> Outcome:
    """The script as the shell would run it, without a process; a traceback, if it has one, is on stderr."""
    # processor time: other programs may keep this one waiting
    out, err, started, before = io.StringIO(), io.StringIO(), time.process_time(), sys.argv
    code = 0
    graph.cache_clear()  # a process of its own would read the graph anew
    sys.argv = [target.script, *target.arguments(world)]
    try:
        with redirect_stdout(out), redirect_stderr(err), more_memory(MEMORY):
            errors.run_command(main_of(target))
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        code = 1
        err.write(traceback.format_exc())
    finally:
        sys.argv = before
    return Outcome(code, out.getvalue(), err.getvalue(), time.process_time() - started)


def in_process(target: Target, world: Path) -> Outcome:
    """The same in a process of its own, with the memory limit of a shell's ulimit."""
    started = time.monotonic()
    limit = ["prlimit", f"--as={6 * 2**30}"]  # address space: torch alone reserves about three gigabytes
    ended = subprocess.run(
        [*limit, sys.executable, str(ROOT / target.script), *target.arguments(world)], capture_output=True, text=True,
        cwd=world, timeout=60, check=False, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return Outcome(ended.returncode, ended.stdout, ended.stderr, time.monotonic() - started)


def faults_of(case: Case, outcome: Outcome, before: dict[str, str], after: dict[str, str], good: str) -> list[str]:
    """What is wrong with how a case ended."""
    found = []
    if "Traceback" in outcome.err or outcome.code not in case.target.codes:
        found.append(f"exit code {outcome.code}:\n{outcome.err[-1500:]}")
    elif outcome.code == 2:
        errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        if len(errors) != 1 or not outcome.err.endswith("\n") or outcome.err.splitlines()[-1:] != errors:
            found.append(f"not one last line: {outcome.err[:800]}")
        elif not any(word in errors[0] for word in (Path(case.file.path).name, *case.file.named)):
            found.append(f"the file is not named: {errors[0][:300]}")
        if len(outcome.err) > 2000:
            found.append(f"{len(outcome.err)} characters: {outcome.err[:300]}")
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if changed:
            found.append(f"files changed: {changed[:6]}")
    if case.expect == MUST and outcome.code != 2:
        found.append(f"accepted, exit code {outcome.code}: {outcome.out[-300:]}")
    if case.expect == SAME and (outcome.code or plain(outcome.out) != good):
        found.append(f"not read the same: {outcome.err[-400:]} {outcome.out[-200:]}")
    if outcome.seconds > SECONDS:
        found.append(f"took {outcome.seconds:.1f} s")
    if any(name.endswith(WITNESS) for name in after) or Path(WITNESS).exists():
        Path(WITNESS).unlink(missing_ok=True)
        found.append("a pickle in the file was run")
    return found


def plain(text: str) -> str:
    """Output without times."""
    return re.sub(r"\d+(\.\d+)? s\b", "", text)


def try_case(case: Case, world: Path, good: str, run: object = call) -> tuple[Outcome, list[str]] | None:
    """How a case ended and what is wrong with it; None where it cannot be made here."""
    path = world / case.file.path
    try:
        put(path, case.spoil(path.read_bytes()))
        before = snapshot(world)
        with modes_count() if case.damage.name == NO_PERMISSION else nullcontext(True) as counted:
            if not counted:
                return None
            outcome: Outcome = run(case.target, world)  # type: ignore[operator]
        return outcome, faults_of(case, outcome, before, snapshot(world), good)
    finally:
        restore(world)


class Good(dict[str, str]):
    """What each target prints over the undamaged world, called once it is asked for."""

    def __missing__(self, name: str) -> str:
        target = next(target for target in ALL if target.name == name)
        outcome = call(target, pristine())
        restore(pristine())
        assert outcome.code in set(target.codes) - {2}, f"{name}: {outcome.err}"
        self[name] = plain(outcome.out)
        return self[name]


@pytest.fixture(scope="module")
def good() -> Good:
    return Good()


def chosen(heavy: bool, count: int) -> list[Case]:
    """A part of the cases that is the same in every run: every file first, then at random."""
    rng = random.Random(8)
    cases = [case for case in CASES if case.target.heavy == heavy and "bomb" not in case.damage.name]
    rng.shuffle(cases)
    by_file = list({(case.target.name, case.file.path): case for case in cases}.values())
    rest = [case for case in cases if case not in by_file]
    return [*by_file, *rest][:count]


def run_all(cases: list[Case], good: Good) -> None:
    world, faults, refused = pristine(), [], 0
    with suppress(KeyboardInterrupt):
        for case in cases:
            ended = try_case(case, world, "" if case.target.only_bad else good[case.target.name])
            if ended is not None:
                refused += ended[0].code == 2
                faults += [f"{case.id}: {fault}" for fault in ended[1]]
    assert not faults, f"{len(faults)} faults in {len(cases)} cases:\n\n" + "\n\n".join(faults)
    assert refused > len(cases) / 2, f"only {refused} of {len(cases)} were refused: the damages are too mild"


# they make what they read, or read nothing
READ_NO_FILE = {
    "data/family.py", "demo_complete.py", "test_rq_simple.py", "lora_training/test_lora_simple.py",
    "benchmarks/growth.py", "benchmarks/llama_shape.py",
}  # fmt: skip


def test_there_are_enough_cases_over_every_script() -> None:
    """A script that is added reads files that somebody must think of."""
    assert len(CASES) > 300 and len({case.id for case in CASES}) == len(CASES)
    assert {target.script for target in ALL} == {str(path) for path in SCRIPTS} - READ_NO_FILE


def test_modes_count_even_for_root(tmp_path: Path) -> None:
    """The control of the cases without permission."""
    path = tmp_path / "x"
    path.write_text("x")
    path.chmod(0)
    with modes_count() as counted:
        if not counted:
            pytest.skip("root here, and the kernel does not let it give up its right to read everything")
        with pytest.raises(PermissionError):
            path.read_text()
    path.chmod(0o600)
    assert path.read_text() == "x"


def test_damaged_files_of_graph_codes_and_rows(good: Good) -> None:
    run_all(chosen(False, FAST), good)


def test_damaged_files_of_models(good: Good) -> None:
    run_all(chosen(True, FAST_HEAVY), good)


@pytest.mark.slow
@pytest.mark.parametrize("name", [target.name for target in ALL])
def test_every_damaged_file(good: Good, name: str) -> None:
    run_all([case for case in CASES if case.target.name == name], good)


@pytest.mark.slow
def test_some_in_processes_of_their_own() -> None:
    """As the shell runs them: what libraries print, and a limit on memory, show here alone."""
    world, faults = pristine(), []
    cases = [
        case for heavy in (False, True) for case in chosen(heavy, 60)
        if case.expect == MUST and case.target.main is None and case.damage.name != NO_PERMISSION
    ]  # fmt: skip
    for case in random.Random(9).sample(cases, 16):
        ended = try_case(case, world, "", in_process)
        assert ended is not None
        faults += [f"{case.id}: {fault}" for fault in ended[1] if not fault.startswith("took")]
    assert not faults, "\n\n".join(faults)
