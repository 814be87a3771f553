"""Ways to damage a file, by what the file is. Each takes the good bytes and a seeded generator and returns bad ones.

``MUST`` refuse: no reader may take the result. ``SAME``: a reader must take it and read the same. ``MAY``: the result
can be good data again (a text cut at the end of a line), so a reader may take it, but must not crash on it.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch

MUST, MAY, SAME = "must refuse", "may refuse", "must read the same"
MISSING, FOLDER, FORBIDDEN = b"(missing)", b"(folder)", b"(forbidden)"  # in place of a file's bytes
DEEP = 100_000  # brackets
TERA = 1 << 42
NO_PERMISSION = "no permission"
WITNESS = "code-was-run"  # a pickle that runs makes this file in the working folder

Bytes = Callable[[bytes, Random], bytes]


class Damage(NamedTuple):
    name: str
    expect: str
    make: Bytes


class Attack:
    """Unpickled with pickle proper, this writes the witness."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path(WITNESS).write_text, ("a pickle ran",)


def put(path: Path, content: bytes) -> None:
    """Replace the file (or leave it out, make it a folder, take everyone's right to read it)."""
    if content == FORBIDDEN:
        path.chmod(0)
        return
    path.unlink()
    if content == FOLDER:
        path.mkdir()
    elif content != MISSING:
        path.write_bytes(content)


# ---------------------------------------------------------------- any file


def cut(content: bytes, rng: Random) -> bytes:
    """All but the end: what a broken copy leaves. White space at the end does not count as content."""
    return content[: rng.randrange(1, len(content.rstrip()))]


def flip(content: bytes, rng: Random) -> bytes:
    """One bit in another state."""
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def noise(content: bytes, rng: Random) -> bytes:
    return rng.randbytes(200)


def insert(what: bytes) -> Bytes:
    def make(content: bytes, rng: Random) -> bytes:
        at = rng.randrange(len(content))
        return content[:at] + what + content[at:]

    return make


def constant(content: bytes) -> Bytes:
    return lambda _, __: content


def anything(cut_is: str = MUST, flip_is: str = MAY, missing_is: str = MUST) -> list[Damage]:
    """Damages of any file, with what is expected of the three that depend on its form."""
    return [
        Damage("empty", MUST, constant(b"")),
        Damage("missing", missing_is, constant(MISSING)),
        Damage("a folder", MUST, constant(FOLDER)),
        Damage(NO_PERMISSION, MUST, constant(FORBIDDEN)),
        Damage("noise", MUST, noise),
        *(Damage(f"cut {i}", cut_is, cut) for i in range(3)),
        *(Damage(f"bit {i}", flip_is, flip) for i in range(2)),
    ]


# ---------------------------------------------------------------- text


def lines_of(content: bytes) -> list[bytes]:
    return content.removesuffix(b"\n").split(b"\n")


def line(change: Callable[[bytes, Random], list[bytes]]) -> Bytes:
    """Change one line into others."""

    def make(content: bytes, rng: Random) -> bytes:
        lines = lines_of(content)
        at = rng.randrange(len(lines))
        lines[at : at + 1] = change(lines[at], rng)
        return b"\n".join(lines) + b"\n"

    return make


def to_crlf(content: bytes, _: Random) -> bytes:
    return content.replace(b"\n", b"\r\n")


def with_bom(content: bytes, _: Random) -> bytes:
    return b"\xef\xbb\xbf" + content


