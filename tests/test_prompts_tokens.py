"""Rows to literal token ids and labels; code tokens as single ids and their rows; rejected models and tokenizers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from Class import prompts as tasks
from Class.codes import MARKS, entity_text, parse_codes, print_codes
from common.errors import InputError
from common.files import ROOT, save_torch, write_json
from lora_training import code_tokens
from lora_training.base_model import load_config, load_saved_tokenizer, load_tokenizer
from lora_training.code_tokens import CodeShape, add_code_tokens, token_ids
from lora_training.prompts import (
    IGNORED,
    decode_answer,
    encode_answer,
    encode_example,
    encode_examples,
    encode_prompt,
    pad_batch,
    prompt_text,
)

SHAPE = CodeShape(16, 2)
TEXT = """Instruction Response Triple classification judge whether following triple knowledge graph holds itself
quantized codes head tail Head Tail Answer True False has mother Ada Ann Give plausible candidates numbered line"""
WORDS = TEXT.split()
CODES = {"Ada": [[5, 9], [0, 15]], "Ann": [[1, 1], [0, 2]]}
ADA, ANN = (entity_text(name, codes) for name, codes in CODES.items())


def hand_made_tokenizer(**more: Any) -> LlamaTokenizer:
    """A LLaMA tokenizer written out: control tokens, bytes, letters, and each of WORDS built letter by letter."""
    letters = sorted(set("".join(WORDS)))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {piece: len(vocabulary) + i for i, piece in enumerate(["▁", "#", *letters])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for i in range(1, len(word)):
            if (word[:i], word[i]) not in merges:
                merges.append((word[:i], word[i]))
                vocabulary.setdefault(word[: i + 1], len(vocabulary))
    return LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=more.pop("legacy", False), **more)


def save_hand_made(folder: Path, **more: Any) -> Path:
    hand_made_tokenizer(**more).save_pretrained(str(folder))
    write_json({"model_type": "llama"}, folder / "config.json")
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    loaded = load_tokenizer(str(save_hand_made(tmp_path / "base")))
    add_code_tokens(loaded, SHAPE)
    return loaded


def rows() -> dict[str, dict[str, Any]]:
    """One row of each task, as Class/gen_*.py writes it."""
    made = {
        "triple_classification": (tasks.classification("Ada", "has mother", "Ann", ADA, ANN, True), "True"),
        "link_prediction": (
            tasks.link_prediction(
                {
                    "head": "Ada",
                    "relation": "has mother",
                    "head_codes": print_codes(CODES["Ada"]),
                    "candidate_names": ["Ann", "Ada"],
                    "candidate_codes": [print_codes(CODES[n]) for n in ("Ann", "Ada")],
                }
            ),
            tasks.numbered([print_codes(CODES["Ann"]), print_codes(CODES["Ada"])]),
        ),
        "name_to_codes": (tasks.name_to_codes("Ada"), print_codes(CODES["Ada"], "compact")),
        "predict_tail": (tasks.predict_tail("Ada", "has mother", ADA, True), ANN),
        "hidden_level": (tasks.hidden_level(ADA.replace("Q1_9", "?")), "Q1_9"),
        "question_answering": (tasks.question(ADA, "has mother", 0), "Ann"),
    }
    return {task: {"instruction": i, "input": "", "output": o, "id": task} for task, (i, o) in made.items()}


# the literal ids: prompt (every label IGNORED), then answer (every label its own id)
EXPECTED = {
    "triple_classification": (
        "1 259 260 260 260 259 301 61 13 313 259 326 61 259 330 259 336 259 287 383 259 344 259 349 259 282 273 "
        "259 268 259 357 259 361 259 365 47 259 273 285 282 280 259 287 383 259 349 259 370 259 268 281 271 259 "
        "273 285 282 280 259 287 383 259 378 259 382 259 282 273 259 367 259 385 259 268 281 271 259 367 259 388 "
        "49 13 313 61 259 43 414 259 127 259 407 259 409 383 285 259 127 259 415 44 13 391 61 259 446 414 447 259 "
        "448 455 61 475 127 450 61 481 449 13 394 61 259 446 415 447 259 448 451 61 467 127 450 61 468 449 13 399 "
        "259 290 366 275 259 401 259 282 285 259 405 49 13 13 260 260 260 259 308 61 13",
        "259 401 2",
    ),
    "name_to_codes": (
        "1 259 260 260 260 259 301 61 13 418 259 287 383 259 378 259 285 272 283 285 272 286 272 281 386 287 276 "
        "282 281 259 282 273 259 272 281 287 366 124 259 42 414 42 49 13 13 260 260 260 259 308 61 13",
        "448 455 475 450 481 449 2",
    ),
    "hidden_level": (
        "1 259 260 260 260 259 301 61 13 70 282 271 272 259 288 281 271 272 285 286 386 281 271 276 281 274 61 "
        "259 282 281 272 259 381 259 282 273 259 287 383 259 272 281 287 366 124 259 276 286 259 275 276 271 271 "
        "272 281 259 269 272 275 276 281 271 259 268 259 371 272 286 287 276 282 281 259 280 268 285 278 49 13 72 "
        "281 287 366 124 61 259 446 414 447 259 448 455 61 66 127 450 61 481 449 13 418 259 287 383 259 275 276 "
        "271 271 272 281 259 381 49 13 13 260 260 260 259 308 61 13",
        "475 2",
    ),
}


# ---------------------------------------------------------------- rows


def test_the_tokenizer_of_these_tests(tokenizer: Any) -> None:
    """What the literal ids below mean: bytes from 3, pieces from 259, codes behind the 446 tokens of the base."""
    assert len(tokenizer) == 446 + 4 + 2 * 16
    assert tokenizer.convert_ids_to_tokens([1, 2, 13, 446, 449, 450, 465, 466, 481]) == [
        "<s>", "</s>", "<0x0A>", "<ENT>", "</CODE>", "Q0_0", "Q0_15", "Q1_0", "Q1_15",
    ]  # fmt: skip


@pytest.mark.parametrize("task", EXPECTED)
def test_ids_and_labels_of_each_task(tokenizer: Any, task: str) -> None:
    row = rows()[task]
    prompt, answer = ([int(number) for number in part.split()] for part in EXPECTED[task])
    example = encode_example(row, tokenizer)
    assert example.input_ids == prompt + answer
    assert example.labels == [IGNORED] * len(prompt) + answer
    assert example.prompt_length == len(prompt)
    assert encode_prompt(row, tokenizer) == prompt and encode_answer(row["output"], tokenizer) == answer
    assert answer[-1] == tokenizer.eos_token_id and prompt[0] == tokenizer.bos_token_id
    assert tokenizer.decode(prompt[1:]) == prompt_text(row)
    assert decode_answer([*answer, 13, 13], tokenizer) == row["output"]


def test_the_template() -> None:
    row = {"instruction": "Do it.", "input": "", "output": "x"}
    assert prompt_text(row) == "### Instruction:\nDo it.\n\n### Response:\n"
    assert prompt_text(row | {"input": "this"}) == "### Instruction:\nDo it.\n\n### Input:\nthis\n\n### Response:\n"


def test_the_prompt_does_not_depend_on_the_answer_and_answers_can_be_begun(tokenizer: Any) -> None:
    row = rows()["link_prediction"]
    for output in ("True", " x", "<CODE>", "\n"):
        example = encode_example(row | {"output": output}, tokenizer)
        assert example.input_ids[: example.prompt_length] == encode_prompt(row, tokenizer)
    first = row["output"].split("\n")[0]
    begun = encode_answer(first, tokenizer, end=False)
    assert encode_answer(row["output"], tokenizer)[: len(begun)] == begun


def test_text_is_never_a_control_token(tokenizer: Any) -> None:
    row = {"instruction": "Who is <s>Bob</s>?", "output": "a </s> b <unk>"}
    example = encode_example(row, tokenizer)
    assert example.input_ids.count(tokenizer.eos_token_id) == 1 == example.input_ids.count(tokenizer.bos_token_id)
    assert tokenizer.unk_token_id not in example.input_ids
    assert decode_answer(encode_answer(row["output"], tokenizer), tokenizer) == row["output"]
    # control: without the protection the name's </s> would be the end token
    assert tokenizer.eos_token_id in tokenizer(row["instruction"], add_special_tokens=False)["input_ids"]


def test_many_at_once_are_the_same_as_one_by_one(tokenizer: Any) -> None:
    many = list(rows().values()) * 200
    assert list(encode_examples(many, tokenizer)) == [encode_example(row, tokenizer) for row in many]


def test_nothing_is_truncated(tokenizer: Any) -> None:
    row = rows()["predict_tail"]
    assert len(encode_example(row, tokenizer, 128).input_ids) == 128
    with pytest.raises(
        InputError, match=r"row predict_tail has 128 tokens \(14 in the answer\).*--max_length 128"
    ) as e:
        encode_example(row, tokenizer, 127)
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="its answer alone has 14"):
        encode_example(row, tokenizer, 13)
    with pytest.raises(InputError, match="row q has an empty output"):
        encode_example({"instruction": "a", "output": "", "id": "q"}, tokenizer)


def test_padding() -> None:
    from lora_training.prompts import Example

    ids, mask, labels = pad_batch([Example([1, 5, 6], [-100, -100, 6]), Example([1, 7], [-100, 7])], 0)
    assert ids == [[1, 5, 6], [1, 7, 0]]
    assert mask == [[1, 1, 1], [1, 1, 0]]
    assert labels == [[-100, -100, 6], [-100, 7, -100]]


# ---------------------------------------------------------------- code tokens


@pytest.mark.parametrize("shape", [CodeShape(16, 2), CodeShape(1024, 4), CodeShape(8, 1)])
def test_every_code_is_one_id_before_and_after_reloading(tmp_path: Path, shape: CodeShape) -> None:
    tokenizer = load_tokenizer(str(save_hand_made(tmp_path / "base")))
    base = len(tokenizer)
    ids = add_code_tokens(tokenizer, shape)
    assert ids == list(range(base, base + 4 + shape.num_code * shape.num_quantizers))
    code_tokens.save_tokenizer(tokenizer, tmp_path / "saved", shape)
    text = print_codes([[shape.num_code - 1] * shape.num_quantizers, [1] * shape.num_quantizers])
    for one in (tokenizer, load_tokenizer_of(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert token_ids(one, shape) == ids
        for token, number in zip(shape.tokens, ids, strict=True):
            assert one.convert_tokens_to_ids(token) == number
        assert [one(t, add_special_tokens=False)["input_ids"] for t in shape.tokens[::37]] == [[i] for i in ids[::37]]
        back = decode_answer(encode_answer(text, one), one)
        assert back == text and (parse_codes(back) == parse_codes(text)).all()
    assert add_code_tokens(tokenizer, shape) == ids, "adding again changes nothing"
    assert add_code_tokens(tokenizer, None) == [], "no codes, no tokens"


def load_tokenizer_of(folder: Path) -> Any:
    return load_saved_tokenizer(folder)


def test_a_saved_tokenizer_with_other_ids_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(str(save_hand_made(tmp_path / "base")))
    add_code_tokens(tokenizer, SHAPE)
    other = hand_made_tokenizer()
    other.add_tokens(["zebra"])
    add_code_tokens(other, SHAPE)
    monkeypatch.setattr(code_tokens, "load_saved_tokenizer", lambda folder: other)
    with pytest.raises(RuntimeError, match="other ids"):
        code_tokens.save_tokenizer(tokenizer, tmp_path / "saved", SHAPE)


def test_tokenizers_that_cannot_hold_the_codes(tmp_path: Path) -> None:
    plain = load_tokenizer(str(save_hand_made(tmp_path / "base")))
    with pytest.raises(InputError, match=r"lacks 36 of 36 code tokens, such as <ENT>.*another vocabulary"):
        token_ids(plain, SHAPE)
    add_code_tokens(plain, CodeShape(32, 2))
    with pytest.raises(InputError, match=r"32 tokens of other codes, such as Q0_16"):
        add_code_tokens(plain, SHAPE)
    spaced = hand_made_tokenizer(legacy=True)  # the old behaviour: a space behind every added token
    with pytest.raises(InputError, match="legacy=False"):
        add_code_tokens(spaced, SHAPE)
    special = hand_made_tokenizer()
    special.add_special_tokens({"additional_special_tokens": SHAPE.tokens})  # deleted by skip_special_tokens
    with pytest.raises(InputError):
        token_ids(special, SHAPE)


def test_codes_of_another_run_are_refused() -> None:
    ours = {"file": "a.pt", "sha256": "1" * 64, "num_code": 16, "num_quantizers": 2, "shuffled": False}
    code_tokens.refuse_other_codes(ours, dict(ours), "adapter", "data")
    for theirs in ({**ours, "sha256": "2" * 64}, {**ours, "shuffled": True}, {"file": None}):
        with pytest.raises(InputError, match=r"adapter was made with a\.pt \(sha256 1{12}\), data with"):
            code_tokens.refuse_other_codes(ours, theirs, "adapter", "data")


# ---------------------------------------------------------------- models


def small_model(vocabulary: int = 446, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def two_matrices(model: Any) -> list[torch.Tensor]:
    """Embedding [V, D] and head [V, D]."""
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


def test_growing_keeps_the_old_rows_and_the_callers_generator(tokenizer: Any) -> None:
    grown = []
    for seed in (3, 3, 4):
        model = small_model()
        before = [part.clone() for part in two_matrices(model)]
        torch.manual_seed(7)
        code_tokens.resize_model(model, tokenizer, seed)
        drawn = torch.rand(1)
        torch.manual_seed(7)
        assert torch.equal(drawn, torch.rand(1)), "the caller's generator moved"
        after = two_matrices(model)
        for old, new in zip(before, after, strict=True):
            assert new.shape == (482, 32) and torch.equal(new[:446], old)
        grown.append(torch.cat([weight[446:] for weight in after]))
    assert torch.equal(grown[0], grown[1]) and not torch.equal(grown[0], grown[2])
    code_tokens.resize_model(model, tokenizer, 5)
    assert torch.equal(grown[2], torch.cat([weight[446:] for weight in after])), "nothing to grow, nothing changes"


def shifted_model(tied: bool) -> LlamaForCausalLM:
    """Rows with a strong common direction, as in pretrained models; another one in embedding and head."""
    model = small_model(tied=tied)
    with torch.no_grad():
        for i, matrix in enumerate(two_matrices(model)[: 1 if tied else 2]):
            matrix += torch.linspace(-1, 1 + i, 32)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare", [0, 20])
def test_new_rows_start_near_the_mean_of_the_old_ones(tokenizer: Any, tied: bool, spare: int) -> None:
    """At a tenth of the old rows' distance from it. ``spare`` rows of the base without a token are no old rows."""
    model, old = shifted_model(tied), 446 - spare
    for matrix in two_matrices(model):
        matrix.data[old:] = 9.0
    before = [matrix.clone() for matrix in two_matrices(model)]
    code_tokens.resize_model(model, tokenizer, 3, old)
    assert torch.equal(*two_matrices(model)) == tied
    for start, matrix in zip(before, two_matrices(model), strict=True):
        assert torch.equal(matrix[:old], start[:old])
        mean = start[:old].mean(0)
        distance = [(part - mean).square().sum(1).mean().sqrt() for part in (start[:old], matrix[old:])]
        assert float((distance[1] / distance[0]).detach()) == pytest.approx(0.1, rel=0.15)
        assert len(matrix[old:].unique(dim=0)) == 36 + spare, "no two codes have the same row"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("code_dim", [8, 50])
