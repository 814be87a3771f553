"""Text embeddings: a tiny random BERT against a plain computation, and TF-IDF. All offline."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from common import files
from common.errors import InputError
from common.files import read_json, sha256_file
from data import embed_text
from data.embed_text import ModelEncoder, embed_tfidf, entity_texts, model_folder
from data.knowledge_graph import KnowledgeGraph
from tests.conftest import Command, M, assert_refused, small_flags

WORDS = ["entity", "a", "b", "c", ":", *"0123456789", *(f"##{digit}" for digit in range(10))]


@pytest.fixture
def embed(shell: Command) -> Command:
    """embed_text.py."""
    return partial(shell, embed_text)


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


def test_rows_equal_a_plain_unbatched_computation(embed: Command, graph: Path, bert: Path, tmp_path: Path) -> None:
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


def test_a_finished_file_stays_without_overwrite(embed: Command, graph: Path, bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "text.npy"
    flags = ("--dataset", graph, "--out", out)
    assert embed(*flags).code == 0
    done = out.read_bytes()
    assert_refused(embed(*flags, "--model", bert), "--overwrite")
    assert out.read_bytes() == done
    assert embed(*flags, "--model", bert, "--device", "cpu", "--overwrite").code == 0
    assert out.read_bytes() != done


def test_bad_models_are_one_line(
    embed: Command, graph: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_flags_that_do_not_fit_are_refused(embed: Command, graph: Path, bert: Path, tmp_path: Path) -> None:
    flags = ("--dataset", graph, "--out", tmp_path / "text.npy")
    assert_refused(embed(*flags, "--model", bert, "--dim", 8), "--dim")
    assert_refused(embed(*flags, "--device", "cpu"), "--device")
    for device in ("nowhere", "meta"):
        assert_refused(embed(*flags, "--model", bert, "--device", device), f"--device {device}")
    assert_refused(embed(*flags, "--batch", 0), "--batch")
    assert_refused(embed("--dataset", graph, "--out", tmp_path / "text.pt"), "--out", ".npy")
    assert_refused(embed("--dataset", tmp_path / "none", "--out", tmp_path / "text.npy"), "none", "does not exist")
    assert not list(tmp_path.iterdir())


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


def test_tfidf_puts_like_people_together(embed: Command, tmp_path: Path) -> None:
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


def test_tfidf_is_the_same_for_a_seed_and_fits_small_graphs(embed: Command, graph: Path, tmp_path: Path) -> None:
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


def test_run_rq_accepts_the_file(embed: Command, rq: Any, graph: Path, bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "text.npy"
    assert embed("--dataset", graph, "--model", bert, "--out", out, "--device", "cpu").code == 0
    assert rq(*small_flags(graph, tmp_path, epoch=2), "--text_emb", str(out)).code == 0
    (path,) = (tmp_path / "codes").glob("ring_*_rq.json")
    record = read_json(path, "record")
    assert record["inputs"]["text.npy"] == sha256_file(out) and record["history"][-1]["semantic"] > 0
