"""Ways to damage a file, by its kind. Each takes the good bytes and returns bytes that no reader may accept."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

MISSING, FOLDER = b"(missing)", b"(folder)"  # in place of a file's bytes
WITNESS = "code-was-run"  # a pickle that runs makes this file in the working folder
DEEP = 100_000  # brackets
TERA = 1 << 42

Damage = Callable[[bytes], bytes]


class Attack:
    """Unpickled with pickle proper, this writes the witness."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path(WITNESS).write_text, ("a pickle ran",)


def put(path: Path, content: bytes) -> None:
    """Replace a file by other bytes, by nothing, or by a folder."""
    path.unlink()
    if content == FOLDER:
        path.mkdir()
    elif content != MISSING:
        path.write_bytes(content)


def always(content: bytes) -> Damage:
    return lambda _: content


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


ANY: dict[str, Damage] = {
    "missing": always(MISSING),
    "a folder": always(FOLDER),
    "empty": always(b""),
    "random bytes": always(random.Random(0).randbytes(200)),
}
BINARY = ANY | {"cut": half}

# ---------------------------------------------------------------- text


def edit_line(change: Callable[[bytes], bytes]) -> Damage:
    """Change the third line."""

    def make(content: bytes) -> bytes:
        lines = content.splitlines()
        lines[2] = change(lines[2])
        return b"\n".join(lines) + b"\n"

    return make


TEXT = ANY | {
    "NUL": edit_line(lambda line: line + b"\0"),
    "no UTF-8": edit_line(lambda line: b"\xff\xfe" + line),
    "UTF-16": lambda content: content.decode().encode("utf-16"),
}
TRIPLES = TEXT | {
    "an empty line": edit_line(lambda line: line + b"\n"),
    "a column too few": edit_line(lambda line: line.rpartition(b"\t")[0]),
    "a column too many": edit_line(lambda line: line + b"\tmore"),
    "spaces for tabs": edit_line(lambda line: line.replace(b"\t", b" ")),
    "an empty name": edit_line(lambda line: b"\t" + line.partition(b"\t")[2]),
    "an unknown entity": edit_line(lambda line: b"nobody\t" + line.partition(b"\t")[2]),
    "a line of a megabyte": edit_line(lambda line: b"x" * 2**20),
}
OPTIONAL_TEXT = {name: damage for name, damage in TEXT.items() if name not in ("missing", "random bytes")}


def with_id(value: bytes) -> Damage:
    """Another id in the first column."""
    return edit_line(lambda line: value + b"\t" + line.partition(b"\t")[2])


def with_flag(text: str) -> Damage:
    """One more line of flags."""
    return lambda content: content + f"{text}\n".encode()


DICT = OPTIONAL_TEXT | {
    f"id {value[:20].decode()!r}": with_id(value) for value in (b"-1", b"1.0", b"", b"x", b"9" * 5000, b"0x1", b"0")
}
ENTITIES = TEXT | {
    "two rows exchanged": lambda content: content.replace(b"e0\ne1\n", b"e1\ne0\n"),
    "a space behind a name": edit_line(lambda line: line + b" "),
}
ENTITIES = {name: damage for name, damage in ENTITIES.items() if name != "missing"}
FLAGS = TEXT | {
    f"holds {text[:24]}": with_flag(text)
    for text in (
        "--no_such_flag 1", "--lr fast", "--lr nan", "--lr", "words alone", "--batch -3", "--num_code 4398046511104",
        "--seed " + "9" * 5000, "--name 'a quote", "--name ../../escape", "--device toaster",
    )
}  # fmt: skip
FLAGS = {name: damage for name, damage in FLAGS.items() if name not in ("empty", "NUL")}

# ---------------------------------------------------------------- JSON

TEXTS = ("null", "3", '"text"', "[1, 2]", "9" * 5000, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP, "NaN", '"\\ud800"')
JSON = (
    BINARY
    | {"no UTF-8": lambda content: b'{"\xff": 1}'}
    | {f"holds {text[:8]}": always(text.encode()) for text in TEXTS}
)


def edit_rows(change: Callable[[list[dict[str, Any]]], Any]) -> Damage:
    """Change the list of rows of a JSON file."""

    def make(content: bytes) -> bytes:
        rows = json.loads(content)
        change(rows)
        return json.dumps(rows).encode()

    return make


