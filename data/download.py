"""Download the public data sets of public.json; files with a known sha256 are verified.

    python data/download.py FB15k-237
    python data/download.py CoDEx-S YAGO3-10
    python data/download.py all --source FOLDER      # copy from FOLDER/NAME/ or FOLDER/

``data/README.md`` says where each file comes from and under which terms.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, run_command
from common.files import ROOT, atomic_path, command, output_folder, read_json, sha256_file
from data.knowledge_graph import PUBLIC

BASE_URL = "https://raw.githubusercontent.com"
TRIES = 3  # per file: after a timeout, a broken connection or a server error


class PublicFile(NamedTuple):
    """One file of a public data set."""

    path: str | None  # below BASE_URL, at a pinned commit, or a whole URL; None for a file that only --source gives
    sha256: str | None  # None: the file was never seen where the list was made
    unpack: Sequence[str] = ()  # of an archive (.tar.gz): the files to take out of it, by their last name


DATASETS = {
    name: {file: PublicFile(**facts) for file, facts in files.items()}
    for name, files in read_json(ROOT / "data" / "public.json", "list of data sets").items()
}
assert tuple(DATASETS) == PUBLIC


def verified(name: str) -> bool:
    """Whether the sha256 of every file is known."""
    return all(public.sha256 for public in DATASETS[name].values())


def fetch(
    name: str,
    out: Path,
    source: Path | None = None,
    base_url: str = BASE_URL,
    report: Callable[[str], None] = print,
    pause: float = 2.0,
) -> Path:
    """Write one data set to ``out / name`` and return that folder.

    A file that is there with the right hash is skipped, any other is fetched whole again: into a temporary file that
    takes its name only once its hash is right. Where the hash is unknown, a file that is there stays, and the hash of a
    fetched one is reported. ``source``: copy from this folder, or from its subfolder ``name``, instead of the web.
    ``pause``: seconds before the second try, doubled for the third. Raises InputError.
    """
    target = out / name
    wanted = DATASETS[name]
    if source is not None:
        source = source / name if (source / name).is_dir() else source
        wanted = _in_source(name, wanted, source, report)
    for file, public in wanted.items():
        if (public.path is None and source is None) or _is_there(name, file, public, target, report):
            continue
        origin = str(source / file) if source else _url(base_url, public)
        with atomic_path(target / file) as temporary:
            if source is not None:
                shutil.copyfile(origin, temporary)
            else:
                _download(origin, temporary, pause)
            _check(name, file, origin, temporary, public.sha256)
            if public.unpack:
                _unpack(name, file, temporary, public.unpack, target)
            size, sha256 = temporary.stat().st_size, sha256_file(temporary)
        if public.unpack:
            (target / file).unlink()
        how = "verified" if public.sha256 else f"not verified, its sha256 is {sha256}"
        report(f"{name}/{file}: {size / 1e6:.1f} MB, {how}")
    return target


def _url(base_url: str, public: PublicFile) -> str:
    path = str(public.path)
    return path if path.startswith("https://") else f"{base_url.rstrip('/')}/{path}"


def _in_source(
    name: str, wanted: Mapping[str, PublicFile], source: Path, report: Callable[[str], None]
) -> dict[str, PublicFile]:
    """The files to copy from ``source``, all checked before the first is copied; InputError where one is missing."""
    files = dict(wanted)
    for file, public in wanted.items():  # an archive may be there unpacked
        if public.unpack and not (source / file).is_file():
            del files[file]
            files |= {member: PublicFile(public.path, None) for member in public.unpack}
    missing = [file for file, public in files.items() if public.path and not (source / file).is_file()]
    if missing:
        raise InputError(f"--source {source} has no {', '.join(missing)}; expected the files of {name}")
    for file, public in list(files.items()):
        if not (source / file).is_file():
            del files[file]
            continue
        try:
            _check(name, file, str(source / file), source / file, public.sha256)
        except InputError as error:
            if public.path is not None:
                raise
            del files[file]
            report(f"{name}/{file}: left out, {error}")
    return files


def _is_there(name: str, file: str, public: PublicFile, target: Path, report: Callable[[str], None]) -> bool:
    """Whether nothing is to be fetched: the file is there, or only --source gives it."""
    files = [target / member for member in public.unpack or [file]]
    if all(path.is_file() for path in files) and (public.unpack or public.sha256 is None):
        report(f"{name}/{file}: there, not verified, skipped; to fetch it again, remove {files[0]}")
        return True
    if files[0].is_file() and not public.unpack and sha256_file(files[0]) == public.sha256:
        report(f"{name}/{file}: verified, skipped")
        return True
    return False


def _unpack(name: str, file: str, archive: Path, members: Sequence[str], target: Path) -> None:
    """Write these files of an archive to ``target``: matched by their last name, their folders left out."""
    try:
        with tarfile.open(archive) as tar:
            found = {Path(entry.name).name: entry for entry in tar.getmembers() if entry.isfile()}
            for member in members:
                content = tar.extractfile(found[member])
                assert content is not None  # a regular file has content
                with content, atomic_path(target / member) as temporary, open(temporary, "wb") as whole:
                    shutil.copyfileobj(content, whole)
    except KeyError as error:
        raise InputError(f"{name}/{file} does not hold {error}, expected {', '.join(members)}") from error
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise InputError(f"{name}/{file} cannot be unpacked ({error}); fetch it again") from error


def _check(name: str, file: str, origin: str, path: Path, expected: str | None) -> None:
    """InputError unless the bytes at ``path``, which came from ``origin``, have the sha256 of the data set's file.

    Where it is unknown: InputError for a web page or a Git LFS pointer instead of the file.
    """
    if expected is None:
        with open(path, "rb") as content:
            first = content.read(100).lstrip().lower()
        if not first or first.startswith((b"<!doctype", b"<html", b"version https://git-lfs")):
            what = "a web page or a pointer" if first else "an empty file"
            raise InputError(f"{name}/{file} from {origin} is {what}, expected the data; nothing was written")
        return
    found = sha256_file(path)
    if found != expected:
        raise InputError(
            f"{name}/{file} from {origin}: found sha256 {found} ({path.stat().st_size} bytes), "
            f"expected {expected}; nothing was written"
        )


def _download(url: str, path: Path, pause: float) -> None:
    """One file over HTTP with pooch; timeouts, broken connections and server errors are tried again."""
    import pooch
    import requests

    download = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=30)
    for attempt in range(1, TRIES + 1):
        try:
            download(url, str(path), None)
            return
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else 500
            if attempt < TRIES and status >= 500:
                time.sleep(pause * 2 ** (attempt - 1))
                continue
            reason = f"HTTP {status}" if error.response is not None else f"no full answer ({type(error).__name__})"
            raise InputError(
                f"cannot fetch {url}: {reason}; fetch the files by hand and give their folder with --source"
            ) from error


def _name(word: str) -> str:
    """A data set's name, in whatever case it is written."""
    return next((name for name in DATASETS if name.lower() == word.lower()), word)


def main() -> None:
    parser = CommandParser(prog="data/download.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="+", type=_name, choices=[*DATASETS, "all"], metavar="NAME",
        help=f"{', '.join(DATASETS)}; all: those with a known sha256 ({', '.join(filter(verified, DATASETS))})",
    )  # fmt: skip
    parser.add_argument(
        "--source", type=Path, help="copy from this folder (it holds NAME/... or the files) instead of fetching"
    )
    parser.add_argument("--out", type=output_folder, default=ROOT / "data", help="folder in which NAME/ is made")
    parser.add_argument("--base_url", default=BASE_URL, help="host to fetch from: a mirror with the same paths")
    args = parser.parse_args()
    everything = [name for name in DATASETS if verified(name)] if "all" in args.names else []
    for name in dict.fromkeys([*everything, *(name for name in args.names if name != "all")]):
        folder = fetch(name, args.out, args.source, args.base_url)
        print(f"{name}: complete in {folder}; next: {command('run_rq.py', '--dataset', folder)}")


if __name__ == "__main__":
    run_command(main)
