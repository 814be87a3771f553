"""Download the public data sets; every file is verified by its sha256.

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
from common.files import ROOT, atomic_path, sha256_file
from data.knowledge_graph import PUBLIC

BASE_URL = "https://raw.githubusercontent.com"
TRIES = 3  # per file: after a timeout, a broken connection or a server error

# repositories at a commit; a file's URL is BASE_URL / repository and commit / path
_KGE = "DeepGraphLearning/KnowledgeGraphEmbedding/617062aaedf53bf4d6b44450a580a96dc30e0632/data"
_KG_BERT = "yao8839836/kg-bert/62b76ed5652bf3da5a355cbe9c1109f58290756f/data"
_TAGREAL = "pat-jj/TagReal/3e92149f4940b811236dac32e93c49c7e7cb22a3/dataset/FB15K-237-N"


class PublicFile(NamedTuple):
    path: str | None  # below BASE_URL; None for a file that only --source gives
    sha256: str


DATASETS: dict[str, dict[str, PublicFile]] = {
    "FB15k-237": {
        "train.txt": PublicFile(
            f"{_KGE}/FB15k-237/train.txt", "6e4c2782169af21e9743f3b1d200886f5d595bf6bc504ec1351720949c5cdfae"
        ),
        "valid.txt": PublicFile(
            f"{_KGE}/FB15k-237/valid.txt", "cf6309010852f6a8d47a45df830a426415d1ee6f7a3970a8376ff1fb81db4a5c"
        ),
        "test.txt": PublicFile(
            f"{_KGE}/FB15k-237/test.txt", "5711cf41623ceb4eacc50eb6108a3ca6565c7492e3caaf82a3e355cc660d1574"
        ),
        "entities.dict": PublicFile(
            f"{_KGE}/FB15k-237/entities.dict", "55666c4fb9c2990ef809e41d3a0023503b1f927fd00a1c947f21a805608f50ac"
        ),
        "relations.dict": PublicFile(
            f"{_KGE}/FB15k-237/relations.dict", "e98ebcc621a217ca80d44992cdf0ef5f0eb355ff9aff0ba1a3e939f6ca8fb095"
        ),
        "entity2label.txt": PublicFile(
            f"{_TAGREAL}/entity2label.txt", "e206283404bb096515bf6e0e5c7364d6fbfdacbeacdd96825133b2e7d0a1ebd3"
        ),
        "entity2definition.txt": PublicFile(
            f"{_TAGREAL}/entity2definition.txt", "0a5388bf75eae6360b5bd4a80f644001d54c11c790d3a239eec944502276361d"
        ),
        "entity2text.txt": PublicFile(
            f"{_KG_BERT}/FB15k-237/entity2text.txt", "16beedcfad3d32696e8b0b98cfa0f5eeb144f5142225f227a64fd9ce37447da5"
        ),
        "FB15k_mid2name.txt": PublicFile(
            f"{_KG_BERT}/FB15k-237/FB15k_mid2name.txt",
            "4da94b8059a83bc7e08c832f573d34221d38e85030576e332a0d0e9726d13d73",
        ),
        "relation2text.txt": PublicFile(
            f"{_KG_BERT}/FB15k-237/relation2text.txt",
            "4bf7cb6ea0ac09b17ad210889f723be5e079669f6ae5d507787e1320bbaa0f72",
        ),
        "ent_emd_minilm.npy": PublicFile(None, "2a24ea54d4e47187a0f63a768a2b59c64db6700a38f636c0b542e83e1a4a57ce"),
    },
    "WN18RR": {
        "train.txt": PublicFile(
            f"{_KGE}/wn18rr/train.txt", "038612e783c215ee5f3ca9fbfca27b8d0739be1028fe4ee7c174aecf0b83d5df"
        ),
        "valid.txt": PublicFile(
            f"{_KGE}/wn18rr/valid.txt", "453ce7202afa58094a04d2b1560ee2b02660f1c260b32ce6651c8ccedd1028ab"
        ),
        "test.txt": PublicFile(
            f"{_KGE}/wn18rr/test.txt", "0383bceaaa1096cf3c03ec021ed0048068e2355dbfc0239b292cefdac821cec5"
        ),
        "entities.dict": PublicFile(
            f"{_KGE}/wn18rr/entities.dict", "3dc41455a835d7523b68a2d449a8ae9429ba8cf8be7db7e29b4cbadf6fbc092f"
        ),
        "relations.dict": PublicFile(
            f"{_KGE}/wn18rr/relations.dict", "0cf033f5ea243c938d86e8e5e89b43676df040b9196ce495b92382e54ad59916"
        ),
        "entity2text.txt": PublicFile(
            f"{_KG_BERT}/WN18RR/entity2text.txt", "8f5c6f11753dafa879917b9bdf73d398ceb3bd4bed8d5553177e1e0f2c37521f"
        ),
        "relation2text.txt": PublicFile(
            f"{_KG_BERT}/WN18RR/relation2text.txt", "91b1de5585d686ed31498d50f1c4eed44ba9486dffbbcc0c28927ac884184918"
        ),
        "ent_emd_minilm.npy": PublicFile(None, "12333af5823be0090af7e2b72e95069a9e5ecae1f609526913c5d66bbaa5984f"),
    },
    "FB15k-237N": {
        "train.txt": PublicFile(
            f"{_TAGREAL}/train.txt", "ba2bf41374e4a85b01cc23fd2b546caac4f7d44ecc1578da643623226a584475"
        ),
        "valid.txt": PublicFile(
            f"{_TAGREAL}/valid.txt", "57147130a5984dfc17ce00f95870e696ee8b5175ebcf8b8a50c85a3c6a46f678"
        ),
        "test.txt": PublicFile(
            f"{_TAGREAL}/test.txt", "3b8348a4fb7b410734a4d45aa7a08c4a33bc5e96b18e3d4b41b30ed88e60fd59"
        ),
        "valid_neg.txt": PublicFile(
            f"{_TAGREAL}/valid_neg.txt", "d2eb3520fc9e71d9a42a37386ed76cda37a2555365c5e0df38ee75f7829d55f8"
        ),
        "test_neg.txt": PublicFile(
            f"{_TAGREAL}/test_neg.txt", "8cacc3626f779675cd1e9cd9eafa42d9b251c4dd00c25e73154162e68cf5788f"
        ),
        "entity2label.txt": PublicFile(
            f"{_TAGREAL}/entity2label.txt", "e206283404bb096515bf6e0e5c7364d6fbfdacbeacdd96825133b2e7d0a1ebd3"
        ),
        "entity2definition.txt": PublicFile(
            f"{_TAGREAL}/entity2definition.txt", "0a5388bf75eae6360b5bd4a80f644001d54c11c790d3a239eec944502276361d"
        ),
    },
}
assert tuple(DATASETS) == PUBLIC


def fetch(
    name: str,
    out: Path,
    source: Path | None = None,
    base_url: str = BASE_URL,
    say: Callable[[str], None] = print,
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
                    say(f"{name}/{file}: left out, {error}")
    for file, public in wanted.items():
        path = target / file
        if public.path is None and (source is None or not (source / file).is_file()):
            continue
        if path.is_file() and sha256_file(path) == public.sha256:
            say(f"{name}/{file}: verified, skipped")
            continue
        with atomic_path(path) as temporary:
            if source is not None:
                origin = str(source / file)
                shutil.copyfile(origin, temporary)
            else:
                origin = f"{base_url.rstrip('/')}/{public.path}"
                _download(origin, temporary, pause)
            _check(name, file, origin, temporary, public.sha256)
        say(f"{name}/{file}: {path.stat().st_size / 1e6:.1f} MB, verified")
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
        print(f"{name}: complete in {folder}; next: python run_rq.py --dataset {folder}")


if __name__ == "__main__":
    run_command(main)
