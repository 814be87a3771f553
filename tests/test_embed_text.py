"""Text embeddings: a tiny random BERT against a plain computation, a server on this machine, TF-IDF. All offline."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from common import errors, files
from common.errors import InputError
from common.files import read_json, sha256_file
from data import embed_text
from data.embed_text import ModelEncoder, embed_tfidf, entity_texts, model_folder
from data.knowledge_graph import KnowledgeGraph
from tests.conftest import M, Outcome, arguments, assert_refused, small_flags

Embed = Callable[..., Outcome]
WORDS = ["entity", "a", "b", "c", ":", *"0123456789", *(f"##{digit}" for digit in range(10))]
SECRET = "sk-very-secret"


@pytest.fixture
def embed(capsys: pytest.CaptureFixture[str]) -> Embed:
    """embed_text.py as the shell would run it, in this process."""

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        with arguments([str(word) for word in words]), pytest.raises(SystemExit) as end:
            errors.run_command(embed_text.main)
        captured = capsys.readouterr()
        return Outcome(int(end.value.code or 0), captured.out, captured.err)

    return call


def save_bert(folder: Path) -> Path:
    """A BERT with wide random weights, so that different texts are far apart."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: i for i, word in enumerate(vocab)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def graph(ring: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ring with descriptions of very unequal lengths for two entities of three; three entities have no label."""
    folder = tmp_path_factory.mktemp("graph") / "ring"
    folder.mkdir()
    for path in ring.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "entity2label.txt").write_text("".join(f"e{i}\tEntity {i}\n" for i in range(M) if i > 2))
    texts = (f"e{i}\t{' '.join('abc'[j * i % 3] for j in range(1 + i * 7 % 30))}\n" for i in range(M) if i % 3)
    (folder / "entity2definition.txt").write_text("".join(texts))
    return folder


def plain_rows(folder: Path, texts: list[str]) -> np.ndarray:
    """One text at a time, no padding, no mask: the mean over all its tokens, at length 1."""
    model, tokenizer = AutoModel.from_pretrained(str(folder)).eval(), AutoTokenizer.from_pretrained(str(folder))
    rows = []
    for text in texts:
        with torch.no_grad():
            row = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        rows.append((row / row.norm()).numpy())
    return np.array(rows)


# ---------------------------------------------------------------- texts


def test_texts_are_label_and_description(graph: Path) -> None:
    texts = entity_texts(KnowledgeGraph.load(graph))
    assert texts[0] == "e0" and texts[1].startswith("e1: ") and texts[3] == "Entity 3"
    assert texts[4] == "Entity 4: " + " ".join("abc"[j * 4 % 3] for j in range(29))


def test_a_gloss_line_stays_as_it_is(ring: Path, tmp_path: Path) -> None:
    folder = tmp_path / "glosses"
    folder.mkdir()
    for path in ring.iterdir():
        if path.name != "entity2label.txt":
            (folder / path.name).write_bytes(path.read_bytes())
    lines = [f"stool {i}, a seat, or worse" for i in range(M)]
    (folder / "entity2text.txt").write_text("".join(f"e{i}\t{line}\n" for i, line in enumerate(lines)))
    assert entity_texts(KnowledgeGraph.load(folder)) == lines


# ---------------------------------------------------------------- encoder


