"""Ways to damage a file, by its kind. Each takes the good bytes and returns bytes that no reader may accept.

Faults of content, such as a column too few, are in the tests of each reader.
"""

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
TRIPLES = TEXT | {"a line of a megabyte": edit_line(lambda line: b"x" * 2**20)}
OPTIONAL_TEXT = {name: damage for name, damage in TEXT.items() if name not in ("missing", "random bytes")}


def with_flag(text: str) -> Damage:
    """One more line of flags."""
    return lambda content: content + f"{text}\n".encode()


DICT = OPTIONAL_TEXT | {"a long id": edit_line(lambda line: b"9" * 5000 + b"\t" + line.partition(b"\t")[2])}
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


ROWS = JSON | {"no rows": always(b"[]\n")}
ANSWERS = ANY | {
    "no UTF-8": lambda content: b"\xff" + content,
    "a line of null": lambda content: content + b"null\n",
    "a line of brackets": lambda content: content + b"[" * DEEP + b"\n",
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


NPZ = BINARY | {"a single array": always(npy(np.zeros(3)))}

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
