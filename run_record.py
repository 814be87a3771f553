"""What every command shares: one-line errors, files renamed into place, and the record beside each artifact.

The lowest file of the toolkit: it imports nothing of ours.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

if TYPE_CHECKING:  # torch takes a second to import: only the functions that need it do so
    import torch
    from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
RECORDED_PACKAGES = ("torch", "dgl", "numpy", "numba", "transformers", "peft", "accelerate")


class InputError(Exception):
    """Bad input of the user's. Its message is ONE line: flag or file:line, what was found, what was expected,
    what to run next. ``run_command`` prints it and exits with code 2."""


class CommandParser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line on stderr and exit code 2; its help shows every default."""

    origin = ""  # said before an error: the file that the flags stand in, where they come from one

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        message = message if len(message) < 600 else f"{message[:600]} ..."
        self.exit(2, f"error: {self.origin}{message} (see: python {self.prog} --help)\n")


class Terminated(BaseException):
    """SIGTERM: unwinds like Ctrl-C, so that temporary files go."""


def _terminate(signum: int, frame: object) -> NoReturn:
    raise Terminated


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's ``main`` and turn its end into an exit code and, where it failed, one line on stderr.

    2: InputError, a file that cannot be read or written, no memory. 130: Ctrl-C. 143: SIGTERM.
    """
    in_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _terminate) if in_main else None
    try:
        code = main() or 0
    except InputError as error:
        code = _say(f"error: {' '.join(str(error).split())}", 2)
    except KeyboardInterrupt:
        code = _say("stopped by Ctrl-C", 130)
    except Terminated:
        code = _say("stopped by SIGTERM", 143)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except MemoryError as error:
        what = f" ({' '.join(str(error).split())[:160]})" if str(error) else ""
        code = _say(f"error: there is not enough memory{what}; close other programs, or give smaller input", 2)
    except OSError as error:
        if error.filename is None and error.errno not in NO_ROOM:
            raise
        code = _say(f"error: {error.filename or 'cannot write'}: {error.strerror}", 2)
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
    sys.exit(code)


def _say(line: str, code: int) -> int:
    """Print to stderr whatever the terminal can show of a line; returns the exit code."""
    print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    return code


# ---------------------------------------------------------------- files


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed to ``path``, on failure removed.

    Raises InputError when the folder cannot be written or the disk is full; the file that was there stays.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; what was there before is untouched"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def only_run(path: Path, flag: str = "--name") -> Iterator[None]:
    """Hold ``path`` as a lock for as long as the run lives; InputError when another run holds it.

    ``flag``: the one that gives a second run a place of its own.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115 (held open for as long as the run lives)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino
        except OSError:
            ours = False
        if not ours:
            raise InputError(f"another run is writing {path.with_suffix('')}; wait for it or choose another {flag}")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class Memory(NamedTuple):
    """Bytes when an allocation failed."""

    wanted: float
    used: float
    total: float


def memory_wanted(error: BaseException) -> Memory | None:
    """What a failed allocation wanted, on a GPU or the CPU; None where the error is another."""
    import torch

    text = str(error)
    found = re.search(r"[Tt]ried to allocate ([0-9.]+) ?(bytes|KiB|MiB|GiB|TiB)", text)
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in text:
        return None
    units = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    wanted = float(found[1]) * units[found[2]] if found else 0.0
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():  # the type is the GPU's alone
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return Memory(wanted, torch.cuda.memory_allocated(), total)
    return Memory(wanted, peak_memory_mb() * 2**20, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def is_disk_full(error: BaseException) -> bool:
    """Whether a library's error, of whatever type, says that a file could not be written to its end."""
    text = str(error)
    words = ("No space left", "File too large", "Disk quota", "PytorchStreamWriter failed", "unexpected pos")
    return getattr(error, "errno", None) in NO_ROOM or any(word in text for word in words)


@contextmanager
def written_whole(folder: Path) -> Iterator[None]:
    """Around a library's writing into a new folder: a full disk is one line, and then the folder goes."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not is_disk_full(error):
            raise
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"cannot write {folder}: {reason}; what was there before is untouched") from error


def save_torch(value: Any, path: str | Path) -> None:
    """torch.save through a temporary file (see ``atomic_path``)."""
    import torch

    with atomic_path(path) as temporary:
        try:
            with open(temporary, "wb") as file:  # a name would go into the archive, and equal values differ in bytes
                torch.save(value, file)
        except RuntimeError as error:  # torch reports a full disk as a RuntimeError of its zip writer
            raise InputError(f"cannot write {path}: {str(error).splitlines()[0]}; is the disk full?") from error


class _Writer:
    """A file for numpy, which does not see a full disk where it writes a real one past Python."""

    def __init__(self, file: BinaryIO) -> None:
        self.write = file.write


def save_array(array: NDArray[Any], path: str | Path) -> None:
    """np.save through a temporary file (see ``atomic_path``)."""
    import numpy as np

    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(_Writer(file), array)


def load_torch(path: str | Path, what: str, device: str | torch.device = "cpu") -> Any:
    """torch.load restricted to plain tensors and containers.

    ``what`` names the file's meaning in the error, as in "codes" or "checkpoint".
    Raises InputError where the file is missing, damaged, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{what} file {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    import torch

    try:
        _check_archive(path)
        with warnings.catch_warnings(action="ignore"):  # of foreign pickles: the error says it
            value = torch.load(path, map_location=device, weights_only=True)
        _check_tensors(value)
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise InputError(
            f"{what} file {path} cannot be read as tensors and plain values ({line}); write it anew"
        ) from error
    return value


def _check_archive(path: Path) -> None:
    """ValueError where a zip archive is damaged or packed: torch checks no sums, and never packs what it writes."""
    if not zipfile.is_zipfile(path):  # the form before torch 1.6, or none at all
        return
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
                raise ValueError(f"{part.filename} is packed, which torch.save never does")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} is damaged: its sum is wrong")


def _check_tensors(value: Any) -> None:
    """ValueError where a tensor is not dense, or shows more numbers than the file holds."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_nested:
            raise ValueError(f"a tensor is {value.layout}, expected a plain one")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"a tensor of {list(value.shape)} has {value.untyped_storage().nbytes()} bytes behind it")
    elif isinstance(value, Mapping):
        for item in value.values():
            _check_tensors(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            _check_tensors(item)


def write_json(value: Any, path: str | Path) -> None:
    """Indented UTF-8 JSON through a temporary file; NaN and infinities are refused (ValueError)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(text, path)


def write_text(text: str, path: str | Path) -> None:
    """UTF-8 text through a temporary file (see ``atomic_path``)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def parse_json(text: str | bytes) -> Any:
    """json.loads whose every fault is a ValueError of one line.

    Also refused: NaN and infinities, numbers of thousands of digits, nesting that is too deep, and half a character
    (a lone surrogate), which nothing could print or write again.
    """

    def finite(number: str) -> float:
        value = float(number)
        if value - value != 0:
            raise ValueError(f"{number[:20]} is not a finite number")
        return value

    try:
        value = json.loads(text, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    half = _HALF.search(text) if isinstance(text, str) else _HALF_BYTES.search(text)
    if half is not None:
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError, a ValueError
    return value


_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_HALF_BYTES = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: str | Path, what: str) -> Any:
    """Parse a JSON file (see ``parse_json``); InputError names ``what`` the file is and the line of the fault."""
    path = Path(path)
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{what} file {path} cannot be read as JSON: {reason}") from error


def read_text(path: str | Path, what: str) -> str:
    """A UTF-8 text file; InputError names ``what`` the file is."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{what} {path} cannot be read as text: {reason}") from error