def test_code_rows_start_from_the_codebooks(tokenizer: Any, tied: bool, code_dim: int) -> None:
    """Inner products of the offsets from the mean are those of stage 1 but for a factor; all other rows stay."""
    Q, K = SHAPE.num_quantizers, SHAPE.num_code
    scales = torch.tensor([3.0, 1.0])[:, None, None]
    codebooks = torch.randn(Q, K, code_dim, generator=torch.Generator().manual_seed(1)) * scales
    made = []
    for seed in (3, 3, 4):
        model = shifted_model(tied)
        before = [matrix.clone() for matrix in two_matrices(model)]
        code_tokens.resize_model(model, tokenizer, seed, codebooks=codebooks)
        ids = token_ids(tokenizer, SHAPE)[len(MARKS) :]
        for old, new in zip(before, two_matrices(model), strict=True):
            assert torch.equal(old, new[:446])
            mean = old.mean(0)
            offsets = (new[ids] - mean).detach()
            spread = float((old - mean).square().sum(1).mean().sqrt())
            assert offsets.norm(dim=1).mean() == pytest.approx(0.3 * spread, rel=1e-4)
            if code_dim <= 32:  # the model's width: nothing is lost
                flat = codebooks.reshape(Q * K, code_dim)
                factor = offsets.norm() / flat.norm()
                assert torch.allclose(offsets @ offsets.T, flat @ flat.T * factor**2, atol=1e-5)
        made.append(two_matrices(model)[0][ids].detach())
    assert torch.equal(made[0], made[1]) and not torch.allclose(made[0], made[2])