ROWS = JSON | {
    "no rows": always(b"[]\n"),
    "a row without its instruction": edit_rows(lambda rows: rows[1].pop("instruction")),
    "a row without its output": edit_rows(lambda rows: rows[1].pop("output")),
    "an output of null": edit_rows(lambda rows: rows[1].update(output=None)),
    "an output of a list": edit_rows(lambda rows: rows[1].update(output=[1])),
    "a row of null": edit_rows(lambda rows: rows.insert(1, None)),  # type: ignore[arg-type]
}


def edit_answer(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the second line of a file with one JSON object per line."""

    def make(content: bytes) -> bytes:
        lines = content.splitlines()
        answer = json.loads(lines[1])
        change(answer)
        lines[1] = json.dumps(answer).encode()
        return b"\n".join(lines) + b"\n"

    return make


ANSWERS = ANY | {
    "no UTF-8": lambda content: b"\xff" + content,
    "a line of null": lambda content: content + b"null\n",
    "a line of brackets": lambda content: content + b"[" * DEEP + b"\n",
    "an answer twice": lambda content: content + content.splitlines()[0] + b"\n",
    "an answer without its id": edit_answer(lambda answer: answer.pop("id")),
    "an answer without its scores": edit_answer(lambda answer: answer.pop("scores")),
    "scores of text": edit_answer(lambda answer: answer.update(scores="high")),
    "an id of a list": edit_answer(lambda answer: answer.update(id=[1])),
}

# ---------------------------------------------------------------- .pt


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def edit_tensor(change: Callable[[torch.Tensor], Any]) -> Damage:
    return lambda content: saved(change(torch.load(io.BytesIO(content), weights_only=True)))


def zip_parts(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def packed(content: bytes) -> bytes:
    """The parts compressed, which torch.save never does: gigabytes of zeros would take megabytes."""
    return zipped(zip_parts(content), zipfile.ZIP_DEFLATED)


PT = BINARY | {
    f"holds {value!r}"[:24]: always(saved(value))
    for value in (None, 3, "text", [], {}, {"codes": 1}, torch.zeros(0), [torch.zeros(2)])
}
PT |= {"compressed": packed, "an empty archive": lambda _: zipped({}), "a plain pickle": always(pickle.dumps([1, 2]))}
PT_CODES = PT | {
    "float32": edit_tensor(lambda codes: codes.float()),
    "int32": edit_tensor(lambda codes: codes.int()),
    "a row missing": edit_tensor(lambda codes: codes[1:].clone()),
    "a row more": edit_tensor(lambda codes: torch.cat([codes, codes[:1]])),
    "a level missing": edit_tensor(lambda codes: codes[..., 1:].clone()),
    "transposed": edit_tensor(lambda codes: codes.permute(2, 1, 0).contiguous()),
    "four dimensions": edit_tensor(lambda codes: codes[None]),
    "an index of K": edit_tensor(lambda codes: codes.where(codes != codes[0, 0, 0], torch.tensor(8))),
    "an index of -1": edit_tensor(lambda codes: codes.where(codes != codes[0, 0, 0], torch.tensor(-1))),
    "terabytes": edit_tensor(lambda codes: torch.zeros(1, dtype=torch.int64).expand(43, TERA, 2)),
    "sparse": edit_tensor(lambda codes: codes.to_sparse()),
    "in a dictionary": edit_tensor(lambda codes: {"codes": codes}),
}


def edit_checkpoint(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def make(content: bytes) -> bytes:
        stored = torch.load(io.BytesIO(content), weights_only=True)
        change(stored)
        return saved(stored)

    return make


PT_CHECKPOINT = PT | {
    "no best epoch": edit_checkpoint(lambda stored: stored.pop("best")),
    "no last epoch": edit_checkpoint(lambda stored: stored.pop("last")),
    "a best epoch of 3": edit_checkpoint(lambda stored: stored.update(best=3)),
    "a best epoch of a list": edit_checkpoint(lambda stored: stored.update(best=[1])),
    "a last epoch of tensors": edit_checkpoint(lambda stored: stored.update(last=torch.zeros(2, 3))),
    "no scorer": edit_checkpoint(lambda stored: stored["best"].update(model={})),
    "no relations": edit_checkpoint(lambda stored: stored["best"].pop("relations")),
    "relations of NaN": edit_checkpoint(lambda stored: stored["best"]["relations"].fill_(torch.nan)),
}
PT_SCORER = (
    PT_CHECKPOINT
    | {  # a run is continued without these
        "no best": edit_checkpoint(lambda stored: stored.update(best=None)),
        "narrow relations": edit_checkpoint(
            lambda stored: stored["best"].update(relations=stored["best"]["relations"][:, 1:])
        ),
        "another K": edit_checkpoint(lambda stored: stored["model"].update(num_code=9)),
    }
)

# ---------------------------------------------------------------- .npy and .npz


def npy(array: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **how)
    return buffer.getvalue()


def npy_header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    """A header that declares ``shape`` with sixteen bytes behind it."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(16)


def edit_array(change: Callable[[Any], Any]) -> Damage:
    return lambda content: npy(change(np.load(io.BytesIO(content))))


def npz(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, array)
    return buffer.getvalue()


NPY = BINARY | {
    "an archive": lambda content: npz(np.load(io.BytesIO(content))),
    "a broken archive": always(b"PK\x03\x04" + bytes(50)),
    "integers": edit_array(lambda a: a.astype(np.int32)),
    "text": edit_array(lambda a: a.astype(str)),
    "transposed": edit_array(lambda a: a.T),
    "one dimension": edit_array(lambda a: a.ravel()),
    "a row missing": edit_array(lambda a: a[1:]),
    "NaN": edit_array(lambda a: np.where(a == a[3, 2], np.nan, a).astype(np.float32)),
    "infinity": edit_array(lambda a: np.where(a == a[3, 2], -np.inf, a).astype(np.float32)),
    "declares terabytes": always(npy_header((43, TERA))),
    "declares rows below zero": always(npy_header((-43, 6))),
    "declares an odd type": always(npy_header((43, 6), "|V7")),
    "objects": always(npy(np.array([[Attack()]]), allow_pickle=True)),
}


def in_npz(name: str, change: Callable[[Any], bytes]) -> Damage:
    """One array of the archive becomes the bytes of another .npy."""

    def make(content: bytes) -> bytes:
        parts = zip_parts(content)
        parts[f"{name}.npy"] = change(np.load(io.BytesIO(parts[f"{name}.npy"])))
        return zipped(parts)

    return make


NPZ = BINARY | {
    **{f"{name} is an object": in_npz(name, lambda _: npy(np.array([Attack()]), allow_pickle=True))
       for name in ("query", "scores")},
    **{f"{name} a row short": in_npz(name, lambda a: npy(a[1:])) for name in ("query", "direction", "candidates")},
    "candidates of floats": in_npz("candidates", lambda a: npy(a.astype(np.float64))),
    "query declares terabytes": in_npz("query", lambda _: npy_header((TERA, 2))),
    "an id of M": in_npz("candidates", lambda a: npy(np.where(a == a.max(), 43, a))),
    "an id of -2": in_npz("candidates", lambda a: npy(np.where(a == a.max(), -2, a))),
    "NaN scores": in_npz("scores", lambda a: npy(a * np.nan)),
    "rising scores": in_npz("scores", lambda a: npy(a[:, ::-1])),
    "another direction": in_npz("direction", lambda a: npy(np.where(a == "tail", "up", a))),
    "info no JSON": in_npz("info", lambda _: npy(np.array("{"))),
    "a single array": always(npy(np.zeros(3))),
}  # fmt: skip

# ---------------------------------------------------------------- safetensors


def with_header(size: int, text: bytes) -> bytes:
    return struct.pack("<Q", size) + text


def edit_header(change: Callable[[dict[str, Any], str], Any]) -> Damage:
    """Change the entry of the first tensor."""

    def make(content: bytes) -> bytes:
        (size,) = struct.unpack("<Q", content[:8])
        found = json.loads(content[8 : 8 + size])
        change(found, next(name for name in found if name != "__metadata__"))
        text = json.dumps(found).encode()
        return with_header(len(text), text) + content[8 + size :]

    return make


SAFETENSORS = BINARY | {
    "a header of terabytes": lambda content: with_header(TERA, content[8:]),
    "a header that is no JSON": always(with_header(8, b"{{{{{{{{")),
    "a tensor of terabytes": edit_header(lambda found, name: found[name].update(shape=[TERA, 2])),
    "a tensor missing": edit_header(lambda found, name: found.pop(name)),
    "no tensors": always(with_header(2, b"{}")),
    "a pickle": always(pickle.dumps(Attack())),
}