@contextmanager
def content_of(path: str | Path, what: str, remedy: str = "repeat its run") -> Iterator[None]:
    """Around the use of what was read from ``path``: where it does not fit, one line names the file, what it should be
    (as in "run record") and the remedy."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        line = (str(error).strip() or "?").splitlines()[0][:160]
        raise InputError(f"{path} is no complete {what} ({type(error).__name__}: {line}); {remedy}") from error


def is_hub_id(name: str) -> bool:
    """Whether a model's name has the form of a hub id; out/merged, where out/ exists, is a mistyped path."""
    parts = Path(name).parts
    return bool(HUB_ID.fullmatch(name)) and not (len(parts) == 2 and Path(parts[0]).is_dir())


def sha256_file(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- provenance


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def git_commit() -> str | None:
    """The repository's commit, with ``+changes`` when tracked files differ from it; None outside git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def by_name(given: Mapping[str, Path | None]) -> dict[str, Path]:
    """The files of ``given`` (role -> file) by their names, as records name inputs; those of one name by role too, but
    for the role "", which is its name alone."""
    names = [path.name for path in given.values() if path]
    return {
        path.name if names.count(path.name) == 1 or not role else f"{role}: {path.name}": path
        for role, path in given.items() if path
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the recorded packages that are installed (none is imported for it)."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def find_device(name: str | None, flag: str = "--device") -> torch.device:
    """The device of that name; for None or ``auto`` the GPU where there is one. InputError where there is none such."""
    import torch

    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        if found.type != "cuda":  # one number on a GPU takes hundreds of megabytes of it
            torch.zeros(1, device=found).cpu()  # and back: "meta" takes every number and keeps none
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:  # torch has its own for each
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"{flag} {name} is not there: {reason}; use --device cpu") from error
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"{flag} {name} is not there: torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    return found


def device_name(device: str | torch.device) -> str:
    """``cpu (N threads, AVX512)``, by what a recipe's time depends on most, or the GPU's own name."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'s' * (threads > 1)}, {torch.backends.cpu.get_cpu_capability()})"


def peak_memory_mb(device: str | torch.device = "cpu") -> float:
    """Peak resident memory of this process in MiB, or peak allocated memory of a CUDA device."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would be the starting process's where that was larger (Linux keeps it over exec)
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def make_record(
    args: Mapping[str, Any],
    inputs: Mapping[str, str],
    wall_seconds: float,
    device: str | torch.device = "cpu",
    **extra: Any,
) -> dict[str, Any]:
    """The run record written beside an artifact.

    ``args``: the parsed flags; ``inputs``: file name -> sha256; ``wall_seconds``: of the whole run, resumed parts
    included; ``extra``: metrics and whatever else the command reports (``seed`` is taken from ``args``).
    """
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "args": {key: str(value) if isinstance(value, Path) else value for key, value in args.items()},
        "seed": args.get("seed"),
        "git_commit": git_commit(),
        "versions": versions(),
        "device": device_name(device),
        "inputs": dict(inputs),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(wall_seconds, 2),
        "peak_memory_mb": round(peak_memory_mb(device), 1),
        **extra,
    }