def test_codebooks_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    Q, K = SHAPE.num_quantizers, SHAPE.num_code
    codebooks = torch.randn(Q, K, 5)
    weights = {f"scorer.rq_codebook.codebooks.{q}.weight": codebooks[q] for q in range(Q)}
    save_torch({"best": {"model": weights}}, tmp_path / "ck.pt")
    assert torch.equal(code_tokens.read_codebooks(tmp_path / "ck.pt", SHAPE), codebooks)
    broken = {name: w * torch.nan for name, w in weights.items()}
    for stored, shape in (
        ({"best": {"model": weights}}, CodeShape(K + 1, Q)),
        ({"best": {"model": weights}}, CodeShape(K, Q - 1)),
        ({"best": {"model": weights}}, CodeShape(K, Q + 1)),
        ({"best": {"model": {}}}, SHAPE),
        ({"best": None}, SHAPE),
        (codebooks, SHAPE),
        ({"best": {"model": broken}}, SHAPE),
    ):
        save_torch(stored, tmp_path / "ck.pt")
        with pytest.raises(InputError) as error:
            code_tokens.read_codebooks(tmp_path / "ck.pt", shape)
        assert "\n" not in str(error.value) and "ck.pt" in str(error.value)
    with pytest.raises(InputError):
        code_tokens.read_codebooks(tmp_path / "nowhere.pt", SHAPE)