TEXT = [
    Damage("NUL", MUST, insert(b"\0")),
    Damage("no UTF-8", MUST, insert(b"\xff\xfe")),
    Damage("CRLF", SAME, to_crlf),
    Damage("BOM", SAME, with_bom),
    Damage("UTF-16", MUST, lambda content, _: content.decode().encode("utf-16")),
]
TRIPLES = [
    *anything(cut_is=MAY),
    *TEXT,
    Damage("an empty line", MUST, line(lambda old, _: [old, b""])),
    Damage("a column too few", MUST, line(lambda old, _: [old.rpartition(b"\t")[0]])),
    Damage("a column too many", MUST, line(lambda old, _: [old + b"\tmore"])),
    Damage("spaces for tabs", MUST, line(lambda old, _: [old.replace(b"\t", b" ")])),
    Damage("an empty name", MUST, line(lambda old, _: [b"\t" + old.partition(b"\t")[2]])),
    Damage("an unknown entity", MUST, line(lambda old, _: [b"nobody\t" + old.partition(b"\t")[2]])),
    Damage(
        "an unknown relation", MUST, line(lambda old, _: [old.split(b"\t")[0] + b"\tnothing\t" + old.split(b"\t")[2]])
    ),
    Damage("one line of a megabyte", MUST, line(lambda old, _: [old, b"x" * 2**20])),
]


def brief(value: bytes) -> str:
    return value.decode() if len(value) < 20 else f"{len(value)} digits"


def number(value: bytes) -> Bytes:
    """Another number at the place of an id: the first column."""
    return line(lambda old, _: [value + b"\t" + old.partition(b"\t")[2]])


DICT = [
    *anything(cut_is=MAY, missing_is=MAY),
    *TEXT,
    *(
        Damage(f"id {brief(value)}", MUST, number(value))
        for value in (b"-1", b"1.0", b"", b"x", b"9" * 5000, "\u0661".encode(), b"1e3", b"999999999999", b"0x1")
    ),
    Damage(
        "a name twice", MUST, lambda content, _: content + content.splitlines()[0].replace(b"0\t", b"43\t", 1) + b"\n"
    ),
    Damage("an id twice", MUST, line(lambda old, _: [old, old.partition(b"\t")[0] + b"\tanother"])),
    Damage("no name", MUST, line(lambda old, _: [old.partition(b"\t")[0]])),
]


EXACT = anything(flip_is=MUST)  # known by its hash
NEGATIVES = [damage._replace(expect=MAY) if damage.name == "missing" else damage for damage in TRIPLES]
PAGE = [
    *anything(cut_is=MAY),
    *(damage._replace(expect=MAY) if damage.name == "NUL" else damage for damage in TEXT),
    Damage("no end marks", MUST, lambda content, _: content.replace(b"<!-- end -->", b"")),
    Damage("marks misspelt", MUST, lambda content, _: content.replace(b"<!--", b"<!-")),
]


def further(text: str) -> Bytes:
    """More flags behind those of a file."""
    return lambda content, _: content + f"{text}\n".encode()


FLAGS = [
    *anything(cut_is=MAY),
    *(damage._replace(expect=MAY) if damage.name == "NUL" else damage for damage in TEXT),
    *(
        Damage(f"holds {text[:24]}", MUST, further(text))
        for text in (
            "--no_such_flag 1",
            "--lr fast",
            "--lr nan",
            "--lr",
            "words alone",
            "--batch -3",
            "--num_code 4398046511104",
            "--gcn_dim 4398046511104",
            "--seed " + "9" * 5000,
            "--decoder " + "x" * 100_000,
            "--name 'a quote",
            "--name ../../escape",
            "--config flags.txt",
            "--text_emb nowhere.npy",
            "--device toaster",
        )
    ),
]


def declared(value: bytes) -> Bytes:
    """Another number of lines in OpenKE's first line."""
    return lambda content, _: value + b"\n" + content.partition(b"\n")[2]


