"""One-line errors and exit codes, the same for every command. This file imports nothing else of the toolkit."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class InputError(Exception):
    """Bad input of the user's. Its message is ONE line: flag or file:line, what was found, what was expected,
    what to run next. ``run_command`` prints it and exits with code 2."""


class _DefaultOnce(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a flag's default to its help text, unless there is none or the text states it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line on stderr and exit code 2; its help shows every default."""

    origin = ""  # said before an error: the file that the flags stand in, where they come from one

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _DefaultOnce)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse. A file to write (of type ``output_file``) that is also the file of another flag is an error."""
        found = super().parse_args(args, namespace)
        files = {action: _files_of(getattr(found, action.dest, None)) for action in self._actions}
        for action in files:
            for other in files:
                written = getattr(action.type, "__name__", "") == "output_file" and files[action] & files[other]
                if written and action is not other:
                    flag, read = action.option_strings[0], (*other.option_strings, other.dest)[0]
                    self.error(f"argument {flag}: {min(written)} is the file of {read}, which it would replace")
        return found

    def error(self, message: str) -> NoReturn:
        message = message if len(message) < 600 else f"{message[:600]} ..."
        self.exit(2, f"error: {self.origin}{message} (see: python {self.prog} --help)\n")


def _files_of(value: Any) -> set[Path]:
    """The files that a flag names."""
    values = value if isinstance(value, list) else [value]
    return {Path(one).resolve() for one in values if isinstance(one, str | Path) and os.path.isfile(one)}


def at_least(low: int) -> Callable[[str], int]:
    """A type for argparse: a whole number of ``low`` or more."""

    def number(word: str) -> int:
        if not word.isdecimal() or int(word) < low:
            raise argparse.ArgumentTypeError(f"must be {low} or more, got {word}")
        return int(word)

    return number


class Terminated(BaseException):
    """SIGTERM: unwinds like Ctrl-C, so that temporary files go."""


def _terminate(signum: int, frame: object) -> NoReturn:
    raise Terminated


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's ``main`` and turn its end into an exit code and, where it failed, one line on stderr.

    2: InputError, a file that cannot be read or written, no memory. 130: Ctrl-C. 143: SIGTERM. Characters that the
    output's encoding does not have are printed as backslash escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
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


@contextmanager
def content_of(path: str | Path, what: str, remedy: str = "repeat its run") -> Iterator[None]:
    """Around the use of what was read from ``path``: where it does not fit, one line names the file, what it should be
    (as in "run record") and the remedy."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        line = (str(error).strip() or "?").splitlines()[0][:160]
        raise InputError(f"{path} is no complete {what} ({type(error).__name__}: {line}); {remedy}") from error


def is_disk_full(error: BaseException) -> bool:
    """Whether a library's error, of whatever type, says that a file could not be written to its end."""
    text = str(error)
    words = ("No space left", "File too large", "Disk quota", "PytorchStreamWriter failed", "unexpected pos")
    return getattr(error, "errno", None) in NO_ROOM or any(word in text for word in words)


def is_hub_id(name: str) -> bool:
    """Whether a model's name has the form of a hub id; out/merged, where out/ exists, is a mistyped path."""
    parts = Path(name).parts
    return bool(HUB_ID.fullmatch(name)) and not (len(parts) == 2 and Path(parts[0]).is_dir())


def hub_answers() -> bool:
    """Whether the hub of models can be connected to. Without a network its library tries for half a minute."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():  # it fails at once; another host connects
        return True
    try:
        url = urlsplit(constants.ENDPOINT)
        socket.create_connection((url.hostname or "", url.port or 443), timeout=3).close()
    except OSError:
        return False
    return True
