"""Download the public data sets of public.json; every file is verified by its sha256.

    python data/download.py FB15k-237
    python data/download.py all --source FOLDER      # copy from FOLDER/NAME/ or FOLDER/

``data/README.md`` says where each file comes from and under which terms.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, run_command
from common.files import ROOT, atomic_path, command, read_json, sha256_file
from data.knowledge_graph import PUBLIC

BASE_URL = "https://raw.githubusercontent.com"
TRIES = 3  # per file: after a timeout, a broken connection or a server error


class PublicFile(NamedTuple):
    """One file of a public data set."""

    path: str | None  # below BASE_URL, at a pinned commit; None for a file that only --source gives
    sha256: str


DATASETS = {
    name: {file: PublicFile(**facts) for file, facts in files.items()}
    for name, files in read_json(ROOT / "data" / "public.json", "list of data sets").items()
}
assert tuple(DATASETS) == PUBLIC


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
    takes its name only once its hash is right. ``source``: copy from this folder, or from its subfolder ``name``,
    instead of the web. ``pause``: seconds before the second try, doubled for the third. Raises InputError.
    """
    target = out / name
    wanted = DATASETS[name]
    if source is not None:
        source = source / name if (source / name).is_dir() else source
        missing = [file for file, public in wanted.items() if public.path and not (source / file).is_file()]
        if missing:
            raise InputError(f"--source {source} has no {', '.join(missing)}; expected the files of {name}")
        for file, public in list(wanted.items()):  # all of them before the first is copied
            if (source / file).is_file():
                try:
                    _check(name, file, str(source / file), source / file, public.sha256)
                except InputError as error:
                    if public.path is not None:
                        raise
                    wanted = {key: value for key, value in wanted.items() if key != file}
                    report(f"{name}/{file}: left out, {error}")
    for file, public in wanted.items():
        path = target / file
        if public.path is None and (source is None or not (source / file).is_file()):
            continue
        if path.is_file() and sha256_file(path) == public.sha256:
            report(f"{name}/{file}: verified, skipped")
            continue
        with atomic_path(path) as temporary:
            if source is not None:
                origin = str(source / file)
                shutil.copyfile(origin, temporary)
            else:
                origin = f"{base_url.rstrip('/')}/{public.path}"
                _download(origin, temporary, pause)
            _check(name, file, origin, temporary, public.sha256)
        report(f"{name}/{file}: {path.stat().st_size / 1e6:.1f} MB, verified")
    return target


def _check(name: str, file: str, origin: str, path: Path, expected: str) -> None:
    """InputError unless the bytes at ``path``, which came from ``origin``, have the sha256 of the data set's file."""
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


def main() -> None:
    parser = CommandParser(prog="data/download.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="+", choices=[*DATASETS, "all"], metavar="NAME", help=f"{', '.join(DATASETS)} or all"
    )
    parser.add_argument(
        "--source", type=Path, help="copy from this folder (it holds NAME/... or the files) instead of fetching"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "data", help="folder in which NAME/ is made")
    parser.add_argument("--base_url", default=BASE_URL, help="host to fetch from: a mirror with the same paths")
    args = parser.parse_args()
    for name in DATASETS if "all" in args.names else dict.fromkeys(args.names):
        folder = fetch(name, args.out, args.source, args.base_url)
        print(f"{name}: complete in {folder}; next: {command('run_rq.py', '--dataset', folder)}")


if __name__ == "__main__":
    run_command(main)