OPENKE = [
    *anything(cut_is=MAY),
    *TEXT,
    *(
        Damage(f"declares {brief(value)}", MUST, declared(value))
        for value in (b"0", b"-5", b"999999999999999", b"x", b"", b"9" * 5000, b"1e3")
    ),
]
OPENKE_SPLIT = [*OPENKE, Damage("an id too large", MUST, lambda c, _: c.replace(lines_of(c)[1], b"99999 1 0", 1))]
OPENKE_NAMES = [
    *OPENKE,
    Damage("an id too large", MUST, lambda c, _: c.replace(b"\t1\n", b"\t99999\n", 1)),
    Damage("an id twice", MUST, lambda c, _: c.replace(b"\t1\n", b"\t0\n", 1)),
]
NAMES = [*anything(cut_is=MAY, missing_is=MAY), *TEXT]  # entity2label: a file of names that may be left out
ENTITIES = [
    *anything(),
    Damage("NUL", MUST, insert(b"\0")),
    Damage("no UTF-8", MUST, insert(b"\xff")),
    Damage("two rows changed about", MUST, lambda c, _: b"\n".join([*lines_of(c)[1::-1], *lines_of(c)[2:], b""])),
]


# ---------------------------------------------------------------- JSON

ODD = [
    "null",
    "-1",
    "1e999",
    "NaN",
    "[]",
    "{}",
    '"x"',
    "true",
    "0",
    "1.5",
    '"\\ud800"',
    "9" * 5000,
    "[" * DEEP + "]" * DEEP,
    "4398046511104",
    '"../../../escape"',
    '"\\u0000"',
]
HOLE = "-- a hole to be filled --"


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested lists and dictionaries, the inside before the outside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in places(item, (*path, key))] + ([path] if path else [])