def test_which_rows_are_trained() -> None:
    assert code_tokens.trainable_rows(small_model(), [5, 6]) == {"embed_tokens": [5, 6], "lm_head": [5, 6]}
    assert code_tokens.trainable_rows(small_model(tied=True), [5, 6]) == {"embed_tokens": [5, 6]}


def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for name, problem in {
        "./nowhere": "does not exist", "out/merged": "does not exist", "/a/b/c": "does not exist",
        "a b": "does not exist",
        str(tmp_path / "out"): "has no config.json", str(tmp_path / "file"): "is a file",
        "meta-llama/Llama-2-7b-hf": "is gated: accept its licence.*HF_TOKEN",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=problem) as error:
            load_config(name)
        assert "\n" not in str(error.value)


GATED = """
import sys, time
sys.path.insert(0, {root!r})
from lora_training.base_model import load_config
from common.errors import run_command
run_command(lambda: load_config({name!r}))
"""


@pytest.mark.parametrize(
    ("header", "status", "said"),
    [
        ("GatedRepo", 401, "is gated: accept its licence"),
        ("RepoNotFound", 404, "neither a folder nor a model of the hub"),
    ],
)
def test_what_the_hub_answers(tmp_path: Path, header: str, status: int, said: str) -> None:
    """A hub on the loopback that refuses: one line, exit code 2."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", header)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        environment = {
            **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path),
            "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", GATED.format(root=str(ROOT), name="someone/secret")], env=environment,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    finally:
        server.shutdown()
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and said in done.stderr
