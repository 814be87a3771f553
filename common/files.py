"""Files: written through a temporary file that is renamed into place; read with one-line errors; locks and hashes."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from common.errors import InputError, is_disk_full

if TYPE_CHECKING:  # torch takes a second to import: only the functions that need it do so
    from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent


def command(script: str, *words: object) -> str:
    """A command line to print, which runs from the present folder as it is pasted: ``script`` in the repository, words
    quoted for the shell."""
    try:
        path = os.path.relpath(ROOT / script) if Path.cwd().is_relative_to(ROOT) else str(ROOT / script)
    except OSError:  # the folder is gone
        path = str(ROOT / script)
    return shlex.join(["python", path, *map(str, words)])


def output_file(word: str) -> Path:
    """The type of a flag that names a file to write: a wrong place is an error of the command line, before any work."""
    path = Path(word)
    if path.is_dir() or not path.name:
        raise argparse.ArgumentTypeError(f"{word} is a folder; name a file in it")
    _try_to_write(path.parent, path)
    return path


def output_folder(word: str) -> Path:
    """As ``output_file``, for a folder, which may exist."""
    path = Path(word)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{word} is a file, expected a folder; name another")
    _try_to_write(path, path)
    return path


def _try_to_write(folder: Path, path: Path) -> None:
    """ArgumentTypeError where no file can be made in ``folder``, or where it could be made; nothing is left there."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror}; choose a folder that can be written"
        raise argparse.ArgumentTypeError(reason) from error


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
def exclusive_lock(path: Path, flag: str = "--name") -> Iterator[None]:
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


def check_replaceable(folder: Path, flag: str, record: str | None = None, overwrite: bool = False) -> None:
    """InputError unless ``replaced_folder`` may write ``folder``: the present folder is not in it, and it is empty or
    (``record``) holds this file, which says that a script wrote it, and ``overwrite`` is given."""
    if Path.cwd().is_relative_to(folder.resolve()):
        raise InputError(f"{flag} {folder} is replaced as a whole, and you are in it; name another folder")
    if record and folder.is_dir() and any(folder.iterdir()) and not (folder / record).is_file():
        raise InputError(f"{flag} {folder} holds files that this script did not write; choose another folder")
    if record and (folder / record).is_file() and not overwrite:
        raise InputError(f"{flag} {folder} is finished; give another folder, or --overwrite to replace it")


@contextmanager
def replaced_folder(folder: Path, flag: str) -> Iterator[Path]:
    """Yield a folder beside ``folder`` to write to, under a lock. It takes the place of ``folder`` when all is written;
    otherwise ``folder`` stays as it was. A full disk is one line."""
    part = folder.with_name(f".{folder.name}.part")
    with exclusive_lock(folder.with_name(f"{folder.name}.lock"), flag):
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        try:
            yield part
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
        except Exception as error:
            if not is_disk_full(error):
                raise
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"cannot write {folder}: {reason}; what was there before is untouched") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


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


def need_file(path: str | Path, what: str) -> Path:
    """``path``; InputError where it is no file. ``what`` it means, as in "codes"."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{what} file {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    return path


def load_torch(path: str | Path, what: str) -> Any:
    """torch.load on the CPU, restricted to plain tensors and containers.

    ``what`` names the file's meaning in the error, as in "codes" or "checkpoint".
    Raises InputError where the file is missing, damaged, or holds anything but tensors and plain values.
    """
    path = need_file(path, what)
    import torch

    try:
        _check_archive(path)
        with warnings.catch_warnings(action="ignore"):  # of foreign pickles: the error says it
            value = torch.load(path, map_location="cpu", weights_only=True)
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


def sha256_file(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