def at_place(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> None:
    for key in path[:-1]:
        value = value[key]
    change(value, path[-1])


def odd_value(value: Any, rng: Random) -> str:
    """JSON text of ``value`` with an odd value somewhere, the upper places as likely as the many deep ones."""
    found = places(value)
    depth = rng.randint(1, max(map(len, found)))
    place = rng.choice([path for path in found if len(path) <= depth])

    def change(holder: Any, key: Any) -> None:
        holder[key] = HOLE

    at_place(value, place, change)
    return json.dumps(value, ensure_ascii=False).replace(json.dumps(HOLE), rng.choice(ODD))


def odd_json(content: bytes, rng: Random) -> bytes:
    return odd_value(json.loads(content), rng).encode()


def lost_key(content: bytes, rng: Random) -> bytes:
    value = json.loads(content)
    place = rng.choice([path for path in places(value) if isinstance(path[-1], str)])
    at_place(value, place, lambda holder, key: holder.pop(key))
    return json.dumps(value).encode()


WHOLE = [
    *(
        Damage(f"the value {text[:8]} of {len(text)}", MUST, constant(text.encode()))
        for text in (
            "null",
            "3",
            '"text"',
            "[]",
            "{}",
            "[1, 2]",
            "9" * 5000,
            "[" * DEEP + "]" * DEEP,
            '{"a":' * DEEP,
            "NaN",
            '"\\ud800"',
        )
    ),
]
JSON = [
    *anything(),
    *WHOLE,
    Damage("NUL", MAY, insert(b"\0")),
    Damage("no UTF-8", MUST, insert(b"\xff")),
    *(Damage(f"an odd value {i}", MAY, odd_json) for i in range(8)),
    *(Damage(f"a lost key {i}", MAY, lost_key) for i in range(4)),
]


# where a file that is gone would only be made again
THERE = [damage for damage in JSON if damage.name not in ("missing", "a folder")]


def odd_row(content: bytes, rng: Random) -> bytes:
    """An odd value in one line that holds a JSON object."""

    def change(old: bytes, rng: Random) -> list[bytes]:
        text = old.rstrip(b",")
        return [odd_value(json.loads(text), rng).encode() + old[len(text) :]]

    lines = lines_of(content)
    rows = [i for i, text in enumerate(lines) if text.startswith(b"{")]
    at = rng.choice(rows)
    lines[at : at + 1] = change(lines[at], rng)
    return b"\n".join(lines) + b"\n"


def lost_row_key(content: bytes, rng: Random) -> bytes:
    lines = lines_of(content)
    at = rng.choice([i for i, text in enumerate(lines) if text.startswith(b"{")])
    row = json.loads(lines[at].rstrip(b","))
    row.pop(rng.choice(list(row)))
    lines[at] = json.dumps(row).encode() + b"," * lines[at].endswith(b",")
    return b"\n".join(lines) + b"\n"


def repeated_row(content: bytes, rng: Random) -> bytes:
    lines = lines_of(content)
    at = next(i for i, text in enumerate(lines) if text.startswith(b"{"))
    return b"\n".join([*lines[: at + 1], lines[at], *lines[at + 1 :], b""])


ROWS = [
    *anything(),
    *(damage for damage in WHOLE if damage.name != "the value [] of 2"),
    Damage("no UTF-8", MUST, insert(b"\xff")),
    *(Damage(f"an odd value {i}", MAY, odd_row) for i in range(10)),
    *(Damage(f"a lost key {i}", MAY, lost_row_key) for i in range(5)),
    Damage("a row twice", MAY, repeated_row),
    Damage("no rows", MUST, constant(b"[]\n")),
    Damage("CRLF", MAY, to_crlf),
    Damage("BOM", MAY, with_bom),
]
ANSWERS = [
    *anything(cut_is=MAY),
    *(damage._replace(make=constant(damage.make(b"", Random(0)) + b"\n")) for damage in WHOLE),
    Damage("no UTF-8", MUST, insert(b"\xff")),
    *(Damage(f"an odd value {i}", MAY, odd_row) for i in range(14)),
    *(Damage(f"a lost key {i}", MUST, lost_row_key) for i in range(4)),
    Damage("an answer twice", MUST, repeated_row),
]


# ---------------------------------------------------------------- .pt


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def loaded(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


def tensor(change: Callable[[torch.Tensor], Any]) -> Bytes:
    return lambda content, _: saved(change(loaded(content)))


def zip_parts(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def bomb(content: bytes, _: Random) -> bytes:
    """A packed part, where torch.save never packs: gigabytes of zeros would take megabytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in zip_parts(content).items():
            if not name.endswith("data/0"):
                archive.writestr(name, part)
                continue
            archive.writestr(name, bytes(1 << 24))
    return buffer.getvalue()


def declares_tera(content: bytes, _: Random) -> bytes:
    """Every number above 255 in the pickle becomes terabytes: storage sizes and shapes alike."""
    parts = zip_parts(content)
    name = next(name for name in parts if name.endswith("data.pkl"))
    number, text = b"\x8a\x08" + TERA.to_bytes(8, "little"), parts[name]
    for at in reversed(
        [at for at in range(len(text) - 2) if text[at : at + 1] == b"M" and text[at + 3 : at + 4] in b"tq\x85K"]
    ):
        text = text[:at] + number + text[at + 3 :]
    return zipped(parts | {name: text})


def attack(content: bytes, _: Random) -> bytes:
    """A torch file whose pickle calls a function."""
    parts = zip_parts(content)
    name = next(name for name in parts if name.endswith("data.pkl"))
    return zipped(parts | {name: pickle.dumps(Attack(), protocol=2)})


def legacy_attack(content: bytes, _: Random) -> bytes:
    """The same in the form that torch wrote before 1.6."""
    parts: list[Any] = [0x1950A86A20F9469CFC6C, 1001, {}, Attack(), []]
    return b"".join(pickle.dumps(part, protocol=2) for part in parts)


PT = [
    *anything(),
    *(
        Damage(f"holds {value!r}"[:24], MUST, constant(saved(value)))
        for value in (None, 3, "text", [], {}, {"codes": 1}, torch.zeros(0), torch.tensor(3), [torch.zeros(2)])
    ),
    Damage("a plain pickle", MUST, constant(pickle.dumps([1, 2]))),
    Damage("attack", MUST, attack),
    Damage("attack, old form", MUST, legacy_attack),
    Damage("attack, plain pickle", MUST, lambda _, __: pickle.dumps(Attack())),
    Damage("declares terabytes", MUST, declares_tera),
    Damage("decompression bomb", MUST, bomb),
    Damage("a zip of nothing", MUST, lambda _, __: zipped({})),
]
STATE = [damage for damage in PT if damage.name != "a zip of nothing"]  # of a trainer: without our sums
CODES = [
    *PT,
    Damage("float32", MUST, tensor(lambda t: t.float())),
    Damage("int32", MUST, tensor(lambda t: t.int())),
    Damage("bool", MUST, tensor(lambda t: t.bool())),
    Damage("complex", MUST, tensor(lambda t: t.to(torch.complex64))),
    Damage("NaN", MUST, tensor(lambda t: t.float() * float("nan"))),
    Damage("a row missing", MUST, tensor(lambda t: t[1:].clone())),
    Damage("a row more", MUST, tensor(lambda t: torch.cat([t, t[:1]]))),
    Damage("a level missing", MUST, tensor(lambda t: t[..., 1:].clone())),
    Damage("a position more", MUST, tensor(lambda t: torch.cat([t, t[:, :1]], 1))),
    Damage("transposed", MUST, tensor(lambda t: t.permute(2, 1, 0).contiguous())),
    Damage("one dimension", MUST, tensor(lambda t: t.ravel())),
    Damage("four dimensions", MUST, tensor(lambda t: t[None])),
    Damage("no rows", MUST, tensor(lambda t: t[:0].clone())),
    Damage("an index of K", MUST, tensor(lambda t: t.where(t != t[0, 0, 0], torch.tensor(8)))),
    Damage("an index of 2**62", MUST, tensor(lambda t: t.where(t != t[0, 0, 0], torch.tensor(2**62)))),
    Damage("an index of -1", MUST, tensor(lambda t: t.where(t != t[0, 0, 0], torch.tensor(-1)))),
    Damage(
        "one number seen as terabytes", MUST, tensor(lambda t: torch.zeros(1, dtype=torch.int64).expand(43, TERA, 2))
    ),
    Damage("sparse", MUST, tensor(lambda t: t.to_sparse())),
    Damage("a list of rows", MUST, tensor(lambda t: list(t))),
    Damage("within a dictionary", MUST, tensor(lambda t: {"codes": t})),
]


def tensor_places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """As ``places``; every key of every dictionary and list of a checkpoint."""
    return places(value, path)


def odd_checkpoint(content: bytes, rng: Random) -> bytes:
    """One entry of the checkpoint, at any depth, becomes something else."""
    stored = loaded(content)
    found = tensor_places(stored)
    depth = rng.randint(1, max(map(len, found)))
    place = rng.choice([path for path in found if len(path) <= depth])
    what: Any = rng.choice(
        [
            None,
            "x",
            -1,
            10**30,
            float("nan"),
            [],
            {},
            torch.zeros(0),
            torch.zeros(2, 3),
            torch.full((43, 3, 2), 99),
            torch.tensor(float("nan")),
            torch.zeros(5, dtype=torch.uint8),
            "gone",
        ]
    )

    def change(holder: Any, key: Any) -> None:
        if isinstance(what, str) and what == "gone":
            holder.pop(key)
        else:
            holder[key] = what

    at_place(stored, place, change)
    return saved(stored)


def spoilt_weights(part: str) -> Bytes:
    """NaN in a tensor of ``part``'s model."""

    def make(content: bytes, rng: Random) -> bytes:
        stored = loaded(content)
        weights = stored[part]["model"]
        name = rng.choice([name for name, value in weights.items() if value.is_floating_point() and value.numel()])
        weights[name] = torch.full_like(weights[name], float("nan"))
        return saved(stored)

    return make


CHECKPOINT = [
    *PT,
    *(Damage(f"an odd entry {i}", MAY, odd_checkpoint) for i in range(20)),
    *(Damage(f"NaN in the last weights {i}", MAY, spoilt_weights("last")) for i in range(2)),
    *(Damage(f"NaN in the best weights {i}", MAY, spoilt_weights("best")) for i in range(2)),
]


# ---------------------------------------------------------------- .npy and .npz


def npy(array: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **how)
    return buffer.getvalue()


def npy_header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    """A header that declares ``shape`` with sixteen bytes behind it."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(16)


def array(change: Callable[[Any], Any]) -> Bytes:
    return lambda content, _: npy(change(np.load(io.BytesIO(content))))


NPY = [
    *anything(),
    Damage("float64", MAY, array(lambda a: a.astype(np.float64))),
    Damage("big-endian", SAME, array(lambda a: a.astype(">f4"))),
    Damage("integers", MUST, array(lambda a: a.astype(np.int32))),
    Damage("complex", MUST, array(lambda a: a.astype(np.complex64))),
    Damage("text", MUST, array(lambda a: a.astype(str))),
    Damage("transposed", MUST, array(lambda a: a.T)),
    Damage("one dimension", MUST, array(lambda a: a.ravel())),
    Damage("a row missing", MUST, array(lambda a: a[1:])),
    Damage("no columns", MUST, array(lambda a: a[:, :0])),
    Damage("NaN", MUST, array(lambda a: np.where(a == a[3, 2], np.nan, a).astype(np.float32))),
    Damage("infinity", MUST, array(lambda a: np.where(a == a[3, 2], -np.inf, a).astype(np.float32))),
    Damage("beyond float32", MUST, array(lambda a: np.where(a == a[3, 2], 1e300, a.astype(np.float64)))),
    Damage("declares terabytes", MUST, constant(npy_header((43, TERA)))),
    Damage("declares ten gigabytes", MUST, constant(npy_header((43, 10 * 2**30 // 172)))),
    Damage("declares rows below zero", MUST, constant(npy_header((-43, 6)))),
    Damage("declares an odd type", MUST, constant(npy_header((43, 6), "|V7"))),
    Damage("an archive", MUST, lambda _, __: zipped({"a.npy": npy(np.zeros((43, 6), np.float32))})),
    Damage("attack", MUST, lambda _, __: npy(np.array([[Attack()]]), allow_pickle=True)),
    Damage("attack, plain pickle", MUST, lambda _, __: pickle.dumps(Attack())),
]


def part_head(key: str, text: str) -> Bytes:
    """Another value in the first line of the file of finished batches."""

    def make(content: bytes, rng: Random) -> bytes:
        head, _, rest = content.partition(b"\n")
        value = json.loads(head) | {key: HOLE}
        return json.dumps(value).replace(json.dumps(HOLE), text).encode() + b"\n" + rest

    return make


PART = [
    *anything(cut_is=MAY, missing_is=MAY),
    *(
        Damage(f"{key} {text[:8]} of {len(text)}", MUST, part_head(key, text))
        for key in ("width", "plan")
        for text in ("null", "-1", "0", "1e999", "[]", '"x"', "[" * DEEP + "]" * DEEP, "9" * 5000)
    ),
    Damage("width of terabytes", MAY, part_head("width", str(TERA))),
    Damage("another width", MAY, part_head("width", "3")),
]


def in_npz(name: str, change: Callable[[Any], bytes]) -> Bytes:
    """One array of the archive, as the bytes of another .npy."""

    def make(content: bytes, _: Random) -> bytes:
        parts = zip_parts(content)
        parts[f"{name}.npy"] = change(np.load(io.BytesIO(parts[f"{name}.npy"])))
        return zipped(parts)

    return make


def without(name: str) -> Bytes:
    return lambda content, _: zipped({key: part for key, part in zip_parts(content).items() if key != f"{name}.npy"})


def npz_bomb(content: bytes, _: Random) -> bytes:
    """``scores`` of 300 megabytes in as many kilobytes."""
    parts, rows = zip_parts(content), 24
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            if name != "scores.npy":
                archive.writestr(name, part)
                continue
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(npy_header((rows, 300 * 2**20 // 4 // rows))[:-16])
                file.write(bytes(300 << 20))
    return buffer.getvalue()


NPZ = [
    *anything(),
    *(Damage(f"no {name}", MUST, without(name)) for name in ("query", "direction", "candidates")),
    *(
        Damage(f"attack in {name}", MUST, in_npz(name, lambda _: npy(np.array([Attack()]), allow_pickle=True)))
        for name in ("query", "info", "scores")
    ),
    *(
        Damage(f"{name} of floats", MUST, in_npz(name, lambda a: npy(a.astype(np.float64))))
        for name in ("query", "truth", "candidates")
    ),
    *(
        Damage(f"{name} a row short", MUST, in_npz(name, lambda a: npy(a[1:])))
        for name in ("query", "direction", "truth", "candidates", "scores", "rank")
    ),
    *(
        Damage(f"{name} declares terabytes", MUST, in_npz(name, lambda _: npy_header((TERA, 2))))
        for name in ("query", "scores")
    ),
    Damage("an id of M", MUST, in_npz("candidates", lambda a: npy(np.where(a == a.max(), 43, a)))),
    Damage("an id of -2", MUST, in_npz("candidates", lambda a: npy(np.where(a == a.max(), -2, a)))),
    Damage(
        "an id of 2**63",
        MUST,
        in_npz("candidates", lambda a: npy(np.where(a == a.max(), np.uint64(2**63), a.astype(np.uint64)))),
    ),
    Damage("a candidate twice", MUST, in_npz("candidates", lambda a: npy(a[:, [0, 0, 2, 3, 4, 5]]))),
    Damage("NaN scores", MUST, in_npz("scores", lambda a: npy(a * np.nan))),
    Damage("infinite ranks", MUST, in_npz("rank", lambda a: npy(a * np.inf))),
    Damage("ranks below one", MUST, in_npz("rank", lambda a: npy(a * 0))),
    Damage("rising scores", MUST, in_npz("scores", lambda a: npy(a[:, ::-1]))),
    Damage("another direction", MUST, in_npz("direction", lambda a: npy(np.where(a == "tail", "up", a)))),
    Damage("info no JSON", MUST, in_npz("info", lambda _: npy(np.array("{")))),
    Damage("info deep", MUST, in_npz("info", lambda _: npy(np.array("[" * DEEP + "]" * DEEP)))),
    Damage("info of 5,000 digits", MUST, in_npz("info", lambda _: npy(np.array("9" * 5000)))),
    Damage("info a list", MUST, in_npz("info", lambda _: npy(np.array("[]")))),
    Damage("decompression bomb", MUST, npz_bomb),
    Damage("a single array", MUST, lambda _, __: npy(np.zeros(3))),
]


# ---------------------------------------------------------------- safetensors


def header_of(size: int, text: bytes) -> bytes:
    return struct.pack("<Q", size) + text


def header(change: Callable[[dict[str, Any], Random], None]) -> Bytes:
    def make(content: bytes, rng: Random) -> bytes:
        (size,) = struct.unpack("<Q", content[:8])
        found = json.loads(content[8 : 8 + size])
        change(found, rng)
        text = json.dumps(found).encode()
        return header_of(len(text), text) + content[8 + size :]

    return make


def widen(found: dict[str, Any], rng: Random) -> None:
    name = rng.choice([name for name in found if name != "__metadata__"])
    found[name]["shape"] = [TERA, *found[name]["shape"][1:]]


def lose(found: dict[str, Any], rng: Random) -> None:
    del found[rng.choice([name for name in found if name != "__metadata__"])]


SAFETENSORS = [
    *anything(),
    Damage("header of terabytes", MUST, lambda content, _: header_of(TERA, content[8:])),
    Damage("header no JSON", MUST, constant(header_of(8, b"{{{{{{{{"))),
    Damage("header deep", MUST, constant(header_of(2 * DEEP, b"[" * DEEP + b"]" * DEEP))),
    Damage("a tensor of terabytes", MUST, header(widen)),
    Damage("a tensor missing", MUST, header(lose)),
    Damage("no tensors", MUST, constant(header_of(2, b"{}"))),
    Damage("a pickle", MUST, lambda _, __: pickle.dumps(Attack())),
]
