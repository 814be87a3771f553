"""The verified download, against a server on this machine: no test leaves it."""

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common.errors import InputError
from data import download
from data.download import DATASETS, PublicFile, fetch
from data.knowledge_graph import SPLITS, KnowledgeGraph

CONTENT = {"train.txt": b"a\tr\tb\n" * 5000, "valid.txt": b"b\tr\tc\n" * 30}


class Server(ThreadingHTTPServer):
    """Serves CONTENT below /pinned; ``faults`` holds what goes wrong with the next requests for a file."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.faults: dict[str, list[str]] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.requests.append(name)
        faults = self.server.faults.get(name, [])
        fault = faults.pop(0) if faults else ""
        if fault.isdigit() or not self.path.startswith("/pinned/"):
            self.send_error(int(fault or 404))
            return
        body = b"another file" if fault == "other" else CONTENT[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "truncated" else body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    files = {name: PublicFile(f"pinned/{name}", hashlib.sha256(body).hexdigest()) for name, body in CONTENT.items()}
    files["extra.npy"] = PublicFile(None, hashlib.sha256(b"extra").hexdigest())
    monkeypatch.setitem(DATASETS, "toy", files)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def get(server: Server, out: Path, said: list[str] | None = None) -> Path:
    return fetch("toy", out, base_url=server.url, report=(said if said is not None else []).append, pause=0)


def test_fetches_verifies_and_then_skips(server: Server, tmp_path: Path) -> None:
    folder = get(server, tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT
    assert (folder / "train.txt").stat().st_mode & 0o044  # not the private mode of a temporary file
    said: list[str] = []
    server.requests.clear()
    get(server, tmp_path, said)
    assert server.requests == [] and all("skipped" in line for line in said)


def test_a_partial_or_changed_file_is_fetched_again(server: Server, tmp_path: Path) -> None:
    folder = get(server, tmp_path)
    (folder / "train.txt").write_bytes(CONTENT["train.txt"][:100])
    server.requests.clear()
    get(server, tmp_path)
    assert server.requests == ["train.txt"]
    assert (folder / "train.txt").read_bytes() == CONTENT["train.txt"]


def test_a_truncated_body_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.faults["train.txt"] = ["truncated", "503"]
    folder = get(server, tmp_path)
    assert (folder / "train.txt").read_bytes() == CONTENT["train.txt"]
    assert server.requests == ["train.txt"] * 3 + ["valid.txt"]


@pytest.mark.parametrize(
    ("faults", "words", "requests"),
    [
        (["truncated"] * 9, "no full answer", download.TRIES),
        (["404"], "HTTP 404", 1),
        (["500"] * 9, "HTTP 500", download.TRIES),
        (["other"], "found sha256", 1),
    ],
)
def test_faults_are_one_line_and_leave_nothing(
    server: Server, tmp_path: Path, faults: list[str], words: str, requests: int
) -> None:
    server.faults["train.txt"] = faults
    with pytest.raises(InputError) as error:
        get(server, tmp_path)
    message = str(error.value)
    assert words in message and "train.txt" in message and "\n" not in message
    assert len(server.requests) == requests
    assert not list((tmp_path / "toy").iterdir())


def test_a_wrong_hash_names_both_and_keeps_the_other_files(server: Server, tmp_path: Path) -> None:
    server.faults["valid.txt"] = ["other"]
    with pytest.raises(InputError) as error:
        get(server, tmp_path)
    assert hashlib.sha256(b"another file").hexdigest() in str(error.value)
    assert str(DATASETS["toy"]["valid.txt"].sha256) in str(error.value)
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["train.txt"]


def test_no_server(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--source"):
        fetch("toy", tmp_path, base_url="http://127.0.0.1:1", report=lambda line: None, pause=0)


@pytest.mark.parametrize("nested", [True, False])
def test_source_folder(server: Server, tmp_path: Path, nested: bool) -> None:
    source = tmp_path / "source"
    folder = source / "toy" if nested else source
    folder.mkdir(parents=True)
    for name, body in {**CONTENT, "extra.npy": b"extra"}.items():
        (folder / name).write_bytes(body)
    target = fetch("toy", tmp_path / "out", source, base_url=server.url, report=lambda line: None)
    assert {path.name for path in target.iterdir()} == {*CONTENT, "extra.npy"} and server.requests == []

    (folder / "extra.npy").write_bytes(b"one's own embeddings")
    said: list[str] = []
    without = fetch("toy", tmp_path / "own", source, report=said.append)
    assert {path.name for path in without.iterdir()} == set(CONTENT) and "extra.npy: left out" in "".join(said)

    (folder / "valid.txt").write_bytes(b"changed")
    with pytest.raises(InputError, match=r"toy/valid\.txt .* expected"):
        fetch("toy", tmp_path / "again", source, report=lambda line: None)
    (folder / "valid.txt").unlink()
    with pytest.raises(InputError, match=r"has no valid\.txt"):
        fetch("toy", tmp_path / "third", source, report=lambda line: None)
    assert not (tmp_path / "third").exists()


def test_an_archive_is_unpacked_and_its_graph_loads(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of Wikidata5M's transductive archive, in a folder."""
    members = {f"wikidata5m_transductive_{split}.txt": b"Q1\tP1\tQ2\nQ2\tP1\tQ1\n" for split in SPLITS}
    extra = {"wikidata5m_transductive_train.txt.old": b"x", "../../evil.txt": b"x"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, body in {**{f"inner/{name}": body for name, body in members.items()}, **extra}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            tar.addfile(entry, io.BytesIO(body))
    archive = "wiki.tar.gz"
    monkeypatch.setitem(CONTENT, archive, buffer.getvalue())
    monkeypatch.setitem(DATASETS, "toy", {archive: PublicFile(f"pinned/{archive}", None, list(members))})
    said: list[str] = []
    folder = get(server, tmp_path / "deep" / "out", said)
    assert {path.name for path in folder.iterdir()} == set(members) and not list(tmp_path.rglob("evil.txt"))
    assert hashlib.sha256(buffer.getvalue()).hexdigest() in said[0] and "not verified" in said[0]
    kg = KnowledgeGraph.load(folder)
    assert kg.entities == ["Q1", "Q2"] and len(kg.train) == 2
    server.requests.clear()
    get(server, tmp_path / "deep" / "out")
    assert server.requests == [], "what is there stays"

    target = fetch("toy", tmp_path / "copied", folder, report=said.append)
    assert {path.name for path in target.iterdir()} == set(members), "an archive may be unpacked in --source"
    (tmp_path / archive).write_bytes(buffer.getvalue())
    target = fetch("toy", tmp_path / "again", tmp_path, report=said.append)
    assert {path.name for path in target.iterdir()} == set(members)
    for body, words in ((b"no archive", "cannot be unpacked|no archive"), (buffer.getvalue()[:-40], "unpacked")):
        monkeypatch.setitem(CONTENT, archive, body)
        with pytest.raises(InputError, match=words):
            get(server, tmp_path / f"broken{len(body)}")
    monkeypatch.setitem(DATASETS, "toy", {archive: PublicFile(f"pinned/{archive}", None, ["other.txt"])})
    monkeypatch.setitem(CONTENT, archive, buffer.getvalue())
    with pytest.raises(InputError, match=r"does not hold 'other\.txt'"):
        get(server, tmp_path / "other")


@pytest.mark.parametrize(
    "body", [b"", b"<!DOCTYPE html><html>gone</html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_an_unverified_file_that_is_no_data_is_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setitem(DATASETS, "toy", {"train.txt": PublicFile("pinned/train.txt", None)})
    monkeypatch.setitem(CONTENT, "train.txt", body)
    with pytest.raises(InputError, match="expected the data"):
        get(server, tmp_path)
    assert not list((tmp_path / "toy").iterdir())


# each data set's own layout, in small: what its files hold
LAYOUTS = {
    "CoDEx-S": {f"{name}.txt": "Q1\tP27\tQ2\nQ2\tP27\tQ1\n" for name in SPLITS}
    | {"valid_neg.txt": "Q1\tP27\tQ1\n", "test_neg.txt": "Q2\tP27\tQ2\n"},
    "YAGO3-10": {f"{name}.txt": "Duje_Čop\tplaysFor\tRKC_(1)\nRKC_(1)\tisLocatedIn\tDuje_Čop\n" for name in SPLITS}
    | {"entities.dict": "0\tRKC_(1)\n1\tDuje_Čop\n", "relations.dict": "0\tisLocatedIn\n1\tplaysFor\n"},
    "NELL-995": {f"{name}2id.txt": "2\n0 1 0\n1 0 1\n" for name in SPLITS}
    | {"entity2id.txt": "2\nconcept_city_x\t1\n36.7,-95.9\t0\n", "relation2id.txt": "2\nconcept:a\t0\nconcept:b\t1\n"},
    "Wikidata5M": {f"wikidata5m_transductive_{name}.txt": "Q1\tP1\tQ2\nQ2\tP2\tQ1\n" for name in SPLITS},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_of_each_data_set_loads(tmp_path: Path, name: str) -> None:
    for file, text in LAYOUTS[name].items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    kg = KnowledgeGraph.load(tmp_path)
    assert kg.num_entities == 2 and kg.num_relations == (2 if name != "CoDEx-S" else 1)
    if name in DATASETS and name != "Wikidata5M":
        assert set(DATASETS[name]) == set(LAYOUTS[name])


def test_every_url_is_pinned_to_a_commit_and_every_hash_is_whole() -> None:
    for files in DATASETS.values():
        held = {member for file, public in files.items() for member in public.unpack or [file]}
        assert all(any(split in member for member in held) for split in SPLITS)
        for public in files.values():
            assert public.sha256 is None or (len(public.sha256) == 64 and int(public.sha256, 16))
            if public.path is not None and not public.path.startswith("https://zenodo.org/record/"):
                owner, repository, commit, *rest = public.path.split("/")
                assert owner and repository and len(commit) == 40 and int(commit, 16) and rest
