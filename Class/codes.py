"""Codes: their files, their text and the tokens of that text. No other module writes or parses code text.

Files, as stage 1 leaves them:

{dataset}_{L}_{K}_{Q}_rq.pt       int64 [M, L, Q]     (VQ: {dataset}_{L}_{K}.pt, int64 [M, L])
..._rq_emd.pt                     float32 [M, L, code_dim], the vectors that the codes stand for
..._rq.entities.txt               one raw entity name per row, so that codes map to another data set's ids
..._rq.json                       the run record

Text of one entity, in two forms that ``parse_codes`` reads (L = 2 positions, Q = 3 levels):
spec      <ENT>name</ENT> <CODE>Q0_5:Q1_9:Q2_0|Q0_7:Q1_1:Q2_3</CODE>     about 2*L*Q tokens
compact   <ENT>name</ENT> <CODE>Q0_5Q1_9Q2_0Q0_7Q1_1Q2_3</CODE>          L*Q + 2 tokens: level 0 opens a position
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.errors import InputError
from common.files import load_torch, save_torch, sha256_file, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import ArrayLike, NDArray

    from data.knowledge_graph import KnowledgeGraph

ENT, END_ENT, CODE, END_CODE = MARKS = ("<ENT>", "</ENT>", "<CODE>", "</CODE>")
CODE_FORMATS = ("spec", "compact")


class CodeFiles(NamedTuple):
    """The files of one set of codes, all beside each other."""

    codes: Path
    embeddings: Path
    entities: Path
    record: Path


def code_stem(dataset: str, seq_len: int, num_code: int, num_quantizers: int, quantizer: str = "rq") -> str:
    """The name of a codes file without its ending; VQ codes are named without the level count."""
    if quantizer == "vq":
        return f"{dataset}_{seq_len}_{num_code}"
    return f"{dataset}_{seq_len}_{num_code}_{num_quantizers}_rq"


def code_files(folder: str | Path, stem: str) -> CodeFiles:
    """Paths of the four files of ``stem`` in ``folder``."""
    folder = Path(folder)
    return CodeFiles(
        folder / f"{stem}.pt", folder / f"{stem}_emd.pt", folder / f"{stem}.entities.txt", folder / f"{stem}.json"
    )


def save_codes(
    files: CodeFiles, codes: torch.Tensor, entities: Sequence[str], embeddings: torch.Tensor | None
) -> dict[str, str]:
    """Write codes [M, L, Q] (or VQ [M, L]), names and, where given, embeddings [M, L, code_dim].

    Returns file name -> sha256 of what was written, for the record.
    """
    import torch

    if codes.dtype != torch.int64 or len(codes) != len(entities):
        raise ValueError(f"codes must be int64 with one row per entity: {codes.dtype}, {len(codes)}, {len(entities)}")
    save_torch(codes.cpu().contiguous(), files.codes)
    write_text("".join(f"{name}\n" for name in entities), files.entities)
    written = [files.codes, files.entities]
    if embeddings is not None:
        save_torch(embeddings.detach().to("cpu", torch.float32).contiguous(), files.embeddings)
        written.append(files.embeddings)
    return {path.name: sha256_file(path) for path in written}


def load_codes(path: str | Path, num_entities: int | None = None, num_code: int | None = None) -> torch.Tensor:
    """Read and check a codes file; always returns int64 [M, L, Q] (VQ's [M, L] becomes [M, L, 1]).

    Raises InputError with both sides named when the shape, dtype, row count or index range is wrong.
    """
    import torch

    codes = load_torch(path, "codes")
    if not isinstance(codes, torch.Tensor):
        raise InputError(f"codes file {path} holds a {type(codes).__name__}, expected an int64 tensor [M, L, Q]")
    if codes.dtype != torch.int64 or codes.dim() not in (2, 3) or codes.numel() == 0:
        raise InputError(
            f"codes file {path} holds {codes.dtype} {list(codes.shape)}, expected torch.int64 [M, L, Q] (VQ: [M, L])"
        )
    if num_entities is not None and len(codes) != num_entities:
        raise InputError(f"codes file {path} has {len(codes)} rows, but the data set has {num_entities} entities")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or (num_code is not None and high >= num_code):
        limit = "" if num_code is None else f"..{num_code - 1}"
        raise InputError(f"codes file {path} holds indices {low}..{high}, expected 0{limit}")
    return codes if codes.dim() == 3 else codes.unsqueeze(-1)


def load_entities(path: str | Path) -> list[str]:
    """The raw entity names of ``{stem}.entities.txt``, row by row. Raises InputError when it cannot be read."""
    try:  # split at newlines only: a name may hold U+2028 or another line end of splitlines()
        return Path(path).read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"entity names {path} cannot be read: {error}; run run_rq.py again to write them") from error


# ---------------------------------------------------------------- tokens and text

_TOKEN = re.compile(r"Q(0|[1-9][0-9]{0,8})_(0|[1-9][0-9]{0,8})")
# a part of a name that a tokenizer would read as one of our tokens, with the backslashes that prevent it
_LIKE_TOKEN = re.compile(r"(</?(?:ENT|CODE)|Q[0-9]+)(\\*)(?=>|_[0-9])")


def code_tokens(num_code: int, num_quantizers: int) -> list[str]:
    """Every token that the codes add to a tokenizer: the four marks, then Q{level}_{index} by level and index.

    Token ``4 + level * K + index`` of the list is ``Q{level}_{index}``; its length is 4 + Q*K.
    """
    return [*MARKS, *(f"Q{level}_{index}" for level in range(num_quantizers) for index in range(num_code))]


def print_codes(codes: ArrayLike, code_format: str = "spec") -> str:
    """``<CODE>...</CODE>`` of one entity's codes [L, Q] (VQ: [L]). ValueError for another shape or a negative index."""
    return render_codes(np.asarray(codes)[None], code_format)[0]


def render_codes(codes: ArrayLike, code_format: str = "spec") -> list[str]:
    """``<CODE>...</CODE>`` of each row of codes [M, L, Q] (VQ: [M, L]): M strings."""
    if code_format not in CODE_FORMATS:
        raise ValueError(f"code format {code_format!r} does not exist; choose one of {', '.join(CODE_FORMATS)}")
    rows = np.asarray(codes)
    if rows.ndim == 2:
        rows = rows[..., None]
    if rows.ndim != 3 or not rows.size or not np.issubdtype(rows.dtype, np.integer) or rows.min() < 0:
        raise ValueError(f"codes must be indices of 0 or more, [L, Q] or [L] per entity, not {rows.dtype} {rows.shape}")
    return [_joined(row, code_format) for row in rows.tolist()]


def _joined(row: list[list[int]], code_format: str) -> str:
    """``<CODE>...</CODE>`` of one entity's codes, level by level for each position."""
    between_levels, between_positions = (":", "|") if code_format == "spec" else ("", "")
    positions = (between_levels.join(f"Q{q}_{k}" for q, k in enumerate(position)) for position in row)
    return f"{CODE}{between_positions.join(positions)}{END_CODE}"


def parse_codes(text: str) -> NDArray[np.int64]:
    """The codes [L, Q] of a ``<CODE>...</CODE>`` in either format: the exact inverse of ``print_codes``.

    ValueError for any other text.
    """
    rows: list[list[int]] = []
    for token in _TOKEN.finditer(text):
        if int(token[1]) == 0:
            rows.append([])
        if not rows or int(token[1]) != len(rows[-1]):
            raise ValueError(f"expected another level at character {token.start()} of {text[:60]!r}")
        rows[-1].append(int(token[2]))
    if not rows or len({len(row) for row in rows}) > 1 or text not in [_joined(rows, form) for form in CODE_FORMATS]:
        raise ValueError(f"expected <CODE>, codes such as Q0_5 at equal levels, </CODE>, found {text[:60]!r}")
    return np.array(rows, dtype=np.int64)


def escape_name(name: str) -> str:
    """The name with a backslash inside whatever a tokenizer would read as one of our tokens.

    ``</ENT>`` becomes ``</ENT\\>`` and ``Q1_20`` becomes ``Q1\\_20``; where there are backslashes already, one more
    is added, so that no two names become equal. Other names are unchanged.
    """
    return _LIKE_TOKEN.sub(r"\1\2\\", name)


def entity_text(name: str, codes: ArrayLike | None, code_format: str = "spec") -> str:
    """``<ENT>name</ENT> <CODE>...</CODE>``, the name escaped; without codes (None, the ablation) the bare name."""
    if codes is None:
        return escape_name(name)
    return f"{ENT}{escape_name(name)}{END_ENT} {print_codes(codes, code_format)}"


# ---------------------------------------------------------------- names


class Names(NamedTuple):
    """One name per entity, no two equal."""

    names: list[str]
    missing: int  # entities without a label, shown by their id
    shared: int  # entities whose label another one has too
    described: int  # of these, distinguished by the description


def unique_names(kg: KnowledgeGraph) -> Names:
    """A display name per entity: the label; where it is shared, followed by ' (description)', else by ' (id)'.

    Entities that share label and description get ' (id)' instead of the description. An entity without a label is shown
    by its id. Names are never equal.
    """

    def shared(values: Sequence[str]) -> list[int]:
        counts = Counter(values)
        return [i for i, value in enumerate(values) if counts[value] > 1]

    names = list(kg.labels)
    ambiguous = shared(names)
    for i in ambiguous:
        names[i] += f" ({kg.descriptions[i] or kg.entities[i]})"
    again = shared(names)
    for i in again:
        names[i] = f"{kg.labels[i]} ({kg.entities[i]})"
    described = sum(bool(kg.descriptions[i]) for i in set(ambiguous) - set(again))
    while again := shared(names):  # a label may read like another one with its id
        for i in again:
            names[i] += f" ({kg.entities[i]})"
    return Names(names, int((~kg.has_label).sum()), len(ambiguous), described)