def test_rows_equal_a_plain_unbatched_computation(embed: Embed, graph: Path, bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "deeper" / "text.npy"
    flags = ("--dataset", graph, "--model", bert, "--batch", 7, "--device", "cpu")
    outcome = embed(*flags, "--out", out, "--dtype", "float32")
    assert outcome.code == 0 and f"run_rq.py --dataset {graph} --text_emb {out}" in outcome.out
    kg = KnowledgeGraph.load(graph)
    wanted = plain_rows(bert, entity_texts(kg))
    found = np.load(out)
    assert found.dtype == np.float32 and np.abs(found - wanted).max() < 1e-5
    # the test can fail: another row is far away, and so is a mean that counts the padding
    assert (np.abs(found - np.roll(wanted, 1, axis=0)).max(axis=1) > 1e-3).all()
    encoder = ModelEncoder(bert, entity_texts(kg), 256, "cpu")
    pool = embed_text.mean_pool
    embed_text.mean_pool = lambda hidden, mask: pool(hidden, torch.ones_like(mask))
    try:
        padded = encoder.encode([0, 4])
    finally:
        embed_text.mean_pool = pool
    assert np.abs(padded[0] / np.linalg.norm(padded[0]) - wanted[0]).max() > 1e-2
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-6)

    record = read_json(out.with_suffix(".json"), "record")
    assert record["sha256"] == sha256_file(out) and record["shape"] == [M, 16] and record["cut_texts"] == 0
    assert record["inputs"]["model/model.safetensors"] == sha256_file(bert / "model.safetensors")
    assert record["inputs"]["entity2definition.txt"] == kg.input_hashes["entity2definition.txt"]
    assert {path.name for path in out.parent.iterdir()} == {"text.npy", "text.json", "text.entities.txt"}

    half = tmp_path / "half.npy"
    assert embed(*flags, "--out", half).code == 0
    assert np.load(half).dtype == np.float16 and np.abs(np.load(half) - found).max() < 1e-3


def test_long_texts_are_cut_and_counted(bert: Path) -> None:
    texts = ["a b c", "a " * 100]
    encoder = ModelEncoder(bert, texts, 256, "cpu")
    assert encoder.cut_texts == 1 and [len(tokens) for tokens in encoder.tokens] == [5, 38]  # 40 positions, less two
    assert ModelEncoder(bert, texts, 4, "cpu").cut_texts == 2


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int) -> list[int]:
    """Ctrl-C in the ``call``-th batch from here; the sizes of the batches."""
    encode, sizes = ModelEncoder.encode, list[int]()

    def counted(self: ModelEncoder, rows: list[int]) -> Any:
        sizes.append(len(rows))
        if len(sizes) == call:
            raise KeyboardInterrupt
        return encode(self, rows)

    monkeypatch.setattr(ModelEncoder, "encode", counted)
    return sizes


@pytest.mark.parametrize("damaged", [False, True])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    embed: Embed, graph: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    flags = ("--dataset", graph, "--model", bert, "--batch", 8, "--device", "cpu", "--out")
    assert embed(*flags, tmp_path / "whole.npy").code == 0
    sizes = stop_at(monkeypatch, 4)
    out, parts = tmp_path / "again.npy", tmp_path / "again.npy.parts"
    outcome = embed(*flags, out)
    assert outcome.code == 130 and f"24 of {M} rows are kept" in outcome.err and not out.exists()
    if damaged:
        (parts / "1.npy").write_bytes((parts / "1.npy").read_bytes()[:-3])
    assert embed(*flags, out).code == 0
    assert sizes[4:] == [8] * damaged + [8, 8, 3]
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes() and not parts.exists()


def test_runs_are_not_mixed(
    embed: Embed, graph: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, parts = tmp_path / "text.npy", tmp_path / "text.npy.parts"
    flags = ("--dataset", graph, "--model", bert, "--device", "cpu", "--out", out)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert embed(*flags, "--batch", 8).code == 130
    assert_refused(embed(*flags, "--batch", 9), "text.npy.parts", "other batch", "--overwrite")
    assert_refused(embed(*flags, "--batch", 8, "--dtype", "float32"), "other dtype")
    other = tmp_path / "other"
    other.mkdir()
    for path in bert.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    model = BertModel.from_pretrained(str(bert))
    with torch.no_grad():
        model.get_parameter("embeddings.LayerNorm.bias").add_(1)
    model.save_pretrained(other)
    assert_refused(embed(*flags, "--batch", 8, "--model", other), "other model")
    definitions = graph / "entity2definition.txt"
    before = definitions.read_bytes()
    definitions.write_bytes(before + b"e0\tc c\n")
    try:
        assert_refused(embed(*flags, "--batch", 8), "other texts")
    finally:
        definitions.write_bytes(before)
    assert (parts / "0.npy").is_file() and not out.exists()
    assert embed(*flags, "--batch", 8).code == 0 and not parts.exists()
    done = out.read_bytes()
    assert_refused(embed(*flags), "--overwrite")
    assert embed(*flags, "--model", other, "--overwrite").code == 0
    assert out.read_bytes() != done


def test_bad_models_are_one_line(
    embed: Embed, graph: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files.ROOT)  # where tests/none is a missing folder, and no name to ask the hub for
    flags = ("--dataset", graph, "--out", tmp_path / "text.npy", "--device", "cpu", "--model")
    for name in ("./none", tmp_path / "none", "a/b/c", "tests/none", tmp_path, bert / "config.json"):
        assert_refused(embed(*flags, name), "--model", str(name))
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (lacking / file).write_bytes((bert / file).read_bytes())
    assert_refused(embed(*flags, lacking), str(lacking), "safetensors")
    torch.save(BertModel.from_pretrained(str(bert)).state_dict(), lacking / "pytorch_model.bin")
    assert_refused(embed(*flags, lacking), str(lacking), "safetensors")  # a pickle is not read
    (lacking / "pytorch_model.bin").unlink()
    config = read_json(bert / "config.json", "config")
    (lacking / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    (lacking / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    assert_refused(embed(*flags, lacking), "lacks", "encoder.layer.2")  # a random layer would go unseen
    (lacking / "config.json").write_text(json.dumps(config | {"model_type": "no_such_kind"}))
    assert_refused(embed(*flags, lacking), str(lacking), "cannot be read as an encoder")
    assert not list(tmp_path.glob("text*"))


def test_the_hub_is_asked_for_ids_alone(monkeypatch: pytest.MonkeyPatch, bert: Path, tmp_path: Path) -> None:
    import huggingface_hub

    asked = []

    def snapshot(name: str, **how: Any) -> str:
        asked.append(name)
        if name == "some/model":
            return str(bert)
        raise OSError("no route to the hub\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for name in ("./minilm", "out/minilm", "../x", "/x/y", "a b"):
        with pytest.raises(InputError, match="does not exist"):
            model_folder(name)
    assert asked == [] and model_folder(str(bert)) == bert
    assert model_folder("some/model") == bert
    with pytest.raises(InputError, match="no route to the hub") as error:
        model_folder("other/model")
    assert "\n" not in str(error.value) and asked == ["some/model", "other/model"]


def test_flags_that_do_not_fit_are_refused(embed: Embed, graph: Path, bert: Path, tmp_path: Path) -> None:
    flags = ("--dataset", graph, "--out", tmp_path / "text.npy")
    assert_refused(embed(*flags, "--endpoint", "http://127.0.0.1:1/v1"), "--endpoint", "--model")
    assert_refused(embed(*flags, "--model", bert, "--dim", 8), "--dim")
    assert_refused(embed(*flags, "--device", "cpu"), "--device")
    for device in ("nowhere", "meta"):
        assert_refused(embed(*flags, "--model", bert, "--device", device), f"--device {device}")
    assert_refused(embed(*flags, "--batch", 0), "--batch")
    assert_refused(embed("--dataset", graph, "--out", tmp_path / "text.pt"), "--out", ".npy")
    assert_refused(embed("--dataset", tmp_path / "none", "--out", tmp_path / "text.npy"), "none", "does not exist")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- endpoint


def vector_of(text: str) -> list[float]:
    """What the server answers for a text, of length 2."""
    row = np.random.default_rng(list(text.encode())).normal(size=6)
    return list(2 * row / np.linalg.norm(row))


class Server(ThreadingHTTPServer):
    """Embeds with ``vector_of``; ``faults`` holds what goes wrong with the next requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers["Authorization"])
        fault = self.server.faults.pop(0) if self.server.faults else ""
        data: list[dict[str, Any]] = [
            {"index": i, "embedding": vector_of(text)} for i, text in enumerate(body["input"])
        ]
        if fault == "reversed":
            data.reverse()
        elif fault == "one less":
            data.pop()
        elif fault == "twice":
            data[1]["index"] = 0
        elif fault == "ragged":
            data[1]["embedding"].pop()
        elif fault == "narrow":
            data = [{**item, "embedding": item["embedding"][:4]} for item in data]
        elif fault == "words":
            data[0]["embedding"] = "AAAA"
        elif fault == "zeros":
            data[0]["embedding"] = [0.0] * 6
        elif fault == "nan":
            data[0]["embedding"] = [float("nan")] * 6
        answer: Any = {"object": "list", "data": data}
        code = int(fault) if fault.isdigit() else 200
        if code != 200:
            answer = {"error": {"message": f"fault number\n{code}"}}
        content = b"<html>" if fault == "page" else json.dumps(answer).encode()
        self.send_response(code if self.path == "/v1/embeddings" else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "truncated" else content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr(embed_text, "RETRY_SECONDS", 0.001)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def asked(graph: Path, tmp_path: Path, server: Server) -> tuple[object, ...]:
    """The flags of a run against the server; its file is ``text.npy``."""
    return (
        "--dataset", graph, "--out", tmp_path / "text.npy", "--endpoint", server.url, "--model", "tiny", "--batch", 10,
        "--dtype", "float32",
    )  # fmt: skip


def wanted_rows(graph: Path) -> np.ndarray:
    return np.array([vector_of(text) for text in entity_texts(KnowledgeGraph.load(graph))]) / 2


def test_endpoint_rows_whatever_their_order(
    embed: Embed, asked: tuple[object, ...], graph: Path, server: Server, tmp_path: Path
) -> None:
    server.faults = ["reversed", "", "reversed"]
    outcome = embed(*asked, "--dim", 6)
    assert outcome.code == 0
    assert np.abs(np.load(tmp_path / "text.npy") - wanted_rows(graph)).max() < 1e-6
    assert [len(body["input"]) for body in server.bodies] == [10, 10, 10, 10, 3]
    assert all(body["model"] == "tiny" and body["dimensions"] == 6 for body in server.bodies)
    assert set(server.keys) == {f"Bearer {SECRET}"}
    text = (tmp_path / "text.json").read_text()
    assert SECRET not in text + outcome.out + outcome.err and f"{server.url}/embeddings" in text


def test_no_key_none_sent(
    embed: Embed, asked: tuple[object, ...], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert embed(*asked, "--endpoint", f"{server.url}/embeddings").code == 0  # the whole URL is accepted too
    assert set(server.keys) == {None} and "dimensions" not in server.bodies[0]


def test_faults_that_pass_are_waited_for(
    embed: Embed, asked: tuple[object, ...], graph: Path, server: Server, tmp_path: Path, monkeypatch: Any
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(embed_text, "sleep", waits.append)
    server.faults = ["500", "429", "truncated", "503", ""]
    assert embed(*asked).code == 0 and len(server.bodies) == 5 + 4
    assert waits == [0.001, 0.002, 0.004, 0.008]  # doubled each time
    assert np.abs(np.load(tmp_path / "text.npy") - wanted_rows(graph)).max() < 1e-6


@pytest.mark.parametrize(
    ("faults", "words", "requests"),
    [
        (["503"] * 9, "HTTP 503", embed_text.TRIES),
        (["429"] * 9, "HTTP 429", embed_text.TRIES),
        (["401"], "OPENAI_API_KEY", 1),
        (["404"], "check --endpoint and --model", 1),
        (["307"], "HTTP 307", 1),
        (["one less"], "sent 9 embeddings", 1),
        (["twice"], "expected 0..9 once each", 1),
        (["ragged"], "equally long", 1),
        (["narrow"], "embeddings of 4 numbers came after others of 6", 1),
        (["words"], "equally long", 1),
        (["page"], "is it an OpenAI-compatible", 1),
        (["zeros"], "has length 0.0", 1),
        (["nan"], "has length nan", 1),
    ],
)
def test_other_faults_are_one_line_and_the_rest_is_asked_later(
    embed: Embed, asked: tuple[object, ...], graph: Path, server: Server, tmp_path: Path, monkeypatch: Any,
    faults: list[str], words: str, requests: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(embed_text, "sleep", lambda seconds: None)
    server.faults = ["", "", *faults]
    outcome = embed(*asked)
    assert_refused(outcome, words, f"20 of {M} rows are kept", "the same command continues")
    assert len(server.bodies) == 2 + requests and SECRET not in outcome.err and not (tmp_path / "text.npy").exists()
    server.faults, server.bodies = [], []
    assert embed(*asked).code == 0
    assert [len(body["input"]) for body in server.bodies] == [10, 10, 3]  # what was paid for is not asked again
    assert np.abs(np.load(tmp_path / "text.npy") - wanted_rows(graph)).max() < 1e-6


def test_no_server(embed: Embed, asked: tuple[object, ...]) -> None:
    assert_refused(embed(*asked, "--endpoint", "http://127.0.0.1:1/v1"), "no full answer", "0 of")
    for url in ("127.0.0.1/v1", "ftp://127.0.0.1/v1", f"http://me:{SECRET}@127.0.0.1/v1", "http:///v1"):
        outcome = embed(*asked, "--endpoint", url)
        assert_refused(outcome, "--endpoint", "http(s)://HOST/v1")
        assert SECRET not in outcome.err


# ---------------------------------------------------------------- TF-IDF


def test_tfidf_finds_the_twin_of_a_description() -> None:
    """Texts in pairs that share their words in another order, among pairs that share fewer: the twin is nearest."""
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(200)]
    texts = [" ".join(rng.choice(words, 12)) for _ in range(60)]
    rows = embed_tfidf(texts + [" ".join(reversed(text.split())) for text in texts], dim=40, seed=0)
    assert rows.shape == (120, 40) and np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-5)
    likeness = rows @ rows.T - 2 * np.eye(120)
    assert (likeness.argmax(axis=1) == (np.arange(120) + 60) % 120).all()


def test_tfidf_puts_like_people_together(embed: Embed, tmp_path: Path) -> None:
    """On the bundled graph the nearest person has the same work or town far more often than a random one."""
    folder = files.ROOT / "data" / "family"
    out = tmp_path / "text.npy"
    assert embed("--dataset", folder, "--out", out).code == 0
    rows = np.load(out).astype(np.float32)
    kg = KnowledgeGraph.load(folder)
    assert rows.shape == (kg.num_entities, embed_text.TFIDF_DIM)
    work, town = (np.array([text.split()[i] for text in kg.descriptions]) for i in (0, 2))
    nearest = (rows @ rows.T - 2 * np.eye(len(rows))).argmax(axis=1)
    other = np.random.default_rng(0).permutation(len(rows))
    alike, random = (((work == work[i]) | (town == town[i])).mean() for i in (nearest, other))
    assert alike > 0.7 and random < 0.3


def test_tfidf_is_the_same_for_a_seed_and_fits_small_graphs(embed: Embed, graph: Path, tmp_path: Path) -> None:
    for name, more in (("a", ()), ("b", ()), ("c", ("--dim", 3, "--dtype", "float32"))):
        assert embed("--dataset", graph, "--out", tmp_path / f"{name}.npy", *more).code == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    rows = np.load(tmp_path / "a.npy")
    assert rows.dtype == np.float16 and rows.shape == (M, M)  # as many columns as the texts allow
    assert np.load(tmp_path / "c.npy").shape == (M, 3) and np.load(tmp_path / "c.npy").dtype == np.float32
    assert read_json(tmp_path / "a.json", "record")["zero_rows"] == 0


def test_tfidf_without_words() -> None:
    rows = embed_tfidf(["a word", "another word", "__"], dim=2, seed=0)
    assert not rows[2].any() and np.linalg.norm(rows[:2], axis=1) == pytest.approx(1)
    with pytest.raises(InputError, match="no entity's text holds a word"):
        embed_tfidf(["__", "--"], dim=2, seed=0)


# ---------------------------------------------------------------- what reads the file


def test_run_rq_accepts_the_file(embed: Embed, rq: Any, graph: Path, bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "text.npy"
    assert embed("--dataset", graph, "--model", bert, "--out", out, "--device", "cpu").code == 0
    assert rq(*small_flags(graph, tmp_path, epoch=2), "--text_emb", str(out)).code == 0
    (path,) = (tmp_path / "codes").glob("ring_*_rq.json")
    record = read_json(path, "record")
    assert record["inputs"]["text.npy"] == sha256_file(out) and record["history"][-1]["semantic"] > 0
